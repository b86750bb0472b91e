"""How many answers a second the reward for mathematics checks, by kind of answer.

    python benchmarks/reward_throughput.py [--answers 2000] [--processes 2] [--threads 8]

Every answer is different, so that the cache of verdicts does not help; in training it does, because the responses to a
prompt give few different answers. The threads stand for those in which verl calls a reward function.
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from vimpo_verl.rewards.math import compute_score

FILLER = "Let us look at the next case and put what is known into the equation. " * 150  # about 10,000 characters


def integers(count: int) -> Iterator[tuple[str, str]]:
    """(ground truth, response), every other one right."""
    for n in range(count):
        yield str(n), f"{FILLER} so it is \\boxed{{{n + n % 2}}}."


def fractions(count: int) -> Iterator[tuple[str, str]]:
    for n in range(count):
        yield f"\\frac{{{n}}}{{7}}", f"{FILLER} so it is $\\boxed{{\\dfrac{{{2 * n + n % 2}}}{{14}}}}$."


def expressions(count: int) -> Iterator[tuple[str, str]]:
    for n in range(count):
        yield f"x^2-{n * n}", f"{FILLER} so it is $\\boxed{{(x-{n})(x+{n + n % 2})}}$."


def intervals(count: int) -> Iterator[tuple[str, str]]:
    for n in range(count):
        yield f"[{n},\\frac{{{2 * n + 3}}}{{2}})", f"{FILLER} so it is $\\boxed{{[{n + n % 2}, {n}.5 + 1)}}$."


def without_box(count: int) -> Iterator[tuple[str, str]]:
    for n in range(count):
        yield f"\\frac{{{n}}}{{7}}", f"{FILLER} So the answer is {2 * n + n % 2}/14."


def measure(cases: list[tuple[str, str]], threads: int, processes: int) -> tuple[float, int]:
    """Answers a second, and how many were right."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        scores = list(pool.map(lambda case: compute_score("benchmark", case[1], case[0], processes=processes), cases))
    return len(cases) / (time.perf_counter() - start), sum(score["score"] == 1.0 for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=2000, help="of each kind")
    parser.add_argument("--processes", type=int, default=2, help="checker processes")
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()

    start = time.perf_counter()
    compute_score("benchmark", r"\boxed{\frac{2}{4}}", "1/2", processes=args.processes)
    print(f"first answer, with the start of a checker: {time.perf_counter() - start:.2f} s ({os.cpu_count()} cores)")
    measure([(f"{n}/3", f"\\boxed{{{n}/6}}") for n in range(50)], args.threads, args.processes)  # starts the others
    for kind in (integers, fractions, intervals, expressions, without_box):
        rate, right = measure(list(kind(args.answers)), args.threads, args.processes)
        print(f"{kind.__name__:12} {rate:8.0f} answers a second ({right} of {args.answers} right)", flush=True)


if __name__ == "__main__":
    main()
