"""The public data sets of the math recipes: where each is, what its columns are, and how a row becomes a question and an answer.

The columns are those of the data sets' own pages on the Hugging Face hub (tests/fixtures/math_sources/README.md says which).
Imports the standard library only.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class DataError(Exception):
    """Something about the data that the user has to know; the message says what to do."""


@dataclass(frozen=True)
class Example:
    """What a row of a source holds.

    Attributes:
        messages: the chat before the answer: dicts with role and content; none where the source has none.
        answer: the right answer, or "".
        name: the source's own name of the row, or "".
    """

    messages: list[dict[str, str]]
    answer: str
    name: str


@dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
        hub: its name on the hub.
        parts: (configuration or None, split), read in this order.
        columns: those that `read` needs.
        read: row -> Example.
        rows: how many rows the result should have, (least, most); another number is reported, not refused.
        use: "train" or "test".
        files: the data files, within the hub's repository or a local folder, where not all of them are wanted.
        unique: keep one row of each question.
    """

    hub: str
    parts: tuple[tuple[str | None, str], ...]
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], Example]
    rows: tuple[int, int]
    use: str
    files: str | None = None
    unique: bool = False


def _question(text: Any, answer: Any, name: Any = "") -> Example:
    return Example([{"role": "user", "content": _text(text)}], _text(answer), _text(name))


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _guru(row: dict) -> Example:
    """In verl's columns already; the chat ends with an instruction to box the answer."""
    messages = [{"role": message["role"], "content": _text(message["content"])} for message in row["prompt"] or []]
    return Example(messages, _text((row["reward_model"] or {}).get("ground_truth")), _text(row["data_source"]))


# DAPO's prompts ask for a last line "Answer: ..."; the recipes ask for a box everywhere, so what stands around the question
# is taken off.
_DAPO_BEFORE = re.compile(r"\ASolve the following math problem step by step\.[^\n]*\n+")
_DAPO_AFTER = re.compile(r"\n+Remember to put your answer on its own line[^\n]*\s*\Z")


def _dapo(row: dict) -> Example:
    prompt = _text(row["prompt"][-1]["content"]) if row["prompt"] else ""
    question = _DAPO_AFTER.sub("", _DAPO_BEFORE.sub("", prompt)).strip()
    reward_model, extra_info = row["reward_model"] or {}, row["extra_info"] or {}
    return _question(question, reward_model.get("ground_truth"), extra_info.get("index"))


def _olympiad(row: dict) -> Example:
    """The answers of a row are a list, each with dollars; a context, where there is one, comes before the question."""
    answers = [_text(answer).strip("$").strip() for answer in row["final_answer"] or []]
    question = "\n\n".join(filter(None, (_text(row["context"]), _text(row["question"]))))
    return _question(question, ", ".join(filter(None, answers)), row["id"])


def _gsm8k(row: dict) -> Example:
    """The answer follows "####" at the end of the solution, with commas in large numbers."""
    _, marker, answer = _text(row["answer"]).rpartition("####")
    return _question(row["question"], answer.replace(",", "") if marker else "")


def _columns(question: str, answer: str, name: str | None = None) -> Callable[[dict], Example]:
    return lambda row: _question(row[question], row[answer], row[name] if name else "")


SOURCES = {
    "guru_math": Source(
        hub="LLM360/guru-RL-92k",
        parts=((None, "train"),),
        files="**/math__combined*.parquet",
        columns=("prompt", "reward_model", "data_source"),
        read=_guru,
        rows=(54_350, 54_450),
        use="train",
    ),
    "dapo_math": Source(
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        parts=((None, "train"),),
        columns=("prompt", "reward_model", "extra_info"),
        read=_dapo,
        rows=(17_000, 18_000),  # of 1.8 million on the hub, where each is there about a hundred times
        use="train",
        unique=True,
    ),
    "gsm8k_train": Source(
        hub="openai/gsm8k",
        parts=(("main", "train"),),
        columns=("question", "answer"),
        read=_gsm8k,
        rows=(7_473, 7_473),
        use="train",
    ),
    "gsm8k_test": Source(
        hub="openai/gsm8k",
        parts=(("main", "test"),),
        columns=("question", "answer"),
        read=_gsm8k,
        rows=(1_319, 1_319),
        use="test",
    ),
    "math500": Source(
        hub="HuggingFaceH4/MATH-500",
        parts=((None, "test"),),
        columns=("problem", "answer", "unique_id"),
        read=_columns("problem", "answer", "unique_id"),
        rows=(500, 500),
        use="test",
    ),
    "aime2024": Source(
        hub="HuggingFaceH4/aime_2024",
        parts=((None, "train"),),
        columns=("problem", "answer", "id"),
        read=_columns("problem", "answer", "id"),
        rows=(30, 30),
        use="test",
    ),
    "aime2025": Source(
        hub="opencompass/AIME2025",
        parts=(("AIME2025-I", "test"), ("AIME2025-II", "test")),
        columns=("question", "answer"),
        read=_columns("question", "answer"),
        rows=(30, 30),
        use="test",
    ),
    "olympiadbench": Source(
        hub="Hothan/OlympiadBench",
        parts=(("OE_TO_maths_en_COMP", "train"),),
        columns=("question", "final_answer", "context", "id"),
        read=_olympiad,
        rows=(674, 675),
        use="test",
    ),
}
