"""The policy as its own verifier: choosing among 8 answers by S = sum of td, and by mean log-prob, on the tiny task.

Trains the model of examples/one_file.py, then has two policies answer 512 held-out prompts 8 times each: the trained
one, and the start, which is the reference. The trained one ranks the answers of both. One thread; about twelve seconds
of processor time a run.

    python -m benchmarks.self_rank --json benchmarks/results/self_rank.json
"""

import copy
import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from one_file import RunningSums, Transformer, grpo_loss, imitate, train, vimpo_loss

from benchmarks import report
from benchmarks.learning.analysis import mean_interval
from benchmarks.learning.arms import grpo
from benchmarks.learning.settings import Setting
from vimpo_verl import functional as F
from vimpo_verl.batch import outcome_auc
from vimpo_verl.evaluation import majority, pass_at_k
from vimpo_verl.ranking import best_of_n, weighted_majority

TITLE = "The policy as its own verifier"
START_ACCURACY, BATCHES, LR, BETA, LARGE_BETA, KL_LOSS_COEF = 0.34, 60, 1e-3, 0.05, 0.2, 0.1
LOSSES = {
    "VIMPO": functools.partial(vimpo_loss, beta=BETA),
    f"VIMPO, beta {LARGE_BETA}": functools.partial(vimpo_loss, beta=LARGE_BETA),
    "GRPO": grpo_loss,
    f"GRPO, KL loss {KL_LOSS_COEF}": functools.partial(grpo, setting=Setting("grpo", coeff=KL_LOSS_COEF)),
}
N, PROMPTS, HELD_OUT_SEED = 8, 512, 777


def trained(start: Transformer, task: RunningSums, loss, flip_prob: float, seed: int) -> Transformer:
    policy = copy.deepcopy(start)
    train(policy, task, loss, batches=BATCHES, lr=LR, seed=seed, flip_prob=flip_prob)
    return policy


def answers_of(sampler: Transformer, task: RunningSums, seed: int) -> Tensor:
    """[PROMPTS * N, P + T], those to one prompt in a row."""
    prompts = task.prompts(PROMPTS, torch.Generator().manual_seed(HELD_OUT_SEED)).repeat_interleave(N, 0)
    torch.manual_seed(HELD_OUT_SEED + seed)
    return sampler.sample(prompts, task.response_tokens)[0]


@torch.no_grad()
def scores_of(policy: Transformer, reference: Transformer, task: RunningSums, sequences: Tensor) -> dict[str, Tensor]:
    """Each [PROMPTS * N]. All answers have as many tokens, so a mean ranks as a sum does."""
    (log_prob, logits), (ref_log_prob, ref_logits) = (
        model.score(sequences, task.response_tokens) for model in (policy, reference)
    )
    td = F.td_residual(log_prob, ref_log_prob, F.exact_kl(logits, ref_logits), torch.ones_like(log_prob), BETA)
    return {"S": td.sum(1), "log-ratio": (log_prob - ref_log_prob).sum(1), "mean log-prob": log_prob.mean(1)}


def figures(task: RunningSums, sequences: Tensor, scores: dict[str, Tensor]) -> dict[str, float | None]:
    """Means over the prompts, and the AUC over all pairs of a right and a wrong answer to one prompt."""
    prompts, responses = sequences[:, : task.prompt_tokens], sequences[:, task.prompt_tokens :]
    right = task.judge(prompts, responses)[0]
    answers = ["".join(map(str, digits)) for digits in responses.tolist()]

    def rows(values) -> list:
        return [values[i : i + N] for i in range(0, len(values), N)]

    questions = list(zip(rows(answers), rows(right.bool().tolist()), strict=True))
    found = {
        f"avg@{N}": right.mean().item(),
        f"pass@{N}": np.mean([pass_at_k(sum(verdicts), N, N) for _, verdicts in questions]),
        f"majority@{N}": np.mean([majority(*question) for question in questions]),
    }
    group = torch.arange(PROMPTS).repeat_interleave(N).tolist()
    for name, score in scores.items():
        ranked = list(zip(questions, rows(score.double().tolist()), strict=True))
        for label, choose in ((f"best-of-{N}", best_of_n), (f"weighted majority@{N}", weighted_majority)):
            found[f"{label} by {name}"] = np.mean([choose(*question, row) for question, row in ranked])
        found[f"AUC of {name}"] = outcome_auc(score, right, group)
    return {name: None if value is None else round(float(value), 4) for name, value in found.items()}


def over_seeds(rows: list[dict]) -> list[dict]:
    """One row a figure for each algorithm, noise and sampler: the mean over seeds with its bootstrap interval, and two
    differences, paired by seed."""
    pairs = {
        f"best-of-{N}: S minus mean log-prob": (f"best-of-{N} by S", f"best-of-{N} by mean log-prob"),
        f"weighted majority@{N} by S minus majority@{N}": (f"weighted majority@{N} by S", f"majority@{N}"),
    }
    keys = ("algorithm", "flip_prob", "answers of")
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), []).append(row)
    table = []
    for cell, members in cells.items():
        values = {name: [row[name] for row in members] for name in members[0] if name not in (*keys, "seed")}
        values |= {name: np.subtract(values[a], values[b]) for name, (a, b) in pairs.items()}
        for name, per_seed in values.items():
            known = np.array([value for value in per_seed if value is not None])
            if len(known):
                mean, low, high = (round(number, 4) for number in mean_interval(known))
                line = {"figure": name, "mean": mean, "low": low, "high": high, "seeds": len(known)}
                table.append(dict(zip(keys, cell, strict=True)) | line)
    return table


def main() -> None:
    args = report.arguments(__doc__, seeds=[1, 2, 3, 4, 5], flip_prob=[0.0, 0.2])
    torch.set_num_threads(1)
    task, rows = RunningSums(), []
    for seed in args.seeds:
        torch.manual_seed(seed)
        start = Transformer(vocabulary=task.vocabulary, positions=task.prompt_tokens + task.response_tokens)
        imitate(start, task, START_ACCURACY, seed)
        for flip_prob in args.flip_prob:
            for algorithm, loss in LOSSES.items():
                begin = time.process_time()
                policy = trained(start, task, loss, flip_prob, seed)
                for name, sampler in {"the policy": policy, "the start": start}.items():
                    sequences = answers_of(sampler, task, seed)
                    found = figures(task, sequences, scores_of(policy, start, task, sequences))
                    setting = {"algorithm": algorithm, "flip_prob": flip_prob, "answers of": name, "seed": seed}
                    rows.append(setting | found)
                    print(*rows[-1].values(), f"{time.process_time() - begin:.0f} s", flush=True)
                report.save(TITLE, rows, args.json, over_seeds=over_seeds(rows))
    report.show(TITLE, over_seeds(rows), None)


if __name__ == "__main__":
    main()
