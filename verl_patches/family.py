"""The estimators of this package: what each brings, in one table. Imports nothing of verl.

An estimator is chosen by algorithm.adv_estimator=<name> and has its knobs under algorithm.<name>. What it brings stands here as
"package.module:attribute" and is imported when a run asks for it: a process of another run imports none of it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Member:
    """One estimator.

    Attributes:
        name: of algorithm.adv_estimator, of its section under algorithm, and before the slash of its metrics.
        title: what messages call it.
        config: the function that reads its section: what stands there -> (knobs, problems).
        recipe: the module with problems(config) and warnings(config, knobs) of a recipe; where there is something to say of
            what an accepted one comes to, plan(config, knobs); where it sets anything of it right, adjust(config).
        trainer: the class that is put in front of verl's trainer, derived from family_trainer.FamilyTrainer.
        policy_loss: the class of actor.policy_loss that carries the knobs to the workers, in a field of the estimator's
            name; verl's loss_mode is the name, too. "": the workers need none, and verl's own policy loss stays.
        keeps_policy_loss: whether the recipe's own loss_mode goes to the workers, too, in the field recipe_loss_mode.
        needs_reference: whether verl is to load a reference policy for it.
    """

    name: str
    title: str
    config: str
    recipe: str
    trainer: str
    policy_loss: str = ""
    keeps_policy_loss: bool = False
    needs_reference: bool = False

    def parse_config(self, section: Any) -> tuple[Any, list[str]]:
        """The knobs, and the problems found in them."""
        return _attribute(self.config)(section)

    def recipe_checks(self) -> Any:
        """The module with problems and warnings."""
        return importlib.import_module(self.recipe)

    def trainer_part(self) -> type:
        """The class to put in front of verl's trainer."""
        return _attribute(self.trainer)


FAMILY = {
    member.name: member
    for member in (
        Member(
            name="vimpo",
            title="VIMPO",
            config="vimpo_verl.config:parse_config",
            recipe="verl_patches.recipe_checks",
            trainer="verl_patches.one_pass:OnePassTrainer",
            policy_loss="verl_patches.policy_loss_config:VimpoPolicyLossConfig",
            keeps_policy_loss=True,
            needs_reference=True,
        ),
        Member(
            name="pacs",
            title="PACS",
            config="vimpo_verl.pacs_config:parse_config",
            recipe="verl_patches.pacs_checks",
            trainer="verl_patches.pacs_trainer:PacsTrainer",
            policy_loss="verl_patches.policy_loss_config:PacsPolicyLossConfig",
        ),
        Member(
            name="v05",
            title="V0.5",
            config="vimpo_verl.v05_config:parse_config",
            recipe="verl_patches.v05_recipe",
            trainer="verl_patches.v05:V05Trainer",
        ),
    )
}


def _attribute(path: str) -> Callable:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
