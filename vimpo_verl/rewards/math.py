r"""Reward for mathematics: is the answer of a response the right one?

    reward.custom_reward_function.path=pkg://vimpo_verl.rewards.math
    reward.custom_reward_function.name=compute_score

The answer is what stands in the last closed \boxed{...}; without a box, what math-verify finds at the end of the response.
It is brought to one notation (vimpo_verl.rewards.notation). Equal text, whole numbers and words are compared here; the rest
by math-verify, in checker processes with limits on time and memory (vimpo_verl.rewards.pool), so that no answer can hang or
fell a run. Safe in threads and in Ray actors.

Needs math-verify: pip install '.[math]' in a clone of this repository.
"""

import functools
import importlib.util
from typing import Any

from vimpo_verl.rewards import answers, notation
from vimpo_verl.rewards.answers import EQUAL, NOTHING_FOUND
from vimpo_verl.rewards.pool import Limits, pool_for

if importlib.util.find_spec("math_verify") is None:  # now, when a reward worker starts, not with the first answer
    raise ImportError(
        "vimpo_verl.rewards.math needs math-verify, which is not installed: pip install 'math-verify>=0.9,<0.10'"
    )

_MAX_GOLD = 10_000  # characters


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict | None = None,
    *,
    processes: int = Limits.processes,
    cpu_seconds: int = Limits.cpu_seconds,
    memory_mib: int = Limits.memory_mib,
    **_: Any,
) -> dict[str, Any]:
    """verl's reward function.

    Args:
        data_source, extra_info: not looked at, except for messages.
        solution_str: the decoded response.
        ground_truth: the right answer, LaTeX or plain text, with or without a box or dollars.
        processes, cpu_seconds, memory_mib: limits (vimpo_verl.rewards.pool.Limits), given as
            +reward.custom_reward_function.reward_kwargs.cpu_seconds=...

    Returns:
        score and acc, 1.0 or 0.0; reason, a few words; pred, what stood in the box, in that notation and cut to 1,000
        characters, by which verl takes majorities in validation.

    Raises:
        ValueError: the ground truth is empty or too long: the data are at fault, not the response.
        RuntimeError: no checker process can be started.
    """
    gold = _gold(ground_truth, data_source, extra_info)
    box = answers.last_box(solution_str)
    answer = _plain(box) if box is not None else answers.tail(solution_str)
    verdict = _compare(gold, answer, box is not None, Limits(processes, cpu_seconds, memory_mib))
    score = 1.0 if verdict == EQUAL else 0.0
    pred = answer[: answers.MAX_ANSWER] if box is not None else ""
    return {"score": score, "acc": score, "reason": verdict, "pred": pred}


def _plain(box: str) -> str:
    answer = answers.clean(box)
    return notation.plain(answer) if len(answer) <= answers.MAX_ANSWER else answer


@functools.lru_cache(maxsize=4096)  # the responses to a prompt give few different answers
def _compare(gold: str, answer: str, boxed: bool, limits: Limits) -> str:
    if not answer:
        return NOTHING_FOUND
    if boxed and len(answer) > answers.MAX_ANSWER:
        return f"answer longer than {answers.MAX_ANSWER} characters"
    plain = answers.compare_plainly(gold, answer)
    if plain is not None and (boxed or plain == EQUAL):
        return plain
    if boxed:
        gold, answer = notation.with_variables(gold, answer)
    return pool_for(limits).compare(gold, answer, boxed)


def _gold(ground_truth: Any, data_source: str, extra_info: dict | None) -> str:
    text = str(ground_truth)
    box = answers.last_box(text) if len(text) <= _MAX_GOLD else None
    gold = notation.plain(answers.clean(text if box is None else box)[:_MAX_GOLD])
    if ground_truth is None or not gold or len(text) > _MAX_GOLD:
        raise ValueError(
            f"the ground truth of a sample of {data_source!r} (index {(extra_info or {}).get('index')}) is "
            f"{'empty' if len(text) <= _MAX_GOLD else f'longer than {_MAX_GOLD} characters'}: every row needs its right "
            "answer in reward_model.ground_truth (examples/math/prepare_data.py checks that)"
        )
    return gold
