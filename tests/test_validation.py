"""Claim: what VIMPO cannot run with is refused in the driver, before Ray starts, all at once, each with what to write.

On verl's own Hydra configuration. A run with another estimator is left exactly as it was.
"""

import contextlib
import functools
import logging
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_patches import recipe_checks
from verl_patches.switch import knobs_of, noise_of
from vimpo_verl.config import VimpoConfig

# A GRPO recipe without KL, as a user has it.
GRPO = [
    "algorithm.adv_estimator=grpo",
    "data.train_batch_size=16",
    "data.max_response_length=256",
    "actor_rollout_ref.model.path=somewhere",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.rollout.name=vllm",
    "trainer.n_gpus_per_node=1",
]


def compose(*overrides, base=GRPO):
    import verl.trainer.main_ppo  # noqa: F401  registers resolvers, and is where a run starts
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return hydra_compose("ppo_trainer", [*base, *overrides])


def vimpo(*overrides):
    return compose("algorithm.adv_estimator=vimpo", *overrides)


def validate(config):
    """As verl's driver does it."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


def test_the_switch_alone_is_enough():
    config = vimpo()
    validate(config)
    from verl.trainer.ppo.utils import need_reference_policy

    assert need_reference_policy(config) is True
    assert need_reference_policy(compose()) is False


def test_a_grpo_run_is_left_exactly_as_it_was(capsys):
    config = compose()
    before = OmegaConf.to_container(config, resolve=False)
    validate(config)
    assert OmegaConf.to_container(config, resolve=False) == before
    assert "inert" in capsys.readouterr().out


def test_what_vimpo_changes_in_the_configuration():
    """The policy loss, and what the reference worker needs; nothing else."""
    config = vimpo(
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "actor_rollout_ref.model.use_remove_padding=True"
    )
    before = flat(OmegaConf.to_container(config, resolve=True))
    validate(config)
    after = flat(OmegaConf.to_container(config, resolve=True))
    changed = {key for key in before.keys() | after.keys() if before.get(key, "absent") != after.get(key, "absent")}
    loss = "actor_rollout_ref.actor.policy_loss."
    assert {key for key in changed if not key.startswith(loss)} <= {
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
        "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size",
        "actor_rollout_ref.ref.fsdp_config.model_dtype",
    }
    assert after["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"] == 4
    assert after["actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size"] == 2
    assert after["actor_rollout_ref.ref.fsdp_config.model_dtype"] == "bf16"  # what it is computed in


def flat(container, prefix=""):
    found = {}
    for key, value in container.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def test_a_micro_batch_size_of_the_reference_is_kept():
    config = vimpo("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2")
    validate(config)
    assert config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 2


def test_the_precision_of_the_reference_follows_the_policys():
    keys = {
        "model_dtype=bf16",
        "dtype=float16",
        "mixed_precision.param_dtype=fp16",
        "mixed_precision.reduce_dtype=fp16",
    }
    config = vimpo(*[f"{'+' * ('mixed' in key)}actor_rollout_ref.actor.fsdp_config.{key}" for key in keys])
    for _ in range(2):  # validating again finds nothing to refuse
        validate(config)
        ref = config.actor_rollout_ref.ref.fsdp_config
        assert ref.model_dtype == "bf16" and ref.dtype == "float16"
        assert dict(ref.mixed_precision) == {"param_dtype": "fp16", "reduce_dtype": "fp16"}
    from verl.utils.config import omega_conf_to_dataclass

    assert omega_conf_to_dataclass(ref).mixed_precision["param_dtype"] == "fp16"


def test_a_precision_that_is_given_twice_alike_is_not_refused():
    for key in ("model_dtype=bf16", "dtype=float16"):
        validate(vimpo(*[f"actor_rollout_ref.{role}.fsdp_config.{key}" for role in ("actor", "ref")]))
    key = "fsdp_config.mixed_precision.param_dtype=fp16"
    validate(vimpo(*[f"+actor_rollout_ref.{role}.{key}" for role in ("actor", "ref")]))


def test_with_lora_the_precision_of_a_reference_worker_is_of_no_account():
    validate(vimpo("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.ref.fsdp_config.model_dtype=bf16"))


def test_the_knobs_reach_the_workers():
    """actor.policy_loss is built through its _target_, in every worker."""
    from verl.utils.config import omega_conf_to_dataclass

    from verl_patches.policy_loss_config import VimpoPolicyLossConfig

    config = vimpo("+algorithm.vimpo.beta=5e-3", "+algorithm.vimpo.kl_estimator=k3", "+algorithm.vimpo.actor_coeff=0.1")
    validate(config)
    built = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    assert isinstance(built, VimpoPolicyLossConfig) and built.loss_mode == "vimpo"
    assert built.vimpo == VimpoConfig(beta=5e-3, kl_estimator="k3", actor_coeff=0.1)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss.vimpo == built.vimpo


def test_validating_twice_changes_nothing_more():
    config = vimpo("+algorithm.vimpo.beta=5e-3")
    validate(config)
    once = OmegaConf.to_container(config, resolve=True)
    validate(config)
    assert OmegaConf.to_container(config, resolve=True) == once


def test_the_line_in_the_driver_names_the_knobs(capsys):
    validate(vimpo("+algorithm.vimpo.beta=5e-3", "algorithm.lam=0.95"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vimpo_verl")]
    assert "VIMPO accepted" in line and "in force" not in line and "beta=0.005" in line and "lam=0.95" in line


def test_a_section_of_another_estimator_is_said_to_have_no_effect(capsys):
    validate(compose("+algorithm.vimpo.passes=one"))
    assert "inert (algorithm.adv_estimator=grpo); without effect there: algorithm.vimpo\n" in capsys.readouterr().out
    validate(vimpo("+algorithm.pacs.beta=1.0"))
    assert "; without effect there: algorithm.pacs\n" in capsys.readouterr().out


def test_the_line_in_the_driver_begins_with_what_a_step_is(capsys):
    for overrides, what in (((), "one pass a step"), (("actor_rollout_ref.actor.ppo_epochs=2",), "two passes a step")):
        validate(vimpo(*overrides))
        assert f"VIMPO accepted with this configuration, {what} (" in capsys.readouterr().out


# override -> what the refusal must say besides the key: what to write instead
REFUSED = {
    "algorithm.gamma=0.99": "algorithm.gamma=1.0",
    "algorithm.lam=1.5": "algorithm.lam=1.0",
    "algorithm.lam=null": "algorithm.lam=1.0",
    "critic.enable=True": "remove critic.enable",
    "trainer.use_v1=False": "trainer.use_v1=True",
    "actor_rollout_ref.actor.strategy=torchtitan": "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean": "Write vanilla, or gspo",
    "actor_rollout_ref.ref.strategy=fsdp2": "remove actor_rollout_ref.ref.strategy",
    "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=2": "remove it",
    "actor_rollout_ref.ref.fsdp_config.model_dtype=fp16": "remove it, and the reference follows the policy",
    "actor_rollout_ref.ref.fsdp_config.dtype=float16": "remove it, and the reference follows the policy",
    "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype:fp16}": "remove it, and the reference follows",
    "actor_rollout_ref.actor.fsdp_config.qat.enable=True": "actor_rollout_ref.actor.fsdp_config.qat.enable=False",
    "actor_rollout_ref.actor.fsdp_config.pad_to_length=True": "pad_to_length=False",
    "actor_rollout_ref.model.lora_adapter_path=adapters/one": "merge the adapter into the model",
    "actor_rollout_ref.model.lora.rank=8": "write actor_rollout_ref.model.lora_rank",
    "distillation.enabled=True": "distillation.enabled=False",
    "+algorithm.vimpo.kl_estimator=k1": "exact, topk, k2 or k3",
    "+algorithm.vimpo.betta=1": "did you mean algorithm.vimpo.beta?",
    "+algorithm.vimpo.beta=-1": "greater than 0",
}


def refusals(config) -> list[str]:
    with pytest.raises(ValueError, match="adv_estimator=vimpo cannot run") as caught:
        validate(config)
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize("override", REFUSED)
def test_a_refusal_names_the_key_and_what_to_write(override):
    (problem,) = refusals(vimpo(override))
    assert override.removeprefix("+").split("=")[0] in problem
    assert REFUSED[override] in problem


@pytest.mark.parametrize("value", ["0", "-1", "null", "2.5", "few"])
@pytest.mark.parametrize(
    "key",
    ["data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.actor.ppo_epochs"],
)
def test_a_number_of_sequences_or_epochs_that_is_none_is_named(key, value):
    """With which the other checks compute."""
    (problem,) = refusals(vimpo(f"{key}={value}"))
    assert f"{key}={value}: write a whole number of at least 1" in problem.replace("'", "")


BYPASS = ("algorithm.rollout_correction.bypass_mode=True", "actor_rollout_ref.rollout.calculate_log_probs=True")


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (
            ("+algorithm.vimpo.passes=two",),
            ["write algorithm.vimpo.passes=one or auto, or algorithm.rollout_correction"],
        ),
        (
            ("+algorithm.vimpo.passes=two", "+algorithm.vimpo.kl_estimator=topk", "+algorithm.vimpo.topk=4"),
            [
                "no pass before the update; write algorithm.rollout_correction.bypass_mode=False",
                "kl_estimator=topk needs",
            ],
        ),
        (
            ("actor_rollout_ref.actor.strategy=megatron", "+algorithm.vimpo.value_type=soft"),
            ["value_type=soft needs", "strategy=megatron: one pass does not run there yet"],
        ),
    ],
)
def test_what_bypass_mode_does_not_go_with_is_named_at_once(overrides, wanted):
    problems = [problem for problem in refusals(vimpo(*BYPASS, *overrides)) if "bypass_mode=True" in problem]
    assert len(problems) == len(wanted)
    for problem, reason in zip(problems, wanted, strict=True):
        assert reason in problem and problem.endswith("algorithm.rollout_correction.bypass_mode=False")


def test_every_problem_is_listed_at_once():
    apart = ("torchtitan", "critic", "null", "lora")  # the same key twice, or one that hides others
    together = [o for o in REFUSED if not any(a in o for a in apart) and "ref." not in o.split("=")[0][18:]]
    problems = refusals(vimpo(*together))
    assert len(problems) == len(together)
    for number, problem in enumerate(problems, 1):
        assert problem.strip().startswith(f"{number}. ")
    for override in together:
        assert any(override.removeprefix("+").split("=")[0] in problem for problem in problems), override


KEYS = [
    "algorithm.gamma", "algorithm.lam", "algorithm.use_kl_in_reward", "algorithm.rollout_correction",
    "algorithm.rollout_correction.bypass_mode", "algorithm.rollout_correction.rollout_is",
    "algorithm.rollout_correction.rollout_rs", "algorithm.vimpo", "algorithm.vimpo.beta", "algorithm.reward_noise",
    "algorithm.reward_noise.flip_prob", "critic.enable", "trainer.use_v1", "trainer.v1.trainer_mode",
    "distillation.enabled",
    "data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.strategy", "actor_rollout_ref.actor.policy_loss.loss_mode",
    "actor_rollout_ref.actor.use_prefix_grouper", "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
    "actor_rollout_ref.ref.strategy", "actor_rollout_ref.ref.fsdp_config.model_dtype",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision", "actor_rollout_ref.actor.fsdp_config.qat",
    "actor_rollout_ref.actor.loss_agg_mode", "actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.use_fused_kernels",
]  # fmt: skip
VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    0.5,
    1.5,
    math.nan,
    "",
    "x",
    "1.0",
    "sync",
    "fsdp",
    "vimpo",
    "token",
    [],
    [1],
    {},
]


@functools.cache
def small_recipe() -> dict:
    """What the checks look at, without the rest of verl's configuration."""
    config, small = vimpo(), OmegaConf.create({})
    others = ["algorithm.adv_estimator", "data.max_response_length", "actor_rollout_ref.rollout.n"]
    others += [
        f"actor_rollout_ref.{name}" for name in ("actor.use_kl_loss", "ref.fsdp_config.ulysses_sequence_parallel_size")
    ]
    for key in [key for key in [*KEYS, *others, "reward"] if "vimpo" not in key and "noise" not in key]:
        OmegaConf.update(small, key, OmegaConf.select(config, key), force_add=True)
    return OmegaConf.to_container(small)


