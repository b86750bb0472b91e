r"""Claims about vimpo_verl/rewards: answers that are right are found right in whatever notation, wrong ones are not, however much
they look like them; separators, spaces and percent signs never make another number of a number; it agrees with math-verify on
its own ground; any answer whatever is dealt with in bounded time and memory, from any thread; no answer is run as code; a checker
that dies is replaced, and its answer asked again; verl loads and calls it.

The cases are ours (the longer list is math_answers.py). Agreement with math-verify's own test cases is measured outside of
the repository (docs/recipes.md). Not covered: how fast it is (benchmarks/reward_throughput.py), and systems that are not Linux.
"""

import asyncio
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_answers import ANSWERS, INHERITED

from vimpo_verl.rewards import answers, notation
from vimpo_verl.rewards.checker import MEMORY_LIMIT, TIME_LIMIT
from vimpo_verl.rewards.math import compute_score
from vimpo_verl.rewards.pool import DIED, CheckerPool, Limits, pool_for

pytest.importorskip("math_verify")

SHORT = {"cpu_seconds": 1, "memory_mib": 512}  # limits for hostile answers


def score(gold, response, **limits) -> float:
    return compute_score("test", response, gold, {"index": 0}, **limits)["score"]


RIGHT = [
    # whole numbers and decimals
    ("42", r"\boxed{42}"),
    ("42", r"\boxed{ 042 }"),
    ("-3", r"$\boxed{-3}$"),
    ("1234567", r"\boxed{1,234,567}"),
    ("12000", r"\boxed{12\,000}"),
    ("12000", r"\boxed{12{,}000}"),
    ("0.125", r"\boxed{.125}"),
    ("0.125", r"\boxed{\frac18}"),
    # fractions and roots
    (r"\frac{3}{4}", r"\boxed{\dfrac{3}{4}}"),
    (r"\frac{3}{4}", r"\boxed{\frac{9}{12}}"),
    (r"\frac{3}{4}", r"\boxed{3/4}"),
    (r"-\frac{1}{2}", r"\boxed{\frac{-1}{2}}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    (r"\frac{1}{\sqrt2}", r"\boxed{\frac{\sqrt{2}}{2}}"),
    # expressions and equations
    ("x^2-4", r"\boxed{(x-2)(x+2)}"),
    ("a+b", r"\boxed{b+a}"),
    ("7", r"\boxed{x=7}"),
    ("x=7", r"\boxed{7}"),
    (r"\frac{\pi}{6}", r"\boxed{\pi/6}"),
    # sets, tuples and intervals
    (r"\{1,2,5\}", r"\boxed{\{5, 1, 2\}}"),
    ("1,2,5", r"\boxed{5,2,1}"),
    ("(3,-4)", r"\boxed{(3, -4)}"),
    ("[0,1)", r"\boxed{[0, 1)}"),
    (r"(-\infty,2)", r"\boxed{x<2}"),
    (r"(-\infty,0)\cup(1,\infty)", r"\boxed{(-\infty, 0) \cup (1, \infty)}"),
    (r"3\pm\sqrt2", r"\boxed{3+\sqrt{2},3-\sqrt{2}}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
    # units, money, degrees, percent
    ("12", r"\boxed{12\text{ cm}}"),
    (r"12\text{ cm}^2", r"\boxed{12}"),
    ("70", r"\boxed{70 \text{ mph}}"),
    ("18", r"\boxed{\$18}"),
    ("90", r"\boxed{90^\circ}"),
    (r"25\%", r"\boxed{25\%}"),
    (r"25\%", r"\boxed{25}"),
    (r"25\%", r"\boxed{0.25}"),
    ("0.25", r"\boxed{25\%}"),
    (r"12.5\%", r"\boxed{12.5}"),
    # text
    ("Tuesday", r"\boxed{\text{Tuesday}}"),
    (r"\text{Tuesday}", r"\boxed{tuesday.}"),
    (r"\text{no solution}", r"\boxed{\text{No  solution}}"),
    (r"\text{(B)}", r"\boxed{B}"),
    # where the answer stands
    ("5", r"First \boxed{3}, no: \boxed{4}. So \boxed{5}."),
    ("5", r"\boxed{\boxed{5}}"),
    ("5", r"\fbox{5}"),
    ("3/4", "It is 3/4. Therefore we are done."),
    ("5", r"It is $\boxed 5$."),
    ("5", r"So \boxed{5}. Shall I write it once more? \boxed{"),
    ("5", r"So \boxed{5}." + " And on it goes." * 5000),
    (r"\boxed{5}", r"\boxed{5}"),
    ("$5$", r"\boxed{5}"),
    ("42", "The answer is 42."),
    ("3/4", "So the final answer is 3/4."),
    ("3/4", r"Hence $x=\frac{6}{8}$."),
    ("1234", "The answer is: 1,234"),
    ("42", "Words before.\n" * 5000 + "The answer is 42."),
]

WRONG = [
    ("42", r"\boxed{43}"),
    ("42", r"\boxed{4.2}"),
    ("42", r"\boxed{}"),
    ("42", ""),
    ("42", "No number at all."),
    ("5", r"So \boxed{5}, or rather \boxed{6}."),
    (r"\frac{3}{4}", r"\boxed{\frac{4}{3}}"),
    ("0.125", r"\boxed{0.126}"),
    ("[0,1)", r"\boxed{[0,1]}"),
    ("(0,1)", r"\boxed{[0,1]}"),
    (r"(-\infty,2)", r"\boxed{x>2}"),
    (r"\{1,2,5\}", r"\boxed{\{1,2\}}"),
    ("(3,-4)", r"\boxed{(-4,3)}"),
    ("x^2-4", r"\boxed{(x-2)^2}"),
    (r"25\%", r"\boxed{26\%}"),
    ("Tuesday", r"\boxed{\text{Thursday}}"),
    ("east", r"\boxed{seat}"),  # a product of the same variables
    (r"\text{no solution}", r"\boxed{\text{one solution}}"),
    (r"\text{(B)}", r"\boxed{C}"),
    ("42", "The answer is 41."),
]


@pytest.mark.parametrize(("gold", "response"), RIGHT)
def test_right(gold, response):
    assert score(gold, response) == 1.0


@pytest.mark.parametrize(("gold", "response"), WRONG)
def test_wrong(gold, response):
    assert score(gold, response) == 0.0


@pytest.mark.parametrize("kind", [*ANSWERS, *INHERITED])
def test_answers_of_a_kind(kind):
    cases = {**ANSWERS, **INHERITED}[kind]
    misjudged = [case for case in cases if (score(case[0], rf"\boxed{{{case[1]}}}") == 1.0) != case[2]]
    assert misjudged == []


def test_the_list_has_right_and_wrong_answers_of_every_kind():
    assert sum(map(len, ANSWERS.values())) >= 150
    assert all({right for *_, right in cases} == {True, False} for cases in ANSWERS.values())


# Without a box, too, a percent sign is a factor of 100 only where the answer has none, and spaces join nothing.
UNBOXED = [
    (r"50\%", "The answer is 5000%.", 0.0),
    (r"50\%", r"The answer is $5000\%$.", 0.0),
    (r"50\%", "The answer is 50%.", 1.0),
    (r"50\%", "Of 20% of it, the answer is 50.", 1.0),
    ("3", "The answer is $1 2$.", 0.0),
    ("12", "The answer is 1 2.", 0.0),
    # several answers: docs/recipes.md, "What math-verify decides"
    ("3", "The answers are 3 and 5.", 1.0),
    ("5", "The answers are 3 and 5.", 0.0),
    ("5", "The answer is 3. Or the answer is 5.", 1.0),
    ("3", "The answer is 3. Or the answer is 5.", 0.0),
    ("3,5", "$x=3$ or $x=5$", 1.0),
]


@pytest.mark.parametrize(("gold", "response", "expected"), UNBOXED)
def test_numbers_without_a_box(gold, response, expected):
    assert score(gold, response) == expected


# ---- no number becomes another one ---------------------------------------------------------------------------------

numbers = st.integers(0, 10**9)
near = st.sampled_from([0, 0, 0, 1, -1, 1000, 10**6])  # what the right number is away from the answer


def grouped(number: int, separator: str) -> str:
    return f"{number:,}".replace(",", separator)


@given(numbers, near, st.sampled_from([",", r"\,", r"\ ", "{,}", " ", "~", "\u202f", r",\!"]))
@settings(max_examples=200, deadline=None)
def test_separators_of_thousands_keep_the_number(number, distance, separator):
    assert score(str(number + distance), rf"\boxed{{{grouped(number, separator)}}}") == float(distance == 0)


@given(
    st.text("0123456789", min_size=2, max_size=8), st.data(), st.sampled_from([" ", r"\,", "~", r"\quad ", "\u200b"])
)
@settings(max_examples=200, deadline=None)
def test_spaces_join_no_numbers(digits, data, space):
    cut = data.draw(st.integers(1, len(digits) - 1))
    left, right = digits[:cut], digits[cut:]
    thousands = len(right) == 3 and len(left) <= 3 and left[0] != "0"
    response = rf"\boxed{{{left}{space}{right}}}"
    assert score(str(int(digits)), response) == float(thousands)
    assert score(str(int(left) + int(right)), response) == float(thousands and int(digits) == int(left) + int(right))


@given(
    st.integers(1, 10**5),
    st.sampled_from([1, 1, 100, 10_000, Fraction(1, 100)]),
    st.sampled_from(["\\%", "%", "％", "percent"]),
)
@settings(max_examples=150, deadline=None)
def test_percent_signs_on_both_sides_leave_no_factor(hundredths, factor, sign):
    wanted, found = (f"{float(Fraction(hundredths, 100) * times):.4f}" for times in (1, factor))
    assert score(rf"{wanted}\%", rf"\boxed{{{found} {sign}}}") == float(factor == 1)


@given(st.integers(10, 9999), st.integers(-30, 30), near)
@settings(max_examples=100, deadline=None)
def test_scientific_notation_is_the_exact_number(mantissa, exponent, distance):
    wanted = Fraction(mantissa, 10) * Fraction(10) ** exponent
    found = f"{(mantissa + distance) / 10}e{exponent:+d}"
    assert score(rf"\frac{{{wanted.numerator}}}{{{wanted.denominator}}}", rf"\boxed{{{found}}}") == float(distance == 0)


@given(st.integers(0, 99), st.text("0123456789", max_size=4), st.text("0123456789", min_size=1, max_size=4))
def test_repeating_decimals_are_exact(whole, fixed, cycle):
    """The limit of the decimals, from 60 of them; the formula has no limit in it."""
    match = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", notation.plain(rf"{whole}.{fixed}\overline{{{cycle}}}"))
    decimals = fixed + cycle * 60
    shortened = whole + Fraction(int(decimals), 10 ** len(decimals))
    assert abs(Fraction(int(match.group(1)), int(match.group(2))) - shortened) <= Fraction(1, 10 ** len(decimals))


# Where math-verify decides otherwise: a thin space in a number, a full stop in the box, a word of the same letters.
OTHERWISE = {r"\boxed{12\,000}", r"\boxed{tuesday.}", r"\boxed{seat}"}


@pytest.mark.parametrize(("gold", "response"), [case for case in RIGHT + WRONG if "boxed{" in case[1]])
def test_agrees_with_math_verify_where_that_reads_the_answer(gold, response):
    """math-verify in this thread, with its own extraction; it reads no percentages here, and joins several boxes."""
    from math_verify import parse, verify

    if response.count("boxed") == 1 and "%" not in gold + response:
        # Without their time limits, which use the signal that pytest-timeout uses.
        wanted, found = (parse(text, parsing_timeout=None) for text in (f"\\boxed{{{gold}}}", response))
        expected = verify(wanted, found, allow_set_relation_comp=True, timeout_seconds=None)
        assert (score(gold, response) == 1.0) == (expected != (response in OTHERWISE))


def test_result_has_what_verl_and_a_reader_want():
    result = compute_score("test", r"\boxed{\frac{2}{4}}", "1/2")
    assert result == {"score": 1.0, "acc": 1.0, "reason": "equal", "pred": r"\frac{2}{4}"}
    assert compute_score("test", "", "1/2")["reason"] == "no answer found"


@pytest.mark.parametrize("gold", ["", "  ", None, "$$", "1" * 20_000])
def test_useless_ground_truth_is_an_error_of_the_data(gold):
    with pytest.raises(ValueError, match=r"'math' \(index 7\).*ground truth|ground truth.*'math' \(index 7\)"):
        compute_score("math", r"\boxed{1}", gold, {"index": 7})


# ---- hostile answers -----------------------------------------------------------------------------------------------

HOSTILE = {
    "tower of powers": r"\boxed{9^{9^{9^{9}}}}",
    "large power": r"\boxed{7^{100000000000}}",
    "large factorial": r"\boxed{100000000!}",
    "power without a box": "the answer is 9^(9^(9^9))",
    "long sum": r"\boxed{\sum_{n=1}^{10000000000} n^{1/3}}",
    "hard integral": r"\boxed{\int_0^{10} e^{e^{x^x}} dx}",
    "parentheses": r"\boxed{" + "(" * 450 + "5" + ")" * 450 + "}",
    "roots": r"\boxed{" + r"\sqrt{" * 120 + "5" + "}" * 120 + "}",
    "exponents": r"\boxed{" + "x^{" * 200 + "5" + "}" * 200 + "}",
    "a million digits": "1" * 1_000_000,
    "a million digits in a box": r"\boxed{" + "1" * 1_000_000 + "}",
    "a million dollars": "$" * 1_000_000,
    "open boxes": r"\boxed{" * 150_000,
    "boxes in boxes": r"\boxed{" * 70_000 + "5" + "}" * 70_000,
    "parentheses without a box": "(" * 1_000_000,
    "words": "answer " * 150_000,
    "backslashes": "\\" * 1_000_000,
    "equations": "$1=" * 300_000 + "$",
    "null bytes": "\\boxed{\x00}\x00" * 1000,
    "not Unicode text": "\\boxed{\ud800}",
    "large matrix": r"\boxed{\begin{pmatrix}" + "&".join("1" * 60) * 8 + r"\end{pmatrix}}",
    "polynomial": r"\boxed{(x+y+z+1)^{3000}}",
}


@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_are_wrong_in_bounded_time(response):
    """Bound: the processor time limit, the kernel's grace and the start of a checker, on a busy machine."""
    start = time.monotonic()
    result = compute_score("test", response, "123457", **SHORT)
    assert result["score"] == (1.0 if response.count("5") == 70_000 else 0.0)
    assert time.monotonic() - start < Limits(cpu_seconds=1).wall_seconds + 10
    assert len(result["pred"]) <= answers.MAX_ANSWER


def test_time_limit_is_what_stops_them():
    pool = CheckerPool(Limits(processes=1, cpu_seconds=1))
    assert pool.compare("5", "100000000!", True) == TIME_LIMIT
    assert pool.compare("5", "10", True) == "different", "the next answer gets a fresh checker"
    pool.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_below_the_limit():
    """2^(2^33) has a gibibyte."""
    pool = CheckerPool(Limits(processes=1, cpu_seconds=10, memory_mib=64))
    assert pool.compare("1/2", "0.5", True) == "equal"
    before = peak_mib(pool._free.queue[0])
    assert pool.compare("5", "2^{2^{33}}", True) in ("different", MEMORY_LIMIT, DIED)
    checker = pool._free.queue[0]
    if checker.is_alive():  # sympy and math-verify catch a MemoryError themselves
        assert peak_mib(checker) <= before + 64
    assert pool.compare("5", "5.0", True) == "equal"
    pool.close()


def peak_mib(checker) -> float:
    """Largest address space that the process ever had."""
    status = Path(f"/proc/{checker.process.pid}/status").read_text()
    return int(re.search(r"VmPeak:\s+(\d+) kB", status).group(1)) / 1024


def test_no_answer_is_run_as_code(tmp_path):
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path('{trace}').touch()"
    for response in (
        rf"\boxed{{{code}}}",
        rf"\boxed{{x={code}}}",
        f"the answer is {code}",
        rf"\boxed{{\text{{{code}}}}}",
    ):
        assert score("5", response) == 0.0
    assert not trace.exists()


def test_checker_refuses_to_compile_text():
    """What sympy would do with a number: Number("7") goes through eval in an unprepared process."""
    import subprocess
    import sys

    program = (
        "import sys; from vimpo_verl.rewards import checker; checker._prepare_math_verify();"
        "sys.addaudithook(checker._refuse_code);"
        "import sympy; assert sympy.Number('7') == 7; assert checker.compare('x^2-1', '(x-1)(x+1)', True) == 'equal'\n"
        "try: eval('1+1')\nexcept PermissionError: print('refused')\nelse: print('evaluated')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "refused", done.stderr


def test_dead_checker_is_replaced():
    pool = CheckerPool(Limits(processes=1))
    assert pool.compare("1/2", "0.5", True) == "equal"
    checker = pool._free.queue[0]
    checker.process.kill()
    checker.process.wait()
    assert pool.compare("1/2", "0.5", True) == "equal"
    assert pool._free.queue[0] is not checker
    pool.close()


def test_checker_killed_from_outside_is_asked_again():
    """Killed in the middle of a request, as the kernel does when the node has no memory left."""
    pool = CheckerPool(Limits(processes=1))
    assert pool.compare("1/2", "0.5", True) == "equal"
    process = pool._free.queue[0].process
    process.send_signal(signal.SIGSTOP)  # so that it has the request and no answer yet
    with ThreadPoolExecutor(1) as thread:
        verdict = thread.submit(pool.compare, "1/3", r"\frac{2}{6}", True)
        time.sleep(0.5)
        assert not verdict.done()
        process.kill()
        assert verdict.result(timeout=120) == "equal"
    pool.close()


def test_answer_that_fells_every_checker_is_wrong_after_two(monkeypatch):
    from vimpo_verl.rewards import pool

    asked = []
    monkeypatch.setattr(
        pool._Checker, "ask", lambda self, request, seconds: asked.append(request) or self.kill() or DIED
    )
    checkers = CheckerPool(Limits(processes=1))
    assert checkers.compare("5", "5.0", True) == DIED and len(asked) == 2


def test_many_threads_share_few_checkers():
    cases = [(f"\\frac{{{n}}}{{7}}", f"\\boxed{{\\frac{{{2 * n + n % 2}}}{{14}}}}", 1.0 - n % 2) for n in range(60)]
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda case: score(case[0], case[1], processes=2), cases))
    assert results == [expected for *_, expected in cases]
    assert pool_for(Limits(processes=2))._free.qsize() == 2


def test_checker_ends_with_its_reader():
    pool = CheckerPool(Limits(processes=1))
    pool.compare("1/2", "0.5", True)
    process = pool._free.queue[0].process
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    pool.close()


def test_checker_that_does_not_start_is_an_error_not_a_wrong_answer(monkeypatch):
    import sys

    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = CheckerPool(Limits(processes=1))
    for _ in range(2):  # the place in the pool is given back
        with pytest.raises(RuntimeError, match="does not start: exit status 1"):
            pool.compare("1/2", "0.5", True)


def test_missing_math_verify_is_said_when_the_reward_is_loaded(monkeypatch):
    import importlib.util

    from vimpo_verl.rewards import math

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    source = Path(math.__file__).read_text()
    with pytest.raises(ImportError, match=r"pip install 'math-verify>=0\.9,<0\.10'"):
        exec(compile(source, math.__file__, "exec"), {"__name__": "loaded_by_verl"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_does_not_use_its_parents_checkers():
    parent = pool_for(Limits())
    pid = os.fork()
    if pid == 0:
        os._exit(0 if pool_for(Limits()) is not parent else 1)
    assert os.waitpid(pid, 0)[1] == 0


# ---- finding the answer --------------------------------------------------------------------------------------------


@given(st.text(alphabet=r"\boxed{}5 $f", max_size=60))
@settings(max_examples=500)
def test_last_box_against_a_plain_search(text):
    assert answers.last_box(text) == plain_last_box(text)


def plain_last_box(text):
    """Every start from the end, every length."""
    starts = [i for i in range(len(text)) if text.startswith((r"\boxed", r"\fbox"), i)]
    for start in reversed(starts):
        name = 6 if text.startswith(r"\boxed", start) else 5
        rest = text[start + name :]
        if rest[:1].isalpha():
            continue
        rest = rest.lstrip()
        if rest.startswith("{"):
            depth, i = 0, 0
            while i < len(rest):
                if rest[i] == "\\":
                    i += 2
                    continue
                depth += {"{": 1, "}": -1}.get(rest[i], 0)
                if depth == 0:
                    return rest[1:i].strip()
                i += 1
        elif rest and rest[0] not in "$\\{}":
            return "".join(character for character in _until(rest))
    return None


def _until(rest):
    for character in rest:
        if character.isspace() or character in "$\\{}":
            return
        yield character


@given(st.text(max_size=300), st.text(max_size=50))
@settings(max_examples=300)
def test_extraction_never_fails(text, gold):
    answers.last_box(text)
    answers.compare_plainly(notation.plain(answers.clean(gold)), notation.plain(answers.clean(text)))
    answers.tail(text)


# ---- verl ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["pkg://vimpo_verl.rewards.math", "file"])
def test_verl_loads_and_calls_it(path):
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    if path == "file":
        from vimpo_verl.rewards import math

        path = math.__file__
    section = {"path": path, "name": "compute_score", "reward_kwargs": {"cpu_seconds": 2}}
    reward = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": section}}))
    arguments = {"data_source": "d", "solution_str": r"\boxed{0.5}", "ground_truth": "1/2", "extra_info": {"index": 1}}

    async def as_verl_does():
        return await asyncio.get_running_loop().run_in_executor(None, lambda: reward(**arguments))

    assert asyncio.run(as_verl_does())["score"] == 1.0
