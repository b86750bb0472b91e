"""How near is one batch's update to the gradient of what is wanted? Cosines of the arms' gradients to the exact one.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.gradients   # adds what is missing of results/gradients.json
    python -m benchmarks.learning.gradients --table             # the tables of docs/study.md

The exact gradient is that of the expected reward without noise, which a batch of all answers would give: only one answer is
right, so it is the gradient of that answer's probability. At policies on the way of two arms, with each arm's best trial.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import torch
from one_file import collect
from torch import Tensor

from benchmarks import report
from benchmarks.learning.analysis import RESULTS, cell, mean_interval, paired_difference
from benchmarks.learning.arms import ARMS
from benchmarks.learning.grids import chosen
from benchmarks.learning.run import make_task, start_policy, trained
from benchmarks.learning.settings import Setting

CONDITIONS = {"qwen3_clean": "Without noise", "qwen3_noise_20": "A fifth of the groups flipped"}
PATHS = ("GRPO", "VIMPO, value loss")  # whose policies
AFTER = (5, 20, 80)  # batches
COMPARED = ("GRPO", "GRPO, KL loss", "RLOO", "KL in the reward", "VIMPO, value loss", "VIMPO, actor 0.1", "oracle")
SEEDS = range(1, 6)
BATCHES = 32
PROMPTS, CHUNK = 4096, 512  # of the exact gradient
FILE = RESULTS / "gradients.json"


def exact_gradient(policy: torch.nn.Module, task) -> Tensor:
    """[parameters], of minus the expected reward."""
    policy.zero_grad()
    for prompts in task.prompts(PROMPTS, torch.Generator().manual_seed(78)).split(CHUNK):
        log_prob, _ = policy.score(torch.cat([prompts, task.answers(prompts)], 1), task.response_tokens)
        (-log_prob.sum(1).exp().sum() / PROMPTS).backward()
    return _flat(policy)


def batch_gradients(policy: torch.nn.Module, settings: dict[str, Setting], seed: int) -> Iterator[dict[str, Tensor]]:
    """For each of BATCHES batches, arm -> [parameters], the gradient of its loss: of the same batch for every arm."""
    task, reference = make_task(settings["GRPO"]), start_policy(settings["GRPO"])
    generator = torch.Generator().manual_seed(5000 + seed)
    torch.manual_seed(5000 + seed)
    for _ in range(BATCHES):
        flip_prob = settings["GRPO"].flip_prob
        rollout = collect(policy, reference, task, generator, flip_prob=flip_prob)
        rollout.exact_advantages = task.advantages(policy, rollout)
        found = {}
        for label, setting in settings.items():
            policy.zero_grad()
            ARMS[setting.arm](
                rollout, *policy.score(rollout.sequences, task.response_tokens), setting=setting
            ).backward()
            found[label] = _flat(policy)
        yield found


def measure(path: Setting, settings: dict[str, Setting]) -> dict[str, float]:
    """Arm -> cosine of a batch's gradient to the exact one, mean over the batches, at the policy that `path` ends with."""
    settings = {label: replace(setting, seed=path.seed) for label, setting in settings.items()}
    policy = trained(path)[0]
    exact = exact_gradient(policy, make_task(path))
    cosines = {label: [] for label in settings}
    for found in batch_gradients(policy, settings, path.seed):
        for label, gradient in found.items():
            cosines[label].append(torch.nn.functional.cosine_similarity(gradient, exact, dim=0).item())
    return {label: sum(values) / len(values) for label, values in cosines.items()}


def _flat(policy: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).double()


def rows(done: list[dict]) -> Iterator[dict]:
    """A row a policy, of those that are missing."""
    there = {(row["condition"], row["path"], row["after"], row["setting"]["seed"]) for row in done}
    for condition, path, after, seed in product(CONDITIONS, PATHS, AFTER, SEEDS):
        if (condition, path, after, seed) in there:
            continue
        best = chosen(condition)
        setting = replace(best[path], batches=after, seed=seed)
        cosines = measure(setting, {label: best[label] for label in COMPARED})
        yield {"condition": condition, "path": path, "after": after, "setting": asdict(setting), "cosines": cosines}


def table(found: list[dict], condition: str) -> str:
    """Arms by policies: cosine, mean over the seeds and bootstrap interval."""
    return _by_policy(
        COMPARED, lambda *point: cell(mean_interval(np.array(list(_by_seed(found, condition, *point).values()))))
    )


def nearer(found: list[dict], condition: str, reference: str = "VIMPO, value loss") -> str:
    """Arms by policies: how much greater the cosine of the arm `reference` is, paired by seed."""

    def difference(path: str, after: int, label: str) -> str:
        of_arm, of_reference = (_by_seed(found, condition, path, after, name) for name in (label, reference))
        return cell(paired_difference(of_arm, of_reference, float), sign=True)

    return _by_policy([label for label in COMPARED if label != reference], difference)


def _by_seed(found: list[dict], condition: str, path: str, after: int, label: str) -> dict[int, float]:
    return {
        row["setting"]["seed"]: row["cosines"][label]
        for row in found
        if (row["condition"], row["path"], row["after"]) == (condition, path, after)
    }


def _by_policy(labels: Iterable[str], of: Callable[[str, int, str], str]) -> str:
    points = list(product(PATHS, AFTER))
    heads = ["arm", *(f"{path}, {after}" for path, after in points)]
    return report.markdown(heads, [[label, *(of(path, after, label) for path, after in points)] for label in labels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="of the results that there are")
    found = json.loads(FILE.read_text()) if FILE.exists() else []
    if parser.parse_args().table:
        for condition, title in CONDITIONS.items():
            print(
                f"\n{title}:\n\n{table(found, condition)}\n\nVIMPO's value loss is nearer by:\n\n{nearer(found, condition)}"
            )
        return
    for row in rows(found):
        found.append(row)
        print(row["condition"], row["path"], row["after"], row["setting"]["seed"], row["cosines"], flush=True)
        FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