@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=4))
def test_property_a_recipe_runs_or_is_refused_by_name(overrides):
    """Whatever stands under a key that VIMPO looks at: sentences that name their key, never an exception."""
    config = OmegaConf.create(small_recipe())
    for key, value in sorted(overrides.items()):
        with contextlib.suppress(OmegaConfBaseException, ValueError):  # below something that is no section
            OmegaConf.update(config, key, value, force_add=True)
    problems = knobs_of(config)[1] + recipe_checks.problems(config)
    problems += noise_of(config)[1] + recipe_checks.noise_problems(config)
    for problem in problems:
        assert problem.startswith(("algorithm.", "trainer.", "critic.", "distillation.", "actor_rollout_ref.", "data."))
    if not overrides:
        assert problems == []


def test_nothing_is_changed_where_something_is_refused():
    config = vimpo("algorithm.gamma=0.9")
    before = OmegaConf.to_container(config, resolve=False)
    refusals(config)
    assert OmegaConf.to_container(config, resolve=False) == before


@pytest.mark.parametrize(
    "key",
    [
        "trainer.v1.trainer_mode=colocate_async",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_epochs=3",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=token_k1",
    ],
)
def test_what_vimpo_supports_is_not_refused(key):
    validate(vimpo(key))


WARNED = {
    "actor_rollout_ref.rollout.n=1": "V0 = R",
    "actor_rollout_ref.actor.use_kl_loss=True": "kl_loss_coef",
    "actor_rollout_ref.actor.entropy_coeff=0.01": "weighs as",
    "algorithm.lam=0.95": "about 20 tokens",
    "algorithm.use_kl_in_reward=True": "R is the reward without verl's penalty",
    "actor_rollout_ref.actor.use_prefix_grouper=True": "do not look at it",
}


