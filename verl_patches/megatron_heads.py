"""Seam: both models' last hidden states meet at the policy's output head, in verl's Megatron engine.

Touches MegatronEngineWithLMHead._lm_head_logits_processor(logits, label, temperature, *, batch, ...), which verl calls on a
pipeline's last stage with vocabulary-parallel logits [1, n/cp, V/tp] and gathers and unpacks the results of; and the `forward` of
the output matrix (Megatron Core's ColumnParallelLinear) of the reference. Both are replaced on the engine's and the model's
instance inside a `with` block, and verl's own at any other time. Checked against verl 0.9.1 with Megatron Core 0.16.1; no
upstream issue.

The reference has its pass first, by verl's own schedule, for a pipeline of any length: its output matrix multiplies nothing, but
what would have gone into it is kept on the host, by micro-batch. Then the policy has its pass over the same micro-batches. At its
head the kept states go through the reference's output matrix, and both logits tensors are reduced to numbers a token
(vimpo_verl.token_statistics). So there are as many products as in two passes with logits, and never more than two such tensors.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from verl_patches.megatron_kept import KeptStates, shard_of_rank, vocab_size_of
from vimpo_verl.token_statistics import TokenStatistics, VocabularyShard, token_statistics


class ReferenceStates(KeptStates):
    """The reference's last hidden states of a pass, in the order of its micro-batches, and its output matrix.

    Args:
        engine: verl's Megatron engine of the reference. With LoRA, the policy's own.
        adapters_off: makes the context in which the engine's output matrix is the reference's.
    """

    def __init__(self, engine: Any, adapters_off: Callable[[], contextlib.AbstractContextManager]):
        super().__init__()
        self.adapters_off = adapters_off
        self._output_layer = _output_layer_of(engine)
        self._project = None if self._output_layer is None else self._output_layer.forward  # before it is replaced

    @contextlib.contextmanager
    def recorded(self, engine: Any) -> Iterator[None]:
        """Every micro-batch that `engine` works on inside the block is kept, and yields log-probs of 0."""
        given: list[tuple[Tensor, dict]] = []

        def keep(hidden: Tensor, **arguments: Any):
            given.append((hidden, arguments))
            ranks = _tensor_parallel_size() if self._output_layer.sequence_parallel else 1
            return hidden.new_empty(hidden.shape[0] * ranks, hidden.shape[1], 0), None

        def no_logits(logits: Tensor, label: Tensor, temperature: Tensor, **_: Any) -> dict[str, Tensor]:
            hidden, arguments = given.pop()
            self.keep(label, hidden, arguments)
            return {"log_probs": torch.zeros_like(label, dtype=torch.float32)}

        with contextlib.ExitStack() as stack:
            if self._output_layer is not None:
                stack.enter_context(_replaced(self._output_layer, "forward", keep))
            stack.enter_context(_replaced(engine, "_lm_head_logits_processor", no_logits))
            yield

    @torch.no_grad()
    def next_logits(self, labels: Tensor) -> Tensor:
        """The reference's logits [1, n/cp, V/tp] of the next micro-batch, whose labels [1, n/cp] are for recognition.

        Raises:
            RuntimeError: the policy's micro-batches are not the reference's.
        """
        kept = self.next(labels)
        with self.adapters_off():
            logits, _ = self._project(kept.hidden.to(labels.device), **kept.arguments)
        return logits.transpose(0, 1)  # as Megatron Core does with the policy's


@contextlib.contextmanager
def statistics_at_the_head(engine: Any, states: ReferenceStates) -> Iterator[None]:
    """Every forward of `engine` inside the block yields log_probs, entropy, ref_log_probs and token_kl, without gradients."""
    shard = shard_of(engine)

    def processor(logits: Tensor, label: Tensor, temperature: Tensor, **_: Any) -> dict[str, Tensor]:
        # Divided as verl divides in the update, in the dtype of the logits: the ratio to its log-probs is to be 1.
        scale = torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)  # padding has none
        ref_logits = states.next_logits(label)
        for tensor in (logits, ref_logits):
            tensor.div_(scale.to(tensor.dtype))
        statistics = _statistics(logits, ref_logits, label, shard)
        return {
            "log_probs": statistics.log_prob,
            "entropy": statistics.entropy,
            "ref_log_probs": statistics.ref_log_prob,
            "token_kl": statistics.token_kl,
        }

    with _replaced(engine, "_lm_head_logits_processor", processor):
        yield
    states.require_all_used()


@contextlib.contextmanager
def kappa_at_the_head(engine: Any, states: ReferenceStates) -> Iterator[None]:
    """Every forward of `engine` inside the block yields token_kl beside verl's own results, with their gradients."""
    shard, verls = shard_of(engine), engine._lm_head_logits_processor

    def processor(logits: Tensor, label: Tensor, temperature: Tensor, **settings: Any) -> dict[str, Tensor]:
        scale = torch.where(temperature > 0, temperature, 1.0).flatten()
        ref_logits = states.next_logits(label)
        # First, because verl works in place on the logits.
        token_kl = _statistics(logits.detach(), ref_logits, label, shard, scale).token_kl
        return {**verls(logits, label, temperature, **settings), "token_kl": token_kl}

    with _replaced(engine, "_lm_head_logits_processor", processor):
        yield
    states.require_all_used()


def shard_of(engine: Any) -> VocabularyShard | None:
    """The part of the vocabulary of this rank's logits; None on all stages of a pipeline but the last."""
    layer = _output_layer_of(engine)
    return None if layer is None else shard_of_rank(layer.output_size_per_partition, vocab_size_of(engine))


def _statistics(
    logits: Tensor, ref_logits: Tensor, label: Tensor, shard: VocabularyShard, temperature: Tensor | None = None
) -> TokenStatistics:
    """[1, n, V/tp] twice, [1, n] -> each [1, n]."""
    statistics = token_statistics(
        logits.flatten(0, 1), ref_logits.flatten(0, 1), label.flatten(), temperature, shard=shard
    )
    return TokenStatistics(*(result.view(label.shape) for result in statistics))


def _output_layer_of(engine: Any) -> torch.nn.Module | None:
    """The output matrix of a GPT model, or of the GPT model inside a vision-language one."""
    from verl.utils.megatron_utils import unwrap_model

    last = unwrap_model(engine.module[-1])
    last = getattr(last, "language_model", last)
    return last.output_layer if last.post_process else None


def _tensor_parallel_size() -> int:
    from megatron.core import parallel_state as mpu

    return mpu.get_tensor_model_parallel_world_size()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set on the instance, so that its class's own is back when it is deleted."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
