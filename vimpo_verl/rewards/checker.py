"""The process that compares answers with math-verify: `python -m vimpo_verl.rewards.checker`.

It reads a request a line from standard input and writes a verdict a line, both JSON, and ends when its input does. Run by
vimpo_verl.rewards.pool. In a process of its own, because nothing else bounds what an answer can make a computer algebra
system do: a soft limit by a timer signal, which works here since this is the main thread; and for what does not come back
to the interpreter, such as an enormous power, the kernel's limits on processor time and memory, which end the process.

An answer is never run as code. sympy reads numbers and plain arithmetic with Python's eval (parse_expr, also under
sympify and Number); here it gets a parser of arithmetic instead, which is faster, too. Beyond that, the interpreter compiles
text for _CODE_WRITERS alone, whose code does not hold any of the answer.
"""

import ast
import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from vimpo_verl.rewards.answers import DIFFERENT, EQUAL, NOTHING_FOUND

TIME_LIMIT, MEMORY_LIMIT = "time limit", "memory limit"
_MOST_ZEROS = 400  # of a small number; beyond those of any quantity
_DECIMAL = re.compile(r"\d+(?:\.\d+)?")
_GRACE = 1  # seconds of processor time between the timer and the kernel's limit

# Who may compile text: sympy's polynomials write functions for a number of variables, and modules that are imported on
# demand may define named tuples and data classes.
_CODE_WRITERS = ("sympy/polys/monomials.py", "collections/__init__.py", "dataclasses.py")


class _OutOfTime(BaseException):
    """Not an Exception, because sympy and math-verify catch those."""


def main() -> None:
    """Serve until the input ends. Arguments: processor seconds an answer, mebibytes of memory."""
    cpu_seconds, memory_mib = int(sys.argv[1]), int(sys.argv[2])
    output = _private_output()
    _prepare_math_verify()
    _limit_memory(memory_mib)
    sys.addaudithook(_refuse_code)
    _answer(output, {"verdict": "ready"})
    _silence()
    for line in sys.stdin:
        _answer(output, {"verdict": _judge(json.loads(line), cpu_seconds)})


def _judge(request: dict[str, str], cpu_seconds: int) -> str:
    """The verdict. After TIME_LIMIT or MEMORY_LIMIT a computation was torn off and this process should not go on."""
    _limit_processor_time(cpu_seconds + _GRACE)
    signal.signal(signal.SIGPROF, _out_of_time)
    try:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            return compare(request["gold"], request["answer"], request["boxed"])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _OutOfTime:
        return TIME_LIMIT
    except MemoryError:
        return MEMORY_LIMIT
    except Exception:  # such as a RecursionError: not an answer that can be read
        return DIFFERENT


def compare(gold: str, answer: str, boxed: bool) -> str:
    """Compare by algebra.

    Args:
        gold: the right answer, LaTeX or plain.
        answer: what stood in the box, or, where `boxed` is False, text with an answer somewhere.

    Returns:
        EQUAL, DIFFERENT or NOTHING_FOUND.
    """
    found = _parse_boxed(answer) if boxed else _parse_text(answer)
    if not found:
        return NOTHING_FOUND
    readings = [(wanted, found) for wanted in _without_sign(gold, found, answer if boxed else None)]
    if boxed and "%" in answer and "%" not in gold and _more_than_one(gold):
        readings.append((gold, _parse_boxed(answer.replace(r"\%", ""))))
    return EQUAL if any(_verify(_parse_boxed(wanted), found) for wanted, found in readings) else DIFFERENT


def _without_sign(gold: str, found: tuple, box: str | None) -> list[str]:
    r"""`gold`, and where the answer has no percent sign also `gold` without its own: 50\% is 50 or 0.5, but not 5000\%."""
    from sympy import UnevaluatedExpr

    # In text outside of a box math-verify leaves the hundredth of a percentage unevaluated.
    signed = (
        "%" in box
        if box is not None
        else any(
            "%" in reading if isinstance(reading, str) else bool(reading.has(UnevaluatedExpr)) for reading in found
        )
    )
    return [gold] if signed or "%" not in gold else [gold, gold.replace(r"\%", "")]


