"""Seam: kappa where verl's fused kernels make no logits (`use_fused_kernels=True`).

Touches verl.utils.experimental.torch_functional.FusedLinearForPPO.forward (backends torch and liger) and
verl.utils.kernel.linear_cross_entropy.linear_cross_entropy (backend triton): the places where verl's patched model forward
has the last hidden states, the output matrix and the labels in hand. They are replaced inside a `with` block around one
forward_step of the policy's engine, and verl's own at any other time. Checked against verl 0.9.1; no upstream issue.

Inside the block the policy's forward reaches its output head, the reference runs nested up to its own (with LoRA, where it is
the same model without adapters, right after the policy's forward instead), and both are reduced in chunks of tokens to
per-token numbers while both output matrices are gathered. The reference's engine hands its share (reference log-probs and
kappa) back nested and gathered over sequence parallelism, because they take the places of its own log_probs and entropy.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from verl_patches.lora_reference import EngineWithAdaptersOff
from verl_patches.names import POLICY_ENTROPY, POLICY_LOG_PROBS
from vimpo_verl.token_statistics import TokenStatistics, linear_token_statistics


class FusedHeads:
    """The output heads of policy and reference in one forward of a micro-batch.

    Args:
        ref_engine: verl's FSDP engine of the reference, in eval mode.
        micro_batch: what the policy's engine is working on.
        nested: run the reference inside the policy's forward. False: `run_reference` is to be called once that is done; the
            policy's log-probs and entropy are verl's own then, and its hidden states are kept until.
        with_policy: the policy's log-probs and entropy are those computed here (the joint pass). False leaves them, with
            their gradients, to verl's own head (an update), and hands those computed here on beside kappa.
    """

    def __init__(self, ref_engine: Any, micro_batch: TensorDict, *, with_policy: bool, nested: bool):
        self.ref_engine, self.micro_batch, self.with_policy, self.nested = ref_engine, micro_batch, with_policy, nested
        self._in_reference = False
        self.reference_output: dict[str, Tensor] = {}
        self._policy: tuple[Tensor, Tensor] | None = None
        self._statistics: TokenStatistics | None = None

    def __call__(self, verl_head: Callable, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float):
        """In the place of verl's head: hidden [..., D], weight [V, D], labels [...] -> log_probs, entropy [...]."""
        if self._in_reference:
            return self._reference_head(hidden, weight, labels, temperature)
        self._policy, self._shape = (hidden.detach().flatten(0, -2), weight.detach()), labels.shape
        if not self.nested:
            return verl_head()
        self.run_reference()
        if not self.with_policy:
            return verl_head()
        return self._statistics.log_prob.view(labels.shape), self._statistics.entropy.view(labels.shape)

    def run_reference(self) -> None:
        """Run the reference up to its own head, where the policy's hidden states meet it."""
        self._in_reference = True
        try:
            self._run_reference()
        finally:
            self._in_reference, self._policy = False, None

    @torch.no_grad()
    def _run_reference(self) -> None:
        # A shallow copy: the reference's engine is to return an "entropy" (kappa) whatever the policy's does.
        micro_batch = self.micro_batch.copy()
        tu.assign_non_tensor(micro_batch, calculate_entropy=True, distillation_use_topk=False, distillation_only=False)
        _, output = self.ref_engine.forward_step(micro_batch, loss_function=None, forward_only=True)
        model_output = output["model_output"]
        self.reference_output = {"ref_log_probs": model_output["log_probs"], "token_kl": model_output["entropy"]}
        if not self.with_policy:
            policys = self._in_verls_layout(micro_batch, self._statistics.log_prob, self._statistics.entropy)
            self.reference_output |= dict(zip((POLICY_LOG_PROBS, POLICY_ENTROPY), policys, strict=True))

    def _in_verls_layout(self, micro_batch: TensorDict, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Two per-token results of this rank, gathered and un-padded by the engine as those of a forward are."""
        # Without the images, which the layout does not need and which would be put together once more.
        _, output_args = self.ref_engine.prepare_model_inputs(micro_batch=micro_batch.exclude("multi_modal_inputs"))
        head = SimpleNamespace(log_probs=log_prob.view(self._shape), entropy=entropy.view(self._shape))
        output = self.ref_engine.prepare_model_outputs(
            output=head, output_args=output_args, micro_batch=micro_batch, logits_processor_func=None
        )
        return output["log_probs"], output["entropy"]

    def _reference_head(self, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float):
        policys, matrix = self._policy
        if not self.nested:
            matrix = weight  # one model: its output matrix has no adapter here, and is gathered now
        self._statistics = linear_token_statistics(
            policys, matrix, hidden.flatten(0, -2), weight, labels.flatten(), temperature
        )
        return self._statistics.ref_log_prob.view(labels.shape), self._statistics.token_kl.view(labels.shape)


@contextlib.contextmanager
def fused_heads(engine: Any, ref_engine: Any, *, with_policy: bool) -> Iterator[None]:
    """Every forward_step of `engine` inside the block also returns `ref_log_probs` and `token_kl` in its model output.

    Without the policy's own, `policy_log_probs` and `policy_entropy`, too, which have no gradients.

    Args:
        engine, ref_engine: verl's FSDP engines of policy and reference; the reference's in eval mode.
        with_policy: see FusedHeads.
    """
    verl_forward_step = engine.forward_step
    one_model = isinstance(ref_engine, EngineWithAdaptersOff)
    under_way: list[FusedHeads] = []

    def forward_step(micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool):
        if under_way:  # the reference's, with LoRA
            return verl_forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
        micro_batch = micro_batch.to(get_device_id())  # as verl's engines do, once for both models
        heads = FusedHeads(ref_engine, micro_batch, with_policy=with_policy, nested=not one_model)

        def loss_with_reference(model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None):
            if one_model:
                under_way.append(heads)
                try:
                    heads.run_reference()
                finally:
                    under_way.pop()
            model_output.update(heads.reference_output)
            if loss_function is None:  # verl's own stand-in of a forward-only pass
                return torch.tensor(1.0, device=data["input_ids"].device), {}
            return loss_function(model_output=model_output, data=data, dp_group=dp_group)

        with _in_place_of_verls_heads(heads):
            return verl_forward_step(micro_batch, loss_function=loss_with_reference, forward_only=forward_only)

    engine.forward_step = forward_step
    try:
        yield
    finally:
        del engine.forward_step  # the class's own again


@contextlib.contextmanager
def _in_place_of_verls_heads(heads: FusedHeads) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        torch_functional = importlib.import_module("verl.utils.experimental.torch_functional")
        stack.enter_context(_replaced(torch_functional.FusedLinearForPPO, "forward", _method_head, heads))
        with contextlib.suppress(ImportError):  # no Triton: verl cannot have chosen that backend either
            kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
            stack.enter_context(_replaced(kernel, "linear_cross_entropy", _function_head, heads))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable, heads: FusedHeads) -> Iterator[None]:
    verls = getattr(owner, name)
    setattr(owner, name, make(verls, heads))
    try:
        yield
    finally:
        setattr(owner, name, verls)


def _method_head(verls: Callable, heads: FusedHeads) -> Callable:
    def forward(self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0):
        verl_head = functools.partial(verls, self, hidden_states, vocab_weights, input_ids, temperature)
        return heads(verl_head, hidden_states, vocab_weights, input_ids.long(), temperature)

    return forward


def _function_head(verls: Callable, heads: FusedHeads) -> Callable:
    def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, *rest: Any):
        verl_head = functools.partial(verls, hidden, weight, labels, temperature, *rest)
        return heads(verl_head, hidden, weight, labels.long(), temperature)

    return linear_cross_entropy
