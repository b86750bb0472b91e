"""Seam: PACS's worker, which finds dL/dr of a whole mini-batch before each update.

Touches verl.workers.engine_workers.TrainingWorker.train_mini_batch and train_batch and ActorRolloutRefWorker, by subclassing, and
verl.workers.utils.losses.ppo_loss, by composition; PACS's trainer puts the subclass where verl's was. Checked against verl
0.9.1; no upstream issue.

L compares the members of a group, which are in different micro-batches and on different ranks. Its gradient needs one number of
each, r_j, at the policy of the update: in the first mini-batch of a step that is the old policy, whose log-probs are there; in
later ones a forward without gradient finds it. The ranks exchange it, and each micro-batch then backpropagates through its own
r_j alone (vimpo_verl.pacs).
"""

import math
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from verl_patches.family_worker import FamilyWorker
from vimpo_verl import pacs
from vimpo_verl.pacs_config import PacsConfig
from vimpo_verl.pacs_registrations import MicroBatch, micro_batch

# Names under which the trainer hands the worker what it needs, a number a sequence.
OUTCOME = "pacs_outcome"  # the label
GROUP = "pacs_group"  # the number of the sequence's group in the batch
GROUP_SIZE = "pacs_group_size"  # its real sequences in the batch; 0: a placeholder, which belongs to none
# And the worker its loss.
COEFFICIENT = "pacs_coefficient"  # dL/dr_j
SHARE = "pacs_share"  # w_j BCE_j / N


class PacsLoss:
    """The loss function of PACS's actor worker: verl's ppo_loss, whose policy loss must be "pacs", given what that needs.

    Args:
        ppo_loss: verl's, with its actor configuration bound.
        knobs: PACS's configuration.
    """

    def __init__(self, ppo_loss: Callable, knobs: PacsConfig):
        self.ppo_loss, self.knobs = ppo_loss, knobs

    def __call__(self, *, data: TensorDict, model_output: dict[str, Tensor], dp_group=None):
        """As verl's ppo_loss: a micro-batch's share of the loss of its global mini-batch, and its metrics."""
        found = MicroBatch(self.knobs, data[COEFFICIENT], data[SHARE], float(data["dp_size"]))
        with micro_batch(found):
            return self.ppo_loss(model_output=model_output, data=data, dp_group=dp_group)


