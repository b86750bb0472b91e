"""Claim: on verl's own FSDP engine and training worker, an update of PACS is the formula's, however its groups are split.

The engine computes in float64 here (verl itself offers no such precision): loss, gradients and parameters of a step of several
mini-batches and epochs agree with the formula, written out below over whole groups, to 1e-9; with any micro-batches, dynamic
batch size, order inside a mini-batch, placeholders, and two data-parallel ranks that share every group. One forward without
gradient an update, and none in the first of a step. From a configuration to the weights: test_pacs_trainer.py.
"""

import functools
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from engine_harness import Setting, make_worker, parameters_of, recorded_gradients, run_on_ranks, slice_of_rank
from engine_samples import make_samples, nested, placeholders, response_part, to_tensordict

from vimpo_verl import pacs
from vimpo_verl.pacs_config import PacsConfig

LR = 0.05


def in_float64(function):
    """While `function` runs, whatever precision is asked of verl, which knows no float64, is that one, and so is the norm of HF's
    model, which rounds to float32 whatever it is given.
    """

    def rms_norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    @functools.wraps(function)
    def run(*args, **kwargs):
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
        from verl.utils.torch_dtypes import PrecisionType

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PrecisionType, "to_dtype", staticmethod(lambda precision: torch.float64))
            patch.setattr(Qwen3RMSNorm, "forward", rms_norm)
            return function(*args, **kwargs)

    return run


# ---- the formula, with the policy's own forward ----------------------------------------------------------------------


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa").eval()


def sums_of(model, samples, reward_method) -> list[torch.Tensor]:
    """sum_t, or mean_t, of log pi(y_t) over the tokens that the policy wrote."""
    found = []
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.prompt + sample.response])).logits[0]
        first = len(sample.prompt) - 1
        log_p = torch.log_softmax(logits[first : first + len(sample.response)], -1)
        log_prob = log_p.gather(-1, torch.tensor(sample.response).unsqueeze(-1)).squeeze(-1)
        mask = torch.tensor(sample.mask, dtype=torch.float64)
        found.append((mask * log_prob).sum() / (max(mask.sum().item(), 1) if reward_method == "mean_log_prob" else 1))
    return found


def loss_of(model, old, rows, samples, knobs):
    """L of one mini-batch: docs/algorithms.md, with loops."""
    new = sums_of(model, [samples[i] for i in rows], knobs.reward_method)
    r = {
        i: knobs.beta * (s - (old[i] if knobs.reward_method == "log_ratio" else 0))
        for i, s in zip(rows, new, strict=True)
    }
    total = 0.0
    for j in rows:
        group = [i for i in rows if samples[i].uid == samples[j].uid]
        n, mean = len(group), sum(r[i] for i in group) / len(group)
        if knobs.score == "rloo":
            psi = r[j] - sum(r[i] for i in group if i != j) / (n - 1) if n > 1 else r[j] * 0
        elif knobs.score == "group_normalised":
            std = torch.stack([r[i] for i in group]).std()
            psi = (r[j] - mean) / (std + 1e-6)
        else:
            psi = r[j] - mean if knobs.score == "dr_grpo" else r[j]
        y = samples[j].outcome
        alike = sum(samples[i].outcome == y for i in group)
        weight = {
            "question": n / (2 * alike) if alike < n else 1.0, "only_positive": y, "only_negative": 1 - y, "off": 1.0,
        }[knobs.class_weight]  # fmt: skip
        cross_entropy = torch.nn.functional.softplus(-psi) if y else torch.nn.functional.softplus(psi)
        total = total + weight * cross_entropy / len(rows)
    return total


@in_float64
def formula(models, samples, mini_batches, knobs, epochs=2) -> dict:
    """Steps of SGD on L over mini-batches, each a list of positions."""
    model = load(models / "policy")
    with torch.no_grad():
        old = sums_of(model, samples, "log_ratio")
    losses, gradients = [], []
    for _ in range(epochs):
        for rows in mini_batches:
            model.zero_grad()
            loss = loss_of(model, old, rows, samples, knobs)
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            with torch.no_grad():
                for p in model.parameters():
                    p -= LR * p.grad
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": {n: p.detach() for n, p in model.named_parameters()},
    }


# ---- the engine --------------------------------------------------------------------------------------------------------


