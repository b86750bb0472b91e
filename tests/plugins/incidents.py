"""Makes something go wrong at an exact moment of a verl run: loaded through VERL_USE_EXTERNAL_MODULES by the tests of
faults and resume.

INCIDENT="point:count:action" in the environment. The count-th time that a process of the run comes by the point, it does
the action; `rank-1` and the like after another colon restricts it to one rank. Points are functions of verl or of ours,
table POINTS; actions:

    stop       wait to be killed
    die        SIGKILL to this process
    full_disk  the OSError of a full disk
    nan        the point's own way to put a NaN there

When it comes to that, the file $INCIDENT_FILE is written.
"""

import errno
import io
import os
import signal
import time
from collections import Counter
from pathlib import Path

import wrapt

POINT, COUNT, ACTION, *RANK = os.environ["INCIDENT"].split(":")
# name of the point -> (module whose import brings it, function in it)
POINTS = {
    "generation": ("verl.experimental.agent_loop.single_turn_agent_loop", "SingleTurnAgentLoop.run"),
    "server": ("vllm.v1.engine.async_llm", "AsyncLLM.generate"),
    "weight_sync": ("verl.workers.rollout.vllm_rollout.utils", "vLLMColocateWorkerExtension.update_weights_from_ipc"),
    "joint_pass": ("verl_patches.joint_pass", "_ReferenceLogitsHook.reduce"),
    "logits": ("verl_patches.joint_pass", "PolicyLogitsHook.reduce"),
    "loss": ("verl_patches.value_branch", "VimpoLoss._loss"),
    "gradients": ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.optimizer_step"),
    "updated": ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.optimizer_step"),
    "record": ("verl_patches.checkpoints", "finish"),
}
# name of the point -> start of the name of the file that torch.save is to write there
FILES = {"model_file": "model_world_size", "optimizer_file": "optim_world_size", "dataloader_file": "data.pt"}
AFTER = {"updated"}  # points after the function instead of before it

_passed = Counter()


def _act() -> None:
    if ACTION == "stop":
        time.sleep(100_000)
    elif ACTION == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ACTION == "full_disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_due() -> bool:
    if RANK and RANK[0] != f"rank-{os.environ.get('RANK')}":
        return False
    _passed[POINT] += 1
    if _passed[POINT] != int(COUNT):
        return False
    if POINT not in AFTER | set(FILES):
        _announce()
    return True


def _announce() -> None:
    Path(os.environ["INCIDENT_FILE"]).write_text(POINT)


def _at_point(wrapped, instance, args, kwargs):
    if not _is_due():
        return wrapped(*args, **kwargs)
    if ACTION == "nan":
        return _with_nan(wrapped, args, kwargs)
    if POINT not in AFTER:
        _act()
        return wrapped(*args, **kwargs)
    result = wrapped(*args, **kwargs)
    _announce()
    _act()
    return result


def _with_nan(wrapped, args, kwargs):
    if POINT == "loss":
        loss, metrics = wrapped(*args, **kwargs)
        return loss * float("nan"), metrics
    logits, *others = args
    logits = logits.clone()
    logits[: len(logits) // 2] = float("nan")  # prompts and responses are packed
    return wrapped(logits, *others, **kwargs)


def _save(wrapped, instance, args, kwargs):
    """torch.save of which half reaches the file."""
    content, path = args[0], args[1] if len(args) > 1 else kwargs["f"]
    if not Path(str(path)).name.startswith(FILES[POINT]) or not _is_due():
        return wrapped(*args, **kwargs)
    whole = io.BytesIO()
    wrapped(content, whole)
    Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    _announce()
    _act()


def _empty_tracker(path, mode="r", *others, **kwargs):
    """open() of verl's trainer: the tracker has been emptied and not been written."""
    file = open(path, mode, *others, **kwargs)  # noqa: SIM115  the caller closes it
    if str(path).endswith("latest_checkpointed_iteration.txt") and "w" in mode and _is_due():
        _act()
    return file


if POINT in POINTS:
    module_name, function = POINTS[POINT]
    wrapt.when_imported(module_name)(lambda module: wrapt.wrap_function_wrapper(module, function, _at_point))
elif POINT in FILES:
    wrapt.when_imported("verl.utils.checkpoint.checkpoint_manager")(
        lambda module: wrapt.wrap_function_wrapper(module.torch, "save", _save)
    )
elif POINT == "tracker":
    wrapt.when_imported("verl.trainer.ppo.v1.trainer_base")(lambda module: setattr(module, "open", _empty_tracker))
else:
    raise ValueError(f"INCIDENT={os.environ['INCIDENT']!r}: no such point")
