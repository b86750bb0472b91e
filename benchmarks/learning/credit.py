"""How good is the credit? td and advantages of a trained policy against the exact advantage of every token.

    python -m benchmarks.learning.credit                # trains, measures, writes benchmarks/learning/results/credit.json

For VIMPO's policies and, with the same formulas, for those of its rivals: log-ratios exist for any policy and reference. It
answers the objection that log-ratios trained through their sum only leave the credit of a token weakly identified
(arXiv 2604.13197).
"""

import argparse
import json
from dataclasses import asdict, replace

import numpy as np
import torch
from one_file import collect
from torch import Tensor

from benchmarks.learning.analysis import RESULTS, mean_interval
from benchmarks.learning.grids import chosen
from benchmarks.learning.run import make_task, start_policy, trained
from benchmarks.learning.settings import Setting
from vimpo_verl import functional as F
from vimpo_verl.batch import outcome_auc

PROMPTS, RESPONSES = 256, 8
SEEDS = range(1, 6)
ARMS = ("GRPO", "KL in the reward", "VIMPO, value loss", "VIMPO, actor 0.1")
CONDITIONS = ("qwen3_clean", "qwen3_noise_20")  # each arm at its best trial there, 80 batches


def measure(setting: Setting) -> dict[str, float]:
    """Train a policy and compare the credit that it implies with the exact one, on fresh prompts.

    Returns:
        accuracy: share of right answers among those looked at.
        td_correlation, td_auc: of td with the exact advantage over all tokens; the AUC is that of td ranking tokens that
            lose value (exact advantage below -0.05) under those that do not.
        advantage_correlation: of A_t with lam = 1.
        summed_td_auc: of S = sum_t td_t ranking right answers above wrong ones of the same prompt.
        first_wrong: share of wrong answers whose lowest td is at the first wrong token.
        first_wrong_single: the same where only one token does not follow from the one before it.
        value_correlation, value_error: of the implied value after each token, V0 + sum_{k<=t} td_k with V0 the exact value
            of the prompt, with the exact value; the error is the root of the mean square.
        value_error_of_prompt: the same error for V0 alone, which knows nothing of the answer.
    """
    task = make_task(setting)
    policy, reference = trained(setting)[0], start_policy(setting)
    generator = torch.Generator().manual_seed(77)
    torch.manual_seed(77)
    rollout = collect(policy, reference, task, generator, prompts=PROMPTS, responses=RESPONSES)
    beta = (setting.coeff or 0.5) / task.response_tokens
    with torch.no_grad():
        log_prob, logits = policy.score(rollout.sequences, task.response_tokens)
    td = F.td_residual(log_prob, rollout.ref_log_prob, F.exact_kl(logits, rollout.ref_logits), rollout.mask, beta)
    exact = task.advantages(policy, rollout)
    wrong = rollout.truth == 0
    lowest = td.argmin(1)
    first, single = task.first_wrong(rollout)
    value = rollout.truth.unsqueeze(1) - exact.flip(1).cumsum(1).flip(1)  # V(s_t): what is left to lose or gain
    after = value + exact
    implied = value[:, :1] + td.cumsum(1)
    found = (lowest == first)[wrong].float()
    return {
        "accuracy": rollout.truth.mean().item(),
        "td_correlation": _correlation(td, exact),
        "td_auc": _auc(td.flatten(), exact.flatten() >= -0.05),
        "advantage_correlation": _correlation(F.implied_advantages(td, rollout.mask, 1.0), exact),
        "summed_td_auc": outcome_auc(td.sum(1), rollout.truth, rollout.group),
        "first_wrong": found.mean().item(),
        "first_wrong_single": found[single[wrong]].mean().item(),
        "value_correlation": _correlation(implied, after),
        "value_error": (implied - after).square().mean().sqrt().item(),
        "value_error_of_prompt": (value[:, :1] - after).square().mean().sqrt().item(),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def _auc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive has the higher score; by ranks."""
    ranks = score.double().argsort().argsort().double()
    count = positive.sum().item()
    above = ranks[positive].sum().item() - count * (count - 1) / 2
    return above / (count * (len(score) - count)) if 0 < count < len(score) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = []
    for condition in CONDITIONS:
        best = chosen(condition)
        if not best:
            parser.error(f"each arm's best trial is that of tune_{condition}: run that grid to its end first")
        for arm in ARMS:
            setting = replace(best[arm], batches=80)
            runs = [measure(replace(setting, seed=seed)) for seed in SEEDS]
            summary = {name: mean_interval(np.array([run[name] for run in runs])) for name in runs[0]}
            rows.append({"name": setting.name, "setting": asdict(setting), "seeds": list(SEEDS), "runs": runs})
            print(setting.name)
            for name, (mean, low, high) in summary.items():
                print(f"    {name:24} {mean:.3f} ({low:.3f} to {high:.3f})", flush=True)
            (RESULTS / "credit.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