def _more_than_one(gold: str) -> bool:
    """Whether `gold` is a number that is no share of one: then an answer in percent may mean it, 12.5\\% for 12.5."""
    return _DECIMAL.fullmatch(gold) is not None and float(gold) > 1


def _verify(wanted: tuple, found: tuple) -> bool:
    """math-verify's verdict, with as many decimals as a small `wanted` needs."""
    from math_verify import verify

    small = _leading_zeros(wanted)
    return verify(
        list(wanted),
        list(found),
        float_rounding=max(6, small + 4),
        numeric_precision=max(15, small + 12),
        timeout_seconds=None,
        allow_set_relation_comp=True,  # x < 2 and (-\infty, 2) are one answer, whichever of them the data set has
    )


def _leading_zeros(wanted: tuple) -> int:
    """Zeros behind the point of the smallest number in `wanted` but 0.

    math-verify compares 6 decimals of a floating-point number and 15 of an expression. That takes 6.6e-34 for 1.6e-19.
    """
    import mpmath

    zeros = [0]
    pending = [expression for expression in wanted if not isinstance(expression, str)]
    while pending:
        expression = pending.pop()
        if getattr(expression, "is_number", False):
            with contextlib.suppress(Exception):  # what has no value in floating-point has no decimals either
                size = abs(expression.evalf(5))
                if size.is_Float and size != 0:
                    zeros.append(int(-mpmath.floor(mpmath.log10(size._to_mpmath(53)))) - 1)
        else:
            pending.extend(expression.flat() if hasattr(expression, "flat") else expression.args)
    return min(max(zeros), _MOST_ZEROS)


@functools.lru_cache(maxsize=1024)
def _parse_boxed(answer: str) -> tuple:
    """What a box holds, as a whole: without try_extract_without_anchor=False, a fraction in what cannot be read would do."""
    from math_verify import LatexExtractionConfig, parse

    whole = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    hundredths = answer.replace(r"\%", r"\cdot\frac{1}{100}")
    return tuple(parse(rf"\boxed{{{hundredths}}}", [whole], parsing_timeout=None))


def _parse_text(text: str) -> tuple:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return tuple(parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))


# ---- arithmetic without eval --------------------------------------------------------------------------------------


def arithmetic(expression: str, *_: Any, evaluate: bool = True, **__: Any) -> Any:
    """What sympy and math-verify need of sympy's parse_expr: numbers, names, + - * / ** and parentheses.

    Args:
        expression: Python syntax.
        evaluate: False leaves the expression as it was written.

    Returns:
        A sympy expression.

    Raises:
        SyntaxError: anything else is in it; sympify makes its SympifyError of that.
    """
    expression = expression.strip()
    return _to_sympy(ast.parse(expression, mode="eval").body, expression, evaluate)


def _to_sympy(node: ast.expr, source: str, evaluate: bool) -> Any:
    import sympy

    if isinstance(node, ast.Constant):
        text = ast.get_source_segment(source, node)
        if _NUMBER.fullmatch(text):
            return sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)
    if isinstance(node, ast.Name):  # sympy's own modules sympify names of symbols and constants
        constant = getattr(sympy, node.id, None)
        return constant if isinstance(constant, sympy.Basic) else sympy.Symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        operand = _to_sympy(node.operand, source, evaluate)
        return operand if isinstance(node.op, ast.UAdd) else -operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = (_to_sympy(side, source, evaluate) for side in (node.left, node.right))
        return _OPERATIONS[type(node.op)](left, right, evaluate)
    raise SyntaxError(f"not arithmetic: {source[:80]}")


def _divide(left: Any, right: Any, evaluate: bool) -> Any:
    import sympy

    return sympy.Mul(left, sympy.Pow(right, sympy.S.NegativeOne, evaluate=evaluate), evaluate=evaluate)


def _build(name: str, left: Any, right: Any, evaluate: bool) -> Any:
    import sympy

    return getattr(sympy, name)(left, right, evaluate=evaluate)


