"""Carries the knobs of an estimator to the workers: the typed `actor.policy_loss` that verl builds through its _target_.

Touches verl.workers.config.PolicyLossConfig (subclass). Checked against verl 0.9.1.
"""

from dataclasses import dataclass, field

from verl.workers.config import PolicyLossConfig

from vimpo_verl.config import VimpoConfig
from vimpo_verl.pacs_config import PacsConfig


@dataclass
class FamilyPolicyLossConfig(PolicyLossConfig):
    """PolicyLossConfig of a run with an estimator of this package; a subclass has the knobs under the estimator's name."""

    def __post_init__(self):
        """Built in every process that trains: the place to notice that the plugin was not loaded there."""
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

        if self.loss_mode not in POLICY_LOSS_REGISTRY:
            raise RuntimeError(
                f"the policy loss {self.loss_mode!r} is not registered in this process: verl did not load the plugin "
                "here. Is vimpo_verl installed in this process's environment, and is VERL_USE_EXTERNAL_PLUGINS unset? "
                "Run `vimpo check` there"
            )


@dataclass
class VimpoPolicyLossConfig(FamilyPolicyLossConfig):
    """Of a VIMPO run.

    Attributes:
        vimpo: the knobs, as validated in the driver.
        recipe_loss_mode: the recipe's own loss_mode, which is the form of L_A; its other keys stay where they are.
    """

    vimpo: VimpoConfig = field(default_factory=VimpoConfig)
    recipe_loss_mode: str = "vanilla"


@dataclass
class PacsPolicyLossConfig(FamilyPolicyLossConfig):
    """Of a PACS run.

    Attributes:
        pacs: the knobs, as validated in the driver.
    """

    pacs: PacsConfig = field(default_factory=PacsConfig)
