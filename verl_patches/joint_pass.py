"""Seam: old log-probs, entropy, reference log-probs and kappa in one pass over a batch.

Touches the logits hook of verl's FSDP engine: FSDPEngineWithLMHead.prepare_model_outputs calls
`logits_processor_func(student_logits=..., data=...)` when the batch says `distillation_use_topk`, gathers whatever
per-token results it returns over sequence parallelism, and un-pads them. With `distillation_only` verl makes no
log-probs of its own. Checked against verl 0.9.1 (workers/engine/fsdp/transformer_impl.py); no upstream issue.

The reference forward runs nested inside the policy's hook, with the same engine function, while the policy's logits are
at hand: only those two logits tensors exist, both made by verl, and each is reduced to four numbers a token before the
hook returns. Nothing keeps a reference to logits, which verl may later change in place.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from verl.utils import tensordict_utils as tu
from vimpo_verl.functional import sampled_kl
from vimpo_verl.token_statistics import TokenStatistics, token_statistics

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
        kl_estimator: "exact", "k2" or "k3".
    """

    def __init__(self, ref_engine: Any, kl_estimator: str):
        self.ref_engine, self.kl_estimator = ref_engine, kl_estimator

    def reduce(self, logits: Tensor, micro_batch: TensorDict) -> dict[str, Tensor]:
        """Logits [n, V] -> log_probs, entropy, ref_log_probs, token_kl, each [1, n]."""
        # The labels in the layout of the logits (rolled, padded and sliced for sequence parallelism) are verl's.
        _, output_args = self.ref_engine.prepare_model_inputs(micro_batch=micro_batch)
        ref_hook = _ReferenceLogitsHook(logits, output_args["input_ids_rmpad_rolled"])
        self.ref_engine.forward_step(micro_batch, loss_function=ref_hook, forward_only=True)
        statistics = ref_hook.statistics
        token_kl = statistics.token_kl
        if self.kl_estimator != "exact":
            token_kl = sampled_kl(statistics.log_prob, statistics.ref_log_prob, self.kl_estimator)
        results = {
            "log_probs": statistics.log_prob,
            "entropy": statistics.entropy,
            "ref_log_probs": statistics.ref_log_prob,
            "token_kl": token_kl,
        }
        return {name: result.unsqueeze(0) for name, result in results.items()}


class _ReferenceLogitsHook(_LogitsHook):
    """Given the reference's logits, reduces them together with the policy's."""

    def __init__(self, policy_logits: Tensor, labels: Tensor):
        self.policy_logits, self.labels = policy_logits, labels
        self.statistics: TokenStatistics | None = None

    def reduce(self, logits: Tensor, micro_batch: TensorDict) -> dict[str, Tensor]:
        self.statistics = token_statistics(self.policy_logits, logits, self.labels)
        return {}  # the policy's hook hands the results to verl


def joint_infer_batch(actor: Any, ref: Any, data: TensorDict, kl_estimator: str) -> TensorDict | None:
    """One pass over `data` with the policy and the reference.

    Args:
        actor, ref: verl's TrainingWorkers of the two models, both on the FSDP engine, with equal sequence parallelism.
        data: as for TrainingWorker.infer_batch.
        kl_estimator: "exact", "k2" or "k3".

    Returns:
        What TrainingWorker.infer_batch returns, with nested [B, prompt + response] `log_probs`, `entropy`,
        `ref_log_probs` and `token_kl`, in nats; None on ranks that collect nothing.
    """
    tu.assign_non_tensor(data, compute_loss=True, **_HOOK_FLAGS)
    hook = PolicyLogitsHook(ref.engine, kl_estimator)
    with ref.engine.eval_mode(), _loss_function(actor, hook):
        return actor.infer_batch(data)


@contextlib.contextmanager
def _loss_function(worker: Any, hook: _LogitsHook) -> Iterator[None]:
    """verl's engine takes its logits hook from the worker's loss function."""
    training_loss = worker.loss_fn
    worker.set_loss_fn(hook)
    try:
        yield
    finally:
        worker.set_loss_fn(training_loss)
