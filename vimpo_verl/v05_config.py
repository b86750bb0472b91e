"""The knobs of V0.5 under `algorithm.v05`: those that every estimator has. Its budget is algorithm.rollout_budget, its prior
algorithm.prior. Imports the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vimpo_verl import section as section_reader
from vimpo_verl import timeouts

SECTION = "algorithm.v05"


@dataclass(frozen=True)
class V05Config(timeouts.Timeouts):
    """Knobs under `algorithm.v05`. Attributes: see timeouts.Timeouts."""


def parse_config(section: Mapping[str, Any] | None) -> tuple[V05Config, list[str]]:
    """Read `algorithm.v05`, collecting every problem.

    Args:
        section: the mapping under `algorithm.v05`, or None if the user gave none.

    Returns:
        The configuration (defaults where a value was unusable) and the problems found, each a sentence that names the
        key and says what to write instead. The configuration may be used only if there are none.
    """
    values, problems = section_reader.read(section, SECTION, timeouts.CHECKS, f"+{SECTION}.<name>=<value>")
    return V05Config(**values), problems
