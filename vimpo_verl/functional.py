"""The equations of VIMPO (arXiv 2606.20008) as pure tensor functions. Imports torch only.

Notation, for one response y_1..y_T to a prompt x, with s_t = (x, y_<t), a reward R at the end only and discount 1:

    rho_t    = beta * log( pi_theta(y_t|s_t) / pi_ref(y_t|s_t) )         policy-reference log-ratio
    kappa_t  = beta * KL( pi_theta(.|s_t) || pi_ref(.|s_t) )             over the whole vocabulary
    td_t     = rho_t - kappa_t                                           token TD residual         td_residual
    V(s_t)   = V(s_{t+1}) - td_t,  V(s_{T+1}) = 0                        implied values            implied_values
    A_t      = sum_{k>=t} lam^(k-t) td_k                                 GAE(lam) over them        implied_advantages
    V0       = mean reward of the prompt's group                         baseline                  group_baseline
    L_V      = mean_i 1/2 ( sum_t (rho_t - sg[kappa_t]) - (R - V0) )^2   value loss                value_loss

Shapes: B sequences, T response tokens, V vocabulary entries. `response_mask` is 1 on the tokens that the policy wrote.
Masked tokens (padding, tool output) have td = 0 and are skipped by the recurrences: they are no episode ends, and lam
does not decay over them. Values found under the mask never matter, not even NaN. Inputs of half precision are
accumulated in float32, because a sum over T log-ratios is small against its terms.

Arguments that do not fit are refused with a ValueError that names them: shapes, devices, tensors that are not of a float
dtype, masks that are not 0/1, numbers out of range. A bool mask is taken as it is; the values of any other are looked at,
which on an accelerator waits for the device, so verl_patches hands over bools in every micro-batch.
"""

from collections.abc import Hashable, Sequence
from numbers import Real

import torch
from torch import Tensor

WHITEN_EPS = 1e-8  # under the root of `whiten`; part of the method, see there
SAMPLED_KL_ESTIMATORS = ("k2", "k3")
VALUE_LOSS_TYPES = ("squared_error", "huber")
_SCAN_BLOCK = 64  # tokens that implied_advantages sums at once where lam < 1


# ---- kappa: the KL of a token ----------------------------------------------------------------------------------------


def exact_kl(policy_logits: Tensor, ref_logits: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """KL( policy || reference ) of every token, over the whole vocabulary (kappa_t / beta, paper section 3).

    Args:
        policy_logits: [..., V], any float dtype, already divided by the sampling temperature. -inf entries have
            probability zero.
        ref_logits: [..., V], same shape, device and dtype: rounding one of them only would be read as KL.
        chunk_size: tokens handled at a time; None takes all at once. Extra memory is a few [chunk_size, V] tensors in
            both directions. The result does not depend on it.

    Returns:
        [...], float32 (float64 for float64 inputs), in nats; exactly 0 where the logits are equal. Differentiable with
        respect to both arguments (first order).

    Raises:
        ValueError: the logits differ in shape, device or dtype, the vocabulary is empty, or chunk_size is not positive.
    """
    _require_logits(policy_logits, ref_logits)
    if chunk_size is not None and not (_is_int(chunk_size) and chunk_size >= 1):
        raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size!r}")
    vocab_size = policy_logits.shape[-1]
    kl = _ExactKL.apply(policy_logits.reshape(-1, vocab_size), ref_logits.reshape(-1, vocab_size), chunk_size)
    return kl.reshape(policy_logits.shape[:-1])


def topk_kl(policy_logits: Tensor, ref_logits: Tensor, k: int) -> Tensor:
    """The part of KL( policy || reference ) on the policy's k most likely entries, with the full normalisers.

    Args:
        policy_logits, ref_logits: [..., V].
        k: entries kept, 1 <= k <= V.

    Returns:
        [...], float32 (float64 for float64 inputs). Not a divergence: it can be negative.

    Raises:
        ValueError: the logits do not fit, as for exact_kl, or k is outside 1..V.
    """
    _require_logits(policy_logits, ref_logits)
    if not (_is_int(k) and 1 <= k <= policy_logits.shape[-1]):
        raise ValueError(f"k must be an integer from 1 to the vocabulary size {policy_logits.shape[-1]}, got {k!r}")
    log_p = torch.log_softmax(accumulating(policy_logits), dim=-1)
    log_q = torch.log_softmax(accumulating(ref_logits), dim=-1)
    top_log_p, top = log_p.topk(k, dim=-1)
    top_p = top_log_p.exp()
    terms = top_p * (top_log_p - log_q.gather(-1, top))
    return torch.where(top_p == 0, torch.zeros_like(terms), terms).sum(-1)


