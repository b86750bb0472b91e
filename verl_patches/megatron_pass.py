"""Seam: the joint pass on verl's Megatron engine: two passes by verl's schedule, which meet at the policy's output head.

Touches what verl_patches.megatron_heads names, and MegatronEngine.infer_batch and disable_adapter, by calling them. Checked
against verl 0.9.1 with Megatron Core 0.16.1; no upstream issue.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_patches.lora_reference import AdaptersOff
from verl_patches.megatron_fused_heads import FusedReferenceStates, fused_statistics_at_the_head, unpacked
from verl_patches.megatron_heads import ReferenceStates, kappa_at_the_head, statistics_at_the_head
from verl_patches.megatron_kept import KeptStates, vocab_size_of
from verl_patches.separate_passes import separate_passes

States = TypeVar("States", bound=KeptStates)


def megatron_infer_batch(actor: Any, ref: Any, data: TensorDict, kl_estimator: str) -> TensorDict | None:
    """Arguments and result as for `joint_infer_batch`, with both workers on verl's Megatron engine."""
    if kl_estimator != "exact":
        return separate_passes(actor, ref, data, kl_estimator)
    tu.assign_non_tensor(data, compute_loss=False, calculate_entropy=True)
    _settle_layout(actor, data, forward_only=True)
    with _reference_of(actor, ref, on_device=False) as (engine, adapters_off):
        if actor.engine_config.use_fused_kernels:
            states = _recorded(FusedReferenceStates(), engine, adapters_off, data)
            with fused_statistics_at_the_head(actor.engine, states, vocab_size_of(actor.engine)):
                output = actor.infer_batch(data)
            return unpacked(output) if output is not None else None
        states = _recorded(ReferenceStates(engine, adapters_off), engine, adapters_off, data)
        with statistics_at_the_head(actor.engine, states):
            return actor.infer_batch(data)


@contextlib.contextmanager
def megatron_kappa_in_update(actor: Any, ref: Any, data: TensorDict) -> Iterator[None]:
    """The update on `data` inside the block has token_kl in its model outputs (kappa_policy=current)."""
    _settle_layout(actor, data, forward_only=False)
    with _reference_of(actor, ref, on_device=True) as (engine, adapters_off):
        states = _recorded(ReferenceStates(engine, adapters_off), engine, adapters_off, data)
        with kappa_at_the_head(actor.engine, states):
            yield


def _settle_layout(actor: Any, data: TensorDict, forward_only: bool) -> None:
    """Note in `data` how verl is to split it into micro-batches, for both models as TrainingWorker would for the policy."""
    config = actor.engine_config
    layout = {
        "use_remove_padding": actor.model_config.get("use_remove_padding", False),
        "use_dynamic_bsz": config.use_dynamic_bsz,
        "max_token_len_per_gpu": config.infer_max_token_len_per_gpu if forward_only else config.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": (
            config.infer_micro_batch_size_per_gpu if forward_only else config.micro_batch_size_per_gpu
        ),
        "use_fused_kernels": config.use_fused_kernels,
    }
    tu.assign_non_tensor(data, **{name: value for name, value in layout.items() if name not in data.keys()})


@contextlib.contextmanager
def _reference_of(actor: Any, ref: Any, on_device: bool) -> Iterator[tuple[Any, Any]]:
    """The engine of the reference, at hand until the policy has had its pass, and what makes its output matrix its own.

    on_device: whether the policy is on the device already, and stays there.
    """
    if isinstance(ref, AdaptersOff):
        with actor.engine.eval_mode(disable_auto_offload=on_device):
            yield actor.engine, actor.engine.disable_adapter
    else:
        with ref.engine.eval_mode():
            yield ref.engine, contextlib.nullcontext


def _recorded(states: States, engine: Any, adapters_off: Any, data: TensorDict) -> States:
    """The reference's pass over the batch; nothing of `data` changes."""
    ref_data = data.copy()  # shallow: the flags below are the reference's
    tu.assign_non_tensor(ref_data, enable_routing_replay=False, calculate_entropy=False)
    with states.recorded(engine), adapters_off():
        engine.infer_batch(ref_data, loss_function=None)
    return states
