"""Which of verl's example scripts take the switch; docs/compatibility.md and the README's fraction are made from it.

    .venv/bin/python tests/compatibility/recipes.py --verl FOLDER [FOLDER ...]     checkouts of verl and verl-recipe
    .venv/bin/python tests/compatibility/recipes.py --again     after a change of what is refused, without a checkout

Every script is run with a stub in python's place (recipe_scripts.py); what it hands to verl.trainer.main_ppo is composed by
Hydra on the installed verl and put through the driver's checks, with the script's own estimator and with vimpo. Nothing is
trained. Written are recipes.json, the table of docs/compatibility.md and the fraction of the README.

A checkout may be newer than the installed verl. An override that this verl does not know is left out, a plus before a key that
it has is made a plus plus, both are counted, and the rest of the script is checked: what VIMPO says does not depend on them.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import recipe_scripts

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MAIN = "verl.trainer.main_ppo"
REFUSED = "algorithm.adv_estimator=vimpo cannot run with this configuration:\n"
# The keys below which a script's settings are kept, where they differ from verl's: those that the checks may look at. With them
# the checks are run again without a checkout, by `--again` and by a test.
KEPT = (
    "algorithm",
    "distillation.enabled",
    "critic.enable",
    "trainer.use_v1",
    "trainer.v1.trainer_mode",
    "actor_rollout_ref",
)
# Of those, what says how large, how fast and where from, and no more.
NOT_KEPT = re.compile(
    r"actor_rollout_ref\.(rollout\.(?!n$|calculate_log_probs$)|model\.(enable|use_remove|custom|target|exclude)|nccl|hybrid)"
    r"|actor_rollout_ref\..*(optim|profiler|checkpoint|(?<!adapter_)path$|files$|override_|offload|bsz|micro_batch|token_len"
    r"|trust_remote|torch_compile|infer_|turbo_config\.(?!distributed\.ulysses))|algorithm\.(kl_ctrl|pf_ppo)"
)


@dataclass
class Recipe:
    """What was found of one script that starts verl.trainer.main_ppo.

    Attributes:
        script: path in its checkout.
        launcher: what starts the driver, and by that the workers: "uv", "python3", ...
        given: variables that the script asks for and was given 1.
        mended: overrides that the installed verl does not compose, as they stand in the script.
        engine: actor.strategy; "?" where the script's overrides do not compose at all.
        plain: plain GRPO, that is the estimator grpo with verl's vanilla policy loss and no distillation.
        settings: what is kept of its configuration (KEPT) and not as verl has it.
        own: what verl says with the script's own estimator; "" where it accepts the configuration.
        refused: keys that VIMPO refuses, as "key=value"; empty where the script takes the switch.
        warned: keys that VIMPO warns of.
    """

    script: str
    launcher: str
    given: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    engine: str = ""
    plain: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    own: str = ""
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "accepted", or why not."""
        return ", ".join(self.refused) or (self.own if self.engine == "?" else "accepted")


def main(checkouts: list[Path]) -> int:
    import recipes_page
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VERL_PLATFORM", "cpu")
    if checkouts:
        found = [run_checkout(checkout.resolve()) for checkout in checkouts]
    else:
        found = json.loads(recipes_page.RESULTS.read_text())["checkouts"]
        for checkout in found:
            checkout["recipes"] = [r if r["engine"] == "?" else again(r) for r in checkout["recipes"]]
    results = {"date": datetime.date.today().isoformat(), "verl": metadata.version("verl"), "checkouts": found}
    recipes_page.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    recipes_page.write(results)
    print(recipes_page.summary(results))
    return 0


def run_checkout(checkout: Path) -> dict:
    """Every script of one checkout."""
    recipes, elsewhere, silent = [], {}, {}
    folders = ("examples",) if (checkout / "examples").is_dir() else (".",)
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        sandbox = recipe_scripts.Sandbox(checkout, Path(folder))
        for script in recipe_scripts.find_scripts(checkout, folders):
            ran = sandbox.run(script)
            if not ran.commands:
                silent[str(script)] = ran.error
            for command in ran.commands:
                if command.module == MAIN:
                    recipes.append(check(str(script), ran, command))
                    print(f"{script}: {recipes[-1].verdict}", flush=True)
                else:
                    elsewhere.setdefault(command.module, []).append(str(script))
    return {
        "name": checkout.name,
        "commit": _git(checkout, "rev-parse", "--short=9", "HEAD"),
        "committed": _git(checkout, "log", "-1", "--format=%cs"),
        "recipes": [asdict(recipe) for recipe in recipes],
        "other_modules": elsewhere,
        "started_nothing": silent,
    }


