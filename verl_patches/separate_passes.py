"""Old and reference log-probs by verl's own two passes, and a KL from the sampled tokens (kl_estimator k2, k3).

Touches TrainingWorker.infer_batch, by calling it; nothing is replaced. So it works wherever verl makes log-probs: on any engine,
pipelines of any length, with whatever padding or output head. Checked against verl 0.9.1; no upstream issue.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from vimpo_verl.functional import sampled_kl


def separate_passes(actor: Any, ref: Any, data: TensorDict, kl_estimator: str) -> TensorDict | None:
    """verl's pass for the old log-probs, then its pass for the reference's.

    Args:
        actor, ref: verl's TrainingWorkers of the two models; with LoRA `ref` may be an AdaptersOff of the actor.
        data: as for TrainingWorker.infer_batch.
        kl_estimator: "k2" or "k3".

    Returns:
        As `joint_infer_batch`.
    """
    tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False)
    ref_data = data.copy()  # shallow: verl's passes note their own settings in what they are given
    if "enable_routing_replay" in ref_data.keys():  # the routes are the policy's
        tu.assign_non_tensor(ref_data, enable_routing_replay=False)
    output = actor.infer_batch(data)
    ref_output = ref.infer_batch(ref_data)
    if output is None:
        return None
    output["ref_log_probs"] = ref_output["log_probs"]
    output["token_kl"] = sampled_kl_nested(output["log_probs"], ref_output["log_probs"], kl_estimator)
    return output


def sampled_kl_nested(log_probs: Tensor, ref_log_probs: Tensor, kl_estimator: str) -> Tensor:
    """Nested [B, prompt + response] both, and the result."""
    values = sampled_kl(log_probs.values(), ref_log_probs.values(), kl_estimator)
    return torch.nested.nested_tensor_from_jagged(values, log_probs.offsets())