@pytest.mark.parametrize("override", WARNED)
def test_warnings(override, caplog):
    with caplog.at_level(logging.WARNING, logger="vimpo_verl"):
        validate(vimpo(override))
    (record,) = [r for r in caplog.records if r.name == "vimpo_verl"]
    assert override in record.getMessage() and WARNED[override] in record.getMessage()


def test_a_plain_recipe_gives_no_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="vimpo_verl"):
        validate(vimpo())
    assert [r for r in caplog.records if r.name == "vimpo_verl"] == []


def test_the_warning_works_out_the_weight(caplog):
    """kl_loss_coef beside beta * T * |residual| = 5e-4 * 256 * 0.5 = 0.064: 0.001 weighs as 0.016."""
    recipe = ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.001")
    with caplog.at_level(logging.WARNING, logger="vimpo_verl"):
        validate(vimpo(*recipe, "+algorithm.vimpo.beta=5e-4"))
    assert "at T = 256 tokens and |residual| = 0.5 that is 0.064" in caplog.text and "0.016" in caplog.text


@pytest.mark.parametrize("scale", [0.5, 0.8])
def test_the_warning_works_out_the_weight_beside_beta_auto(caplog, scale):
    """beta * T is beta_scale at any length: 0.001 weighs as 0.001 / (beta_scale * 0.5)."""
    recipe = ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.001")
    with caplog.at_level(logging.WARNING, logger="vimpo_verl"):
        validate(vimpo(*recipe, f"+algorithm.vimpo.beta_scale={scale}"))
    assert f"at beta*T = {scale} (beta_scale) and |residual| = 0.5 that is {scale * 0.5:.2g} of it" in caplog.text
    assert f"weighs as {0.001 / (scale * 0.5):.2g} would" in caplog.text


def test_an_untested_verl_is_named(caplog, monkeypatch):
    import verl

    monkeypatch.setattr(verl, "__version__", "0.99.0")
    with caplog.at_level(logging.WARNING, logger="vimpo_verl"):
        validate(vimpo())
    assert "0.99.0" in caplog.text and "0.9.1" in caplog.text


def test_a_seam_that_is_not_in_force_is_refused_with_the_reason(monkeypatch):
    from verl_patches import seams

    lost = seams.SEAMS[0]
    monkeypatch.setattr(seams, "_in_force", {seam.name for seam in seams.SEAMS} - {lost.name})
    monkeypatch.setattr(seams, "_failures", {lost.name: "ImportError: nothing there"})
    (problem,) = refusals(vimpo())
    assert lost.name in problem and "nothing there" in problem