@in_float64
def run_step(models, setting, samples, mini_batches, knobs, epochs=2, ranks=1, rank=0, count=None) -> dict:
    """A step of PACS's worker; `mini_batches` are lists of positions, in the order in which the ranks' pieces hold them."""
    from functools import partial

    from verl.utils.metric import reduce_metrics
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    from verl_patches.pacs_worker import PacsTrainingWorker
    from verl_patches.policy_loss_config import PacsPolicyLossConfig

    worker = make_worker(PacsTrainingWorker, models / "policy", setting, forward_only=False)
    actor = FSDPActorConfig(
        strategy=setting.strategy, rollout_n=2, ppo_micro_batch_size_per_gpu=1,
        policy_loss=PacsPolicyLossConfig(loss_mode="pacs", pacs=knobs),
    )  # fmt: skip
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    worker.use_pacs_loss(knobs)
    if count is not None:
        count.extend([0])
        forward = worker.engine.infer_batch

        def infer_batch(*args, **kwargs):
            count[0] += 1
            return forward(*args, **kwargs)

        worker.engine.infer_batch = infer_batch
    size = len(mini_batches[0])
    pieces = [rows[slice_of_rank(size, rank, ranks)] for rows in mini_batches]
    mine = [samples[i] for piece in pieces for i in piece]
    data = to_tensordict(mine, temperature=1.0, calculate_entropy=False, compute_loss=False)
    old = response_part(worker.infer_batch(data)["log_probs"].unbind(), mine)
    if count is not None:
        count[0] = 0
    update = to_tensordict(
        mine, temperature=1.0, calculate_entropy=False, distillation_use_topk=False, distillation_only=False,
        global_batch_size=size, mini_batch_size=size, epochs=epochs, seed=42, dataloader_kwargs={"shuffle": False},
    )  # fmt: skip
    update["old_log_probs"], update["advantages"] = nested(old), nested([torch.zeros_like(row) for row in old])
    names = [sample.uid for sample in samples]
    update["pacs_outcome"] = torch.tensor([s.outcome for s in mine])
    update["pacs_group"] = torch.tensor([float(names.index(s.uid)) for s in mine])
    update["pacs_group_size"] = torch.tensor([0.0 if s.is_padding else float(names.count(s.uid)) for s in mine])
    gradients = []
    with recorded_gradients(worker.engine, gradients):
        output = worker.train_mini_batch(update)
    metrics = {name: value for name, value in dict(output["metrics"]).items() if name.startswith(("pacs/", "actor/"))}
    return {
        "gradients": gradients, "parameters": parameters_of(worker.engine),
        "losses": metrics["pacs/loss"], "metrics": reduce_metrics(metrics),
    }  # fmt: skip


def relative(found, wanted) -> float:
    difference = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return (difference / sum(tensor.square().sum() for tensor in wanted.values())).sqrt().item()


def assert_agrees(found, wanted, tolerance=1e-9):
    assert len(found["gradients"]) == len(wanted["gradients"]) > 1
    for actual, expected in zip(found["gradients"], wanted["gradients"], strict=True):
        assert actual.keys() == expected.keys() and next(iter(actual.values())).dtype == torch.float64
        assert relative(actual, expected) <= tolerance
    assert relative(found["parameters"], wanted["parameters"]) <= tolerance
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance)


# Groups of 3, with tool output in the middle and one response without a valid token; two of them a mini-batch.
SAMPLES = make_samples(seed=3, prompts=4, group_size=3)
TWO = [list(range(6)), list(range(6, 12))]
SETTING = Setting(lr=LR, micro_batch_size=2)


@pytest.fixture(scope="module")
def expected(models):
    assert {sample.outcome for sample in SAMPLES} == {0.0, 1.0}
    return formula(models, SAMPLES, TWO, PacsConfig())


SPLITS = {
    "micro-batches of 2": {},
    "of 1": {"micro_batch_size": 1},
    "of all": {"micro_batch_size": 6},
    "dynamic": {"micro_batch_size": None},
    "dynamic, short": {"micro_batch_size": None, "max_token_len": 24},
    "padding kept": {"use_remove_padding": False, "micro_batch_size": 3},
    "FSDP1": {"strategy": "fsdp"},
}


@pytest.mark.parametrize("how", SPLITS)
def test_any_micro_batches(models, expected, how):
    """The second mini-batch and the second epoch have an r that is not 0, which a forward before the update finds."""
    count = []
    found = run_step(models, replace(SETTING, **SPLITS[how]), SAMPLES, TWO, PacsConfig(), count=count)
    assert_agrees(found, expected)
    assert count == [3], "four updates, the first of which starts at the old policy"
    assert found["metrics"]["actor/pg_loss"] == pytest.approx(sum(expected["losses"]) / 4, rel=1e-9)


def shuffled(mini_batches, seed):
    generator = random.Random(seed)
    return [generator.sample(rows, len(rows)) for rows in mini_batches]


