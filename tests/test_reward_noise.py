"""Claims about noisy rewards: whole groups are flipped with the given probability, decided by seed, step and prompt
alone, so that GRPO and VIMPO get the same flips; verl trains on the flipped rewards and logs both means; placeholders
and validation are never touched; rewards other than 0 and 1, and samples without an index, are refused by name; without
noise the trainers are verl's.

verl's own configuration, trainer classes and advantage; the TransferQueue is a dictionary (in_process.py). Whole runs with noise
were made by hand (docs/recipes.md), not here.
"""

import hashlib
import inspect
import random

import numpy as np
import pytest
import torch
import transfer_queue
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import InMemoryQueue
from omegaconf import OmegaConf
from test_validation import compose, validate
from transfer_queue import KVBatchMeta

from vimpo_verl.reward_noise import RewardNoiseConfig, flip_groups, is_flipped, parse_config

NOISE = ["+algorithm.reward_noise.flip_prob=0.4", "+algorithm.reward_noise.seed=3"]
SOURCE = "math500"


# ---- which groups --------------------------------------------------------------------------------------------------


def by_hand(seed, step, data_source, index, flip_prob):
    digest = hashlib.sha256(f"({seed}, {step}, '{data_source}', {index})".encode()).hexdigest()
    return int(digest[:16], 16) / 2**64 < flip_prob


@given(st.integers(0, 2**40), st.integers(1, 10**6), st.integers(0, 10**7), st.floats(0, 1))
def test_the_hash_is_what_it_says(seed, step, index, flip_prob):
    config = RewardNoiseConfig(flip_prob, seed)
    assert is_flipped(config, step, (SOURCE, index)) == by_hand(seed, step, SOURCE, index, flip_prob)
    assert is_flipped(config, np.int64(step), (np.str_(SOURCE), np.int64(index))) == is_flipped(
        config, step, (SOURCE, index)
    )


def test_flips_stay_the_same_from_release_to_release():
    flipped = [index for index in range(20) if is_flipped(RewardNoiseConfig(0.2, 3), 1, (SOURCE, index))]
    assert flipped == [4, 7, 12, 16, 19]


@pytest.mark.parametrize("flip_prob", [0.05, 0.2, 0.5])
def test_share_of_flips(flip_prob):
    """20,000 draws: five standard deviations."""
    config = RewardNoiseConfig(flip_prob, 1)
    draws = [is_flipped(config, step, (SOURCE, index)) for step in range(100) for index in range(200)]
    assert abs(np.mean(draws) - flip_prob) < 5 * (flip_prob * (1 - flip_prob) / len(draws)) ** 0.5
    assert not any(is_flipped(RewardNoiseConfig(0.0, 1), step, (SOURCE, 0)) for step in range(1000))
    assert all(is_flipped(RewardNoiseConfig(1.0, 1), step, (SOURCE, 0)) for step in range(1000))


@pytest.mark.parametrize("other", ["seed", "step", "index", "data_source"])
def test_every_part_matters_and_flips_are_independent(other):
    def draw(step=1, index=1, seed=1, data_source=SOURCE):
        return is_flipped(RewardNoiseConfig(0.5, seed), step, (data_source, index))

    one = [draw(step=n) for n in range(4000)]
    changed = {"seed": {"seed": 2}, "index": {"index": 2}, "data_source": {"data_source": "other"}}
    two = [draw(step=n + 5000) if other == "step" else draw(step=n, **changed[other]) for n in range(4000)]
    assert abs(np.mean([a == b for a, b in zip(one, two, strict=True)]) - 0.5) < 5 * 0.5 / 4000**0.5


@given(st.data())
@settings(max_examples=100)
def test_flip_groups_against_a_loop(data):
    config = RewardNoiseConfig(data.draw(st.floats(0, 1)), data.draw(st.integers(0, 9)))
    rows = data.draw(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0])), min_size=1, max_size=20)
    )  # prompt, reward
    names = [str(n) for n in range(len(rows))]
    noisy = flip_groups(
        config,
        rewards=[reward for _, reward in rows],
        groups=[f"uid{prompt}" for prompt, _ in rows],
        steps=[7] * len(rows),
        prompts=[(SOURCE, prompt) for prompt, _ in rows],
        names=names,
    )
    expected, flipped = [], set()
    for prompt, reward in rows:
        if by_hand(config.seed, 7, SOURCE, prompt, config.flip_prob):
            flipped.add(prompt)
            reward = 1.0 - reward
        expected.append(reward)
    assert noisy.rewards == expected and noisy.flipped_groups == len(flipped)
    assert noisy.noisy_mean == pytest.approx(np.mean(expected))
    assert noisy.clean_mean == pytest.approx(np.mean([reward for _, reward in rows]))


