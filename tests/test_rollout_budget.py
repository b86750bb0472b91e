"""Claim: with a budget each prompt gets as many answers as V0.5's rule says, through verl's own agent loop worker: the first side
by side, then one by one; failures end it and are counted; validation is left alone; and a batch of groups of any size is cut
into as many equal mini-batches as the recipe has.

The rule is written out here, in rewards of -1 and +1, as the paper has it. verl's `_run_prompt` is verl's; the model, the
reward and the TransferQueue are not there. A whole run is in test_v05_run.py.
"""

import asyncio
import random
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
from omegaconf import OmegaConf

from vimpo_verl.rollout_budget import PromptBudget, RolloutBudgetConfig, budget_metrics, parse_config

PAPER = RolloutBudgetConfig()
ROOT = Path(__file__).parent.parent


def papers_rule(rewards, prior, least=4, most=16, at_once=1):
    """Answers that a prompt gets whose answers would have these rewards, 0 or 1, in this order."""
    k = least
    while k < most:
        distance = (2 * sum(rewards[:k]) / k - 1) - (2 * prior - 1)
        wrong = max(0.0, distance**2 - 1 / k)

        def risk(count, wrong=wrong):
            w = wrong / (wrong + 1 / count)
            return w**2 / count + (1 - w) ** 2 * wrong + count / most**2

        if risk(k + 1) >= risk(k):
            break
        k = min(k + at_once, most)
    return k


# ---- one prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (PAPER, {}),
        (RolloutBudgetConfig(min_rollouts=2, max_rollouts=7, round_size=3), {"least": 2, "most": 7, "at_once": 3}),
        (RolloutBudgetConfig(min_rollouts=5, max_rollouts=5), {"least": 5, "most": 5}),
    ],
)
def test_a_prompts_budget_is_the_papers_rule(config, rule):
    rng, counts = random.Random(0), set()
    for _ in range(300):
        prior, rate = rng.random(), rng.random()
        rewards = [float(rng.random() < rate) for _ in range(16)]
        budget = PromptBudget(config, prior)
        for reward in rewards:
            if budget.closed:
                break
            budget.settle(reward)
        assert budget.closed and budget.asked == len(budget.rewards) == papers_rule(rewards, prior, **rule)
        counts.add(budget.asked)
    assert min(counts) == config.min_rollouts and max(counts) == config.max_rollouts


@pytest.mark.parametrize("bad", [None, -1.0, 3.0, float("nan")])
def test_a_missing_or_strange_reward_ends_it(bad):
    budget = PromptBudget(PAPER, 1.0)
    for reward in (0.0, bad, 0.0, 0.0):
        assert not budget.closed
        budget.settle(reward)
    assert budget.closed and budget.asked == 4 and budget.missing == (bad is None)


def test_a_cost_of_its_own():
    free, dear = (RolloutBudgetConfig(cost=cost) for cost in (0.0, 1.0))
    for config, expected in ((free, 16), (dear, 4)):
        budget = PromptBudget(config, 1.0)
        while not budget.closed:
            budget.settle(0.0)
        assert budget.asked == expected


def test_knobs():
    assert parse_config(None) == (PAPER, []) and parse_config({"cost": "1e-3"})[0].cost == 1e-3
    _, problems = parse_config({"min_rollouts": 0, "round_size": 1.5, "cost": -1, "max_rollout": 8, "enable": "yes"})
    assert len(problems) == 5 and any("did you mean algorithm.rollout_budget.max_rollouts" in p for p in problems)
    _, problems = parse_config({"max_rollouts": 3})
    assert problems == [
        "algorithm.rollout_budget.min_rollouts=4 is more than max_rollouts=3: write the smaller number first"
    ]


def test_the_page_has_every_knob_with_its_default():
    table = (
        (ROOT / "docs/configuration.md")
        .read_text()
        .split("| knob under `algorithm.rollout_budget`")[1]
        .split("\n\n")[0]
    )
    found = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, flags=re.MULTILINE))
    assert found == {field.name: str(field.default) for field in fields(RolloutBudgetConfig)}


def test_metrics_of_the_budget():
    assert budget_metrics(PAPER, [4, 4, 16, 8]) == {
        "budget/rollouts": 32, "budget/rollouts_per_prompt": 8, "budget/share_at_min": 0.5, "budget/share_at_max": 0.25
    }  # fmt: skip


