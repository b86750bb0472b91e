"""Claim: each switch of VIMPO's authors is its formula, once a batch and on verl's engine, and is refused where it cannot be.

Top-k kappa, kappa with a gradient, the soft value, weight and normalisation of L_V, c_A by the scale of the gradients, GRPO's
advantages beside the value loss. The formula in plain float64 below; the engine computes in float32. The reference that is
refreshed is in test_reference_refresh.py; the recorded soft value in test_reference_vectors.py and test_baselines.py.
"""

import engine_formula
import pytest
import torch
from engine_harness import Setting, run_step
from engine_samples import make_samples, padded
from omegaconf import OmegaConf
from test_validation import vimpo

from vimpo_verl import functional as F
from vimpo_verl import switches
from vimpo_verl.batch import compute_batch
from vimpo_verl.config import VimpoConfig, parse_config

BETA = 0.1
GROUPS = ["a", "a", "a", "b", "b", "c", "d", "d"]
OUTCOME = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.25]


def make_batch(seed=0, **knobs):
    """Inputs in float64 with ragged masks and a placeholder at the end, and the batch computed from them."""
    generator = torch.Generator().manual_seed(seed)
    log_prob, ref, kl = (torch.rand(3, 9, 6, generator=generator, dtype=torch.float64) * torch.tensor(
        [-1.0, -1.0, 0.3], dtype=torch.float64
    ).view(3, 1, 1)).unbind()  # fmt: skip
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 5, 2, 6, 1, 4, 0]).unsqueeze(1)
    inputs = {
        "old_log_prob": log_prob, "ref_log_prob": ref, "token_kl": kl, "response_mask": mask,
        "outcome": torch.tensor([*OUTCOME, 0.0], dtype=torch.float64), "group": [*GROUPS, "pad"],
        "is_padding": torch.tensor([False] * 8 + [True]),
    }  # fmt: skip
    return inputs, compute_batch(**inputs, config=VimpoConfig(beta=BETA, **knobs), lam=1.0)


def targets(inputs):
    means = {g: sum(r for r, name in zip(OUTCOME, GROUPS, strict=True) if name == g) / GROUPS.count(g) for g in GROUPS}
    return [r - means[g] for r, g in zip(OUTCOME, GROUPS, strict=True)]


def sums_of_td(inputs):
    td = BETA * (inputs["old_log_prob"] - inputs["ref_log_prob"] - inputs["token_kl"])
    return [sum(td[i, t].item() for t in range(6) if inputs["response_mask"][i, t]) for i in range(8)]


# ---- once a batch ------------------------------------------------------------------------------------------------------


def test_weight_and_normalisation_of_the_value_loss():
    inputs, plain = make_batch()
    mean_square = sum(t * t for t in targets(inputs)) / 8
    assert plain.value_scale == 1.0
    assert make_batch(value_coeff=3.0)[1].value_scale == 3.0
    batch = make_batch(value_coeff=3.0, value_normalised=True)[1]
    assert batch.value_scale == pytest.approx(3.0 / mean_square, rel=1e-12)
    assert batch.actor_coeff == pytest.approx(plain.actor_coeff * batch.value_scale, rel=1e-12), (
        "the same push beside it"
    )
    everything = torch.ones(8, dtype=torch.bool)
    nothing = switches.value_scale(VimpoConfig(value_coeff=3.0, value_normalised=True), torch.zeros(8), everything)
    assert nothing == 3.0, "no scale can be seen"


def test_soft_value():
    """V0 = mean of R - beta sum_t KL; what is explained is sum_t rho, without kappa."""
    inputs, batch = make_batch(value_type="soft", use_actor=False)
    kl = (inputs["token_kl"] * inputs["response_mask"]).sum(-1).tolist()
    rho = BETA * ((inputs["old_log_prob"] - inputs["ref_log_prob"]) * inputs["response_mask"]).sum(-1)
    wanted, square, tokens = [], 0.0, 0
    for i in range(8):
        group = [j for j in range(8) if GROUPS[j] == GROUPS[i]]
        wanted.append(OUTCOME[i] - sum(OUTCOME[j] - BETA * kl[j] for j in group) / len(group))
        length = int(inputs["response_mask"][i].sum())
        square, tokens = square + length * (rho[i].item() - wanted[i]) ** 2, tokens + length
    for i in range(8):
        valid = inputs["response_mask"][i]
        torch.testing.assert_close(
            batch.returns[i][valid], torch.full((int(valid.sum()),), wanted[i], dtype=torch.float64)
        )
    assert batch.metrics["vimpo/residual_rms"] == pytest.approx((square / tokens) ** 0.5, rel=1e-12)
    assert batch.returns[8].abs().sum() == 0


