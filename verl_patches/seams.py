"""The table of seams: every place where vimpo_verl enters verl, and whether it is in force in this process.

Importing this module is cheap: a seam's own module, and whatever of verl it needs, is imported when verl imports the
module that the seam belongs to. A seam that cannot be put in force never breaks a run that did not ask for VIMPO: it
says so on stderr and is remembered, and asking for VIMPO then fails in the driver with the reason.
"""

import importlib
import sys
import traceback
from dataclasses import dataclass

# Releases of verl that passed tests/compatibility/matrix.py with this version of vimpo_verl, oldest first.
TESTED_VERL = ("0.9.0", "0.9.1")


@dataclass(frozen=True)
class Seam:
    """One place where vimpo_verl enters verl.

    Attributes:
        name: what the seam is called in messages.
        module: the verl module whose import puts the seam in force.
        install: "package.module:function"; the function receives that verl module.
        touches: the verl functions or registries concerned, for the reader and for `vimpo check`.
        how: "registration", "wrapper" or "subclass".
        until: the condition on which the seam can go.
        upstream: the verl issue that would make the seam unnecessary, if there is one.
    """

    name: str
    module: str
    install: str
    touches: str
    how: str
    until: str = ""
    upstream: str = ""


SEAMS = (
    Seam(
        name="estimator and policy loss",
        module="verl.trainer.ppo.core_algos",
        install="vimpo_verl.registrations:register",
        touches="register_adv_est, register_policy_loss",
        how="registration",
        until="never: it is verl's own way to add an estimator and a policy loss",
    ),
    Seam(
        name="PACS: estimator and policy loss",
        module="verl.trainer.ppo.core_algos",
        install="vimpo_verl.pacs_registrations:register",
        touches="register_adv_est, register_policy_loss",
        how="registration",
        until="never: it is verl's own way to add an estimator and a policy loss",
    ),
    Seam(
        name="reference policy",
        module="verl.trainer.ppo.utils",
        install="verl_patches.reference_policy:install",
        touches="need_reference_policy",
        how="wrapper",
        until="verl asks the registered estimator or policy loss whether it needs a reference",
    ),
    Seam(
        name="validation in the driver",
        module="verl.utils.config",
        install="verl_patches.validation:install",
        touches="validate_config",
        how="wrapper",
        until="verl lets an estimator bring checks of its own, with what its workers are to be told",
    ),
    Seam(
        name="trainer, worker, joint pass and value loss",
        module="verl.trainer.ppo.v1",
        install="verl_patches.family_trainer:install",
        touches="PPOTrainer.__new__, role_worker_mapping, ActorRolloutRefWorker, TrainingWorker, "
        "MegatronEngineWithLMHead._lm_head_logits_processor",
        how="subclass",
        until="verl hands a registered policy loss the reference's log-probs and other fields of the batch, and a per-token "
        "statistic of both models' logits can be registered",
        upstream="volcengine/verl#7712 (reference log-probs for a registered policy loss)",
    ),
    Seam(
        name="refusal of other trainers",
        module="verl.trainer.ppo.ray_trainer",
        install="verl_patches.other_trainers:install",
        touches="RayPPOTrainer.__new__, _create_dataloader",
        how="wrapper",
        until="RayPPOTrainer and what derives from it are gone from verl and verl-recipe",
    ),
    Seam(
        name="refusal of other runners",
        module="verl.trainer.main_ppo",
        install="verl_patches.other_runners:install",
        touches="run_ppo",
        how="wrapper",
        until="every main of verl and verl-recipe validates its configuration, or runs a v1 trainer",
    ),
    Seam(
        name="presence in every process",
        module="omegaconf",
        install="verl_patches.presence:install",
        touches="OmegaConf.register_new_resolver",
        how="registration",
        until="verl says which plugins a process has loaded, and ends one that lacks a plugin that the driver has",
    ),
    Seam(
        name="complete checkpoints",
        module="verl.trainer.ppo.v1",
        install="verl_patches.checkpoints:install",
        touches="PPOTrainer._save_checkpoint, _load_checkpoint, checkpoint_callback",
        how="subclass",
        until="verl names a checkpoint in its tracker once all of it is there, and resumes from the newest whole one",
    ),
    Seam(
        name="bound on a stage",
        module="verl.trainer.ppo.v1",
        install="verl_patches.watchdog:install",
        touches="PPOTrainer.init, fit and the stages of a step",
        how="subclass",
        until="verl bounds how long a stage may stand still",
    ),
    Seam(
        name="estimator v05",
        module="verl.trainer.ppo.core_algos",
        install="vimpo_verl.v05:register",
        touches="register_adv_est",
        how="registration",
        until="never: it is verl's own way to add an estimator",
    ),
    Seam(
        name="priors",
        module="verl.trainer.ppo.v1",
        install="verl_patches.prior_state:install",
        touches="PPOTrainer._init_dataloader, _submit_batch_to_rollout, _compute_advantage and the checkpoint",
        how="subclass",
        until="verl keeps a table by prompt that an estimator can read and a checkpoint has",
    ),
    Seam(
        name="rollouts on demand",
        module="verl.trainer.ppo.v1",
        install="verl_patches.rollout_budget:install",
        touches="AgentLoopWorkerTQ._run_prompt and its agent loops, PPOTrainer's batch sizes",
        how="subclass",
        until="verl's agent loop lets a prompt ask for more responses after it has seen some",
    ),
    Seam(
        name="reward noise",
        module="verl.trainer.ppo.v1",
        install="verl_patches.reward_noise:install",
        touches="PPOTrainer._compute_advantage",
        how="subclass",
        until="verl has a hook between a batch's rewards and its advantages",
    ),
)

_in_force: set[str] = set()
_failures: dict[str, str] = {}


def hook_all() -> None:
    """Put every seam in force as soon as verl imports its module (at once where it already has)."""
    import wrapt  # here, so that `vimpo check` can read the table where nothing is installed

    for seam in SEAMS:
        wrapt.when_imported(seam.module)(lambda module, seam=seam: _install(seam, module))


def is_in_force(seam: Seam) -> bool:
    """Whether the seam is in force in this process; False also while its verl module is not imported."""
    return seam.name in _in_force


def failures() -> dict[str, str]:
    """Name of the seam -> why it could not be put in force in this process."""
    return dict(_failures)


def _install(seam: Seam, module) -> None:
    if seam.name in _in_force:
        return
    module_name, function = seam.install.split(":")
    try:
        getattr(importlib.import_module(module_name), function)(module)
    except Exception as error:
        _failures[seam.name] = f"{type(error).__name__}: {error}"
        print(
            f"vimpo_verl: the seam '{seam.name}' ({seam.module}: {seam.touches}) could not be put in force: "
            f"{_failures[seam.name]}\nRuns with verl's own estimators are not affected; algorithm.adv_estimator=vimpo, or "
            "another of this package, will be refused. Is this a verl that is tested "
            f"({', '.join(TESTED_VERL)})? Run `vimpo check`.\n" + traceback.format_exc(),
            file=sys.stderr,
            flush=True,
        )
    else:
        _in_force.add(seam.name)