# ---- verl's agent loop worker ----------------------------------------------------------------------------------------


class Generation:
    """In the place of model, reward and queue: session -> reward, or an exception to raise."""

    def __init__(self, rewards: dict):
        self.rewards, self.started, self.stored, self.tags = rewards, [], [], {}
        self.running = self.most_at_once = 0

    def install(self, monkeypatch):
        import verl.trainer.ppo.v1.agent_loop_tq as verls

        from verl_patches import rollout_budget

        async def run(worker, sampling_params, trajectory, *, agent_name, trace=True, **kwargs):
            uid, session = kwargs["uid"], kwargs["session_id"]
            self.started.append((uid, session))
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
            for _ in range(random.randint(1, 5)):
                await asyncio.sleep(0)
            self.running -= 1
            reward = self.rewards[uid][session]
            if isinstance(reward, Exception):
                raise reward
            outputs = [] if reward is None else [Namespace(reward_score=reward)]
            await worker._agent_loop_postprocess(outputs, trajectory["validate"], **kwargs)

        async def store(worker, output, validate, **kwargs):
            if output:
                self.stored.append(f"{kwargs['uid']}_{kwargs['session_id']}_0")

        async def put(key, partition_id, tag):
            assert key in self.stored or key in self.rewards, "only what is there is tagged"
            self.tags.setdefault(key, {}).update(tag)

        monkeypatch.setattr(rollout_budget.Worker, "_run_agent_loop", run)
        monkeypatch.setattr(rollout_budget.Worker, "_agent_loop_postprocess", store)
        monkeypatch.setattr(verls.tq, "async_kv_put", put)
        return self


def worker_with(config=PAPER):
    from verl_patches.rollout_budget import BudgetedAgentLoopWorker

    worker = object.__new__(BudgetedAgentLoopWorker)  # its __init__ wants a model
    rollout = {"n": 3, "val_kwargs": {"n": 2}}
    worker.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    worker.rollout_budget, worker.gates = config, {}
    return worker


def answer(worker, priors, validate=False):
    """All prompts together, as verl's worker does it."""

    async def all_of_them():
        prompts = [{"uid": uid, "vimpo_prior": prior, "agent_name": "x"} for uid, prior in priors.items()]
        runs = [worker._run_prompt(prompt, {}, {"validate": validate}) for prompt in prompts]
        await asyncio.wait_for(asyncio.gather(*runs), 60)

    asyncio.run(all_of_them())


@pytest.mark.parametrize("at_once", [1, 5])
def test_every_prompt_gets_what_the_rule_says(monkeypatch, at_once):
    rng = random.Random(at_once)
    priors = {f"p{i}": rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]) for i in range(60)}
    rewards = {uid: [float(rng.random() < rng.choice([0.05, 0.5, 0.95])) for _ in range(16)] for uid in priors}
    generation = Generation(rewards).install(monkeypatch)
    worker = worker_with(RolloutBudgetConfig(round_size=at_once))
    answer(worker, priors)
    expected = {uid: papers_rule(rewards[uid], priors[uid], at_once=at_once) for uid in priors}
    assert len(set(expected.values())) > 3, "the test has something to see"
    for uid, count in expected.items():
        assert [session for name, session in generation.started if name == uid] == list(range(count))
        assert generation.tags[uid] == {"status": "finished"}
    assert len(generation.stored) == sum(expected.values()) and worker.gates == {}


def test_the_first_are_side_by_side_and_then_one_by_one(monkeypatch):
    generation = Generation({"p": [0.0] * 16}).install(monkeypatch)
    answer(worker_with(), {"p": 1.0})
    assert generation.most_at_once == 4 and len(generation.started) == papers_rule([0.0] * 16, 1.0) == 16
    second = Generation({"p": [0.0] * 16, "q": [0.0] * 16}).install(monkeypatch)
    answer(worker_with(), {"p": 1.0, "q": 1.0})
    assert second.most_at_once == 8, "prompts do not wait for one another"