def _git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", checkout, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def check(script: str, ran: recipe_scripts.ScriptRun, command: recipe_scripts.Command) -> Recipe:
    """Compose what a script hands to main_ppo, and put it through the driver's checks twice.

    Args:
        script: path in its checkout.
        ran: what running it showed.
        command: its start of main_ppo.
    """
    recipe = Recipe(script, command.launcher, given=list(ran.given))
    location, overrides = split(command.arguments)
    try:
        config, recipe.mended = mend(overrides, location)
    except Exception as error:
        recipe.own = f"does not compose: {_first_line(error)}"
        recipe.engine = "?"
        return recipe
    recipe.engine = config.actor_rollout_ref.actor.strategy
    recipe.settings = settings(config)
    recipe.plain = is_plain(recipe.settings)
    recipe.own = validate(copy.deepcopy(config))[0]
    config.algorithm.adv_estimator = "vimpo"
    _, recipe.refused, recipe.warned = validate(config)
    return recipe


def split(arguments: tuple[str, ...]) -> tuple[tuple[str, str], list[str]]:
    """Hydra's options and overrides of a command line -> (folder, name) of the configuration, and the overrides."""
    import verl.trainer

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config-path", "-cp", default="config")
    parser.add_argument("--config-name", "-cn", default="ppo_trainer")
    options, overrides = parser.parse_known_args(arguments)
    folder = Path(verl.trainer.__file__).parent / options.config_path  # Hydra's: relative to the module that is started
    return (str(folder.resolve()), options.config_name.removesuffix(".yaml")), overrides


def compose(overrides: list[str], location: tuple[str, str]):
    """verl's configuration with these overrides, as its driver has it."""
    import hydra
    import verl.trainer.main_ppo  # noqa: F401  registers resolvers, and is where a run starts

    folder, name = location
    with hydra.initialize_config_dir(folder, version_base=None):
        return hydra.compose(name, overrides)


# What Hydra, and verl's dataclasses, say of an override that the installed verl has no place for.
_UNKNOWN = (
    re.compile(r"Could not override '([^']+)'"),
    re.compile(r"full_key: (\S+)"),
    re.compile(r"unexpected keyword argument '([^']+)'"),
)
_THERE_ALREADY = re.compile(r"Could not append to config\. An item is already at '([^']+)'")
# `actor@actor_rollout_ref.actor=mlite_actor`: the sections of an engine that another package brings.
_OTHERS_ENGINE = re.compile(r"\w+@(actor_rollout_ref\.\w+|critic)=(\w+?)_\w+")
_MOVED = {"actor_rollout_ref.actor.model_engine=": "model_engine="}  # where verl 0.9.1 has it


def mend(overrides: list[str], location: tuple[str, str]) -> tuple[Any, list[str]]:
    """Leave out, or write as this verl has it, what the installed verl has no key for.

    Returns:
        The configuration, and those of the overrides that had to be left out or changed.

    Raises:
        Exception: Hydra's, where none of the overrides is to blame.
    """
    overrides, mended = list(overrides), []
    while True:
        try:
            config = compose(overrides, location)
            _build(config)
        except Exception as error:
            at, replacement = _to_blame(overrides, str(error))
            if at is None:
                raise
            mended.append(overrides[at])
            overrides[at : at + 1] = replacement
        else:
            return config, mended


def _build(config: Any) -> None:
    """The part of verl's checks in which an override becomes an argument that its dataclasses may not know."""
    from verl.utils.config import omega_conf_to_dataclass

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        except Exception as error:
            if "unexpected keyword argument" in str(error):
                raise