def test_grpos_advantages():
    """verl's own estimator, but for a group of one, which has nobody to be compared with."""
    import numpy as np
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    inputs, batch = make_batch(actor_advantage="grpo", whiten=False)
    rewards = torch.zeros(9, 6, dtype=torch.float64)
    rewards[:, 0] = inputs["outcome"]
    verls, _ = compute_grpo_outcome_advantage(
        rewards, inputs["response_mask"].double(), np.array(inputs["group"], dtype=object)
    )
    alone = [i for i, g in enumerate(inputs["group"]) if inputs["group"].count(g) == 1]
    others = [i for i in range(9) if i not in alone]
    torch.testing.assert_close(batch.advantages[others], verls[others])
    assert batch.advantages[alone].abs().sum() == 0
    sums, target = sums_of_td(inputs), targets(inputs)
    lengths = inputs["response_mask"].sum(-1)[:8].tolist()
    square = sum(n * (s - t) ** 2 for n, s, t in zip(lengths, sums, target, strict=True)) / sum(lengths)
    assert batch.actor_coeff == pytest.approx(0.1 * BETA * sum(lengths) / 8 * square**0.5, rel=1e-9), (
        "trust is not asked"
    )


@pytest.mark.parametrize("knobs", [{"whiten": False}, {}, {"actor_advantage": "grpo"}, {"value_coeff": 2.0}], ids=str)
def test_c_a_by_the_scale_of_the_gradients(knobs):
    """alpha = rms of c_A dL_A/dlog pi over rms of v dL_V/dlog pi, by autograd, on the tokens' log-probs at the old policy."""
    inputs, batch = make_batch(actor_coeff="gradient", actor_alpha=0.3, actor_trust=False, **knobs)
    log_prob, mask = inputs["old_log_prob"][:8].clone().requires_grad_(), inputs["response_mask"][:8]
    target = torch.tensor(targets(inputs), dtype=torch.float64)
    loss = F.value_loss(log_prob, inputs["ref_log_prob"][:8], inputs["token_kl"][:8], target, mask, BETA).mean()
    (value_gradient,) = torch.autograd.grad(batch.value_scale * loss, log_prob)
    ratio = (log_prob - inputs["old_log_prob"][:8]).exp()
    actor_loss = -(ratio * batch.advantages[:8])[mask].mean()
    (actor_gradient,) = torch.autograd.grad(batch.actor_coeff * actor_loss, log_prob)
    assert actor_gradient.norm().item() == pytest.approx(0.3 * value_gradient.norm().item(), rel=1e-9)


def test_c_a_by_the_scale_of_gradients_that_are_none():
    inputs, _ = make_batch()
    inputs |= {"ref_log_prob": inputs["old_log_prob"], "token_kl": torch.zeros(9, 6, dtype=torch.float64)}
    assert compute_batch(**inputs, config=VimpoConfig(beta=BETA, actor_coeff="gradient"), lam=1.0).actor_coeff == 0.0


# ---- on verl's engine --------------------------------------------------------------------------------------------------

SAMPLES = make_samples(seed=1)


def formula(models, knobs, samples=SAMPLES):
    """Loss, gradient and per-token KL of the first update, with loops over samples and tokens."""
    policy, ref = engine_formula.load(models / "policy"), engine_formula.load(models / "ref")
    tokens = engine_formula.per_token(policy, ref, samples, 1.0)
    kl = []
    for sample in samples:
        log_p, log_q = (engine_formula.log_distributions(model, sample, 1.0) for model in (policy, ref))
        terms = log_p.exp() * (log_p - log_q)
        if knobs.get("kl_estimator") == "topk":
            top = log_p.topk(knobs["kl_top_k"], -1).indices
            terms = terms.gather(-1, top)
        kl.append(terms.sum(-1))
    soft = knobs.get("value_type") == "soft"
    loss, found = 0.0, []
    for sample in samples:
        group = [j for j in range(len(samples)) if samples[j].uid == sample.uid]
        values = [
            samples[j].outcome - (BETA * (kl[j].detach() * torch.tensor(samples[j].mask)).sum().item() if soft else 0.0)
            for j in group
        ]
        found.append(sample.outcome - sum(values) / len(group))
    scale = knobs.get("value_coeff", 1.0)
    if knobs.get("value_normalised"):
        scale = scale / (sum(t * t for t in found) / len(found))
    for i, sample in enumerate(samples):
        mask = torch.tensor(sample.mask, dtype=torch.float64)
        log_p = engine_formula.log_distributions(policy, sample, 1.0)
        new = log_p.gather(-1, torch.tensor(sample.response).unsqueeze(-1)).squeeze(-1)
        kappa = torch.zeros_like(new) if soft else kl[i] if knobs.get("kappa_detach") is False else kl[i].detach()
        td = BETA * (new - tokens["ref_log_probs"][i] - kappa)
        loss = loss + 0.5 * ((mask * td).sum() - found[i]) ** 2 / len(samples)
    (scale * loss).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    # The logged loss leaves out the constant of a response without a valid token.
    constant = sum(0.5 * t**2 / len(samples) for t, sample in zip(found, samples, strict=True) if not any(sample.mask))
    return loss.item() - constant, gradients, [row.detach() for row in kl]


