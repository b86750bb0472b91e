r"""One way of writing: turns an answer, without changing what it says, into LaTeX that math-verify reads.

math-verify reads LaTeX in ASCII. Each step below brings one family of other ways to write to that. What no step knows
stays as it is and is then not read, which costs a right answer but makes no wrong one right. Answers have a thousand
characters at most, so the steps need not be linear. Imports the standard library only.
"""

import re
import unicodedata

# Signs with a LaTeX command of their own. Greek, powers, fractions, digits and full-width forms go by Unicode's tables.
_SIGNS = {
    **dict.fromkeys("°º˚", r"^\circ "),
    **{"℃": r"^\circ\text{C}", "℉": r"^\circ\text{F}", "∞": r"\infty ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
    **{"ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap "},
    **{"∈": r"\in ", "∖": r"\setminus ", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div ", "−": "-"},
    **{"±": r"\pm ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "、": ", ", "。": "."},
}
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", r"\sqrt": r"\sqrt"}

# Words that multiply the number before them: "5 million" is not 5, which it would be with the word dropped as a unit.
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "萬": 4, "亿": 8, "億": 8}
# Units of money that math-verify's list, which is English, does not have. By name, because other words multiply (see above).
_MONEY = r"元|圆|圓|美元|欧元|日元|人民币|円|원|руб(?:\.|л\w*)?|грн\.?|гривен|тенге|रुपये|रुपए|ريال|درهم|دينار|บาท"

_BARE_INTEGER = re.compile(r"[+-]?[0-9]+")
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|boldsymbol|bm)\s*"
_ENVIRONMENT = re.compile(
    r"\\begin\{(aligned|alignedat|align\*?|gathered|gather\*?|split|equation\*?)\}(?:\{\d+\})?(.*)\\end\{\1\}",
    re.DOTALL,
)
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|lt|gt|approx|equiv)(?![A-Za-z])")
_COLOR = re.compile(r"\\(?:text)?color\s*(?:\[\w+\])?\s*\{[^{}]*\}")
_NUMBER_IN_TEXT = re.compile(_TEXT + r"(\{[^{}A-Za-z]*\d[^{}A-Za-z]*\})")
_DEGREE = re.compile(r"\\degree(?![A-Za-z])")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|(?<!\\)~|\\q?quad(?![A-Za-z])|\s)+")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_PERCENT = re.compile(rf"\s*(?:{_TEXT}\{{\s*per ?cent\s*\}}|(?<![A-Za-z])(?:per ?cent|pct)(?![A-Za-z])|\\?%)")
_THOUSANDS = re.compile(r"(?<![\w.,}^\\])(?<![\d.] )([1-9]\d{0,2})((?: \d{3})+|(?:\{,\}\d{3})+)(?!\d|[ ,]\d|\{,\}\d)")
_MIXED = re.compile(r"(?<![\w.,/^}\\])(?<![\d/] )(\d+) (\d+)/(\d+)(?!\w|[.,]\d|[/^])")
_SCIENTIFIC = re.compile(  # 1.5e-3 (2e-3 is left alone, it may be 2e - 3), 1.5\times10^{-3}
    r"(?<![\w.,])(?:(\d+\.\d+|1)[eE]([+-]?\d{1,3})"
    r"|(?<![/^}])(\d+(?:\.\d+)?) ?\\(?:times|cdot) ?10\^(?:\{(-?\d{1,3})\}|(\d)))(?![\w.!^])"
)
_DOTS = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_REPEATING = re.compile(r"(?<![\d.,])(?<!\d )(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))(?!\d)")
_SCALE = re.compile(rf"(?<=[\d}}])\s*({_TEXT}\{{\s*)?({'|'.join(_SCALES)})(?![A-Za-z])")
_MONEY_NAME = re.compile(rf"(?<=[\d}}])\s*(?:{_MONEY})$")
_POWER = re.compile("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_ROOT = re.compile(r"([√∛∜]|\\sqrt(?=\s*\())\s*")
_RADICAND = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]")
_COMMAND = re.compile(_TEXT + r"\{[^{}]*\}|\\[A-Za-z]+")
_SPACED_UNIT = re.compile(r"(?<=[\d}]) +[A-Za-z]+$")
# Letters that are in math-verify's list of units: c, d, g, h, l, m, o, s and t, ab, bc and st.
_LAST_LETTERS = re.compile(r"(?<=[\d}])\s*([a-z]|ab|bc|st)$")


def plain(answer: str) -> str:
    """`answer` as math-verify reads it: the same number, set, equation ... as before.

    Args:
        answer: without its box and dollars.
    """
    if _BARE_INTEGER.fullmatch(answer):  # most answers
        return answer
    answer = _characters(_roots(answer))
    answer = _one_line(answer)
    answer = _without_marks(answer)
    return _numbers(answer).strip()


def with_variables(gold: str, answer: str) -> tuple[str, str]:
    """Both, with braces around letters at the end that are a factor: math-verify takes the d of 2d for a unit and drops it.

    A letter behind a number is a unit only where the right answer has no letters, or that one after a space ("5 m").
    """
    if not re.search("[A-Za-z]", _COMMAND.sub("", _SPACED_UNIT.sub("", gold))):
        return gold, answer
    return _LAST_LETTERS.sub(r"{\1}", gold), _LAST_LETTERS.sub(r"{\1}", answer)


# ---- signs ---------------------------------------------------------------------------------------------------------


def _characters(answer: str) -> str:
    return "".join(map(_in_latex, _POWER.sub(_power, answer)))


def _in_latex(character: str) -> str:
    """ASCII for a sign of Unicode; the sign itself where there is none."""
    if character < "\x80" or character in _SIGNS:
        return _SIGNS.get(character, character)
    if "！" <= character <= "～":  # full-width forms, in the order of ASCII
        return chr(ord(character) - ord("！") + ord("!"))
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category in ("Zs", "Zl", "Zp", "Cf"):  # signs without width, too: they must not join what they stand between
        return " "
    if category == "Sc":  # money; math-verify drops dollars
        return ""
    over, slash, under = unicodedata.normalize("NFKD", character).partition("⁄")
    if slash:
        return rf"\frac{{{over}}}{{{under}}}"
    name = unicodedata.name(character, "").split()
    if name[:1] == ["GREEK"] and name[2:3] == ["LETTER"] and len(name) == 4:
        return f"\\{name[3].lower() if name[1] == 'SMALL' else name[3].capitalize()} "
    return character


def _power(match: re.Match) -> str:
    digits = "".join("-" if sign == "⁻" else str(unicodedata.digit(sign)) for sign in match.group())
    return f"^{{{digits}}}"


def _roots(answer: str) -> str:
    r"""√12 and √(x+1) as \sqrt{12} and \sqrt{x+1}; \sqrt(x+1), too, of which math-verify makes what it cannot read."""
    for match in reversed(list(_ROOT.finditer(answer))):  # from the end, so that what is within is done already
        begin = match.end()
        radicand = _RADICAND.match(answer, begin)
        end = radicand.end() if radicand else _group_end(answer, begin)
        if end is not None:
            within = radicand.group() if radicand else answer[begin + 1 : end - 1]
            answer = f"{answer[: match.start()]}{_ROOTS[match.group(1)]}{{{within}}}{answer[end:]}"
    return answer


def _group_end(text: str, begin: int) -> int | None:
    """Behind the parenthesis or brace that closes the one at `begin`; None where there is none."""
    opening = text[begin : begin + 1]
    closing = {"(": ")", "{": "}"}.get(opening)
    depth = 0
    for position in range(begin, len(text) if closing else begin):
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return position + 1
    return None


# ---- layout --------------------------------------------------------------------------------------------------------


def _one_line(answer: str) -> str:
    r"""The rows of an aligned environment as a list; a row that begins with a relation goes on with the row before it."""
    environment = _ENVIRONMENT.fullmatch(answer.strip())
    if environment is None or r"\begin" in environment.group(2):
        return answer
    rows: list[str] = []
    for row in _ROW_END.split(environment.group(2)):
        row = row.replace("&", "").strip().rstrip(",;.")
        if rows and _RELATION.match(row):
            rows[-1] += row
        elif row:
            rows.append(row)
    return ", ".join(rows)


def _without_marks(answer: str) -> str:
    r"""Without color, bold numbers and braces around it all; one kind of space, of percent and of degree sign."""
    answer = _NUMBER_IN_TEXT.sub(r"\1", _COLOR.sub("", answer))
    answer = _PERCENT.sub(r"\\%", _DEGREE.sub(r"^\\circ", answer))
    answer = _SPACE.sub(" ", _NEGATIVE_SPACE.sub("", answer)).strip()
    while answer.startswith("{") and _group_end(answer, 0) == len(answer):
        answer = answer[1:-1].strip()
    return answer


# ---- numbers -------------------------------------------------------------------------------------------------------


def _numbers(answer: str) -> str:
    """Numbers with separators, mixed, scientific, repeating, with a word that multiplies or with a unit of money."""
    answer = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match.group()), answer)
    answer = _MIXED.sub(_mixed, answer)
    answer = _SCIENTIFIC.sub(_power_of_ten, answer)
    answer = _REPEATING.sub(_fraction, _DOTS.sub(r"\\overline{\1\2\3}", answer))
    answer = _SCALE.sub(lambda match: rf"\cdot10^{{{_SCALES[match.group(2)]}}}{match.group(1) or ''}", answer)
    return _MONEY_NAME.sub("", answer)


def _mixed(match: re.Match) -> str:
    whole, over, under = match.groups()
    return rf"{whole}\frac{{{over}}}{{{under}}}" if int(over) < int(under) else match.group()


def _power_of_ten(match: re.Match) -> str:
    """Exact, because sympy takes 1.1 for a binary number, and that times a power of ten is no fraction of whole numbers."""
    mantissa = match.group(1) or match.group(3)
    exponent = int(match.group(2) or match.group(4) or match.group(5)) - len(mantissa.partition(".")[2])
    digits = mantissa.replace(".", "")
    return digits + "0" * exponent if exponent >= 0 else rf"\frac{{{digits}}}{{1{'0' * -exponent}}}"


def _fraction(match: re.Match) -> str:
    """Exact: x = 0.ab(cd) has 10^4 x - 10^2 x = abcd - ab."""
    whole, fixed, cycle = match.group(1), match.group(2), match.group(3) or match.group(4)
    over = int(whole + fixed + cycle) - int(whole + fixed or "0")
    return rf"\frac{{{over}}}{{{(10 ** len(cycle) - 1) * 10 ** len(fixed)}}}"
