"""Noisy rewards: all binary rewards of a prompt's group flipped, with a given probability.

The paper's robustness experiment. Which groups are flipped is decided by a hash of the seed, the training step and the
prompt's place in its data set, and by nothing else: not by the algorithm, the answers, the order of the batch or the
number of ranks. So two runs over the same data with the same seeds get the same flips. Imports the standard library only.
"""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vimpo_verl import section as section_reader

SECTION = "algorithm.reward_noise"

_HASH_BITS = 64


@dataclass(frozen=True)
class RewardNoiseConfig:
    """Knobs under `algorithm.reward_noise`.

    Attributes:
        flip_prob: probability that the rewards of a prompt's group are flipped at a step, in [0, 1]; 0 is no noise.
        seed: which groups; two runs that are to be compared need the same one.
    """

    flip_prob: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class NoisyRewards:
    """The outcome of `flip_groups` for a batch.

    Attributes:
        rewards: [B], the rewards to train on.
        clean_mean, noisy_mean: mean reward over the responses before and after.
        flipped_groups: number of groups flipped.
    """

    rewards: list[float]
    clean_mean: float
    noisy_mean: float
    flipped_groups: int


def parse_config(section: Mapping[str, Any] | None) -> tuple[RewardNoiseConfig, list[str]]:
    """Read `algorithm.reward_noise`, collecting every problem.

    Args:
        section: the mapping under `algorithm.reward_noise`, or None if the user gave none.

    Returns:
        The configuration (defaults where a value was unusable) and the problems found, each a sentence that names the
        key and says what to write instead. The configuration may be used only if there are none.
    """
    values, problems = section_reader.read(section, SECTION, _CHECKS, f"+{SECTION}.flip_prob=0.2")
    if section is not None and "flip_prob" not in values and not problems:
        problems.append(f"{SECTION} lacks flip_prob: write +{SECTION}.flip_prob=0.2, or remove the section")
    return RewardNoiseConfig(**values), problems


def is_flipped(config: RewardNoiseConfig, step: int, prompt: Sequence[Any]) -> bool:
    """Whether the group of a prompt is flipped at a step.

    Args:
        config: the knobs.
        step: the training step.
        prompt: what names the prompt in the data, such as (data_source, index): integers and text.

    Returns:
        True for a share flip_prob of all (seed, step, prompt), independently of one another. The flips of a lower
        flip_prob are among those of a higher one.
    """
    text = repr((int(config.seed), int(step), *(_plain(part) for part in prompt)))
    digest = hashlib.sha256(text.encode()).digest()
    uniform = int.from_bytes(digest[: _HASH_BITS // 8], "big") / 2**_HASH_BITS
    return uniform < config.flip_prob


def flip_groups(
    config: RewardNoiseConfig,
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    steps: Sequence[int],
    prompts: Sequence[Sequence[Any]],
    names: Sequence[str],
) -> NoisyRewards:
    """Flip the rewards of the groups that the hash chooses.

    Args:
        config: the knobs.
        rewards: [B], each 0 or 1.
        groups: [B], the group of each response; all its responses have the same step and prompt.
        steps: [B], the training step.
        prompts: [B], what names the prompt, as for `is_flipped`.
        names: [B], what to call a response in an error.

    Returns:
        The rewards to train on, [B], and what to log.

    Raises:
        ValueError: a reward is neither 0 nor 1, or the batch is empty.
    """
    if not len(rewards):
        raise ValueError(f"{SECTION}: the batch has no rewards")
    _require_binary(rewards, names)
    flipped = [is_flipped(config, step, prompt) for step, prompt in zip(steps, prompts, strict=True)]
    noisy = [1.0 - reward if flip else float(reward) for reward, flip in zip(rewards, flipped, strict=True)]
    return NoisyRewards(
        rewards=noisy,
        clean_mean=math.fsum(rewards) / len(rewards),
        noisy_mean=math.fsum(noisy) / len(noisy),
        flipped_groups=len({group for group, flip in zip(groups, flipped, strict=True) if flip}),
    )


def _require_binary(rewards: Sequence[float], names: Sequence[str]) -> None:
    bad = [(name, reward) for name, reward in zip(names, rewards, strict=True) if reward not in (0, 1)]
    if bad:
        name, reward = bad[0]
        raise ValueError(
            f"{SECTION}: the reward of sample {name} is {reward} ({len(bad)} of {len(rewards)} in the batch are neither 0 "
            "nor 1), and only 0 and 1 can be flipped. Use a reward function that returns 0 or 1, such as "
            f"vimpo_verl/rewards/math.py, or remove {SECTION}"
        )


def _plain(part: Any) -> Any:
    """NumPy integers and strings print differently from release to release; Python's do not."""
    if isinstance(part, str):
        return str(part)
    return int(part)


_CHECKS = {
    "flip_prob": section_reader.number_where(
        lambda number: 0.0 <= number <= 1.0, "write a number from 0 to 1, such as 0.2"
    ),
    "seed": section_reader.integer,
}