def sampled_kl(log_prob: Tensor, ref_log_prob: Tensor, estimator: str) -> Tensor:
    """Estimate KL( policy || reference ) of a token from the sampled token alone.

    Args:
        log_prob, ref_log_prob: same shape, in nats.
        estimator: "k2", (log-ratio)^2 / 2, or "k3", q/p - 1 - log(q/p).

    Returns:
        Same shape; float32 for half precision inputs.

    Raises:
        ValueError: the log-probs do not fit, or the estimator is unknown or "k1".
    """
    require_fitting(log_prob=log_prob, ref_log_prob=ref_log_prob)
    log_ratio = accumulating(log_prob) - accumulating(ref_log_prob)
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    if estimator == "k1":
        raise ValueError(
            "estimator 'k1' is the log-ratio itself: rho_t - kappa_t would be zero for every token and nothing would "
            "be learnt. Use the exact KL, 'k2' or 'k3'"
        )
    raise ValueError(f"unknown estimator {estimator!r}: choose one of {', '.join(SAMPLED_KL_ESTIMATORS)}")


# ---- td, values, advantages ------------------------------------------------------------------------------------------


def td_residual(log_prob: Tensor, ref_log_prob: Tensor, token_kl: Tensor, response_mask: Tensor, beta: float) -> Tensor:
    """td_t = rho_t - kappa_t = beta * ( log pi_theta - log pi_ref - KL ), zero where masked (paper section 3).

    Args:
        log_prob, ref_log_prob, token_kl: [B, T], in nats.
        response_mask: [B, T], 0/1 or bool.
        beta: weight of the reference, > 0.

    Returns:
        [B, T], in units of reward; float32 for half precision inputs.

    Raises:
        ValueError: the tensors or the mask do not fit, or beta is not a positive number.
    """
    valid = valid_tokens(response_mask, log_prob=log_prob, ref_log_prob=ref_log_prob, token_kl=token_kl)
    require_positive(beta=beta)
    td = beta * (accumulating(log_prob) - accumulating(ref_log_prob) - accumulating(token_kl))
    return zero_where_masked(td, valid)


def implied_values(td: Tensor, response_mask: Tensor) -> Tensor:
    """V(s_t) = V(s_{t+1}) - td_t with V(s_{T+1}) = 0: the values implied by the policy, zero where masked.

    Args:
        td: [B, T].
        response_mask: [B, T], 0/1 or bool.

    Returns:
        [B, T], relative to the reward at the end, in units of reward; float32 for half precision inputs.

    Raises:
        ValueError: td or the mask do not fit.
    """
    valid = valid_tokens(response_mask, td=td)
    return zero_where_masked(-_sum_from_here_on(zero_where_masked(accumulating(td), valid)), valid)


def implied_advantages(td: Tensor, response_mask: Tensor, lam: float) -> Tensor:
    """A_t = td_t + lam * A_(next valid token): GAE(lam) over the implied values, in which the reward cancels.

    Args:
        td: [B, T].
        response_mask: [B, T], 0/1 or bool.
        lam: in [0, 1].

    Returns:
        [B, T], raw (not whitened), zero where masked; float32 for half precision inputs.

    Raises:
        ValueError: td or the mask do not fit, or lam is outside [0, 1].
    """
    if not (isinstance(lam, Real) and 0.0 <= lam <= 1.0):
        raise ValueError(f"lam must be a number in [0, 1], got {lam!r}")
    valid = valid_tokens(response_mask, td=td)
    if lam == 1.0:
        return -implied_values(td, valid)
    td = zero_where_masked(accumulating(td), valid)
    decay = torch.where(valid, td.new_tensor(lam), td.new_tensor(1.0))  # lam does not decay over masked tokens
    return zero_where_masked(_decayed_sum_from_here_on(td, decay), valid)