@pytest.mark.parametrize("reward", [0.5, -1.0, 2.0, float("nan")])
def test_rewards_that_are_not_binary_are_refused_by_name(reward):
    with pytest.raises(ValueError, match=r"sample b is (0\.5|-1\.0|2\.0|nan) \(1 of 2 .*vimpo_verl/rewards/math\.py"):
        flip_groups(RewardNoiseConfig(0.1), [1.0, reward], ["g", "g"], [1, 1], [(SOURCE, 1)] * 2, ["a", "b"])


# ---- knobs ---------------------------------------------------------------------------------------------------------


def test_knobs():
    assert parse_config(None) == (RewardNoiseConfig(flip_prob=0.0), [])
    assert parse_config({"flip_prob": "2e-1", "seed": 5}) == (RewardNoiseConfig(0.2, 5), [])


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"flip_prob": 1.5}, "algorithm.reward_noise.flip_prob=1.5: write a number from 0 to 1"),
        ({"flip_prob": "much"}, "algorithm.reward_noise.flip_prob='much': write a number"),
        ({"flip_prob": float("nan")}, "algorithm.reward_noise.flip_prob=nan: write a number"),
        ({"flip_prob": True}, "algorithm.reward_noise.flip_prob=True: write a number"),
        ({"flip_prob": 0.1, "seed": 0.5}, "algorithm.reward_noise.seed=0.5: write an integer"),
        ({"flip_probability": 0.1}, "did you mean algorithm.reward_noise.flip_prob?"),
        ({"seed": 1}, "lacks flip_prob"),
        (0.2, "algorithm.reward_noise=0.2 is not a section"),
    ],
)
def test_problems_of_the_knobs(section, problem):
    _, problems = parse_config(section)
    assert len(problems) == 1 and problem in problems[0]


@pytest.mark.parametrize("estimator", ["grpo", "vimpo"])
def test_driver_refuses_every_problem_at_once(estimator):
    config = compose(
        f"algorithm.adv_estimator={estimator}",
        "+algorithm.reward_noise.flip_prob=2",
        "+algorithm.reward_noise.sead=1",
        "trainer.v1.trainer_mode=separate_async",
        "+reward.reward_kwargs.overlong_buffer_cfg.enable=True",
    )
    with pytest.raises(ValueError) as caught:
        validate(config)
    for part in (
        "cannot run with this configuration:\n  1. ",
        "flip_prob=2: write a number from 0 to 1",
        "did you mean algorithm.reward_noise.seed?",
        "write trainer.v1.trainer_mode=sync or colocate_async",
        "write reward.reward_kwargs.overlong_buffer_cfg.enable=False",
    ):
        assert part in str(caught.value)


def test_driver_refuses_the_old_trainer_with_noise():
    with pytest.raises(
        ValueError, match="algorithm.reward_noise is built on verl's v1 trainer; write trainer.use_v1=True"
    ):
        validate(compose(*NOISE, "trainer.use_v1=False"))


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "vimpo"])
def test_driver_says_that_noise_is_accepted(estimator, capsys):
    validate(compose(f"algorithm.adv_estimator={estimator}", *NOISE))
    assert (
        "reward noise accepted with this configuration: RewardNoiseConfig(flip_prob=0.4, seed=3)"
        in capsys.readouterr().out
    )
    validate(compose(f"algorithm.adv_estimator={estimator}"))
    assert "noise" not in capsys.readouterr().out


# ---- trainers ------------------------------------------------------------------------------------------------------


