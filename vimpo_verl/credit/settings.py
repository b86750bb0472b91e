"""What a run's own configuration says: Hydra leaves it beside the checkpoints of the launch scripts here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vimpo_verl import beta as betas
from vimpo_verl.checkpoint import Checkpoint
from vimpo_verl.config import VimpoConfig, parse_config

PAPER_LAM = 1.0  # verl's own default of algorithm.lam as well


@dataclass(frozen=True)
class RunSettings:
    """What `vimpo credit` would otherwise be told on the command line.

    Attributes:
        source: the configuration's file, or None: all values are the defaults.
        vimpo: the knobs of VIMPO; beta is the checkpoint's own where it has one.
        beta_from: where a number for beta was found; None: nowhere, it is "auto".
        lam: GAE's lambda.
        temperature: of the rollout, by which logits are divided.
        reference: path or name of the model that training started from.
        answers: where verl wrote its rollouts.
        data: the run's training and validation files.
        max_response_tokens: an answer as long as that was cut off.
        template: arguments of the chat template.
        problems: what is wrong in it, each a sentence.
    """

    source: Path | None = None
    vimpo: VimpoConfig = VimpoConfig()
    beta_from: str | None = None
    lam: float = PAPER_LAM
    temperature: float = 1.0
    reference: Path | None = None
    answers: Path | None = None
    data: list[Path] = field(default_factory=list)
    max_response_tokens: int | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def of_run(policy: Checkpoint | Path | None) -> RunSettings:
    """The settings of the run that a checkpoint belongs to; the defaults where its configuration is not found."""
    if not isinstance(policy, Checkpoint):
        return RunSettings()
    run = _configured(policy.step.parent.parent / "hydra" / ".hydra" / "config.yaml")
    try:
        kept = betas.load(policy.step)
    except ValueError as error:
        return replace(run, problems=[*run.problems, str(error)])
    if kept is None:
        return run
    return replace(run, vimpo=replace(run.vimpo, beta=kept.value), beta_from=f"the checkpoint's {betas.STATE}")


def _configured(path: Path) -> RunSettings:
    if not path.is_file():
        return RunSettings()
    from omegaconf import OmegaConf

    config = OmegaConf.load(path)

    def get(key: str, default: Any = None) -> Any:
        value = OmegaConf.select(config, key, default=default)
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    vimpo, problems = parse_config(get("algorithm.vimpo"))
    return RunSettings(
        source=path,
        vimpo=vimpo,
        beta_from=None if vimpo.beta == "auto" else "the run's configuration",
        lam=get("algorithm.lam", PAPER_LAM),
        temperature=get("actor_rollout_ref.rollout.temperature", 1.0),
        reference=_path(get("actor_rollout_ref.model.path")),
        answers=_path(get("trainer.rollout_data_dir")),
        data=_paths(get("data.train_files")) + _paths(get("data.val_files")),
        max_response_tokens=get("data.max_response_length"),
        template=get("data.apply_chat_template_kwargs") or {},
        problems=[f"{path}: {problem}" for problem in problems],
    )


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


def _paths(value: str | list[str] | None) -> list[Path]:
    return [Path(item) for item in ([value] if isinstance(value, str) else value or [])]
