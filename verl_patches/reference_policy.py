"""Seam: the reference policy is needed for VIMPO (and whatever estimator says so), although no KL term asks for it.

Touches verl.trainer.ppo.utils.need_reference_policy, which looks at use_kl_loss and use_kl_in_reward only. Wrapped when
verl imports that module, before others import the function by name. Checked against verl 0.9.1; no upstream issue.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_patches.functions import wrap
from verl_patches.switch import member_of


def install(utils: ModuleType) -> None:
    """Wrap need_reference_policy in the module verl.trainer.ppo.utils."""
    wrap(utils, "need_reference_policy", _need_reference_policy)


def _need_reference_policy(verls: Callable, config: Any) -> bool:
    member = member_of(config)
    return True if member and member.needs_reference else verls(config)
