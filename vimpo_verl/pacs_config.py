"""The knobs of PACS, read from `algorithm.pacs` of verl's configuration: the only place with their defaults, which are the
authors'. Imports the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vimpo_verl import section as section_reader
from vimpo_verl import timeouts
from vimpo_verl.section import number_where, one_of
from vimpo_verl.timeouts import Timeouts

SECTION = "algorithm.pacs"

SCORES = ("rloo", "group_normalised", "dr_grpo", "plain")
CLASS_WEIGHTS = ("question", "only_positive", "only_negative", "off")
REWARD_METHODS = ("log_ratio", "mean_log_prob")


@dataclass(frozen=True)
class PacsConfig(Timeouts):
    """Knobs under `algorithm.pacs`; what each does to the equations is in docs/algorithms.md.

    Attributes:
        beta: weight of the log-probs in a response's score, > 0.
        score: how a response is compared with its group: "rloo", "group_normalised", "dr_grpo" or "plain".
        class_weight: "question" balances right and wrong answers of a group; "only_positive", "only_negative", "off".
        reward_method: "log_ratio", the sum of the log-ratios to the old policy, or "mean_log_prob".
        stage_timeout, validation_timeout, startup_timeout: see Timeouts.
    """

    beta: float = 1.0
    score: str = "rloo"
    class_weight: str = "question"
    reward_method: str = "log_ratio"


def parse_config(section: Mapping[str, Any] | None) -> tuple[PacsConfig, list[str]]:
    """Read `algorithm.pacs`, collecting every problem; as vimpo_verl.config.parse_config."""
    values, problems = section_reader.read(section, SECTION, _CHECKS, f"+{SECTION}.<name>=<value>")
    return PacsConfig(**values), problems


_CHECKS = {
    "beta": number_where(lambda number: number > 0, "write a number greater than 0"),
    "score": one_of(*SCORES),
    "class_weight": one_of(*CLASS_WEIGHTS),
    "reward_method": one_of(*REWARD_METHODS),
    **timeouts.CHECKS,
}