class PacsTrainingWorker(TrainingWorker):
    """verl's worker of the policy, with PACS's loss."""

    def use_pacs_loss(self, knobs: PacsConfig) -> None:
        """Hand the loss function that verl has set what PACS's policy loss needs."""
        self.knobs, self.updates = knobs, 0
        self.set_loss_fn(PacsLoss(self.loss_fn, knobs))

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """As verl's: all updates of a step, on this rank's share of the batch."""
        self.updates = 0
        return super().train_mini_batch(data)

    def train_batch(self, data: TensorDict) -> TensorDict:
        """One update on a mini-batch; arguments and result are verl's, with PACS's metrics in it.

        Raises:
            RuntimeError: the batch did not come from PACS's trainer, or a group is not whole in this mini-batch.
        """
        missing = [name for name in (OUTCOME, GROUP, GROUP_SIZE) if name not in data.keys()]
        if missing:
            raise RuntimeError(
                f"this batch lacks {', '.join(missing)}: PACS's trainer is not in force. Run `vimpo check`"
            )
        metrics = self._find_coefficients(data)
        output = super().train_batch(data)
        self.updates += 1
        if output is not None:  # only the first rank of a sequence-parallel group collects
            found = tu.get(output, "metrics")
            # Here, because verl logs the mean of grad_norm over the mini-batches.
            found |= metrics | {"pacs/update_skipped": float(not math.isfinite(found["grad_norm"]))}
        return output

    def _find_coefficients(self, data: TensorDict) -> dict[str, float]:
        """Put dL/dr_j and the shares of L of this rank's sequences into `data`; returns the metrics of the mini-batch."""
        mine = torch.stack(
            [self._scores(data).double(), *(data[name].double() for name in (OUTCOME, GROUP, GROUP_SIZE))]
        )
        gathered = self._gather(mine.to(self.device_name))
        rank = self.engine.get_data_parallel_rank()
        r, outcome, group, group_size = torch.cat(gathered, dim=1)
        real = group_size > 0
        _require_whole_groups(group[real], group_size[real])
        terms = pacs.score_coefficients(
            r[real], outcome[real], group[real].tolist(), score=self.knobs.score, class_weight=self.knobs.class_weight
        )
        share = mine.shape[1]
        rows = slice(rank * share, (rank + 1) * share)
        for name, of_real in ((COEFFICIENT, terms.coefficients), (SHARE, terms.losses / max(int(real.sum()), 1))):
            of_all = torch.zeros_like(r).masked_scatter(real, of_real)
            data[name] = of_all[rows].to(data[OUTCOME].device)
        return {
            "pacs/loss": terms.losses.mean().item() if len(terms.losses) else 0.0,
            "pacs/score_std": r[real].std(correction=0).item() if len(terms.losses) else 0.0,
        }

    def _scores(self, data: TensorDict) -> Tensor:
        """r_j of this rank's sequences [B], at the policy that this update begins with."""
        with torch.no_grad():
            padded = data.select("old_log_probs", "response_mask").to_padded_tensor()
            old_log_prob, mask = padded["old_log_probs"], padded["response_mask"].bool()
            log_prob = old_log_prob if self.updates == 0 else self._log_prob(data).to(old_log_prob.device)
            return pacs.reward_proxy(
                log_prob.to(old_log_prob.dtype),
                old_log_prob,
                mask,
                beta=self.knobs.beta,
                reward_method=self.knobs.reward_method,
            )

    def _log_prob(self, data: TensorDict) -> Tensor:
        """[B, T]: the current policy's log-probs of the responses, by a forward as for the old ones."""
        forward = data.copy()  # shallow: the flags below are this forward's
        tu.assign_non_tensor(
            forward,
            calculate_entropy=False,
            compute_loss=False,
            use_remove_padding=self.model_config.get("use_remove_padding", False),
            use_fused_kernels=self.engine_config.use_fused_kernels,
            use_dynamic_bsz=self.engine_config.use_dynamic_bsz,
            max_token_len_per_gpu=self.engine_config.infer_max_token_len_per_gpu,
            micro_batch_size_per_gpu=self.engine_config.infer_micro_batch_size_per_gpu,
        )
        # The engine, and not infer_batch of the worker, because every rank of a sequence-parallel group needs the result.
        with self.engine.eval_mode(disable_auto_offload=True):
            output = self.engine.infer_batch(forward, loss_function=None)
        return no_padding_2_padding(output["model_output"]["log_probs"], data)

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """[4, B] of every data-parallel rank, in their order."""
        group = self.engine.get_data_parallel_group()
        everyones = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(everyones, mine, group=group)
        return everyones


class PacsActorRolloutRefWorker(FamilyWorker):
    """verl's hybrid worker with PACS's loss."""

    actor_worker_cls = PacsTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """Build the models as verl does, then give the actor PACS's loss."""
        super().init_model()
        self.actor.use_pacs_loss(omega_conf_to_dataclass(self.config.actor.policy_loss).pacs)


def _require_whole_groups(group: Tensor, group_size: Tensor) -> None:
    """Both [N], of the real sequences of a global mini-batch."""
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    torn = (counts[index] != group_size).nonzero().flatten()
    if len(torn):
        first = torn[0]
        raise RuntimeError(
            f"a mini-batch has {int(counts[index][first])} of the {int(group_size[first])} responses to one prompt, and PACS "
            "compares all of them: something has reordered the batch after PACS's trainer dealt it out, such as "
            "actor_rollout_ref.actor.shuffle=True or a trainer of your own"
        )
