"""Claim: the recipe's own policy loss is the form of L_A, for every one that verl has, but for those that are refused by name.

The gradient of L = c_A * L_A + L_V by VIMPO's loss and verl's ppo_loss, in float64, against autograd of each form written out
here token by token, at log-probs far enough from the old ones that clipping, gates and masks take part. What its aggregation
makes of it, by which c_A=auto is divided, against the gradient of verl's own function. The way of loss_mode and its keys from
a recipe to the workers; what is no form of L_A, and a name that verl does not know.
"""

from functools import partial

import pytest
import torch
from engine_samples import make_samples, nested, padded, to_tensordict
from test_validation import compose, refusals, validate, vimpo

from verl_patches.family import FAMILY
from verl_patches.loss_aggregation import OWN_AGG_MODE, aggregation_weight, full_length_weight
from verl_patches.loss_checks import NO_FORM
from vimpo_verl.config import VimpoConfig
from vimpo_verl.registrations import ActorBranch, actor_branch, vimpo_actor_loss

BETA, COEFF, LOW, HIGH, DUAL = 0.1, 0.3, 0.05, 0.1, 3.0
TAU = {True: 1.0, False: 1.05}  # of sapo, for positive advantages and others
COV_RATIO, COV_BOUNDS, KL_COEF, DRO_BETA = 0.25, (0.05, 0.6), 0.2, 0.7
MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
SAMPLES = make_samples(seed=4, prompts=3, group_size=2)  # ragged, with tool output, the last one without a valid token


def registered() -> set[str]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return set(POLICY_LOSS_REGISTRY) - FAMILY.keys()  # without this package's own


# ---- the forms, of one mini-batch: lists of [T] tensors over the valid tokens of each sequence -------------------------


def vanilla(new, old, advantage):
    def token(n, o, a):
        ratio = torch.exp(n - o)
        loss = torch.maximum(-ratio * a, -ratio.clamp(1 - LOW, 1 + HIGH) * a)
        return torch.minimum(loss, -DUAL * a) if a < 0 else loss

    return each(token, new, old, advantage)


def gspo(new, old, advantage):
    rows = []
    for n, o, a in zip(new, old, advantage, strict=True):
        sequence = torch.exp((n - o).mean()).detach() * torch.exp(n - n.detach())
        rows.append(torch.maximum(-sequence * a, -sequence.clamp(1 - LOW, 1 + HIGH) * a))
    return rows


def sapo(new, old, advantage):
    def token(n, o, a):
        tau = TAU[bool(a > 0)]
        return -a * (4 / tau) / (1 + torch.exp(-tau * (torch.exp(n - o) - 1)))

    return each(token, new, old, advantage)


def cispo(new, old, advantage):
    return each(lambda n, o, a: -torch.exp(n - o).clamp(1 - LOW, 1 + HIGH).detach() * a * n, new, old, advantage)


def gpg(new, old, advantage):
    return each(lambda n, o, a: -n * a, new, old, advantage)


def dppo_tv(new, old, advantage):
    def token(n, o, a):
        moved = torch.exp(n) - torch.exp(o)
        kept = moved <= HIGH if a > 0 else moved >= -LOW
        return -a * torch.exp(n - o).clamp(max=DUAL).detach() * n * kept

    return each(token, new, old, advantage)


def dppo_kl(new, old, advantage):
    def token(n, o, a):
        p, q = torch.exp(n), torch.exp(o)
        kl = q * (o - n) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
        kept = (kl <= HIGH or p <= q) if a > 0 else (kl <= LOW or p >= q)
        return -a * torch.exp(n - o).clamp(max=DUAL).detach() * n * kept

    return each(token, new, old, advantage)


def covariances(new, advantage):
    everything, gains = torch.cat(new).detach(), torch.cat(advantage)
    return [(a - gains.mean()) * (n.detach() - everything.mean()) for n, a in zip(new, advantage, strict=True)]


def clip_cov(new, old, advantage):
    rows = []
    for n, o, a, cov in zip(new, old, advantage, covariances(new, advantage), strict=True):
        ratio = torch.exp(n - o)
        free, held = -a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH)
        dropped = (cov > COV_BOUNDS[0]) & (cov < COV_BOUNDS[1]) & ~(held > free)
        rows.append(torch.maximum(free, held) * ~dropped)
    return rows


def kl_cov(new, old, advantage):
    covs = covariances(new, advantage)
    threshold = torch.cat(covs).sort(descending=True).values[int(len(torch.cat(covs)) * COV_RATIO) - 1]
    return [
        -a * torch.exp(n - o) + KL_COEF * (n - o).abs() * (cov >= threshold)
        for n, o, a, cov in zip(new, old, advantage, covs, strict=True)
    ]


def dro(new, old, advantage):
    return each(lambda n, o, a: -(n * a - 0.5 * DRO_BETA * (n - o) ** 2), new, old, advantage)


def each(token, *rows):
    return [torch.stack([token(*t) for t in zip(*row, strict=True)]) for row in zip(*rows, strict=True)]