def trainer_of(monkeypatch, *overrides, mode="sync"):
    """What verl's task runner makes, without its initialisation; and how often that would have run."""
    import verl.trainer.ppo.v1.trainer_base as base

    import verl_patches.family_trainer  # noqa: F401

    initialised = []

    def initialise(self, config):
        initialised.append(type(self))
        self.config = config

    monkeypatch.setattr(base.PPOTrainer, "__init__", initialise)
    config = compose(*overrides, f"trainer.v1.trainer_mode={mode}")
    validate(config)
    trainer = base.get_trainer_cls(mode)(config=config)
    return trainer, initialised


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("overrides", [[], ["+algorithm.reward_noise.flip_prob=0"]])
def test_without_noise_the_trainers_are_what_they_are(monkeypatch, mode, overrides):
    from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from verl_patches.reward_noise import RewardNoise

    stock, initialised = trainer_of(monkeypatch, *overrides, mode=mode)
    assert type(stock) is {"sync": PPOTrainerSync, "colocate_async": PPOTrainerColocateAsync}[mode]
    assert initialised == [type(stock)]
    vimpo, initialised = trainer_of(monkeypatch, "algorithm.adv_estimator=vimpo", *overrides, mode=mode)
    assert isinstance(vimpo, type(stock)) and not isinstance(vimpo, RewardNoise)
    assert initialised == [type(vimpo)]


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("estimator", ["grpo", "vimpo"])
def test_with_noise_the_trainer_differs_in_the_advantage_alone(monkeypatch, mode, estimator, capsys):
    from verl_patches.reward_noise import RewardNoise

    plain, _ = trainer_of(monkeypatch, f"algorithm.adv_estimator={estimator}", mode=mode)
    assert "reward noise" not in capsys.readouterr().out
    noisy, initialised = trainer_of(monkeypatch, f"algorithm.adv_estimator={estimator}", *NOISE, mode=mode)
    said = "reward noise in force, in training only: RewardNoiseConfig(flip_prob=0.4, seed=3)"
    assert capsys.readouterr().out.count(said) == 1
    behind = type(noisy).__mro__[2]
    assert isinstance(noisy, RewardNoise) and behind.__mro__[1:] == type(plain).__mro__[1:]
    assert initialised == [type(noisy)], "initialised once"
    static = inspect.getattr_static  # a class method is bound anew by each class
    differing = {name for name in dir(type(noisy)) if static(type(noisy), name) is not static(behind, name, None)}
    assert {name for name in differing if not name.startswith("__")} <= {"_compute_advantage", "_abc_impl"}


# ---- a batch -------------------------------------------------------------------------------------------------------


class Batch:
    """A batch in the queue: 12 prompts with 4 responses each, 3 placeholders, and a validation sample beside it."""

    def __init__(self, monkeypatch, seed=0, step=5):
        self.queue = InMemoryQueue()
        rng = random.Random(seed)
        self.rows, tags = {}, {}
        for prompt in range(12):
            for session in range(4):
                key = f"uid{seed}-{prompt}_{session}_0"
                self.rows[key] = row(f"uid{seed}-{prompt}", prompt, float(rng.random() < 0.5), rng.randint(1, 6))
                tags[key] = {"global_steps": step, "is_prompt": False}
        for number in range(3):
            key = f"pad_{number}_0"
            self.rows[key] = row("pad", 0, 0.0, 1, mask=0)
            tags[key] = {"global_steps": step, "is_padding": True}
        keys = list(self.rows)
        rng.shuffle(keys)
        self.rows["validation"] = row("validation", 0, 1.0, 3)
        self.queue.rows = {key: dict(self.rows[key]) for key in self.rows}
        self.queue.tags, self.queue.extra_info = tags, {}
        self.meta = KVBatchMeta(keys, [tags[key] for key in keys], "train", extra_info={})
        monkeypatch.setattr(transfer_queue, "kv_batch_get", self.queue.get)
        monkeypatch.setattr(transfer_queue, "kv_batch_put", self.queue.put)

    def flipped(self) -> set[int]:
        """Prompts whose rewards changed; asserts that the whole group did, and nothing else."""
        changed: dict[int, set[bool]] = {}
        for key, before in self.rows.items():
            after = self.queue.rows[key]["rm_scores"]
            assert after[:-1].eq(0).all() and after[-1].item() in (0.0, 1.0)
            flip = after[-1].item() != before["rm_scores"][-1].item()
            if key == "validation" or key.startswith("pad"):
                assert not flip
            else:
                changed.setdefault(before["extra_info"]["index"], set()).add(flip)
        assert all(len(flips) == 1 for flips in changed.values())
        return {index for index, flips in changed.items() if True in flips}