SWITCHES = {
    "top-k kappa": {"kl_estimator": "topk", "kl_top_k": 5},
    "top-k kappa of the current policy": {"kl_estimator": "topk", "kl_top_k": 5, "kappa_policy": "current"},
    "kappa with a gradient": {"kappa_detach": False, "kappa_policy": "current"},
    "top-k kappa with a gradient": {
        "kl_estimator": "topk", "kl_top_k": 5, "kappa_detach": False, "kappa_policy": "current",
    },
    "soft value": {"value_type": "soft"},
    "weight": {"value_coeff": 2.5},
    "normalised": {"value_normalised": True, "value_coeff": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("padding_removed", [True, False], ids=["", "padding kept"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_an_update_is_the_formulas(models, switch, padding_removed):
    knobs = SWITCHES[switch]
    loss, gradients, kl = formula(models, knobs)
    result = run_step(models, Setting(use_remove_padding=padding_removed, knobs={**knobs, "use_actor": False}), SAMPLES)
    torch.testing.assert_close(padded(result.per_token["token_kl"]).double(), padded(kl), rtol=1e-4, atol=1e-6)
    assert result.metrics["vimpo/value_loss"] == pytest.approx(loss, rel=1e-5)
    difference = sum((result.gradients[0][name].double() - gradients[name]).square().sum() for name in gradients)
    norm = sum(gradient.square().sum() for gradient in gradients.values())
    assert (difference / norm).sqrt().item() < 1e-5
    if knobs.get("kappa_detach") is False:
        _, detached, _ = formula(models, {**knobs, "kappa_detach": True})
        apart = sum((detached[name] - gradients[name]).square().sum() for name in gradients)
        assert (apart / norm).sqrt().item() > 1e-2, "the gradient through kappa would not be tested"


def test_k3_with_a_gradient(models):
    """kappa of the sampled token, through the policy's own log-prob."""
    policy = engine_formula.load(models / "policy")
    tokens = engine_formula.per_token(policy, engine_formula.load(models / "ref"), SAMPLES, 1.0)
    _, sums, found = engine_formula.advantages_and_targets(tokens, SAMPLES, BETA, 1.0)
    loss = 0.0
    for i, sample in enumerate(SAMPLES):
        log_p = engine_formula.log_distributions(policy, sample, 1.0)
        ratio = log_p.gather(-1, torch.tensor(sample.response).unsqueeze(-1)).squeeze(-1) - tokens["ref_log_probs"][i]
        kappa = torch.exp(-ratio) - 1 + ratio
        loss = loss + 0.5 * (BETA * (torch.tensor(sample.mask) * (ratio - kappa)).sum() - found[i]) ** 2 / len(SAMPLES)
    loss.backward()
    knobs = {"kl_estimator": "k3", "kappa_detach": False, "kappa_policy": "current", "use_actor": False}
    result = run_step(models, Setting(knobs=knobs), SAMPLES)
    wanted = {name: p.grad for name, p in policy.named_parameters()}
    difference = sum((result.gradients[0][name].double() - wanted[name]).square().sum() for name in wanted)
    assert (difference / sum(g.square().sum() for g in wanted.values())).sqrt().item() < 1e-5


# ---- what is refused ---------------------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "kl_top_k=None with": {"kl_estimator": "topk"},
    "kl_top_k=8 with": {"kl_top_k": 8},
    "write +algorithm.vimpo.kappa_policy=current": {"kappa_detach": False},
    "write algorithm.vimpo.use_actor=false": {"value_type": "soft"},
    "write algorithm.vimpo.baseline=group_mean": {"value_type": "soft", "use_actor": False, "baseline": "shrunk"},
}


@pytest.mark.parametrize("reason", CONTRADICTIONS)
def test_what_does_not_go_together_is_named(reason):
    (problem,) = parse_config(CONTRADICTIONS[reason])[1]
    assert reason in problem


@pytest.mark.parametrize(
    "knobs", [{"kl_estimator": "topk", "kl_top_k": 8}, {"kappa_detach": False, "kappa_policy": "current"}], ids=str
)
def test_fused_kernels_and_one_pass_are_refused(knobs):
    from verl_patches import recipe_checks

    config = vimpo()
    OmegaConf.set_struct(config, False)
    config.algorithm.vimpo = knobs
    assert recipe_checks.problems(config) == []
    config.algorithm.vimpo.passes = "one"
    (problem,) = recipe_checks.problems(config)
    assert "passes=one" in problem and "needs the pass before the update" in problem
    config.algorithm.vimpo.passes = "auto"
    config.actor_rollout_ref.model.use_fused_kernels = True
    (problem,) = recipe_checks.problems(config)
    assert "no logits to take kappa from; write actor_rollout_ref.model.use_fused_kernels=False" in problem
