"""Seam: old log-probs, entropy, reference log-probs and kappa in one pass over a batch.

Touches the logits hook of verl's FSDP engine: FSDPEngineWithLMHead.prepare_model_outputs calls
`logits_processor_func(student_logits=..., data=...)` when the batch says `distillation_use_topk`, gathers whatever
per-token results it returns over sequence parallelism, and un-pads them. With `distillation_only` verl makes no
log-probs of its own. Checked against verl 0.9.1 (workers/engine/fsdp/transformer_impl.py); no upstream issue.

The reference forward runs nested inside the policy's hook, with the same engine function, while the policy's logits are
at hand: the reference's are taken where its model returns them, by a forward hook of torch's, and both are reduced to four
numbers a token before verl's hook returns. Nothing keeps a reference to logits, which verl may later change in place.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu

from verl_patches.fused_head import fused_heads
from vimpo_verl.functional import SAMPLED_KL_ESTIMATORS, exact_kl, sampled_kl, topk_kl
from vimpo_verl.token_statistics import TokenStatistics, token_statistics

_CHUNK_TOKENS = 512  # of logits, where kappa is not that of `token_statistics`

# What verl's engine needs to be told so that it calls the hook and makes no log-probs or entropy by itself.
_HOOK_FLAGS = {"distillation_use_topk": True, "distillation_only": True, "calculate_entropy": False}


class _LogitsHook:
    """A callable in both roles that verl's engine gives to a loss function: logits hook, and final loss."""

    def __call__(self, *, student_logits: Tensor | None = None, data: TensorDict, **_: Any):
        if student_logits is None:  # the final loss: there is none in a forward-only pass
            return torch.zeros(()), {}
        return self.reduce(student_logits.squeeze(0), data)  # verl hands [1, n, V]

    def reduce(self, logits: Tensor, micro_batch: TensorDict) -> dict[str, Tensor]:
        """Logits [n, V] of this rank's slice of the micro-batch -> per-token results, each [1, n]."""
        raise NotImplementedError


class PolicyLogitsHook(_LogitsHook):
    """Given the policy's logits, runs the reference on the same micro-batch and reduces both.

    Args:
        ref_engine: verl's FSDP engine of the reference, in eval mode.
        top_k: as for `statistics_against_reference`.
    """

    def __init__(self, ref_engine: Any, top_k: int | None = None):
        self.ref_engine, self.top_k = ref_engine, top_k

    def reduce(self, logits: Tensor, micro_batch: TensorDict) -> dict[str, Tensor]:
        """Logits [n, V] -> log_probs, entropy, ref_log_probs, token_kl, each [1, n]."""
        statistics = statistics_against_reference(self.ref_engine, logits, micro_batch, top_k=self.top_k)
        results = {
            "log_probs": statistics.log_prob,
            "entropy": statistics.entropy,
            "ref_log_probs": statistics.ref_log_prob,
            "token_kl": statistics.token_kl,
        }
        return {name: result.unsqueeze(0) for name, result in results.items()}


@torch.no_grad()
def statistics_against_reference(
    ref_engine: Any,
    policy_logits: Tensor,
    micro_batch: TensorDict,
    *,
    top_k: int | None = None,
    through_kl: bool = False,
) -> TokenStatistics:
    """Run the reference on a micro-batch and reduce its logits together with the policy's.

    Args:
        ref_engine: verl's FSDP engine of the reference, in eval mode.
        policy_logits: [n, V], this rank's slice, temperature-scaled. Not modified.
        micro_batch: what the policy's engine is working on.
        top_k: kappa is the part of the KL on so many of the policy's most likely tokens; None: the whole of it.
        through_kl: let the gradient of token_kl flow to policy_logits, which keeps both logits until the backward pass.

    Returns:
        TokenStatistics, each [n].
    """
    micro_batch = micro_batch.copy()  # shallow; the flags below are the reference's
    tu.assign_non_tensor(micro_batch, **_HOOK_FLAGS)
    # The labels in the layout of the logits (rolled, padded and sliced for sequence parallelism) are verl's. They need no
    # images, which would be put together once more.
    _, output_args = ref_engine.prepare_model_inputs(micro_batch=micro_batch.exclude("multi_modal_inputs"))
    policy_logits = policy_logits if through_kl else policy_logits.detach()
    ref_hook = _ReferenceLogitsHook(policy_logits, output_args, micro_batch["input_ids"].offsets(), top_k, through_kl)
    with ref_hook.on(ref_engine.module):
        ref_engine.forward_step(micro_batch, loss_function=ref_hook, forward_only=True)
    return ref_hook.statistics