def row(uid, index, reward, length, mask=1):
    scores = torch.zeros(length)
    scores[-1] = reward
    return {
        "uid": uid,
        "rm_scores": scores,
        "response_mask": torch.full((length,), mask),
        "data_source": SOURCE,
        "extra_info": {"index": index, "split": "train"},
    }


def add_noise(batch, estimator="grpo") -> dict:
    from verl_patches.reward_noise import add_noise as add

    metrics: dict = {}
    algorithm = {"adv_estimator": estimator, "reward_noise": {"flip_prob": 0.4, "seed": 3}}
    add(batch.meta, metrics, OmegaConf.create({"algorithm": algorithm}))
    return metrics


def test_flips_are_those_of_the_hash(monkeypatch):
    batch = Batch(monkeypatch)
    metrics = add_noise(batch)
    expected = {index for index in range(12) if by_hand(3, 5, SOURCE, index, 0.4)}
    assert batch.flipped() == expected and expected
    real = [key for key in batch.rows if key.startswith("uid")]
    assert metrics == {
        "reward_noise/clean_mean": pytest.approx(np.mean([batch.rows[key]["rm_scores"][-1] for key in real])),
        "reward_noise/noisy_mean": pytest.approx(np.mean([batch.queue.rows[key]["rm_scores"][-1] for key in real])),
        "reward_noise/flipped_groups": len(expected),
    }


def test_flips_depend_neither_on_the_algorithm_nor_on_answers_order_and_uids(monkeypatch):
    """Seeds of `Batch` change rewards, lengths, order and uids."""
    flips = []
    for seed, estimator in ((0, "grpo"), (1, "vimpo"), (2, "rloo")):
        batch = Batch(monkeypatch, seed=seed)
        add_noise(batch, estimator)
        flips.append(batch.flipped())
    assert flips[0] == flips[1] == flips[2]
    later = Batch(monkeypatch, step=6)
    add_noise(later)
    assert later.flipped() != flips[0], "another step, another choice"


def test_grpo_trains_on_the_flipped_rewards(monkeypatch):
    """verl's own advantage, of the trainer that verl's registry gives, against the formula."""
    trainer, _ = trainer_of(monkeypatch, "algorithm.norm_adv_by_std_in_grpo=False", *NOISE)
    batch = Batch(monkeypatch)
    metrics: dict = {}
    trainer._compute_advantage(batch.meta, metrics)
    assert metrics["reward_noise/flipped_groups"] == len(batch.flipped()) > 0
    for key in batch.rows:
        if not key.startswith("uid"):
            continue
        uid = batch.rows[key]["uid"]
        group = [k for k in batch.rows if batch.rows[k]["uid"] == uid]
        flip = by_hand(3, 5, SOURCE, batch.rows[key]["extra_info"]["index"], 0.4)
        rewards = {k: abs(flip - batch.rows[k]["rm_scores"][-1].item()) for k in group}
        expected = rewards[key] - sum(rewards.values()) / len(group)
        torch.testing.assert_close(
            batch.queue.rows[key]["advantages"], torch.full_like(batch.rows[key]["rm_scores"], expected)
        )


@pytest.mark.parametrize("extra_info", [{"split": "train"}, {"index": None}, None])
def test_sample_without_an_index_is_refused_by_name(monkeypatch, extra_info):
    batch = Batch(monkeypatch)
    batch.queue.rows["uid0-4_2_0"]["extra_info"] = extra_info
    with pytest.raises(ValueError, match=r"sample uid0-4_2_0 \(data_source 'math500'\) has no extra_info.index"):
        add_noise(batch)


def test_reward_that_is_not_binary_is_refused_in_training(monkeypatch):
    batch = Batch(monkeypatch)
    batch.queue.rows["uid0-4_2_0"]["rm_scores"][-1] = 0.5
    with pytest.raises(ValueError, match=r"the reward of sample uid0-4_2_0 is 0\.5"):
        add_noise(batch)
