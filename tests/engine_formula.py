"""A step of VIMPO written out in float64 with loops over samples and tokens: the reference for the engine tests.

Nothing of vimpo_verl or verl is used here: HF's forward, one sample at a time, and the equations of the paper.
"""

from pathlib import Path

import torch

CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.28, 10.0
VALUE_CLIP = 0.2


def load(path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    vision = hasattr(AutoConfig.from_pretrained(path), "vision_config")

    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float64, **plain).eval()
    for module in model.modules():
        if hasattr(module, "chunk_gated_delta_rule"):  # transformers' own computes in float32 and in chunks
            module.chunk_gated_delta_rule = gated_delta_rule
    return model


def gated_delta_rule(query, key, value, g, beta, **_):
    """Linear attention (arXiv 2412.06464), token by token: [B, T, heads, D] each, g and beta [B, T, heads] -> as value, S_T.

    S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) S_(t-1) k_t), output S_t q_t / sqrt(D), with q and k of length 1.
    """
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    g, beta = g.double(), beta.double()
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
    outputs = []
    for t in range(value.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        seen = (state * key[:, t, :, :, None]).sum(-2)
        state = state + key[:, t, :, :, None] * (beta[:, t, :, None] * (value[:, t] - seen)).unsqueeze(-2)
        outputs.append((state * query[:, t, :, :, None]).sum(-2) / query.shape[-1] ** 0.5)
    return torch.stack(outputs, dim=1), state


def log_distributions(model, sample, temperature) -> torch.Tensor:
    """[T, V]: log pi( . | prompt, y_<t) for every response token."""
    tokens = torch.tensor([sample.prompt + sample.response])
    image = sample.image.for_transformers() if sample.image else {}
    logits = model(input_ids=tokens, **image).logits[0] / temperature
    first = len(sample.prompt) - 1
    return torch.log_softmax(logits[first : first + len(sample.response)], dim=-1)


def per_token(policy, ref, samples, temperature) -> dict[str, list[torch.Tensor]]:
    """log-probs, entropy and KL of every response token."""
    found = {"log_probs": [], "entropy": [], "ref_log_probs": [], "token_kl": []}
    with torch.no_grad():
        for sample in samples:
            log_p, log_q = (log_distributions(model, sample, temperature) for model in (policy, ref))
            label = torch.tensor(sample.response).unsqueeze(-1)
            found["log_probs"].append(log_p.gather(-1, label).squeeze(-1))
            found["ref_log_probs"].append(log_q.gather(-1, label).squeeze(-1))
            found["entropy"].append(-(log_p.exp() * log_p).sum(-1))
            found["token_kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
    return found


def advantages_and_targets(tokens, samples, beta, lam):
    """Loops: whitened A_t and S_i = sum_t td_t of each sample, R - V0 of each sample."""
    raw, sums = [], []
    for i, sample in enumerate(samples):
        td = beta * (tokens["log_probs"][i] - tokens["ref_log_probs"][i] - tokens["token_kl"][i])
        running, row = 0.0, [0.0] * len(sample.response)
        for t in reversed(range(len(sample.response))):
            if sample.mask[t]:
                running = td[t].item() + lam * running
                row[t] = running
        raw.append(row)
        sums.append(sum(td[t].item() for t in range(len(td)) if sample.mask[t]))
    valid = [a for row, sample in zip(raw, samples, strict=True) for a, m in zip(row, sample.mask, strict=True) if m]
    mean = sum(valid) / len(valid)
    variance = sum((a - mean) ** 2 for a in valid) / (len(valid) - 1)
    white = [
        [(a - mean) / (variance + 1e-8) ** 0.5 if m else 0.0 for a, m in zip(row, sample.mask, strict=True)]
        for row, sample in zip(raw, samples, strict=True)
    ]
    targets = []
    for sample in samples:
        members = [s.outcome for s in samples if s.uid == sample.uid]
        targets.append(sample.outcome - sum(members) / len(members))
    return white, sums, targets


def actor_coeff(samples, sums, targets, beta, alpha=0.1):
    """alpha * beta * mean_length * rms_over_tokens(residual) * max(0, correlation within groups)."""
    lengths = [sum(s.mask) for s in samples]
    square = sum(n * (s - r) ** 2 for n, s, r in zip(lengths, sums, targets, strict=True)) / sum(lengths)
    judged = [i for i, length in enumerate(lengths) if length]  # without a valid token there is no judgement

    def centred(values):
        means = {samples[i].uid: [values[j] for j in judged if samples[j].uid == samples[i].uid] for i in judged}
        return [values[i] - sum(means[samples[i].uid]) / len(means[samples[i].uid]) for i in judged]

    s, r = centred(sums), centred([sample.outcome for sample in samples])
    numerator = sum(a * b for a, b in zip(s, r, strict=True))
    scale = (sum(a * a for a in s) * sum(b * b for b in r)) ** 0.5
    trust = max(0.0, numerator / scale) if scale > 0 else 0.0
    return alpha * beta * sum(lengths) / len(lengths) * square**0.5 * trust


def step(models: Path, samples, *, temperature=1.0, beta=0.1, lam=1.0, lr=0.0, mini_batches=1, epochs=1, equal=False,
         entropy_coeff=0.0, kl_coeff=0.0, coeff=None, policy=None, weigh=None, keep=None,
         old=None, value_clip=VALUE_CLIP) -> dict:  # fmt: skip
    """One step with SGD. Returns tokens, coeff, and per update: value_loss, actor_loss, gradients; parameters at the end.

    entropy_coeff, kl_coeff: verl's own terms, token means of the entropy and of the low-variance KL to the reference.
    policy: the one to start from, as an earlier step left it; None: the model on disk.
    weigh: old log-probs of a sample, its position in the batch -> importance weights of its tokens in the actor loss.
    old: the tokens of another policy that are to be the old ones; None: those of the one to start from.
    keep: the same -> whether the sample is in the value loss at all.
    value_clip: None: the paper's L_V, without a ratio.
    """
    policy, ref = policy or load(models / "policy"), load(models / ("policy" if equal else "ref"))
    tokens = old or per_token(policy, ref, samples, temperature)
    white, sums, targets = advantages_and_targets(tokens, samples, beta, lam)
    coeff = actor_coeff(samples, sums, targets, beta) if coeff is None else coeff
    size, updates = len(samples) // mini_batches, []
    for _ in range(epochs):
        for start in range(0, len(samples), size):
            rows = range(start, start + size)
            value_loss, actor_loss, extra = 0.0, 0.0, 0.0
            count = sum(sum(samples[i].mask) for i in rows)
            kept = [i for i in rows if keep is None or keep(tokens["log_probs"][i], i)]
            for i in rows:
                mask = torch.tensor(samples[i].mask, dtype=torch.float64)
                log_p = log_distributions(policy, samples[i], temperature)
                new = log_p.gather(-1, torch.tensor(samples[i].response).unsqueeze(-1)).squeeze(-1)
                td = beta * (new - tokens["ref_log_probs"][i] - tokens["token_kl"][i])
                error = (mask * td).sum() - targets[i]
                if i in kept and value_clip is None:
                    value_loss = value_loss + 0.5 * error**2 / len(kept)
                elif i in kept:  # its number stays, its gradient is weighed by the bounded ratio
                    slope = error.detach()
                    value_loss = value_loss + 0.5 * slope**2 / len(kept)
                    for t in range(len(mask)):
                        ratio = torch.exp(new[t].detach() - tokens["log_probs"][i][t])
                        beyond = ratio < 1 - value_clip if slope > 0 else ratio > 1 + value_clip
                        if mask[t] and not beyond:
                            push = beta * slope * min(ratio, 1 + value_clip) * new[t]
                            value_loss = value_loss + (push - push.detach()) / len(kept)
                for t in range(len(mask)):
                    if mask[t]:
                        ratio = torch.exp(new[t] - tokens["log_probs"][i][t])
                        weight = weigh(tokens["log_probs"][i], i)[t] if weigh else 1.0
                        actor_loss = actor_loss + weight * clipped(ratio, white[i][t]) / count
                entropy = -(log_p.exp() * log_p).sum(-1)
                to_ref = tokens["ref_log_probs"][i] - new
                low_variance_kl = torch.exp(to_ref) - to_ref - 1
                extra = extra + (mask * (kl_coeff * low_variance_kl - entropy_coeff * entropy)).sum() / count
            policy.zero_grad()
            (value_loss + coeff * actor_loss + extra).backward()
            gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
            updates.append({"value_loss": value_loss.item(), "actor_loss": actor_loss.item(), "gradients": gradients})
            with torch.no_grad():
                for p in policy.parameters():
                    p -= lr * p.grad
    parameters = {name: p.detach().clone() for name, p in policy.named_parameters()}
    return {"tokens": tokens, "coeff": coeff, "updates": updates, "parameters": parameters, "policy": policy}


def clipped(ratio, advantage):
    """PPO-clip with dual clip (arXiv 1912.09729), as a loss."""
    loss = max(-ratio * advantage, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    return min(loss, torch.tensor(-CLIP_DUAL * advantage)) if advantage < 0 else loss