def _decayed_sum_from_here_on(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t * y_{t+1} over the last dimension, with y_{T+1} = 0.

    Blocks of tokens at once, by doubling: after the step of length s, y_t covers x_t .. x_{t+2s-1} of its block and decay_t
    what lies behind them. What follows a block reaches it through its first tokens, which are such a series themselves.
    """
    length = x.shape[-1]
    if length == 0:
        return x
    blocks = -(-length // _SCAN_BLOCK)
    short = (0, blocks * _SCAN_BLOCK - length)
    y = torch.nn.functional.pad(x, short).unflatten(-1, (blocks, _SCAN_BLOCK))
    decay = torch.nn.functional.pad(decay, short).unflatten(-1, (blocks, _SCAN_BLOCK))
    step = 1
    while step < min(_SCAN_BLOCK, length):
        y = y + decay * torch.nn.functional.pad(y[..., step:], (0, step))
        decay = decay * torch.nn.functional.pad(decay[..., step:], (0, step), value=1.0)
        step *= 2
    if blocks > 1:
        first = _decayed_sum_from_here_on(y[..., 0], decay[..., 0])
        y = y + decay * torch.nn.functional.pad(first[..., 1:], (0, 1)).unsqueeze(-1)
    return y.flatten(-2)[..., :length]


def whiten(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """(a - mean) * rsqrt(var + 1e-8) over the valid tokens of the batch; var is unbiased.

    The 1e-8 belongs to the scale of the data: while the policy is near the reference, raw advantages are tiny, and it
    keeps their noise from being blown up to unit size.

    Args:
        advantages: [B, T].
        response_mask: [B, T], 0/1 or bool.

    Returns:
        [B, T], zero where masked; float32 for half precision inputs. A constant, a single valid token or none give zeros.

    Raises:
        ValueError: the advantages or the mask do not fit.
    """
    valid = valid_tokens(response_mask, advantages=advantages)
    advantages = zero_where_masked(accumulating(advantages), valid)
    count = int(valid.sum())
    if count < 2:
        return torch.zeros_like(advantages)
    # Counted from one of the values, so that a constant gives exact zeros and large offsets cost no digits.
    shifted = advantages - advantages[valid][0]
    deviation = zero_where_masked(shifted - zero_where_masked(shifted, valid).sum() / count, valid)
    variance = deviation.square().sum() / (count - 1)
    return deviation * torch.rsqrt(variance + WHITEN_EPS)


def whiten_with(advantages: Tensor, response_mask: Tensor, mean: float, variance: float) -> Tensor:
    """`whiten` with a mean and a variance that are known from elsewhere: (a - mean) * rsqrt(variance + 1e-8).

    Args:
        advantages: [B, T].
        response_mask: [B, T], 0/1 or bool.
        mean, variance: of the advantages of all valid tokens, in the units of the advantages and their square; >= 0.

    Returns:
        [B, T], zero where masked; float32 for half precision inputs.

    Raises:
        ValueError: the advantages or the mask do not fit, or a number is not finite or the variance negative.
    """
    valid = valid_tokens(response_mask, advantages=advantages)
    for name, number, least in (("mean", mean, -float("inf")), ("variance", variance, 0.0)):
        if not (isinstance(number, Real) and least <= number and abs(number) < float("inf")):
            raise ValueError(f"{name} must be a finite number{' >= 0' if least == 0 else ''}, got {number!r}")
    return zero_where_masked((accumulating(advantages) - mean) * (variance + WHITEN_EPS) ** -0.5, valid)


# ---- value loss ------------------------------------------------------------------------------------------------------


def group_baseline(outcome: Tensor, group: Sequence[Hashable], *, cap: float | None = None) -> Tensor:
    """V0: the mean reward of the prompt's group, at most `cap`. Detached.

    Args:
        outcome: [B], the reward R of each sequence, any real dtype.
        group: B hashables; sequences of one prompt share one.
        cap: upper bound of the baseline, or None.

    Returns:
        [B]; float32 for half precision inputs.

    Raises:
        ValueError: outcome is not [B] (one reward a sequence), group has another length or cap is not a number.
    """
    outcome, index = grouped(outcome, group, cap)
    return _capped(group_sums(outcome, index) / group_sums(torch.ones_like(outcome), index), cap)


def leave_one_out_baseline(outcome: Tensor, group: Sequence[Hashable], *, cap: float | None = None) -> Tensor:
    """V0 as the mean reward of the *other* members of the group, at most `cap`. Detached.

    A group of one has no other member; its baseline is its own reward, as with `group_baseline`, so its target is 0.
    Arguments, result and errors as for `group_baseline`.
    """
    outcome, index = grouped(outcome, group, cap)
    others = group_sums(torch.ones_like(outcome), index) - 1
    mean_of_others = (group_sums(outcome, index) - outcome) / others.clamp(min=1)
    return _capped(torch.where(others > 0, mean_of_others, outcome), cap)


def value_loss(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    token_kl: Tensor,
    target: Tensor,
    response_mask: Tensor,
    beta: float,
    *,
    loss_type: str = "squared_error",
    huber_delta: float = 0.5,
    detach_kl: bool = True,
) -> Tensor:
    """L_V of every sequence: 1/2 ( sum_t (rho_t - sg[kappa_t]) - (R - V0) )^2, or Huber's (paper section 3).

    The gradient flows through log_prob only: kappa, the reference and the target are stopped. `detach_kl` False lets it flow
    through kappa, too, as the authors' switch of that name: L_V then also falls by shrinking the KL itself.

    Args:
        log_prob, ref_log_prob, token_kl: [B, T], in nats.
        target: [B], R - V0.
        response_mask: [B, T], 0/1 or bool.
        beta: weight of the reference, > 0.
        loss_type: "squared_error", or "huber", which is linear beyond |residual| = huber_delta.
        huber_delta: > 0.
        detach_kl: stop the gradient of kappa.

    Returns:
        [B]; the caller averages over the sequences of the global mini-batch. float32 for half precision inputs.

    Raises:
        ValueError: the tensors, the mask or the target do not fit, a number is out of range, or loss_type is unknown.
    """
    if loss_type not in VALUE_LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}: choose one of {', '.join(VALUE_LOSS_TYPES)}")
    token_kl = token_kl.detach() if detach_kl else token_kl
    td = td_residual(log_prob, ref_log_prob.detach(), token_kl, response_mask, beta)
    _require_target(target, td)
    residual = td.sum(-1) - accumulating(target.detach())
    if loss_type == "squared_error":
        return 0.5 * residual.square()
    require_positive(huber_delta=huber_delta)
    return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=huber_delta)


def _require_target(target: Tensor, td: Tensor) -> None:
    _require_real(target=target)
    if target.shape != td.shape[:-1] or target.device != td.device:
        raise ValueError(
            f"target must be [B] = {list(td.shape[:-1])} on {td.device}, got {list(target.shape)} on {target.device}"
        )


def clipped_value_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    ref_log_prob: Tensor,
    token_kl: Tensor,
    target: Tensor,
    response_mask: Tensor,
    beta: float,
    *,
    clip: float,
    loss_type: str = "squared_error",
    huber_delta: float = 0.5,
    detach_kl: bool = True,
) -> Tensor:
    """L_V for several updates a batch: the number is that of `value_loss`, its gradient knows the ratio to the old policy.

        grad L_i = beta e_i sum_t w_t grad log pi_theta(y_t|s_t),   e_i = S_i - (R - V0) (with huber, within +- huber_delta)
        w_t = min(r_t, 1 + clip),   r_t = pi_theta / pi_old;   0 where the push goes on beyond the range, as PPO's clip:
              e_i > 0 and r_t < 1 - clip,  or  e_i < 0 and r_t > 1 + clip

    Where r_t = 1, as in the first update of a batch, this is the gradient of `value_loss`. Later updates need the ratio:
    without it an answer that turned out wrong is pushed down until its log-ratio is (R - V0) / beta, however unlikely it
    has become (docs/method.md, "Several updates a batch"). The bound on w_t is for tokens that have become likelier, whose
    ratio knows no bound.

    Args:
        log_prob, ref_log_prob, token_kl, target, response_mask, beta, loss_type, huber_delta, detach_kl: as for
            `value_loss`. A kappa that is not detached has its gradient unweighed.
        old_log_prob: [B, T], in nats, of the policy that the ratio is to, as PPO's. Detached.
        clip: > 0, how far r_t may be from 1 before a token is pushed no further.

    Returns:
        [B]; the caller averages over the sequences of the global mini-batch. float32 for half precision inputs.

    Raises:
        ValueError: as `value_loss`, old_log_prob does not fit, or clip is not a positive number.
    """
    require_positive(clip=clip)
    valid = valid_tokens(response_mask, log_prob=log_prob, old_log_prob=old_log_prob)
    kind = {"loss_type": loss_type, "huber_delta": huber_delta}
    loss = value_loss(log_prob.detach(), ref_log_prob, token_kl.detach(), target, valid, beta, **kind)
    td = td_residual(log_prob.detach(), ref_log_prob.detach(), token_kl.detach(), valid, beta)
    error = td.sum(-1, keepdim=True) - accumulating(target.detach()).unsqueeze(-1)
    if loss_type == "huber":
        error = error.clamp(-huber_delta, huber_delta)
    log_prob = zero_where_masked(accumulating(log_prob), valid)
    ratio = (log_prob.detach() - zero_where_masked(accumulating(old_log_prob.detach()), valid)).exp()
    goes_on_beyond = ((error > 0) & (ratio < 1 - clip)) | ((error < 0) & (ratio > 1 + clip))
    weight = torch.where(goes_on_beyond, 0.0, ratio.clamp(max=1 + clip))
    pushed = weight * log_prob
    if not detach_kl:
        pushed = pushed - zero_where_masked(accumulating(token_kl), valid)
    surrogate = beta * (error * pushed).sum(-1)
    return loss + surrogate - surrogate.detach()


# ---- numerics of the exact KL ----------------------------------------------------------------------------------------


class _ExactKL(torch.autograd.Function):
    """[N, V], [N, V] -> [N]; both directions a chunk of tokens at a time, nothing of size [N, V] kept but the inputs.

    In float64, because a KL is a small difference of large sums: in float32, two distributions 1e-6 nats apart would
    have no correct digit.
    """

    @staticmethod
    def forward(ctx, policy_logits: Tensor, ref_logits: Tensor, chunk_size: int | None) -> Tensor:
        kl = policy_logits.new_empty(policy_logits.shape[0], dtype=accumulating(policy_logits[:0]).dtype)
        for rows in _chunks(policy_logits.shape[0], chunk_size):
            log_p, log_q = _log_softmaxes(policy_logits[rows], ref_logits[rows])
            p = log_p.exp()
            kl[rows] = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).to(kl.dtype)
        ctx.save_for_backward(policy_logits, ref_logits)
        ctx.chunk_size = chunk_size
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl: Tensor):
        """d KL / d policy_logits = p (log p - log q - KL);  d KL / d ref_logits = q - p."""
        policy_logits, ref_logits = ctx.saved_tensors
        grad_policy = torch.empty_like(policy_logits) if ctx.needs_input_grad[0] else None
        grad_ref = torch.empty_like(ref_logits) if ctx.needs_input_grad[1] else None
        for rows in _chunks(policy_logits.shape[0], ctx.chunk_size):
            log_p, log_q = _log_softmaxes(policy_logits[rows], ref_logits[rows])
            p, grad = log_p.exp(), grad_kl[rows].unsqueeze(-1)
            if grad_policy is not None:
                log_ratio = torch.where(p == 0, 0.0, log_p - log_q)
                kl = (p * log_ratio).sum(-1, keepdim=True)
                grad_policy[rows] = (grad * p * (log_ratio - kl)).to(grad_policy.dtype)
            if grad_ref is not None:
                grad_ref[rows] = (grad * (log_q.exp() - p)).to(grad_ref.dtype)
        return grad_policy, grad_ref, None


def _log_softmaxes(policy_logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """[n, V], [n, V] -> log p, log q, in float64."""
    return torch.log_softmax(policy_logits.double(), dim=-1), torch.log_softmax(ref_logits.double(), dim=-1)


def _chunks(length: int, chunk_size: int | None) -> list[slice]:
    step = chunk_size or max(length, 1)
    return [slice(start, start + step) for start in range(0, length, step)]


# ---- small helpers ---------------------------------------------------------------------------------------------------


def accumulating(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that sums are taken in: float64 stays, anything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def zero_where_masked(tensor: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, tensor, torch.zeros_like(tensor))


def _sum_from_here_on(tensor: Tensor) -> Tensor:
    """sum_{k >= t} over the last dimension."""
    return tensor.flip(-1).cumsum(-1).flip(-1)


def grouped(outcome: Tensor, group: Sequence[Hashable], cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Detached outcomes, and for each sequence the number of its group, counted from 0 as the groups appear.

    Raises:
        ValueError: as for `group_baseline`.
    """
    _require_real(outcome=outcome)
    if outcome.dim() != 1:
        raise ValueError(f"outcome must be [B], one reward a sequence, got shape {list(outcome.shape)}")
    if isinstance(group, Tensor):
        group = group.tolist()  # tensors hash by identity: every sequence would be a group of its own
    if len(group) != outcome.shape[0]:
        raise ValueError(f"outcome has {outcome.shape[0]} rewards and group {len(group)} names: one a sequence in both")
    if cap is not None and not (isinstance(cap, Real) and cap == cap):
        raise ValueError(f"cap must be a number or None, got {cap!r}")
    number: dict[Hashable, int] = {}
    try:
        index = [number.setdefault(name, len(number)) for name in group]
    except TypeError as error:
        raise ValueError(f"group must hold hashables, such as the prompts' uids: {error}") from None
    return accumulating(outcome.detach()), torch.tensor(index, dtype=torch.long, device=outcome.device)


def group_sums(values: Tensor, index: Tensor) -> Tensor:
    """[B] -> [B]: the sum over each sequence's group."""
    groups = int(index.max()) + 1 if index.numel() else 0
    return values.new_zeros(groups).index_add_(0, index, values)[index]


def _capped(baseline: Tensor, cap: float | None) -> Tensor:
    return baseline if cap is None else baseline.clamp(max=cap)


# ---- what is refused -------------------------------------------------------------------------------------------------


def require_mask(response_mask: Tensor) -> Tensor:
    """The mask as bools.

    Args:
        response_mask: bool, or any other dtype with values 0 and 1 only.

    Raises:
        ValueError: it has another value. Truncating 0.5 or -1 to "valid" would train on tokens that nobody meant.
    """
    if response_mask.dtype == torch.bool:
        return response_mask
    valid = response_mask == 1
    strange = response_mask[~(valid | (response_mask == 0))]
    if strange.numel():
        raise ValueError(
            f"response_mask must hold 0 and 1 only, got {strange[0].item()} ({strange.numel()} of {valid.numel()} entries "
            "are neither)"
        )
    return valid


def valid_tokens(response_mask: Tensor, **tensors: Tensor) -> Tensor:
    """The mask of [B, T] tensors as bools, once everything fits.

    Raises:
        ValueError: a tensor differs from the mask in shape or device or is of no float dtype, or the mask is not 0/1.
    """
    require_fitting(response_mask=response_mask, **tensors)
    if response_mask.dim() != 2:
        names = ", ".join([*tensors, "response_mask"])
        raise ValueError(f"{names} must be [B, T], got shape {list(response_mask.shape)}")
    return require_mask(response_mask)


def _require_logits(policy_logits: Tensor, ref_logits: Tensor) -> None:
    require_fitting(policy_logits=policy_logits, ref_logits=ref_logits)
    if policy_logits.dim() == 0 or policy_logits.shape[-1] == 0:
        raise ValueError(f"policy_logits must be [..., V] with V > 0, got shape {list(policy_logits.shape)}")
    if policy_logits.dtype != ref_logits.dtype:
        raise ValueError(f"dtypes differ: policy_logits {policy_logits.dtype}, ref_logits {ref_logits.dtype}")


def require_fitting(**tensors: Tensor) -> None:
    """One shape and one device for all; a float dtype for all but the mask."""
    for what, of in (("shapes", lambda tensor: list(tensor.shape)), ("devices", lambda tensor: str(tensor.device))):
        found = {name: of(tensor) for name, tensor in tensors.items()}
        if any(value != next(iter(found.values())) for value in found.values()):
            raise ValueError(f"{what} differ: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    for name, tensor in tensors.items():
        if name != "response_mask" and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {tensor.dtype}")


def _require_real(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise ValueError(f"{name} must be of a real dtype, got {tensor.dtype}")


def require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, Real) and 0 < number < float("inf")):
            raise ValueError(f"{name} must be a number greater than 0, got {number!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