@pytest.mark.parametrize("seed", range(3))
def test_any_order_inside_a_mini_batch(models, expected, seed):
    assert_agrees(run_step(models, SETTING, SAMPLES, shuffled(TWO, seed), PacsConfig()), expected)


WAYS = [
    ways for ways in product(pacs.SCORES, pacs.CLASS_WEIGHTS, pacs.REWARD_METHODS) if "group_normalised" not in ways
][::3] + [("group_normalised", "question", "mean_log_prob")]


@pytest.mark.parametrize("ways", WAYS, ids=" ".join)
def test_every_score_and_weight(models, ways):
    """Every third of all ways; all of them, without an engine, are in test_pacs.py."""
    knobs = PacsConfig(beta=0.7, score=ways[0], class_weight=ways[1], reward_method=ways[2])
    assert_agrees(run_step(models, SETTING, SAMPLES, TWO, knobs), formula(models, SAMPLES, TWO, knobs))


def test_uneven_groups_and_placeholders(models):
    """Groups of 3, 2, 3 and 1 with a placeholder in each mini-batch: L is the mean over the real sequences."""
    uneven = [sample for position, sample in enumerate(SAMPLES) if position not in (4, 10, 11)]
    filled = [*uneven, *placeholders(3)]
    real = [list(range(5)), list(range(5, 9))]
    with_placeholders = [[0, 9, 1, 2, 3, 4], [5, 6, 10, 7, 8, 11]]
    found = run_step(models, replace(SETTING, max_token_len=256), filled, with_placeholders, PacsConfig())
    assert_agrees(found, formula(models, uneven, real, PacsConfig()))


def on_a_rank(rank, models, hows, mini_batches, ranks):
    found = []
    for how in hows:
        setting = replace(SETTING, **SPLITS[how])
        step = run_step(models, setting, SAMPLES, mini_batches, PacsConfig(), ranks=ranks, rank=rank)
        found.append({name: step[name] for name in ("gradients", "parameters", "losses")})
    return found


def test_two_ranks_share_every_group(models, expected):
    """Each rank has members of both groups of either mini-batch."""
    apart = [[0, 3, 1, 2, 4, 5], [6, 9, 10, 7, 8, 11]]
    for of_a_rank in run_on_ranks(2, on_a_rank, models, ["of 1", "dynamic, short"], apart, 2):
        for found in of_a_rank:
            assert_agrees(found, expected)


@in_float64
def test_the_first_update_is_rloo_with_weights(models):
    """REINFORCE with A = y - mean of the others; with weights n/(n-1) 1/(4 share of its class), a wrong answer's negative."""
    model = load(models / "policy")
    for class_weight in ("off", "question"):
        knobs = PacsConfig(class_weight=class_weight)
        model.zero_grad()
        sums = sums_of(model, SAMPLES, "log_ratio")
        objective = 0.0
        for sample, total in zip(SAMPLES, sums, strict=True):
            rewards = [s.outcome for s in SAMPLES if s.uid == sample.uid]
            n, y, p = len(rewards), sample.outcome, sum(rewards) / len(rewards)
            advantage = (n * y - sum(rewards)) / (n - 1)
            if class_weight == "question":
                advantage = n / (n - 1) * (1 / (4 * p) if y else -1 / (4 * (1 - p))) if 0 < p < 1 else 0.0
            objective = objective - advantage * total / len(SAMPLES)
        objective.backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        found = run_step(models, SETTING, SAMPLES, [list(range(12))], knobs, epochs=1)
        assert relative(found["gradients"][0], wanted) <= 1e-9


def test_a_torn_group_is_named(models):
    torn = [[0, 1, 3, 4, 5, 6], [2, 7, 8, 9, 10, 11]]
    with pytest.raises(RuntimeError, match="a mini-batch has 2 of the 3 responses to one prompt"):
        run_step(models, SETTING, SAMPLES, torn, PacsConfig())


def test_the_loss_and_the_estimator_raise_where_pacs_is_not_in_force():
    import numpy as np
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

    tensors = {"old_log_prob": torch.zeros(2, 2), "log_prob": torch.zeros(2, 2), "response_mask": torch.ones(2, 2)}
    with pytest.raises(RuntimeError, match="PACS's worker is not in force.*vimpo check"):
        get_policy_loss_fn("pacs")(**tensors, advantages=torch.zeros(2, 2), loss_agg_mode="token-mean", config=None)
    with pytest.raises(RuntimeError, match="PACS's trainer is not in force"):
        get_adv_estimator_fn("pacs")(torch.zeros(2, 2), torch.ones(2, 2), index=np.array(["a", "a"]))
