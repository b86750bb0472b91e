"""Seam: the update's loss, L = c_A * L_A + L_V.

Touches verl.workers.utils.losses.ppo_loss, by composition: the worker's loss function becomes one that calls ppo_loss
and adds L_V, which ppo_loss cannot do because it hands a registered policy loss no reference log-probs (volcengine/verl
#7712). ppo_loss itself, with its entropy and KL terms, stays as it is. Checked against verl 0.9.1.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from verl_patches.joint_pass import statistics_against_reference
from verl_patches.names import (
    ACTOR_COEFF,
    AT_OLD_POLICY,
    BETA,
    NUM_SEQUENCES,
    POLICY_ENTROPY,
    POLICY_LOG_PROBS,
    VALUE_MASK,
    VALUE_SCALE,
)
from verl_patches.one_pass_update import OnePassUpdate, is_one_pass, own_log_prob
from verl_patches.targets import target_of
from vimpo_verl import functional as F
from vimpo_verl.config import VimpoConfig
from vimpo_verl.registrations import ActorBranch, actor_branch


class VimpoLoss:
    """The loss function of VIMPO's actor worker.

    Args:
        ppo_loss: verl's ppo_loss with its actor configuration bound; its policy loss must be "vimpo".
        knobs: VIMPO's configuration; its beta may be "auto", the run's number comes with the batch.
        ref_engine: verl's engine of the reference; used with kappa_policy=current.
    """

    def __init__(self, ppo_loss: Callable, knobs: VimpoConfig, ref_engine: Any):
        self.ppo_loss, self.knobs, self.ref_engine = ppo_loss, knobs, ref_engine
        self.one_pass: OnePassUpdate | None = None  # of the update under way, where it is one without a pass before

    @property
    def actor_config(self) -> Any:
        """verl's configuration of the actor."""
        return self.ppo_loss.keywords["config"]

    def __call__(
        self,
        *,
        data: TensorDict,
        model_output: dict[str, Tensor] | None = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ):
        """verl's engine calls it in two roles.

        As logits hook (with kappa_policy=current, or in one pass): student_logits [1, n, V] -> {"token_kl": [1, n]}, in one
        pass with the reference's log-probs and the policy's log-probs and entropy.

        As final loss: model_output with nested `log_probs` -> a micro-batch's share of the loss of its global
        mini-batch, and its metrics.

        Raises:
            RuntimeError: the batch lacks what VIMPO's trainer puts into it, or ppo_loss did not call "vimpo".
        """
        if student_logits is not None:
            statistics = statistics_against_reference(
                self.ref_engine,
                student_logits.squeeze(0),
                data,
                top_k=self.knobs.kl_top_k,
                through_kl=not self.knobs.kappa_detach,
            )
            results = {"token_kl": statistics.token_kl}
            if self.one_pass is not None:
                results["ref_log_probs"] = statistics.ref_log_prob
                results[POLICY_LOG_PROBS], results[POLICY_ENTROPY] = statistics.log_prob, statistics.entropy
            return {name: result.unsqueeze(0) for name, result in results.items()}
        return self._loss(model_output, data, dp_group)

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any) -> tuple[Tensor, dict]:
        if is_one_pass(data):
            if self.one_pass is None:
                raise RuntimeError(
                    "a batch for one pass, and VIMPO's training worker is not in force. Run `vimpo check`"
                )
            data = self.one_pass.complete(model_output, data)
        _require_fields(data)
        if tu.get_non_tensor_data(data, AT_OLD_POLICY, False):
            data = data.copy()  # shallow
            data["old_log_probs"] = own_log_prob(model_output, data)
        with actor_branch(ActorBranch(coeff=tu.get_non_tensor_data(data, ACTOR_COEFF, None))) as branch:
            loss, metrics = self.ppo_loss(model_output=model_output, data=data, dp_group=dp_group)
        if branch.loss is None:
            raise RuntimeError("verl did not call the policy loss 'vimpo': is actor.policy_loss.loss_mode=vimpo?")
        value_loss = self._value_loss(model_output, data)
        # Both are shares of a mean over the global mini-batch: the shares of its micro-batches add up.
        metrics["vimpo/actor_loss"] = Metric(value=branch.loss, aggregation=AggregationType.SUM)
        metrics["vimpo/value_loss"] = Metric(value=value_loss.detach(), aggregation=AggregationType.SUM)
        return loss + tu.get_non_tensor_data(data, VALUE_SCALE, None) * value_loss, metrics

    def _value_loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        """L_V: the mean over the real sequences of the global mini-batch, whatever loss_agg_mode says.

        Scaled by dp_size like verl's own losses, because FSDP averages gradients over the data-parallel ranks.
        """
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        mask_name = VALUE_MASK if VALUE_MASK in data.keys() else "response_mask"
        batch = data.select(mask_name, "old_log_probs", "ref_log_prob", "token_kl", "returns").to_padded_tensor()
        mask = batch[mask_name].bool()
        rest = (
            batch["ref_log_prob"],
            self._token_kl(log_prob, batch["ref_log_prob"], batch["token_kl"], model_output, data),
            target_of(batch["returns"], mask),
            mask,
            tu.get_non_tensor_data(data, BETA, None),
        )
        kind = {
            "loss_type": self.knobs.value_loss_type,
            "huber_delta": self.knobs.huber_delta,
            "detach_kl": self.knobs.kappa_detach,
        }
        if self.knobs.value_clip is None:
            per_sequence = F.value_loss(log_prob, *rest, **kind)
        else:
            per_sequence = F.clipped_value_loss(
                log_prob, batch["old_log_probs"], *rest, clip=self.knobs.value_clip, **kind
            )
        count = tu.get_non_tensor_data(data, NUM_SEQUENCES, None)
        # A placeholder has an empty mask and target 0, so its loss is 0. A mini-batch of nothing else has no mean.
        return per_sequence.sum() * (data["dp_size"] / count if count else 0.0)

    def _token_kl(
        self, log_prob: Tensor, ref_log_prob: Tensor, old_token_kl: Tensor, model_output: dict, data: TensorDict
    ) -> Tensor:
        """KL of each response token [B, T], of the policy that kappa_policy names."""
        if self.knobs.value_type == "soft":
            return torch.zeros_like(ref_log_prob)  # its loss has no kappa
        if self.knobs.kappa_policy == "old" or self.one_pass is not None:
            return old_token_kl  # in one pass: that of the update's own policy
        if self.knobs.kl_estimator in F.SAMPLED_KL_ESTIMATORS:
            of = log_prob.detach() if self.knobs.kappa_detach else log_prob
            return F.sampled_kl(of, ref_log_prob, self.knobs.kl_estimator)
        return no_padding_2_padding(model_output["token_kl"], data)


def _require_fields(data: TensorDict) -> None:
    needed = ("old_log_probs", "ref_log_prob", "token_kl", "returns", ACTOR_COEFF, BETA, VALUE_SCALE, NUM_SEQUENCES)
    missing = [name for name in needed if name not in data.keys()]
    if missing:
        raise RuntimeError(
            f"this batch lacks {', '.join(missing)}: VIMPO's trainer or training worker is not in force in this run. "
            "Run `vimpo check` in the environment of the process that failed"
        )
