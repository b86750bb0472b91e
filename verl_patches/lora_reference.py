"""Seam: with LoRA the reference is the policy's own base model, the adapters switched off.

Touches verl's FSDPEngine.disable_adapter, as verl's own reference pass with LoRA does (`ref_in_actor`). Checked against verl
0.9.1; no upstream issue. A forward cannot have its adapters on and off at once, so with fused kernels, which have no logits
hook, the reference runs after the policy's forward (verl_patches.fused_head).
"""

import contextlib
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu


class AdaptersOff:
    """Stands where a worker of a separate reference would: `engine` is the policy's, with its adapters off.

    Args:
        actor: verl's TrainingWorker of a policy with LoRA adapters.
    """

    def __init__(self, actor: Any):
        self.engine = EngineWithAdaptersOff(actor.engine)
        self._actor = actor

    def infer_batch(self, data: TensorDict) -> TensorDict | None:
        """As TrainingWorker.infer_batch."""
        tu.assign_non_tensor(data, no_lora_adapter=True)  # verl's own word for it
        return self._actor.infer_batch(data)


class EngineWithAdaptersOff:
    """The part of an engine's interface that joint pass and update use of the reference."""

    def __init__(self, engine: Any):
        self._engine = engine

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    def eval_mode(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the policy's engine is in a mode of its own already

    def prepare_model_inputs(self, micro_batch: TensorDict):
        return self._engine.prepare_model_inputs(micro_batch=micro_batch)

    def prepare_model_outputs(self, **arguments: Any) -> dict:
        return self._engine.prepare_model_outputs(**arguments)

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool):
        with self._engine.disable_adapter():
            return self._engine.forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
