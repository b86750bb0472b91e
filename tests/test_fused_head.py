"""Claim: with verl's fused kernels, which make no logits, joint pass and update give what they give with logits.

Per-token results and gradients within 1e-5, padding removed or not, FSDP1 and FSDP2, with LoRA; also with kappa recomputed in the
update (kappa_policy=current), which agrees with the old kappa at the first update and with a fresh joint pass after it.
Backend torch; backend triton needs a GPU (test_engine_on_gpu.py) and has the same seam. The output matrix is tied to the
embedding: with FSDP2 and an output matrix of its own, verl 0.9.1's fused kernels fail by themselves, for GRPO too, because they
meet a sharded matrix.
"""

import pytest
import torch
from engine_harness import Setting, joint_pass, make_workers, run_step
from engine_samples import make_samples

pytestmark = pytest.mark.usefixtures("own_forward")

TOLERANCE = 1e-5


def assert_same_tokens(actual, expected):
    for name, wanted in expected.items():
        torch.testing.assert_close(torch.cat(actual[name]), torch.cat(wanted), rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_gradients(actual, expected, tolerance=TOLERANCE):
    for mine, theirs in zip(actual, expected, strict=True):
        difference = sum((mine[name] - theirs[name]).square().sum() for name in theirs)
        norm = sum(gradient.square().sum() for gradient in theirs.values())
        assert norm > 0 and (difference / norm).sqrt() <= tolerance


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("use_remove_padding", [True, False])
@pytest.mark.parametrize("kappa_policy", ["old", "current"])
def test_fused_kernels_change_nothing(tied_models, strategy, use_remove_padding, kappa_policy):
    samples = make_samples()
    knobs = {"actor_coeff": 0.1, "kappa_policy": kappa_policy}
    setting = {"strategy": strategy, "use_remove_padding": use_remove_padding, "knobs": knobs, "epochs": 2, "lr": 0.05}
    plain = run_step(tied_models, Setting(**setting), samples)
    fused = run_step(tied_models, Setting(use_fused_kernels=True, **setting), samples)
    assert_same_tokens(fused.per_token, plain.per_token)
    assert_same_gradients(fused.gradients, plain.gradients)


@pytest.mark.parametrize("strategy, kappa_policy", [("fsdp2", "old"), ("fsdp2", "current"), ("fsdp", "current")])
def test_with_lora_fused_kernels_change_nothing(models, tied_models, strategy, kappa_policy):
    """The reference is the same model without its adapters: two steps, so that these are no longer fresh."""
    samples, folder = make_samples(), tied_models if strategy == "fsdp2" else models
    knobs = {"actor_coeff": 0.1, "kappa_policy": kappa_policy}
    setting = {"strategy": strategy, "lora_rank": 4, "knobs": knobs, "epochs": 2, "lr": 0.01}
    found = []
    for fused in (False, True):
        of_run = Setting(use_fused_kernels=fused, **setting)
        torch.manual_seed(0)  # of the adapters
        workers = make_workers(folder, of_run)
        run_step(folder, of_run, samples, workers)
        found.append(run_step(folder, of_run, samples, workers))
    plain, fused = found
    assert plain.batch.metrics["vimpo/kl"] > 1e-6, "no longer fresh"
    assert_same_tokens(fused.per_token, plain.per_token)
    assert_same_gradients(
        fused.gradients, plain.gradients, tolerance=5e-5
    )  # 1.3e-5 seen: float32, through small adapters


def test_temperature_goes_through_the_fused_head(tied_models):
    samples = make_samples()
    setting = {"temperature": 0.7, "strategy": "fsdp2"}
    plain = joint_pass(make_workers(tied_models, Setting(**setting)), samples, Setting(**setting))
    fused_setting = Setting(use_fused_kernels=True, **setting)
    assert_same_tokens(joint_pass(make_workers(tied_models, fused_setting), samples, fused_setting), plain)


def test_joint_pass_makes_no_logits(tied_models, monkeypatch):
    """Nothing of [tokens, V] but the chunks of linear_token_statistics, here of one token."""
    import vimpo_verl.token_statistics as token_statistics

    monkeypatch.setattr(token_statistics, "_LINEAR_CHUNK_TOKENS", 1)
    seen = []
    original = token_statistics.token_statistics
    monkeypatch.setattr(
        token_statistics, "token_statistics", lambda z, *rest: seen.append(z.shape[0]) or original(z, *rest)
    )
    setting = Setting(use_fused_kernels=True)
    workers = make_workers(tied_models, setting)
    head = workers.actor.engine.module.lm_head
    head.register_forward_hook(lambda *_: pytest.fail("the model made logits"))
    joint_pass(workers, make_samples(), setting)
    assert set(seen) == {1}


def test_the_reference_works_on_the_batch_where_the_models_are(tied_models):
    """Brought there, which on a CPU is a label only: on a GPU its results could not be laid out beside a batch in host memory."""
    setting = Setting(use_fused_kernels=True, knobs={"kappa_policy": "current"})
    workers = make_workers(tied_models, setting)
    original, seen = workers.ref.engine.prepare_model_inputs, []

    def prepare_model_inputs(micro_batch):
        seen.append(micro_batch.device)
        return original(micro_batch=micro_batch)

    workers.ref.engine.prepare_model_inputs = prepare_model_inputs
    run_step(tied_models, setting, make_samples(), workers)
    assert len(seen) > 4 and set(seen) == {torch.device("cpu")}


@pytest.mark.parametrize("kl_estimator", ["exact", "k2", "k3"])
def test_current_kappa_is_the_old_one_at_the_first_update_only(tied_models, kl_estimator):
    samples = make_samples()
    setting = {"lr": 0.5, "epochs": 2}
    old = run_step(tied_models, Setting(knobs={"actor_coeff": 0.1, "kl_estimator": kl_estimator}, **setting), samples)
    knobs = {"actor_coeff": 0.1, "kl_estimator": kl_estimator, "kappa_policy": "current"}
    current = run_step(tied_models, Setting(knobs=knobs, **setting), samples)
    assert_same_gradients(current.gradients[:1], old.gradients[:1])
    with pytest.raises(AssertionError):
        assert_same_gradients(current.gradients[1:], old.gradients[1:])


def test_current_kappa_in_the_second_update_is_that_of_a_fresh_joint_pass(tied_models):
    """L_V of the second update, from the policy after the first, worked out from a joint pass of that policy."""
    samples = make_samples(tool_tokens=False)
    setting = Setting(lr=0.5, knobs={"use_actor": False, "kappa_policy": "current"})
    workers = make_workers(tied_models, setting)
    first = run_step(tied_models, setting, samples, workers)
    fresh = joint_pass(workers, samples, setting)
    second = run_step(tied_models, setting, samples, workers)
    residuals = [
        0.1 * (lp - ref - kl).double().sum() - returns[0].double()
        for lp, ref, kl, returns in zip(
            fresh["log_probs"], fresh["ref_log_probs"], fresh["token_kl"], first.batch.returns, strict=True
        )
    ]
    expected = 0.5 * torch.stack(residuals).square().mean().item()
    assert second.metrics["vimpo/value_loss"] == pytest.approx(expected, rel=1e-5)