FORMS = {form.__name__: form for form in (vanilla, gspo, sapo, cispo, gpg, dppo_tv, dppo_kl, clip_cov, kl_cov, dro)}


def test_no_policy_loss_of_verl_is_unknown_here():
    assert registered() == FORMS.keys() | NO_FORM.keys()


# ---- the gradient of L -----------------------------------------------------------------------------------------------


def actor_config(mode: str, agg_mode: str):
    from verl.workers.config import FSDPActorConfig

    from verl_patches.policy_loss_config import VimpoPolicyLossConfig

    lower, upper = COV_BOUNDS
    policy_loss = VimpoPolicyLossConfig(
        loss_mode="vimpo", recipe_loss_mode=mode, clip_cov_ratio=1.0, clip_cov_lb=lower, clip_cov_ub=upper,
        kl_cov_ratio=COV_RATIO, ppo_kl_coef=KL_COEF, dro_beta=DRO_BETA,
    )  # fmt: skip
    return FSDPActorConfig(
        strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=agg_mode, policy_loss=policy_loss,
        clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=DUAL, tau_pos=TAU[True], tau_neg=TAU[False],
    )  # fmt: skip


def mini_batch():
    """Per sequence, over the response: new, old and reference log-probs, KL, advantages; and the target."""
    generator = torch.Generator().manual_seed(1)

    def rows(scale=1.0, shift=0.0):
        return [shift + scale * torch.randn(len(s.response), generator=generator).double() for s in SAMPLES]

    old = [row.clamp(max=-0.02) for row in rows(0.7, -1.2)]
    new = [(o + step).clamp(max=-0.01) for o, step in zip(old, rows(0.3), strict=True)]
    return new, old, rows(0.7, -1.2), [row.abs() for row in rows()], rows(), torch.randn(len(SAMPLES)).double()


def gradient_of_vimpos_loss(mode: str, agg_mode: str) -> list[torch.Tensor]:
    from verl.workers.utils.losses import ppo_loss

    from verl_patches.value_branch import VimpoLoss

    new, old, ref, kl, advantages, targets = mini_batch()
    meta = {"vimpo_actor_coeff": COEFF, "vimpo_beta": BETA, "vimpo_value_scale": 1.0}
    meta["vimpo_num_sequences"] = len(SAMPLES)
    data = to_tensordict(SAMPLES, **meta, **batch_info())
    for name, rows in {"old_log_probs": old, "ref_log_prob": ref, "token_kl": kl, "advantages": advantages}.items():
        data[name] = nested(rows)
    data["returns"] = nested([target.expand(len(row)).clone() for target, row in zip(targets, new, strict=True)])
    leaves = [row.requires_grad_() for row in new]
    # verl's engine returns log-probs over prompt and response, where position t - 1 predicts token t.
    whole = [
        torch.cat([row.new_zeros(len(s.prompt) - 1), row, row.new_zeros(1)])
        for row, s in zip(leaves, SAMPLES, strict=True)
    ]
    loss_function = VimpoLoss(
        partial(ppo_loss, config=actor_config(mode, agg_mode)), VimpoConfig(beta=BETA, value_clip=None), None
    )
    loss, metrics = loss_function(model_output={"log_probs": nested_with_gradient(whole)}, data=data)
    loss.backward()
    assert {"vimpo/actor_loss", "vimpo/value_loss", "actor/pg_loss"} <= metrics.keys()
    return [row.grad for row in leaves]


def batch_info() -> dict:
    return {"dp_size": 1, "batch_num_tokens": sum(sum(s.mask) for s in SAMPLES), "global_batch_size": len(SAMPLES)}


