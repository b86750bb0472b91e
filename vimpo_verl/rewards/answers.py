r"""Find the answer in a response, and the comparisons that need no algebra.

Everything here takes time linear in the text, whatever the text. Imports the standard library only.
"""

import re

EQUAL, DIFFERENT, NOTHING_FOUND = "equal", "different", "no answer found"  # verdicts, here and in the checker
MAX_ANSWER = 1_000  # characters; examples/math/prepare_data.py lets no longer one into the data
MAX_TAIL = 2_000  # characters at the end of a response without a box in which an answer is looked for
_MAX_BOXES = 16  # boxes, from the end, that are tried before giving up on unclosed ones

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[^\s$\\{}]+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\-]*")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_FREE_SPACE = re.compile(r"(?<![\d.])\s+|\s+(?![\d.])")  # between digits a space says something
_COUNTED_IN = re.compile(r"\w+_\{?(\d+)\}?")
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z\\])([ap])\.?\s?m(?![A-Za-z])", re.IGNORECASE)
_PAIR = re.compile(r"(?:\\left)?\(.*,.*\)")
_SET = re.compile(r"(?:\\left)?\\\{[^(\[]*,[^(\[]*\\\}")
_SET_BUILDER = re.compile(r"[|:<>]|\\(?:mid|in|leq?|geq?|lt|gt)(?![A-Za-z])")
_FULL_STOP = re.compile(r"(?<=\d)\.(?=\s|$)")
_SHORTEST_WORD = 4  # shorter ones may be products of variables, such as abc


def last_box(text: str) -> str | None:
    r"""What stands in the last closed \boxed{...} or \fbox{...} of `text`; None where there is none.

    An answer of more than MAX_ANSWER characters comes back cut to MAX_ANSWER + 1.
    """
    end = len(text)
    for _ in range(_MAX_BOXES):
        start = max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))
        if start < 0:
            return None
        content = _content(text, start)
        if content is not None:
            return content
        end = start
    return None


def _content(text: str, start: int) -> str | None:
    """What the box at `start` holds; None where it is not closed or no box at all."""
    head = _BOX.match(text, start)
    if head is None:
        return None
    begin = head.end()
    if begin < len(text) and text[begin] == "{":
        return _braced(text, begin + 1)
    bare = _BARE_BOX.match(text, begin)
    return bare.group()[: MAX_ANSWER + 1] if bare else None


def _braced(text: str, begin: int) -> str | None:
    r"""From `begin` to the brace that closes the group; \{ and \} do not count."""
    depth, position = 1, begin
    while position < len(text):
        if position - begin > MAX_ANSWER:
            return text[begin : begin + MAX_ANSWER + 1]
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[begin:position].strip()
        position += 1
    return None


def tail(text: str) -> str:
    """The end of `text`, where an answer without a box is looked for; begins at a line where there is one.

    A full stop after a number becomes a comma: math-verify takes "3/4." for a floating-point number.
    """
    end = text
    if len(text) > MAX_TAIL:
        end = text[-MAX_TAIL:]
        end = end[end.find("\n") + 1 :].strip() or end
    return _FULL_STOP.sub(",", end.strip())


def clean(answer: str) -> str:
    """An answer without what surrounds it: dollars and a final full stop."""
    answer = answer.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(answer) > len(opening) + len(closing) and answer.startswith(opening) and answer.endswith(closing):
            answer = answer[len(opening) : -len(closing)].strip()
    if not answer.strip("$"):
        return ""
    if answer.endswith(".") and not answer.endswith("\\."):
        answer = answer[:-1].rstrip()
    return answer


def compare_plainly(gold: str, answer: str) -> str | None:
    """Compare what needs no algebra.

    Args:
        gold, answer: both cleaned and in plain notation (vimpo_verl.rewards.notation).

    Returns:
        EQUAL or DIFFERENT, or None where it takes algebra to say.
    """
    if _squeezed(gold) == _squeezed(answer):
        return EQUAL
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return EQUAL if int(gold) == int(answer) else DIFFERENT
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words and answer_words:
        # By letters, because algebra takes a word for a product of variables: east would equal seat.
        return EQUAL if gold_words == answer_words else DIFFERENT
    return DIFFERENT if _differ_in_kind(gold, answer) else None


def _squeezed(answer: str) -> str:
    answer = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", _TEXT.sub(r" \1 ", answer))
    return _FREE_SPACE.sub("", " ".join(answer.split())).replace(r"\dfrac", r"\frac")


def _differ_in_kind(gold: str, answer: str) -> bool:
    """Whether they differ in what math-verify does not look at: the base, the half of the day, a set or a pair."""
    bases = [_COUNTED_IN.fullmatch(text) for text in (gold, answer)]
    halves = [_HALF_OF_DAY.search(text) for text in (gold, answer)]
    for matches in (bases, halves):
        if all(matches) and matches[0].group(1).lower() != matches[1].group(1).lower():
            return True
    for one, other in ((gold, answer), (answer, gold)):
        if _SET.fullmatch(one) and not _SET_BUILDER.search(one) and _PAIR.fullmatch(other):
            return True
    return False


def _words(answer: str) -> str | None:
    """The words of an answer that is text, in lower case with single spaces; None for mathematics."""
    unwrapped = _TEXT.sub(r" \1 ", answer).strip(" .")
    is_text = unwrapped != answer.strip(" .")
    if not _WORDS.fullmatch(unwrapped):
        return None
    words = unwrapped.casefold().split()
    return " ".join(words) if is_text or max(map(len, words)) >= _SHORTEST_WORD else None