class _ReferenceLogitsHook(_LogitsHook):
    """Reduces the reference's logits together with the policy's as soon as its model returns them.

    Before verl's engine scales them by the temperature into a copy and, where padding is kept, packs them into another: the
    reference's logits exist once. The engine gets a column of zeros to go on with.

    Args:
        policy_logits: [n, V], packed and scaled.
        output_args: what the reference's engine has prepared with the inputs.
        offsets: [B + 1], where each sequence begins in the packed tokens.
        top_k, through_kl: as for `statistics_against_reference`.
    """

    def __init__(
        self,
        policy_logits: Tensor,
        output_args: dict[str, Any],
        offsets: Tensor,
        top_k: int | None,
        through_kl: bool,
    ):
        self.top_k, self.through_kl = top_k, through_kl
        self.policy_logits, self.labels = policy_logits, output_args["input_ids_rmpad_rolled"]
        self.output_args, self.offsets = output_args, offsets
        self.statistics: TokenStatistics | None = None

    def __call__(self, *, student_logits: Tensor | None = None, data: TensorDict, **_: Any):
        return (torch.zeros(()), {}) if student_logits is None else {}

    @contextlib.contextmanager
    def on(self, module: torch.nn.Module) -> Iterator[None]:
        """Take the logits of the module's forwards inside the block."""
        handle = module.register_forward_hook(self._take)
        try:
            yield
        finally:
            handle.remove()
        if self.statistics is None:
            raise RuntimeError("the reference's model was not called: is this verl one that vimpo_verl is tested with?")

    def _take(self, module: torch.nn.Module, inputs: tuple, output: Any) -> Any:
        """The model's output with its logits [1, n, V], or [B, T, V] where padding is kept, -> with [..., 1]."""
        logits = output.logits
        if isinstance(logits, DTensor):  # sharded over the vocabulary by tensor parallelism
            logits = logits.full_tensor()
        output.logits = logits.new_zeros(*logits.shape[:-1], 1)
        self._scale(logits)
        with torch.set_grad_enabled(self.through_kl):  # also what slices the policy's logits must record it
            if "temperature_rmpad" in self.output_args:
                self.statistics = self.reduce(logits.squeeze(0), self.policy_logits, self.labels)
            else:
                self.statistics = self._reduce_padded(logits)
        return output

    def _scale(self, logits: Tensor) -> None:
        """By the temperature, in place, rounded as verl rounds the policy's (_scale_logits_by_temperature)."""
        if self.output_args.get("temperature_is_one", False):
            return
        packed = self.output_args.get("temperature_rmpad")
        temperature = self.output_args["temperature"].view(-1, 1, 1) if packed is None else packed.view(1, -1, 1)
        logits.div_(temperature.clamp(min=1e-8).to(logits.dtype))

    def _reduce_padded(self, logits: Tensor) -> TokenStatistics:
        """[B, T, V], a sequence at a time, which needs no packed copy."""
        parts = []
        for row, (start, end) in zip(logits, itertools.pairwise(self.offsets.tolist()), strict=True):
            rows = slice(start, end)
            parts.append(self.reduce(row[: end - start], self.policy_logits[rows], self.labels[rows]))
        return TokenStatistics(*(torch.cat(results) for results in zip(*parts, strict=True)))

    def reduce(self, logits: Tensor, policy_logits: Tensor, labels: Tensor) -> TokenStatistics:
        """Logits [n, V] of the reference and of the policy, labels [n] -> TokenStatistics, each [n]."""
        statistics = token_statistics(policy_logits.detach(), logits, labels)
        if self.top_k is None and not self.through_kl:
            return statistics
        return statistics._replace(token_kl=_token_kl(policy_logits, logits, self.top_k))


def _token_kl(policy_logits: Tensor, ref_logits: Tensor, top_k: int | None) -> Tensor:
    """[n, V] twice -> [n], a chunk of tokens at a time; differentiable."""
    if top_k is None:
        return exact_kl(policy_logits, ref_logits, chunk_size=_CHUNK_TOKENS)
    chunks = zip(policy_logits.split(_CHUNK_TOKENS), ref_logits.split(_CHUNK_TOKENS), strict=True)
    return torch.cat([topk_kl(policy, ref, min(top_k, ref.shape[-1])) for policy, ref in chunks])


def joint_infer_batch(
    actor: Any, ref: Any, data: TensorDict, kl_estimator: str, top_k: int | None = None
) -> TensorDict | None:
    """One pass over `data` with the policy and the reference.

    Args:
        actor, ref: verl's TrainingWorkers of the two models, both on the FSDP engine, with equal sequence parallelism, or both
            on the Megatron engine.
        data: as for TrainingWorker.infer_batch.
        kl_estimator: "exact", "topk", "k2" or "k3".
        top_k: for "topk".

    Returns:
        What TrainingWorker.infer_batch returns, with nested [B, prompt + response] `log_probs`, `entropy`,
        `ref_log_probs` and `token_kl`, in nats; None on ranks that collect nothing.
    """
    if actor.engine_config.strategy == "megatron":
        from verl_patches.megatron_pass import megatron_infer_batch  # needs Megatron Core

        return megatron_infer_batch(actor, ref, data, kl_estimator)
    with ref.engine.eval_mode():
        if actor.engine_config.use_fused_kernels:
            tu.assign_non_tensor(data, compute_loss=False, calculate_entropy=True)
            with fused_heads(actor.engine, ref.engine, with_policy=True):
                output = actor.infer_batch(data)
        else:
            tu.assign_non_tensor(data, compute_loss=True, **_HOOK_FLAGS)
            with _loss_function(actor, PolicyLogitsHook(ref.engine, top_k)):
                output = actor.infer_batch(data)
    if output is not None and kl_estimator in SAMPLED_KL_ESTIMATORS:
        output["token_kl"] = _sampled_kl_nested(output["log_probs"], output["ref_log_probs"], kl_estimator)
    return output


def _sampled_kl_nested(log_probs: Tensor, ref_log_probs: Tensor, kl_estimator: str) -> Tensor:
    values = sampled_kl(log_probs.values(), ref_log_probs.values(), kl_estimator)
    return torch.nested.nested_tensor_from_jagged(values, log_probs.offsets())


@contextlib.contextmanager
def _loss_function(worker: Any, hook: _LogitsHook) -> Iterator[None]:
    """verl's engine takes its logits hook from the worker's loss function."""
    training_loss = worker.loss_fn
    worker.set_loss_fn(hook)
    try:
        yield
    finally:
        worker.set_loss_fn(training_loss)
