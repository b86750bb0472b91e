"""`vimpo check`: would algorithm.adv_estimator=vimpo work in this environment?

Every check is one line: what was looked at, what was found and, where it fails, what to do. Nothing is trained, Ray is
not started, no GPU is touched.
"""

import contextlib
import importlib
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from vimpo_verl import __version__

OK, NOTE, FAIL = "ok", "note", "FAIL"
_PLUGIN_GROUP, _PLUGIN_NAME = "verl.plugins", "vimpo"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `verdict` is OK, NOTE (does not stop the switch) or FAIL."""

    verdict: str
    subject: str
    text: str


def run_checks() -> list[Finding]:
    """Every finding, in order. The list ends where a failure makes the later checks meaningless."""
    findings: list[Finding] = []
    for check in _CHECKS:
        findings += check()
        if any(f.verdict == FAIL for f in findings) and check in (_verl, _entry_point, _plugin_loaded):
            break
    return findings


def main(write: Callable[[str], None] = print) -> int:
    """Print the report; 0 if the switch would work here, else 1."""
    with _quiet():
        findings = run_checks()
    for finding in findings:
        write(f"[{finding.verdict:>4}] {finding.subject}: {finding.text}")
    failed = sum(finding.verdict == FAIL for finding in findings)
    write(
        "No: algorithm.adv_estimator=vimpo would not work in this environment, see FAIL above."
        if failed
        else "Yes: algorithm.adv_estimator=vimpo works in this environment."
    )
    return 1 if failed else 0


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Finding(
        OK if supported else NOTE,
        "python",
        version if supported else f"{version}; vimpo_verl is made for 3.10 to 3.12",
    )
    yield Finding(OK, "vimpo_verl", __version__)


def _verl() -> Iterator[Finding]:
    from verl_patches.seams import TESTED_VERL

    try:
        installed = metadata.version("verl")
    except metadata.PackageNotFoundError:
        yield Finding(FAIL, "verl", f"not installed here ({sys.executable}): pip install verl=={TESTED_VERL[-1]}")
        return
    try:
        importlib.import_module("verl")
    except Exception as error:
        yield Finding(FAIL, "verl", f"{installed} cannot be imported: {_reason(error)}")
        return
    if installed in TESTED_VERL:
        yield Finding(OK, "verl", f"{installed}, tested")
    else:
        yield Finding(NOTE, "verl", f"{installed} is not a tested version ({', '.join(TESTED_VERL)})")


def _entry_point() -> Iterator[Finding]:
    found = [entry for entry in metadata.entry_points(group=_PLUGIN_GROUP) if entry.name == _PLUGIN_NAME]
    if not found:
        yield Finding(
            FAIL,
            "entry point",
            f"no '{_PLUGIN_NAME}' in group {_PLUGIN_GROUP}: verl cannot find the plugin. vimpo_verl is on the path but "
            "not installed: pip install it into this environment",
        )
        return
    yield Finding(OK, "entry point", f"{_PLUGIN_GROUP}: {found[0].name} = {found[0].value}")


def _plugin_loaded() -> Iterator[Finding]:
    if "vimpo_verl.plugin" in sys.modules:
        yield Finding(OK, "plugin", "loaded by verl in `import verl`")
        return
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    try:
        importlib.import_module("vimpo_verl.plugin")
        reason = (
            f"verl skipped it: VERL_USE_EXTERNAL_PLUGINS={policy}; unset it or name vimpo in it"
            if policy != "auto"
            else f"verl {metadata.version('verl')} does not load plugins: it needs a verl from 0.9.0 on"
        )
    except Exception as error:
        reason = f"it cannot be imported: {_reason(error)}"
    yield Finding(FAIL, "plugin", f"not loaded by verl; {reason}")


def _seams() -> Iterator[Finding]:
    from verl_patches.seams import SEAMS, failures, is_in_force

    for seam in SEAMS:
        place = f"{seam.module}: {seam.touches}"
        try:
            importlib.import_module(seam.module)
        except Exception as error:
            yield Finding(FAIL, f"seam '{seam.name}'", f"{seam.module} cannot be imported: {_reason(error)}")
            continue
        if is_in_force(seam):
            yield Finding(OK, f"seam '{seam.name}'", f"in force by {seam.how} ({place}); {_until(seam)}")
        else:
            yield Finding(
                FAIL, f"seam '{seam.name}'", f"not in force ({place}): {failures().get(seam.name, 'unknown')}"
            )


def _until(seam) -> str:
    """Until when the seam is needed, and the upstream issue that is about it."""
    never = seam.until.startswith("never")
    return ("" if never else "until ") + seam.until + (f" [{seam.upstream}]" if seam.upstream else "")


def _registered() -> Iterator[Finding]:
    try:
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    except Exception as error:
        yield Finding(FAIL, "registered", f"verl.trainer.ppo.core_algos: {_reason(error)}")
        return
    from verl_patches.family import FAMILY

    with_loss = [member.name for member in FAMILY.values() if member.policy_loss]
    registries = (
        ("advantage estimator", ADV_ESTIMATOR_REGISTRY, FAMILY),
        ("policy loss", POLICY_LOSS_REGISTRY, with_loss),
    )
    for what, registry, names in registries:
        for name in names:
            entry = registry.get(name)
            if entry is None:
                yield Finding(FAIL, what, f"'{name}' is not registered")
            else:
                yield Finding(OK, what, f"'{name}' is {entry.__module__}.{entry.__qualname__}")


def _driver() -> Iterator[Finding]:
    """The wrappers must have been in place before other modules took the functions by name."""
    users = {
        "verl.trainer.main_ppo": ("validate_config", "need_reference_policy"),
        "verl.trainer.ppo.v1.trainer_base": ("need_reference_policy",),
    }
    for module_name, functions in users.items():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            yield Finding(FAIL, module_name, f"cannot be imported: {_reason(error)}")
            continue
        stock = [name for name in functions if not hasattr(getattr(module, name, None), "__wrapped__")]
        if stock:
            yield Finding(FAIL, module_name, f"uses verl's own {', '.join(stock)}: the plugin came too late")
        else:
            yield Finding(OK, module_name, f"uses VIMPO's {', '.join(functions)}")


def _rollout_engine() -> Iterator[Finding]:
    found = []
    for name in ("vllm", "sglang"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    if found:
        yield Finding(OK, "rollout engine", ", ".join(found))
    else:
        yield Finding(NOTE, "rollout engine", "neither vllm nor sglang is installed; verl needs one to generate")


def _accelerator() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield Finding(OK, "GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    elif os.environ.get("VERL_PLATFORM") == "cpu":
        yield Finding(OK, "GPU", "none; VERL_PLATFORM=cpu runs verl on the CPU")
    else:
        yield Finding(NOTE, "GPU", "none found; to run on the CPU: examples/quickstart.sh, or VERL_PLATFORM=cpu")


_CHECKS = (
    _python,
    _verl,
    _entry_point,
    _plugin_loaded,
    _seams,
    _registered,
    _driver,
    _rollout_engine,
    _accelerator,
)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """verl's imports warn about every engine that is not installed; the report says what matters."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
