"""Everything that is needed before weights are read, and every problem with it at once."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from vimpo_verl.beta import STATE
from vimpo_verl.checkpoint import Checkpoint, NotAModel, locate
from vimpo_verl.config import BASELINES_WITH_PRIOR, VimpoConfig
from vimpo_verl.credit import models
from vimpo_verl.credit.answers import Answer, answers_file, choose, read_answers
from vimpo_verl.credit.settings import RunSettings, of_run
from vimpo_verl.credit.tokens import Encoded, Encoder


@dataclass(frozen=True)
class Inputs:
    """What will be scored, and how.

    Attributes:
        policy, reference: the models.
        groups: answers in tokens, by prompt.
        vimpo: the run's knobs, or the defaults, with beta as asked for.
        lam, temperature: as in training.
        settings: the same and the paths, as the page shows them.
        notes: what a reader must know.
    """

    policy: models.Described
    reference: models.Described
    groups: list[list[Encoded]]
    vimpo: VimpoConfig
    lam: float
    temperature: float
    settings: dict
    notes: list[str]


def gather(arguments: argparse.Namespace) -> tuple[Inputs | None, list[str]]:
    """The inputs that the command line asks for, or what is wrong with them, each a sentence."""
    policy, reference, run, problems = describe_pair(arguments.policy, arguments.reference)
    answers, more = _answers(arguments.answers or run.answers)
    problems += more
    data = arguments.data or [path for path in run.data if path.is_file()]
    problems += [f"--data {path}: there is no such file" for path in data if not path.is_file()]
    beta, beta_from = _beta(arguments.beta, run)
    if beta is None and policy:  # without one, what its run says is not known either
        problems.append(beta_from)
    if problems:
        return None, problems
    encoder = Encoder(policy.tokenizer, data, run.template, run.max_response_tokens)
    answers = with_baselines(answers, run.vimpo)
    groups, problems = encoder.encode(choose(answers, arguments.prompts, arguments.per_prompt))
    problems += _too_long(groups, policy, reference) + _unknown_ids(groups, policy)
    inputs = Inputs(
        policy, reference, groups,
        replace(run.vimpo, beta=beta),
        run.lam if arguments.lam is None else arguments.lam,
        arguments.temperature or run.temperature,
        settings={}, notes=[f"beta={beta:.6g}, {beta_from}", *_baseline_note(run.vimpo), *encoder.notes],
    )  # fmt: skip
    return replace(inputs, settings=_shown(inputs, arguments, run, answers)), problems


def describe_pair(
    policy_path: Path, reference_path: Path | None
) -> tuple[models.Described | None, models.Described | None, RunSettings, list[str]]:
    """Policy, reference and the settings of the policy's run, and what is wrong with them, each a sentence.

    Args:
        policy_path: as for `models.describe`.
        reference_path: the same; None: as the run's configuration says.
    """
    policy, problems = models.describe(policy_path, "policy")
    run = of_run(policy.found) if policy else RunSettings()
    problems += run.problems
    reference = None
    if reference_path or run.reference:
        reference, more = models.describe(reference_path or run.reference, "reference")
        problems += more
    elif policy or _is_model(policy_path):
        problems.append(
            "reference: not known from a run's configuration: give --reference, the model that training started from"
        )
    if policy and reference:
        problems += models.differences(policy, reference)
    return policy, reference, run, problems


def _beta(given: float | None, run: RunSettings) -> tuple[float | None, str]:
    """The number to score with, and where it is from; None, and what to do about it, where nobody says."""
    if given is not None:
        return given, "as given with --beta"
    if run.beta_from is not None:
        return run.vimpo.beta, f"from {run.beta_from}"
    return None, (
        f"beta: not known: there is no {STATE} in a checkpoint and no number in a run's configuration: give --beta. A run "
        f"with 0/1 rewards has {run.vimpo.beta_scale:g} / (mean length of its first answers in tokens) by itself; one of "
        "version 0.1.0 had 5e-4"
    )


def _is_model(path: Path) -> bool:
    try:
        return bool(locate(path))
    except NotAModel:
        return False


def _answers(path: Path | None) -> tuple[list[Answer], list[str]]:
    if path is None:
        return [], ["answers: give --answers FILE; a run writes them with trainer.rollout_data_dir=FOLDER"]
    answers, problems = read_answers(answers_file(path))
    return answers, [f"answers: {problem}" for problem in problems]


def with_baselines(answers: list[Answer], config: VimpoConfig) -> list[Answer]:
    """The answers with V0, over all answers of the file, also those that will not be shown."""
    from vimpo_verl.credit.scoring import baselines

    v0 = baselines([answer.reward for answer in answers], [answer.group for answer in answers], config)
    return [replace(answer, baseline=baseline) for answer, baseline in zip(answers, v0, strict=True)]


def _baseline_note(config: VimpoConfig) -> list[str]:
    if config.baseline not in BASELINES_WITH_PRIOR:
        return []
    return [f"V0 is the group's mean here: the answers do not have the priors of the run's baseline={config.baseline}"]


def _too_long(groups: list[list[Encoded]], *described: models.Described) -> list[str]:
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in described]
    limit = min((limit for limit in limits if limit), default=None)
    return [
        f"{encoded.answer.where}: prompt and answer have {length} tokens, the models take {limit}"
        for group in groups
        for encoded in group
        if limit is not None and (length := len(encoded.prompt_ids) + len(encoded.response_ids)) > limit
    ]


def _unknown_ids(groups: list[list[Encoded]], policy: models.Described) -> list[str]:
    size = policy.config.get_text_config().vocab_size
    return [
        f"{encoded.answer.where}: token {worst} is not among the models' {size} vocabulary entries"
        for group in groups
        for encoded in group
        if (worst := max(encoded.prompt_ids + encoded.response_ids, default=0)) >= size
    ]


def _shown(inputs: Inputs, arguments: argparse.Namespace, run: RunSettings, answers: list[Answer]) -> dict:
    found = inputs.policy.found
    return {
        "policy": str(found.step if isinstance(found, Checkpoint) else found),
        "reference": str(arguments.reference or run.reference),
        "answers": str(answers_file(arguments.answers or run.answers)),
        "answers_in_file": len(answers),
        "beta": inputs.vimpo.beta,
        "lam": inputs.lam,
        "temperature": inputs.temperature,
        "kl_estimator": run.vimpo.kl_estimator,
        "baseline": run.vimpo.baseline,
        "run_configuration": str(run.source) if run.source else None,
    }
