"""Seam: the update's part of one pass: kappa, td and advantages of a micro-batch, and what is left of it for the next batch.

Touches nothing of verl's by itself: verl_patches.value_branch hands it each micro-batch between verl's forward and verl's
ppo_loss, and verl_patches.worker the end of the update. Checked against verl 0.9.1; no upstream issue.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from verl_patches import rollout_gap
from verl_patches.finite import first_non_finite
from verl_patches.loss_aggregation import aggregate_sums
from verl_patches.names import (
    ADVANTAGE_MEAN,
    ADVANTAGE_STD,
    BETA,
    GROUP,
    IS_REAL,
    LAM,
    OF_BATCH,
    ONE_PASS,
    OUTCOME,
    POLICY_ENTROPY,
    POLICY_LOG_PROBS,
    ROW,
    STEP,
)
from verl_patches.targets import target_of
from vimpo_verl import functional as F
from vimpo_verl import one_pass
from vimpo_verl.config import VimpoConfig


def own_log_prob(model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
    """[B, T], verl's log-probs of the update, detached: the old ones of an update that starts at the old policy.

    Its ratio is then exactly 1. To log-probs of a pass before it would be noise around 1 in half precision, to which verl rounds
    those of an update where flash-attn's cross entropy is not installed, and the joint pass does not.
    """
    return no_padding_2_padding(model_output["log_probs"].detach(), data)


def is_one_pass(data: TensorDict) -> bool:
    """Whether a batch is to be trained on without a pass before the update."""
    return bool(tu.get_non_tensor_data(data, ONE_PASS, False))


class OnePassUpdate:
    """One update's micro-batches, on one rank.

    Args:
        knobs: VIMPO's configuration; its beta may be "auto", the run's number comes with the batch.
        sequences: of this rank. With several epochs, those of the first are what is left.
    """

    def __init__(self, knobs: VimpoConfig, sequences: int):
        self.knobs, self.sequences = knobs, sequences
        self.parts: list[one_pass.SequenceSums] = []
        self.gaps: list[rollout_gap.Gap] = []

    @torch.no_grad()
    def complete(self, model_output: dict[str, Tensor], data: TensorDict) -> TensorDict:
        """What the trainer puts into a batch in two passes: log-probs, kappa and advantages, [B, T].

        Args:
            model_output: verl's, with what the logits hook or the fused heads added.
            data: the micro-batch, with what VIMPO's trainer puts into it in one pass. Not modified.

        Returns:
            A shallow copy of `data` with ref_log_prob, token_kl, advantages and, unless the rollout's are there already,
            old_log_probs: the policy's own, so that verl's ratio is exactly 1.

        Raises:
            FloatingPointError: a number of a valid token is not finite; naming it, the sample, the token, step and rank.
        """
        mask = data["response_mask"].to_padded_tensor(0).bool()
        log_prob, ref_log_prob, entropy = (
            no_padding_2_padding(model_output[name], data)
            for name in (POLICY_LOG_PROBS, "ref_log_probs", POLICY_ENTROPY)
        )
        if self.knobs.kl_estimator == "exact":
            token_kl = no_padding_2_padding(model_output["token_kl"], data)
        else:
            token_kl = F.sampled_kl(log_prob, ref_log_prob, self.knobs.kl_estimator)
        beta, lam = (tu.get_non_tensor_data(data, name, None) for name in (BETA, LAM))
        found = one_pass.advantages(
            log_prob, ref_log_prob, token_kl, mask, config=self.knobs, beta=beta, lam=lam, before=_before(data)
        )
        if not torch.isfinite(found.raw).all():  # which it is where everything else is
            _raise_not_finite(
                data, mask, log_prob=log_prob, ref_log_prob=ref_log_prob, token_kl=token_kl, value=found.raw
            )
        if sum(len(part.tokens) for part in self.parts) < self.sequences:  # else it is a later epoch
            self._record(found, mask, data, log_prob, token_kl, entropy)
        completed = data.copy()
        completed["ref_log_prob"], completed["token_kl"], completed["advantages"] = (
            ref_log_prob,
            token_kl,
            found.whitened,
        )
        if "old_log_probs" not in data.keys():
            completed["old_log_probs"] = own_log_prob(model_output, data)
        return completed

    def _record(
        self,
        found: one_pass.Advantages,
        mask: Tensor,
        data: TensorDict,
        log_prob: Tensor,
        token_kl: Tensor,
        entropy: Tensor,
    ) -> None:
        sums = one_pass.sequence_sums(
            found,
            mask,
            group=data[GROUP],
            is_real=data[IS_REAL],
            outcome=data[OUTCOME],
            target=target_of(data["returns"].to_padded_tensor(0), mask),
            token_kl=token_kl,
            entropy=entropy,
        )
        self.parts.append(sums)
        if "rollout_log_probs" in data.keys():
            self.gaps.append(rollout_gap.gap(log_prob, data["rollout_log_probs"].to_padded_tensor(0), mask))

    def metrics(self, data: TensorDict, actor_config: Any, group: Any) -> dict[str, float]:
        """Of the whole batch, the same on every rank, under OF_BATCH: those of `one_pass.metrics`, verl's entropy of the
        policy and, where there are the rollout's log-probs, verl's distances from them.

        Args:
            data: the batch that was trained on.
            actor_config: verl's, for its loss_agg_mode.
            group: the data-parallel process group.
        """
        sums, beta = _of_all_ranks(self.parts, group), tu.get_non_tensor_data(data, BETA, None)
        found = one_pass.metrics(sums, self.knobs, beta, _before(data))
        found["actor/entropy"] = aggregate_sums(actor_config, sums.entropy, sums.tokens)
        if self.gaps:
            found |= rollout_gap.metrics(_of_all_ranks(self.gaps, group))
        return {OF_BATCH + name: value for name, value in found.items()}


def _of_all_ranks(parts: list[one_pass.Sums], group: Any) -> one_pass.Sums:
    of_ranks = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(of_ranks, one_pass.cat(parts), group=group)
    return one_pass.cat(of_ranks)


def _before(data: TensorDict) -> tuple[float, float] | None:
    mean, std = (tu.get_non_tensor_data(data, name, None) for name in (ADVANTAGE_MEAN, ADVANTAGE_STD))
    return None if std < 0 else (mean, std)


def _raise_not_finite(data: TensorDict, mask: Tensor, **per_token: Tensor) -> None:
    for name, tensor in per_token.items():
        found = first_non_finite(tensor, mask)
        if found is not None:
            sample, token, value, count = found
            reason = (
                "td overflows there"
                if name == "value"
                else "the policy's or the reference's logits are not finite there"
            )
            raise FloatingPointError(
                f"step {tu.get_non_tensor_data(data, STEP, None)}: {name} is {value} at response token {token} of sample "
                f"{_name_of(data, sample)} on rank {torch.distributed.get_rank()} ({count} such tokens in the micro-batch): "
                f"{reason}"
            )


def _name_of(data: TensorDict, sample: int) -> str:
    """The place in the batch and, where verl has handed it on, the prompt's uid."""
    uid = f" (prompt {data['uid'][sample]})" if "uid" in data.keys() else ""
    return f"number {int(data[ROW][sample])}{uid}"