@pytest.mark.parametrize("failing", [0, 3, 6, None])
def test_a_failure_ends_a_prompt_and_is_counted(monkeypatch, failing):
    """Session 0 or 3 of the first four, or 6, the seventh that the rule asks for; None: all of them."""
    broken = {i: RuntimeError("reward") for i in (range(16) if failing is None else [failing])}
    rewards = [broken.get(i, 0.0) for i in range(16)]
    generation = Generation({"p": rewards, "q": [0.0] * 16}).install(monkeypatch)
    answer(worker_with(), {"p": 1.0, "q": 1.0})
    asked = 4 if failing != 6 else 7
    assert [session for uid, session in generation.started if uid == "p"] == list(range(asked))
    assert generation.tags["p"] == {"status": "failure"} and generation.tags["q"] == {"status": "finished"}
    tags = {key: tag for key, tag in generation.tags.items() if "_" in key}
    assert list(tags.values()) == ([] if failing is None else [{"vimpo_rollouts": asked}])
    assert all(key.startswith("p_") and key in generation.stored for key in tags)


def test_an_agent_loop_without_output_is_a_missing_answer(monkeypatch):
    generation = Generation({"p": [0.0, None, 0.0, 0.0]}).install(monkeypatch)
    answer(worker_with(), {"p": 1.0})
    assert len(generation.started) == 4 and [tag for key, tag in generation.tags.items() if "_" in key] == [
        {"vimpo_rollouts": 4}
    ]


def test_a_prompt_without_a_prior_is_given_up_for_another(monkeypatch, caplog):
    """As an asynchronous trainer restores them from the checkpoint of a run that had none."""
    generation = Generation({"p": [0.0] * 16}).install(monkeypatch)
    asyncio.run(worker_with()._run_prompt({"uid": "p", "agent_name": "x"}, {}, {"validate": False}))
    assert generation.started == [] and generation.tags["p"] == {"status": "failure"}
    assert "the prompt p has no prior" in caplog.text


def test_validation_has_its_own_number(monkeypatch):
    generation = Generation({"p": [0.0] * 16}).install(monkeypatch)
    worker = worker_with()
    answer(worker, {"p": 1.0}, validate=True)
    assert generation.started == [("p", 0), ("p", 1)] and worker.gates == {}


def test_the_manager_makes_these_workers():
    from verl_patches.group_checks import MANAGER
    from verl_patches.rollout_budget import BudgetedAgentLoopManager, BudgetedAgentLoopWorker

    assert f"{BudgetedAgentLoopManager.__module__}.{BudgetedAgentLoopManager.__qualname__}" == MANAGER
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {}, "model": {}}})
    manager = BudgetedAgentLoopManager(config, llm_client=None)
    assert manager.agent_loop_workers_class.__ray_actor_class__ is BudgetedAgentLoopWorker


# ---- verl's trainer --------------------------------------------------------------------------------------------------


class Batch(Namespace):
    """As far as verl's KVBatchMeta is looked at."""

    def __len__(self):
        return len(self.keys)

    def reorder(self, order):
        assert sorted(order) == list(range(len(self)))
        self.keys, self.tags = [self.keys[i] for i in order], [self.tags[i] for i in order]


def batch_with(counts: dict[str, int], padding=0, **tags) -> Batch:
    keys = [f"{uid}_{session}_0" for uid, count in counts.items() for session in range(count)]
    found = [dict(tags.get(key, {})) for key in keys]
    keys += [f"pad_{i}_0" for i in range(padding)]
    return Batch(keys=keys, tags=found + [{"is_padding": True} for _ in range(padding)])


