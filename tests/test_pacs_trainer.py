"""Claim: with algorithm.adv_estimator=pacs verl's own trainer does PACS: every prompt's group is whole in a global mini-batch and
the ranks have equal counts and like lengths in each; a step from the configuration to the weights is the formula's; what PACS
cannot run with is refused by name, in the driver where it can be seen there.

verl's trainer stages and hybrid worker in one process (in_process.py); the update against float64 is in test_pacs_engine.py, a
whole run in test_end_to_end.py.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace as Namespace

import hypothesis.strategies as st
import pytest
import torch
import yaml
from engine_harness import parameters_of
from engine_samples import EOS, make_samples
from hypothesis import given
from in_process import make_config, make_trainer
from omegaconf import OmegaConf
from test_pacs_engine import LR, formula
from test_validation import compose, validate

from verl_patches.group_balance import mini_batches_of_groups, order_for_ranks, regroup
from vimpo_verl.pacs_config import PacsConfig, parse_config

# ---- dealing groups out ------------------------------------------------------------------------------------------------

GROUPS = st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=6), min_size=1, max_size=12)


def spread(groups, order):
    """Lists of lengths -> names and lengths of all sequences, in an order drawn by Hypothesis."""
    rows = [(f"g{number}", length) for number, lengths in enumerate(groups) for length in lengths]
    order.shuffle(rows)
    return [name for name, _ in rows], [length for _, length in rows]


@given(GROUPS, st.randoms(use_true_random=False), st.sampled_from([1, 2, 3]))
def test_property_groups_are_whole_and_ranks_equal(groups, order, ranks):
    """With groups of any sizes up to a mini-batch's, in any order, on any number of ranks, placeholders filling it up."""
    from transfer_queue import KVBatchMeta

    names, lengths = spread(groups, order)
    size = 6
    count = len(mini_batches_of_groups(names, lengths, size))
    extra = count * size - len(names)
    keys = [f"{name}_{i}_0" for i, name in enumerate(names)] + [f"pad_{i}_0" for i in range(extra)]
    tags = [{"is_padding": False}] * len(names) + [{"is_padding": True}] * extra
    batch = KVBatchMeta(keys, tags, "train")
    shares = regroup(batch, size, ranks, lengths + [128] * extra)
    assert sorted(batch.keys) == sorted(keys) and sorted(i for share in shares for i in share) == list(range(len(keys)))
    assert [[keys[i] for i in share] for share in shares] == [
        batch.keys[r * len(keys) // ranks : (r + 1) * len(keys) // ranks] for r in range(ranks)
    ]
    sizes, piece = Counter(names), size // ranks
    for k in range(count):
        here = [batch.keys[r * count * piece + k * piece + i] for r in range(ranks) for i in range(piece)]
        of_prompt = Counter(key.split("_")[0] for key in here if not key.startswith("pad"))
        assert all(found == sizes[name] for name, found in of_prompt.items())


@given(GROUPS, st.randoms(use_true_random=False))
def test_property_no_more_mini_batches_than_needed_where_groups_are_alike(groups, order):
    groups = [(lengths * 4)[:4] for lengths in groups]
    names, lengths = spread(groups, order)
    dealt = mini_batches_of_groups(names, lengths, 8)
    assert len(dealt) == -(-len(groups) // 2) and sorted(i for rows in dealt for i in rows) == list(range(len(names)))


def test_ranks_and_mini_batches_have_like_lengths():
    """64 prompts of 8, 4 mini-batches, 4 ranks: the slowest ranks have less to do than with verl's dealing, which
    is balanced over the step alone.
    """
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    generator = torch.Generator().manual_seed(0)
    lengths = (6 + 0.5 * torch.randn(512, generator=generator)).exp().int().clamp(min=8, max=8192).tolist()
    dealt = mini_batches_of_groups([f"g{i // 8}" for i in range(512)], lengths, 128)
    verls = [i for share in get_seqlen_balanced_partitions(lengths, k_partitions=4, equal_size=True) for i in share]

    def works(order):
        return [[sum(lengths[i] for i in order[r * 128 + k * 32 :][:32]) for r in range(4)] for k in range(4)]

    ours = works(order_for_ranks(dealt, lengths, 4))
    slowest, slowest_of_verls = sum(map(max, ours)), sum(map(max, works(verls)))
    assert slowest < slowest_of_verls and slowest <= 1.1 * sum(lengths) / 4
    of_mini_batches = [sum(of_ranks) for of_ranks in ours]
    assert max(of_mini_batches) <= 1.05 * min(of_mini_batches)


def test_a_group_larger_than_a_mini_batch_is_refused():
    with pytest.raises(
        ValueError, match="a prompt has 5 responses and a mini-batch room for 4.*Raise .*ppo_mini_batch_size"
    ):
        mini_batches_of_groups(["a"] * 5, [1] * 5, 4)


# ---- a step of verl's trainer ------------------------------------------------------------------------------------------

SAMPLES = make_samples(seed=3, prompts=4, group_size=3)


def pacs_trainer(models, monkeypatch, *overrides, ranks=1):
    config = make_config(
        models / "policy",
        "algorithm.adv_estimator=pacs",
        "actor_rollout_ref.rollout.n=3",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.optim.lr=0.05",
        *overrides,
    )
    trainer, queue = make_trainer(config, monkeypatch)
    trainer.actor_rollout_wg._dispatch_info = {"actor": list(range(ranks))}
    trainer.replay_buffer = Namespace(failure_keys={"train": set()})
    trainer.tokenizer, trainer.use_critic = Namespace(eos_token_id=EOS), False
    return trainer, queue


def run_step(trainer, queue, samples):
    batch, metrics = queue.start(samples), {}
    batch = trainer._balance_batch(batch, metrics)
    batch.extra_info.pop("global_token_num", None)
    queue.extra_info = batch.extra_info
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    trainer._update_actor(batch, metrics)
    return batch, metrics


def test_no_reference_is_loaded(models, monkeypatch):
    from verl.trainer.ppo.utils import need_reference_policy

    trainer, _ = pacs_trainer(models, monkeypatch)
    assert not need_reference_policy(trainer.config)
    assert need_reference_policy(compose("algorithm.adv_estimator=vimpo"))


def test_two_steps_agree_with_the_formula(models, monkeypatch):
    """Two updates each; the groups of a mini-batch are those that the trainer chose. The engine computes in float32."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    monkeypatch.setattr(ActorRolloutRefWorker, "compute_ref_log_prob", None)  # there is nobody to ask
    trainer, queue = pacs_trainer(models, monkeypatch)
    batch, metrics = run_step(trainer, queue, SAMPLES)
    positions = [list(queue.rows).index(key) for key in batch.keys]
    mini_batches = [positions[:6], positions[6:]]
    assert [len({SAMPLES[i].uid for i in rows}) for rows in mini_batches] == [2, 2]
    expected = formula(models, SAMPLES, mini_batches, PacsConfig(), epochs=1)
    found = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    for name, wanted in expected["parameters"].items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)
    assert float(metrics["pacs/loss"]) == pytest.approx(sum(expected["losses"]) / 2, rel=1e-5)
    assert metrics["pacs/missing_responses"] == 0 and metrics["pacs/update_skipped"] == 0
    assert metrics["pacs/score_std"] > 0 and LR == 0.05
    for sample, row in zip(SAMPLES, queue.rows.values(), strict=True):
        rewards = [s.outcome for s in SAMPLES if s.uid == sample.uid]
        p = sum(rewards) / 3
        wanted = (1.5 * (1 / (4 * p) if sample.outcome else -1 / (4 * (1 - p)))) if 0 < p < 1 else 0.0
        mask = torch.tensor(sample.mask, dtype=torch.float32)
        torch.testing.assert_close(row["advantages"], wanted * mask, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row["returns"], sample.outcome * mask)
    _, second = run_step(trainer, queue, SAMPLES)
    assert float(second["pacs/loss"]) != float(metrics["pacs/loss"])


def test_missing_responses_leave_groups_whole(models, monkeypatch, capsys):
    """Two responses of one prompt and one of another are gone: placeholders fill the mini-batches, and count nowhere."""
    trainer, queue = pacs_trainer(models, monkeypatch)
    left = [sample for i, sample in enumerate(SAMPLES) if i not in (0, 1, 7)]
    batch, metrics = run_step(trainer, queue, left)
    assert metrics["pacs/missing_responses"] == 3 and "3 of 12 responses are missing" in capsys.readouterr().err
    assert len(batch.keys) == 12 and sum(tag["is_padding"] for tag in batch.tags) == 3
    names = [key.split("_")[0] for key in batch.keys]
    for name in {sample.uid for sample in left}:
        assert len({position // 6 for position, found in enumerate(names) if found == name}) == 1
    rows = [[i for i, key in enumerate(queue.rows) if key in batch.keys[k * 6 : k * 6 + 6] and i < 9] for k in range(2)]
    expected = formula(models, left, rows, PacsConfig(), epochs=1)
    found = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    for name, wanted in expected["parameters"].items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reward", [0.5, -1.0, 2.0])
def test_a_reward_that_is_no_label_is_named(models, monkeypatch, reward):
    trainer, queue = pacs_trainer(models, monkeypatch)
    samples = [replace(sample, outcome=reward if i == 4 else sample.outcome) for i, sample in enumerate(SAMPLES)]
    with pytest.raises(ValueError, match=f"step 1: the reward of sample p1_1_0 is {reward:g}.*labels.*return 0 or 1"):
        run_step(trainer, queue, samples)


def test_a_batch_that_is_not_from_pacss_trainer_is_refused(models, monkeypatch):
    trainer, queue = pacs_trainer(models, monkeypatch)
    batch, _ = run_step(trainer, queue, SAMPLES)
    for row in queue.rows.values():
        row.pop("pacs_group")
    with pytest.raises(RuntimeError, match="this batch lacks pacs_group: PACS's trainer is not in force"):
        trainer._update_actor(batch, {})


# ---- the configuration -------------------------------------------------------------------------------------------------


def test_a_section_is_read_or_explained():
    assert parse_config(None) == (PacsConfig(), [])
    given_, problems = parse_config(
        {"beta": "0.5", "score": "plain", "class_weight": "off", "reward_method": "mean_log_prob"}
    )
    assert problems == [] and given_ == PacsConfig(
        beta=0.5, score="plain", class_weight="off", reward_method="mean_log_prob"
    )
    wrong = {"beta": 0, "score": "grpo", "class_weight": True, "reward_method": 1, "betta": 1, "stage_timeout": "never"}
    _, problems = parse_config(wrong)
    assert len(problems) == 6 and all(problem.startswith("algorithm.pacs.") for problem in problems)
    assert "algorithm.pacs.betta does not exist: did you mean algorithm.pacs.beta?" in problems


REFUSED = {
    "algorithm.use_kl_in_reward=True": "labels",
    "algorithm.rollout_correction.bypass_mode=True": "bypass_mode=False",
    "algorithm.rollout_correction.rollout_is=token": "rollout_is=null",
    "algorithm.rollout_correction.rollout_rs=token_k1": "rollout_rs=null",
    "critic.enable=True": "remove critic.enable",
    "trainer.use_v1=False": "trainer.use_v1=True",
    "trainer.v1.trainer_mode=separate_async": "trainer_mode=sync",
    "actor_rollout_ref.actor.strategy=megatron": "strategy=fsdp2",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gspo": "remove actor_rollout_ref.actor.policy_loss.loss_mode",
    "actor_rollout_ref.actor.shuffle=True": "shuffle=False",
    "actor_rollout_ref.actor.use_prefix_grouper=True": "use_prefix_grouper=False",
    "+reward.reward_kwargs.overlong_buffer_cfg.enable=True": "overlong_buffer_cfg.enable=False",
    "+algorithm.pacs.score=best": "write one of rloo",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_run_is_refused_in_the_driver(override):
    from verl_patches.validation import prepare

    config = compose("algorithm.adv_estimator=pacs")
    key, value = override.removeprefix("+").split("=")
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, yaml.safe_load(value))
    with pytest.raises(ValueError) as error:
        prepare(config)
    assert "algorithm.adv_estimator=pacs cannot run with this configuration" in str(error.value)
    assert key in str(error.value) and REFUSED[override] in str(error.value)


def test_what_runs_but_not_as_meant_is_said(caplog):
    validate(compose("algorithm.adv_estimator=pacs", "actor_rollout_ref.rollout.n=1"))
    assert "nobody to be compared with" in caplog.text
    assert "one update a step: with it PACS is RLOO with class weights" in caplog.text
    caplog.clear()
    validate(compose("algorithm.adv_estimator=pacs", "actor_rollout_ref.actor.ppo_mini_batch_size=4"))
    assert caplog.text == ""


def test_what_pacs_changes_in_the_configuration(capsys):
    """The policy loss alone."""
    config = compose("algorithm.adv_estimator=pacs", "+algorithm.pacs.beta=0.5")
    before = OmegaConf.to_container(config, resolve=True)
    validate(config)
    after = OmegaConf.to_container(config, resolve=True)
    loss = after["actor_rollout_ref"]["actor"].pop("policy_loss")
    before["actor_rollout_ref"]["actor"].pop("policy_loss")
    assert before == after and loss["loss_mode"] == "pacs" and loss["pacs"]["beta"] == 0.5
    assert "PACS accepted with this configuration" in capsys.readouterr().out
