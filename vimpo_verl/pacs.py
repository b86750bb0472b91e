"""PACS (arXiv 2509.02522) as pure tensor functions: the outcome is a label, the policy's own log-ratio its logit. Torch only.

Notation, for N sequences j in groups of n to a prompt, with outcomes y_j in {0, 1}:

    r_j   = beta * sum_t ( log pi_theta(y_jt) - log pi_old(y_jt) )   reward proxy, "log_ratio"     reward_proxy
            beta * mean_t log pi_theta(y_jt)                         the same, "mean_log_prob"
    psi_j = r_j - mean of the group's other r                        score, "rloo"                 relative_scores
            (r_j - mean) / (std + 1e-6), std unbiased                "group_normalised"
            r_j - mean                                               "dr_grpo"
            r_j                                                      "plain"
    w_j   = n / (2 * number of the group with y = y_j)               class weight, "question"      class_weights
    L     = 1/N sum_j w_j BCE_with_logits( psi_j, y_j )              loss                          pacs_loss

Every psi of a group depends on every r of it, so L cannot be summed up from parts of a group. Its gradient can: with
a_i = w_i ( sigmoid(psi_i) - y_i ) / N and sums and means over the group,

    dL/dr_j = ( n a_j - sum a ) / (n - 1)                                                         "rloo"
              ( a_j - mean a - psi_j * sum(a psi) * (std + 1e-6) / ((n - 1) std) ) / (std + 1e-6) "group_normalised"
              a_j - mean a                                                                        "dr_grpo"
              a_j                                                                                 "plain"

and grad L = sum_j dL/dr_j * grad r_j, whatever micro-batch or rank sequence j is in. In three steps:

    r = reward_proxy(...)                       each micro-batch, without gradient; then all r of the mini-batch together
    terms = score_coefficients(r, ...)          the whole mini-batch, [N]: one number a sequence
    surrogate(terms.coefficients[rows], ...)    each micro-batch, with gradient; summed over micro-batches and ranks

A group of one has nobody to be compared with: psi = 0 and no gradient, except with "plain". Where all r of a group are
equal, as in the first update of a step, std = 0 and "group_normalised" divides by 1e-6 alone, as published: such a
gradient needs verl's gradient clipping.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.pacs_config import CLASS_WEIGHTS, REWARD_METHODS, SCORES

STD_EPS = 1e-6  # added to the standard deviation of "group_normalised", as the authors do


class PacsTerms(NamedTuple):
    """Of all N sequences of a mini-batch, detached."""

    losses: Tensor  # [N] w_j * BCE_j; L is their mean
    coefficients: Tensor  # [N] dL/dr_j


def pacs_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    outcome: Tensor,
    group: Sequence[Hashable],
    *,
    beta: float = 1.0,
    score: str = "rloo",
    class_weight: str = "question",
    reward_method: str = "log_ratio",
) -> Tensor:
    """L of a mini-batch that is all here (arXiv 2509.02522, section 3).

    Args:
        log_prob, old_log_prob: [N, T], in nats. "mean_log_prob" does not read the values of old_log_prob.
        response_mask: [N, T], 0/1 or bool.
        outcome: [N], the label: 0 or 1.
        group: N hashables; sequences of one prompt share one.
        beta: weight of the log-probs, > 0.
        score: how a sequence is compared with its group: "rloo", "group_normalised", "dr_grpo" or "plain".
        class_weight: "question" balances right and wrong answers within a group that has both and leaves others at 1;
            "only_positive" and "only_negative" have weight 1 on right or wrong answers, 0 elsewhere; "off" is 1.
        reward_method: "log_ratio" or "mean_log_prob".

    Returns:
        Scalar, the mean over the sequences (0 of none), differentiable in log_prob (first order); float32 for half
        precision inputs.

    Raises:
        ValueError: what does not fit, by name: shapes, the mask, outcomes other than 0 and 1, beta, an unknown word.
    """
    r = reward_proxy(log_prob, old_log_prob, response_mask, beta=beta, reward_method=reward_method)
    terms = score_coefficients(r.detach(), outcome, group, score=score, class_weight=class_weight)
    gradient_of = surrogate(terms.coefficients, r)
    return terms.losses.sum() / max(len(terms.losses), 1) + (gradient_of - gradient_of.detach())


def reward_proxy(
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    *,
    beta: float = 1.0,
    reward_method: str = "log_ratio",
) -> Tensor:
    """r_j of any sequences. Arguments as for `pacs_loss`.

    Returns:
        [B], differentiable in log_prob; float32 for half precision inputs. 0 for a sequence without a valid token.

    Raises:
        ValueError: the tensors, the mask or beta do not fit, or reward_method is unknown.
    """
    _require_one_of("reward_method", reward_method, REWARD_METHODS)
    F.require_positive(beta=beta)
    valid = F.valid_tokens(response_mask, log_prob=log_prob, old_log_prob=old_log_prob)
    log_prob, old_log_prob = F.accumulating(log_prob), F.accumulating(old_log_prob.detach())
    if reward_method == "log_ratio":
        return beta * F.zero_where_masked(log_prob - old_log_prob, valid).sum(-1)
    return beta * F.zero_where_masked(log_prob, valid).sum(-1) / valid.sum(-1).clamp(min=1)


def score_coefficients(
    r: Tensor,
    outcome: Tensor,
    group: Sequence[Hashable],
    *,
    score: str = "rloo",
    class_weight: str = "question",
) -> PacsTerms:
    """dL/dr_j and the losses of all N sequences of a mini-batch: every group whole, N all that L averages over.

    Args:
        r: [N], from `reward_proxy`.
        outcome, group, score, class_weight: as for `pacs_loss`.

    Returns:
        PacsTerms, in the dtype of r; computed in float64.

    Raises:
        ValueError: r, outcome or group do not fit each other, an outcome is neither 0 nor 1, or a word is unknown.
    """
    _require_one_of("score", score, SCORES)
    labels, index = F.grouped(outcome, group)
    if not r.is_floating_point():
        raise ValueError(f"r must be of a float dtype, got {r.dtype}")
    if r.shape != labels.shape or r.device != labels.device:
        raise ValueError(
            f"r must be [N] as outcome is, {list(labels.shape)} on {labels.device}, got {list(r.shape)} on {r.device}"
        )
    weight = class_weights(outcome, group, class_weight)
    r64, labels = r.detach().double(), labels.double()
    psi = relative_scores(r64, index, score)
    losses = weight * torch.nn.functional.binary_cross_entropy_with_logits(psi, labels, reduction="none")
    a = weight * (torch.sigmoid(psi) - labels) / max(len(r64), 1)
    coefficients = _through_the_score(a, psi, r64, index, score)
    return PacsTerms(losses.to(r.dtype), coefficients.to(r.dtype))


def surrogate(coefficients: Tensor, r: Tensor) -> Tensor:
    """sum_j sg[dL/dr_j] * r_j over some sequences: summed over all parts of a mini-batch, its gradient is that of L.

    Args:
        coefficients: [B], the rows of PacsTerms.coefficients that belong to r.
        r: [B], from `reward_proxy`, with its gradient.

    Returns:
        Scalar. Its value means nothing.

    Raises:
        ValueError: the shapes differ.
    """
    if coefficients.shape != r.shape:
        raise ValueError(f"coefficients and r must both be [B], got {list(coefficients.shape)} and {list(r.shape)}")
    return (coefficients.detach() * r).sum()


def class_weights(outcome: Tensor, group: Sequence[Hashable], class_weight: str = "question") -> Tensor:
    """w_j. Arguments and errors as for `pacs_loss`; returns [N], detached, in float64."""
    _require_one_of("class_weight", class_weight, CLASS_WEIGHTS)
    labels, index = F.grouped(outcome, group)
    labels = labels.double()
    strange = labels[(labels != 0) & (labels != 1)]
    if strange.numel():
        raise ValueError(
            f"outcome must hold rewards of 0 and 1 only, which PACS takes as labels, got {strange[0].item()} "
            f"({strange.numel()} of {labels.numel()} are neither)"
        )
    if class_weight == "only_positive":
        return labels
    if class_weight == "only_negative":
        return 1 - labels
    if class_weight == "off":
        return torch.ones_like(labels)
    size, right = F.group_sums(torch.ones_like(labels), index), F.group_sums(labels, index)
    of_its_class = torch.where(labels == 1, right, size - right)
    return torch.where(of_its_class < size, size / (2 * of_its_class), torch.ones_like(labels))


def relative_scores(r: Tensor, index: Tensor, score: str) -> Tensor:
    """psi_j of whole groups, detached.

    Args:
        r: [N].
        index: [N], the number of each sequence's group, from `functional.grouped`.
        score: as for `pacs_loss`.
    """
    if score == "plain":
        return r
    size, deviation, std = _group_statistics(r, index)
    if score == "dr_grpo":
        return deviation
    if score == "group_normalised":
        return deviation / (std + STD_EPS)
    return deviation * size / _others(size)


def _through_the_score(a: Tensor, psi: Tensor, r: Tensor, index: Tensor, score: str) -> Tensor:
    """sum_i a_i dpsi_i/dr_j of every j: dL/dr for a = dL/dpsi."""
    if score == "plain":
        return a
    size, _, std = _group_statistics(r, index)
    centred = a - F.group_sums(a, index) / size
    if score == "dr_grpo":
        return centred
    if score == "rloo":
        return centred * size / _others(size)
    scale = std + STD_EPS
    # d std / dr_j = deviation_j / ((n - 1) std), taken as 0 where all r are equal: the std has its minimum there.
    slope = torch.where(std > 0, psi * scale / (_others(size) * std), torch.zeros_like(psi))
    return (centred - F.group_sums(a * psi, index) * slope) / scale


def _group_statistics(r: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: size of the group, r minus its mean, unbiased standard deviation; 0 and 0 in a group of one."""
    size = F.group_sums(torch.ones_like(r), index)
    deviation = r - F.group_sums(r, index) / size
    return size, deviation, (F.group_sums(deviation.square(), index) / _others(size)).sqrt()


def _others(size: Tensor) -> Tensor:
    """n - 1; 1 in a group of one, where all that it divides is 0."""
    return (size - 1).clamp(min=1)


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