_NUMBER = re.compile(r"\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?")
_OPERATIONS = {
    ast.Add: lambda left, right, evaluate: _build("Add", left, right, evaluate),
    ast.Sub: lambda left, right, evaluate: _build("Add", left, -right, evaluate),
    ast.Mult: lambda left, right, evaluate: _build("Mul", left, right, evaluate),
    ast.Div: _divide,
    ast.Pow: lambda left, right, evaluate: _build("Pow", left, right, evaluate),
}


# ---- numbers side by side --------------------------------------------------------------------------------------------


def _side_by_side(convert: Callable, converter: Any, factors: list, first: int = 0) -> Any:
    r"""latex2sympy's convert_postfix_list, which takes any two numbers for a mixed one: 1 2 for 3, and 2(3) for 5.

    3\frac{1}{2} stays mixed; parentheses multiply; other numbers side by side have no meaning.

    Raises:
        ValueError: two such numbers.
    """
    import sympy

    if first + 1 < len(factors):
        left, right = factors[first].getText(), factors[first + 1].getText()
        if _NUMERAL.fullmatch(left) and right.lstrip("{")[:1].isdigit():
            raise ValueError("two numbers side by side")
        factor = convert(converter, [factors[first]]) if right.startswith(_PARENTHESES) else None
        if isinstance(factor, (sympy.Expr, sympy.Matrix)):  # not a derivative's d/dx
            rest = converter.convert_postfix_list(factors, first + 1)
            matrix = any(getattr(side, "is_Matrix", False) for side in (factor, rest))
            return (converter.mat_mul_flat if matrix else converter.mul_flat)(factor, rest)
    return convert(converter, factors, first)


_NUMERAL = re.compile(r"\{?[\d.,]+\}?(?:\^\{?\\circ\}?)?")
_PARENTHESES = ("(", r"\left(", "[", r"\left[")


# ---- the process ---------------------------------------------------------------------------------------------------


def _prepare_math_verify() -> None:
    import math_verify.parser
    import sympy.parsing.sympy_parser
    from latex2sympy2_extended.antlr_parser import PSParser
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for module in (math_verify.parser, sympy.parsing.sympy_parser):
        if not hasattr(module, "parse_expr"):
            raise RuntimeError(f"{module.__name__} has no parse_expr to replace; vimpo_verl knows math-verify 0.9.0")
        module.parse_expr = arithmetic
    convert = _Latex2Sympy.convert_postfix_list
    _Latex2Sympy.convert_postfix_list = lambda self, factors, i=0: _side_by_side(convert, self, factors, i)
    # Without this, latex2sympy2_extended 1.11.0 reads no percentage with the antlr4 4.9.3 that Hydra, and so verl, asks
    # for: its grammar for that release lacks the token that it looks for just before percentages.
    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda self: None


def _refuse_code(event: str, arguments: tuple) -> None:
    """Audit hook. Modules are compiled under their file's name, ast.parse under "<unknown>"."""
    if event != "compile" or not str(arguments[1]).startswith(("<string>", "<lambdify")):
        return
    if not sys._getframe(1).f_code.co_filename.endswith(_CODE_WRITERS):
        raise PermissionError("the checker compiles no text")


def _private_output() -> TextIO:
    """A stream for the verdicts that nothing else prints to."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _silence() -> None:
    """From here on nobody reads the standard error, so it must not fill up."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _answer(output: TextIO, message: dict[str, str]) -> None:
    output.write(json.dumps(message) + "\n")
    output.flush()


def _limit_memory(memory_mib: int) -> None:
    """Address space: what is in use now and `memory_mib` more. Where the system does not say what is in use, no limit."""
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        limit = in_use + memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_processor_time(seconds: int) -> None:
    """The kernel ends this process when it has used `seconds` more, also when whoever started it is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds + 1, hard))


def _out_of_time(signum: int, frame: Any) -> None:
    raise _OutOfTime


if __name__ == "__main__":
    main()