def nested_with_gradient(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def gradient_of_the_formula(mode: str, agg_mode: str) -> list[torch.Tensor]:
    new, old, ref, kl, advantages, targets = mini_batch()
    leaves = [row.requires_grad_() for row in new]
    masks = [torch.tensor(s.mask, dtype=torch.bool) for s in SAMPLES]
    judged = [i for i, mask in enumerate(masks) if mask.any()]

    def valid(rows):
        return [rows[i][masks[i]] for i in judged]

    losses = FORMS[mode](valid(leaves), valid(old), valid(advantages))
    assert all(loss.shape == rows.shape for loss, rows in zip(losses, valid(old), strict=True))
    actor = {
        "token-mean": lambda: torch.cat(losses).mean(),
        "seq-mean-token-sum": lambda: sum(loss.sum() for loss in losses) / len(SAMPLES),
        "seq-mean-token-mean": lambda: sum(loss.mean() for loss in losses) / len(SAMPLES),
    }[OWN_AGG_MODE.get(mode, agg_mode)]()
    value = 0.0
    for i, row in enumerate(leaves):
        td = BETA * (row - ref[i] - kl[i])[masks[i]]
        value = value + 0.5 * (td.sum() - targets[i]) ** 2 * bool(masks[i].any()) / len(SAMPLES)
    (COEFF * actor + value).backward()
    return [row.grad for row in leaves]


@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("mode", FORMS)
def test_the_gradient_is_that_of_the_formula(mode, agg_mode):
    torch.manual_seed(0)
    actual = gradient_of_vimpos_loss(mode, agg_mode)
    torch.manual_seed(0)
    expected = gradient_of_the_formula(mode, agg_mode)
    torch.testing.assert_close(torch.cat(actual), torch.cat(expected), rtol=1e-6, atol=1e-9)
    assert torch.cat(expected).abs().max() > 1e-3


def test_the_forms_differ_at_these_numbers():
    """So the comparison above would notice that another form is used."""
    gradients = {}
    for mode in FORMS:
        torch.manual_seed(0)
        gradients[mode] = torch.cat(gradient_of_the_formula(mode, "token-mean"))
    for mode, gradient in gradients.items():
        for other, others in gradients.items():
            assert mode == other or (gradient - others).norm() > 0.05 * (gradient - gradients["gpg"]).norm(), (
                mode,
                other,
            )
            assert mode == other or (gradient - others).abs().max() > 1e-4, (mode, other)


# ---- what aggregation makes of a form --------------------------------------------------------------------------------


@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum"])
@pytest.mark.parametrize("mode", FORMS)
def test_the_weight_is_the_push_of_verls_own_function(mode, agg_mode):
    """With advantages of 1 and the policy at its old self, minus the sum of the gradients is the sum of the tokens' weights."""
    config = compose(
        f"{MODE}={mode}",
        f"actor_rollout_ref.actor.loss_agg_mode={agg_mode}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        "actor_rollout_ref.rollout.n=2",
    )
    mask = padded([torch.tensor(s.mask) for s in SAMPLES])
    typed = actor_config(mode, agg_mode)
    typed.global_batch_info.update(batch_info(), loss_scale_factor=None)
    log_prob = torch.full(mask.shape, -1.0, dtype=torch.float64, requires_grad=True)
    with actor_branch(ActorBranch(coeff=1.0)):
        loss, _ = vimpo_actor_loss(
            old_log_prob=log_prob.detach(), log_prob=log_prob, advantages=torch.ones_like(log_prob),
            response_mask=mask.bool(), loss_agg_mode=agg_mode, config=typed,
        )  # fmt: skip
    loss.backward()
    weight = aggregation_weight(config, mask.sum(-1))
    assert -log_prob.grad.sum().item() == pytest.approx(weight, rel=1e-8)  # verl adds 1e-8


def test_sapo_aggregates_by_itself():
    mode = "actor_rollout_ref.actor.loss_agg_mode=token-sum"
    assert full_length_weight(compose(f"{MODE}=sapo", mode)) == pytest.approx(1.0)
    assert full_length_weight(compose(f"{MODE}=gspo", mode)) == pytest.approx(256 * 16 * 8)


# ---- from the recipe to the workers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", sorted(FORMS))
def test_the_recipes_loss_reaches_the_workers(mode):
    from verl.utils.config import omega_conf_to_dataclass

    recipe = [f"{MODE}={mode}", "actor_rollout_ref.actor.policy_loss.ppo_kl_coef=0.7"]
    recipe += ["actor_rollout_ref.actor.policy_loss.dro_beta=0.1"] if mode == "dro" else []
    config = vimpo(*recipe)
    for _ in range(2):  # validating again keeps it
        validate(config)
        built = omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss
        assert (built.loss_mode, built.recipe_loss_mode, built.ppo_kl_coef) == ("vimpo", mode, 0.7)


@pytest.mark.parametrize("mode", sorted(NO_FORM))
def test_what_is_no_form_is_refused_with_the_reason(mode):
    (problem,) = refusals(vimpo(f"{MODE}={mode}"))
    assert f"{MODE}={mode}" in problem and NO_FORM[mode] in problem


def test_a_loss_that_verl_does_not_know_is_refused_by_name():
    (problem,) = refusals(vimpo(f"{MODE}=gsp0"))
    assert f"{MODE}=gsp0" in problem and "vanilla" in problem and "geo_mean" not in problem
    validate(vimpo(f"{MODE}=gsp0", "actor_rollout_ref.model.external_lib=of_the_users"))  # the workers import it


def test_dro_without_its_penalty_is_refused():
    (problem,) = refusals(vimpo(f"{MODE}=dro"))
    assert "policy_loss.dro_beta" in problem


def test_a_loss_of_the_users_own_is_the_form(monkeypatch):
    from verl.trainer.ppo import core_algos

    def own(old_log_prob, log_prob, advantages, response_mask, **_):
        return (log_prob * advantages * response_mask).sum(), {"actor/own": 1.0}

    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "own", own)
    validate(vimpo(f"{MODE}=own"))
    with actor_branch(ActorBranch(coeff=0.5)):
        loss, metrics = vimpo_actor_loss(
            torch.zeros(1, 2), torch.tensor([[2.0, 3.0]]), torch.ones(1, 2), torch.ones(1, 2),
            config=actor_config("own", "token-mean"),
        )  # fmt: skip
    assert loss.item() == 2.5 and metrics == {"actor/own": 1.0}
