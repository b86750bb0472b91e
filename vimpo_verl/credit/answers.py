"""Reads prompts with answers and rewards, in three formats, and chooses which of them to show.

- verl's dumps (trainer.rollout_data_dir, trainer.validation_data_dir): input, output, score; without special tokens.
- responses of examples/math/evaluate.py: prompt, responses, accs, finished; prompt_ids and response_ids where it has them.
- one answer a line: prompt, response, score.
"""

import json
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PLACEHOLDER = re.compile(r"pad[0-9a-f]{32}_\d+_\d+")  # uid, in its dumps, of what verl fills a batch up with
PROMPT_FORMS = "text, messages ([{role, content}, ...]) or prompt_ids"


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    Attributes:
        where: file and line, for messages.
        prompt: the text that the model sees, or messages for its chat template.
        response: what it wrote.
        reward: R.
        finished: whether it ended by itself; None: not known.
        decoded: the prompt is what decoding left of it, without special tokens (verl's dumps).
        prompt_ids, response_ids: the tokens, where they are known.
        response_mask: 1 on tokens that the policy wrote; None: all.
        baseline: V0, once the whole file is known.
        times: how often the file has this answer to the prompt, with this reward.
    """

    where: str
    prompt: str | list[dict]
    response: str
    reward: float
    finished: bool | None = None
    decoded: bool = False
    prompt_ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] | None = None
    response_mask: tuple[int, ...] | None = None
    baseline: float = math.nan
    times: int = 1

    @property
    def group(self) -> Hashable:
        """Answers to the same prompt are one group."""
        return self.prompt_ids or json.dumps(self.prompt, sort_keys=True, ensure_ascii=False)


def answers_file(path: Path) -> Path:
    """The file itself; of a folder of verl's dumps (1.jsonl, 2.jsonl, ...) the last step's."""
    if not path.is_dir():
        return path
    steps = [file for file in path.glob("*.jsonl") if re.fullmatch(r"\d+", file.stem)]
    return max(steps, key=lambda file: int(file.stem), default=path)


def read_answers(path: Path) -> tuple[list[Answer], list[str]]:
    """All answers of a file, and what is wrong with it, each a sentence."""
    if not path.exists():
        return [], [f"{path}: there is no such file"]
    if path.is_dir():
        return [], [f"{path}: no 1.jsonl, 2.jsonl, ... in this folder, as trainer.rollout_data_dir writes them"]
    answers, problems = [], []
    # Not splitlines(): a text may hold U+2028 and its like, which end no line of JSON.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            answers += list(answers_of(json.loads(line), where))
        except json.JSONDecodeError as error:
            problems.append(f"{where}: no JSON: {error}")
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if not answers and not problems:
        problems.append(f"{path}: no answers in it")
    return answers, _shortened(problems)


def answers_of(row: Any, where: str) -> Iterator[Answer]:
    """The answers of one line of a file.

    Args:
        row: the line's JSON.
        where: file and line, for messages.

    Raises:
        ValueError: it is none of the three formats.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if set(row) == {"settings"}:  # the first line of evaluate.py
        return
    if PLACEHOLDER.fullmatch(str(row.get("uid"))):
        return
    if "input" in row or "output" in row:
        _require(row, "input", "output", "score")
        yield _answer(where, row, prompt=row["input"], response=row["output"], reward=row["score"], decoded=True)
    elif "responses" in row:
        _require(row, "prompt", "responses", "accs")
        finished, ids = (row.get(name) or [None] * len(row["responses"]) for name in ("finished", "response_ids"))
        if not len(row["responses"]) == len(row["accs"]) == len(finished) == len(ids):
            raise ValueError("responses, accs, finished and response_ids must have the same length")
        for response, reward, ended, tokens in zip(row["responses"], row["accs"], finished, ids, strict=True):
            known = {"prompt_ids": row.get("prompt_ids"), "response_ids": tokens}
            yield _answer(where, known, prompt=row["prompt"], response=response, reward=reward, finished=ended)
    else:
        _require(row, "prompt_ids" if "prompt_ids" in row else "prompt", "score")
        _require(row, "response_ids" if "response_ids" in row else "response")
        yield _answer(
            where,
            row,
            prompt=row.get("prompt", ""),
            response=row.get("response", ""),
            reward=row["score"],
            finished=row.get("finished"),
        )


def _require(row: dict, *names: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)} (it has {', '.join(row) or 'nothing'}); expected prompt, response and score, or "
            "verl's input, output and score, or evaluate.py's prompt, responses and accs"
        )


def _answer(where: str, row: dict, *, prompt, response, reward, **more) -> Answer:
    if not isinstance(prompt, str) and (
        not isinstance(prompt, list) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    ):
        raise ValueError(f"prompt must be {PROMPT_FORMS}, found {prompt!r:.80}")
    if not isinstance(response, str):
        raise ValueError(f"response must be text, found {response!r:.80}")
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise ValueError(f"score must be a finite number, found {reward!r:.80}")
    ids = {name: _integers(row, name) for name in ("prompt_ids", "response_ids", "response_mask")}
    if ids["response_mask"] is not None and len(ids["response_mask"]) != len(ids["response_ids"] or ()):
        raise ValueError("response_mask needs response_ids of the same length")
    answer = Answer(where, prompt, response, float(reward), **ids, **more)
    # Decoded without special tokens, "" is an answer that ended at once.
    if not (response or answer.response_ids or answer.decoded or answer.finished):
        raise ValueError("the answer is empty: there is no token to give credit to")
    return answer


def _integers(row: dict, name: str) -> tuple[int, ...] | None:
    values = row.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{name} must be a list of whole numbers")
    return tuple(values)


def _shortened(problems: list[str], at_most: int = 5) -> list[str]:
    more = len(problems) - at_most
    return problems if more <= 1 else [*problems[:at_most], f"... and {more} more lines like these"]


def choose(answers: Sequence[Answer], prompts: int, per_prompt: int) -> list[list[Answer]]:
    """Different answers by prompt, those prompts first whose answers differ in reward.

    Args:
        answers: as read.
        prompts: how many prompts at most.
        per_prompt: how many answers of each at most: half of them from the higher rewards, half from the lower.
    """
    groups: dict[Hashable, dict[Hashable, list[Answer]]] = {}
    for answer in answers:
        same = (answer.response, answer.response_ids, answer.response_mask, answer.finished, answer.reward)
        groups.setdefault(answer.group, {}).setdefault(same, []).append(answer)
    merged = [[replace(same[0], times=len(same)) for same in group.values()] for group in groups.values()]
    mixed_first = sorted(merged, key=lambda group: len({answer.reward for answer in group}) == 1)
    return [_some(group, per_prompt) for group in mixed_first[:prompts]]


def _some(group: list[Answer], count: int) -> list[Answer]:
    """From both ends of the rewards by turns, so that right and wrong answers can be compared."""
    ranked = sorted(group, key=lambda answer: -answer.reward)
    turns = [ranked[i // 2] if i % 2 == 0 else ranked[-1 - i // 2] for i in range(len(ranked))]
    kept = {id(answer) for answer in turns[:count]}
    return [answer for answer in ranked if id(answer) in kept]