@pytest.fixture
def trainer():
    """The mixin in front of a trainer that keeps what it was given."""
    from verl_patches.rollout_budget import BudgetedTrainer

    class Stock:
        def _balance_batch(self, batch, metrics):
            self.multiple = self._get_required_batch_multiple(self.dp_size)
            missing = -len(batch.keys) % self.multiple
            added = [{"is_padding": True} for _ in range(missing)]
            return Batch(keys=batch.keys + [f"pad_{i}_0" for i in range(missing)], tags=batch.tags + added)

        def _step_once(self, batch, metrics):
            batch = self._balance_batch(batch, metrics)
            actor = self.config.actor_rollout_ref
            self.mini_batch_size = actor.actor.ppo_mini_batch_size * actor.rollout.n
            self.updates = len(batch) / self.mini_batch_size
            if self.fails:
                raise RuntimeError("update")
            return batch

    def make(updates=1, dynamic=False, micro=2, infer=3, ranks=1, n=5, prompts=12):
        trainer = type("Trainer", (BudgetedTrainer, Stock), {"__init__": lambda self: None})()
        sizes = {"log_prob_use_dynamic_bsz": dynamic, "log_prob_micro_batch_size_per_gpu": None if dynamic else infer}
        trainer.config = OmegaConf.create({
            "data": {"train_batch_size": prompts},
            "actor_rollout_ref": {
                "actor": {
                    "ppo_mini_batch_size": prompts // updates,
                    "use_dynamic_bsz": dynamic,
                    "ppo_micro_batch_size_per_gpu": None if dynamic else micro,
                },
                "rollout": {"n": n, **sizes},
                "ref": {**sizes, "log_prob_micro_batch_size_per_gpu": None},
            },
        })  # fmt: skip
        trainer.rollout_budget, trainer.dp_size, trainer.fails = PAPER, ranks, False
        trainer.replay_buffer = Namespace(failure_keys={"train": set()})
        trainer.actor_rollout_wg = Namespace(_dispatch_info={"actor": list(range(ranks))})
        return trainer

    return make


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dynamic", [True, False])
def test_equal_mini_batches_as_many_as_the_recipe_has(trainer, updates, ranks, dynamic):
    made = trainer(updates=updates, ranks=ranks, dynamic=dynamic)
    rng = random.Random(updates * ranks)
    for _ in range(5):
        counts = {f"p{i}": rng.randint(4, 16) for i in range(12)}
        batch = made._step_once(batch_with(counts), metrics := {})
        added = len(batch) - sum(counts.values())
        assert made.updates == updates, "exactly"
        assert made.mini_batch_size % ranks == 0 and 0 <= added < made.multiple
        share = made.mini_batch_size // ranks
        assert dynamic or (share % 2 == 0 and len(batch) // ranks % 3 == 0), "whole micro-batches"
        assert made.multiple == updates * ranks * (1 if dynamic else {1: 6, 3: 2}[updates])
        assert metrics["budget/rollouts"] == sum(counts.values()) and metrics["budget/missing_responses"] == 0


@pytest.mark.parametrize(("ranks", "updates", "size"), [(1, 1, 5), (1, 4, 8), (2, 3, 7), (4, 2, 3)])
def test_no_mini_batch_is_of_placeholders_alone(ranks, updates, size):
    """verl leaves them at the end of a rank's share, where they would fill mini-batches alone."""
    from verl_patches.rollout_budget import placeholders_spread

    rng = random.Random(size)
    share = updates * size
    for _ in range(30):
        added = [rng.randrange(share - updates + 1) for _ in range(ranks)]
        is_padding = [i >= share - count for count in added for i in range(share)]
        order = placeholders_spread(is_padding, ranks, updates)
        assert sorted(order) == list(range(ranks * share))
        for rank, count in enumerate(added):
            rows = order[rank * share : (rank + 1) * share]
            assert {row // share for row in rows} == {rank}, "each rank keeps its own"
            real = [row for row in rows if not is_padding[row]]
            assert real == sorted(real), "in their order"
            of_each = [sum(is_padding[row] for row in rows[i * size : (i + 1) * size]) for i in range(updates)]
            assert sum(of_each) == count and max(of_each) - min(of_each) <= 1 and max(of_each) < size


def test_the_recipes_own_sizes_come_back(trainer):
    made = trainer()
    made._step_once(batch_with({"p": 4}), {})
    made.fails = True
    with pytest.raises(RuntimeError, match="update"):
        made._step_once(batch_with({"p": 4}), {})
    sizes = made.config.actor_rollout_ref
    assert sizes.actor.ppo_mini_batch_size == 12 and sizes.rollout.n == 5


def test_missing_responses(trainer):
    """p: seven were asked for; q: all are there; r: nothing is left; s: another run's, long gone."""
    made = trainer()
    made.replay_buffer.failure_keys["train"] = {"p", "r"}
    batch = batch_with({"p": 6, "q": 5}, p_3_0={"vimpo_rollouts": 7})
    made._balance_batch(batch, metrics := {})
    assert metrics["budget/missing_responses"] == (7 - 6) + (5 - 5) + (4 - 0)
    assert metrics["budget/rollouts_per_prompt"] == 5.5


def test_a_data_set_with_its_own_numbers_is_refused(trainer):
    with pytest.raises(ValueError, match="__rollout_n__"):
        trainer()._submit_batch_to_rollout({"__rollout_n__": [3], "uid": ["a"]})


def test_another_agent_loop_manager_is_refused(trainer):
    with pytest.raises(RuntimeError, match="agent loop manager is SimpleNamespace, which knows no budget"):
        trainer().fit(Namespace())