def _to_blame(overrides: list[str], message: str) -> tuple[int | None, list[str]]:
    """Position of the override that stands in the way, and what to write in its place."""
    for at, override in enumerate(overrides):
        if foreign := _OTHERS_ENGINE.fullmatch(override):
            section, engine = foreign.groups()
            return at, [f"{section}.strategy={engine}"] if section.startswith("actor_rollout_ref.") else []
        for old, new in _MOVED.items():
            if override.startswith(old):
                return at, [override.replace(old, new)]
    if there := _THERE_ALREADY.search(message):
        at = _find(overrides, there.group(1))
        return at, [] if at is None else [f"+{overrides[at]}"]
    for pattern in _UNKNOWN:
        if (found := pattern.search(message)) and (at := _find(overrides, found.group(1))) is not None:
            return at, []
    blamed = [at for at, override in enumerate(overrides) if override in message]
    return (blamed[0], []) if blamed else (None, [])


def _find(overrides: list[str], key: str) -> int | None:
    """The override of this key, or of the last part of one."""
    keys = [override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides]
    return next((at for at, name in enumerate(keys) if name == key or name.endswith(f".{key}")), None)


def settings(config: Any) -> dict[str, Any]:
    """What is kept of a script's configuration: key -> value, where verl's default for its engine is another."""
    given, defaults = _flat(config), _flat(base_of(config.actor_rollout_ref.actor.strategy))
    kept = [key for key in given if key.startswith(KEPT) and not NOT_KEPT.match(key)]
    return {key: given[key] for key in kept if given[key] != defaults.get(key)}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    found: dict[str, Any] = {}
    for key, value in container.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


@functools.cache
def base_of(engine: str):
    """verl's configuration for an engine, before a script's overrides."""
    group = [f"model_engine={engine}"] if engine in ("megatron", "veomni", "torchtitan") else []
    return compose(group, split(())[0])


def again(recipe: dict) -> dict:
    """Put a script's kept settings through VIMPO's checks as they are now; what they say takes the place of what they said."""
    from omegaconf import OmegaConf

    config = copy.deepcopy(base_of(recipe["engine"]))
    OmegaConf.set_struct(config, False)
    for key, value in {**NEEDED, **recipe["settings"], "algorithm.adv_estimator": "vimpo"}.items():
        OmegaConf.update(config, key, value, force_add=True)
    _, refused, warned = validate(config)
    return {**recipe, "refused": refused, "warned": warned}


# What verl's checks want of every recipe, whatever its size.
NEEDED = {"actor_rollout_ref.actor.use_dynamic_bsz": True, "actor_rollout_ref.model.path": "somewhere"}


def is_plain(given: dict[str, Any]) -> bool:
    """Whether a script's settings make it plain GRPO: the estimator grpo, the loss vanilla, nothing distilled."""
    loss = given.get("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla")
    distilled = given.get("distillation.enabled", False)
    return given.get("algorithm.adv_estimator") == "grpo" and loss == "vanilla" and not distilled


def validate(config: Any) -> tuple[str, list[str], list[str]]:
    """As verl's driver does it.

    Returns:
        What verl itself says, "" where it accepts the configuration; the keys that VIMPO refuses; those that it warns of.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    with _heard() as warnings, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        except Exception as error:
            text = str(error)
            if text.startswith(REFUSED):
                return "", [key_of(line) for line in text.removeprefix(REFUSED).splitlines()], []
            return _first_line(error), [], []
    return "", [], [key_of(warning) for warning in warnings]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def key_of(sentence: str) -> str:
    """The "key=value" that a refusal or a warning begins with; its first words where it begins with none."""
    found = re.match(r"\s*(?:\d+\. )?(?:vimpo_verl: )?([\w.]+=[^\s:]*)", sentence)
    return found.group(1) if found else " ".join(re.sub(r"^\s*\d+\. ", "", sentence).split()[:6])


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What VIMPO's logger says inside the block."""
    import logging

    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("vimpo_verl")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = arguments.add_mutually_exclusive_group(required=True)
    source.add_argument("--verl", type=Path, nargs="+", default=[], metavar="FOLDER")
    source.add_argument(
        "--again", action="store_true", help="the kept settings of the last time, after a change of the checks"
    )
    sys.exit(main(arguments.parse_args().verl))
