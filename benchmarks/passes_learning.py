"""Does VIMPO learn as well with statistics of the batch before (algorithm.vimpo.passes=one) as with the batch's own?

The plain loop of examples/one_file.py (running sums, 0.1 million parameters), with the package's own functions: two passes is
vimpo_verl.batch.compute_batch before the update, one pass is batch.compute_targets and vimpo_verl.one_pass in the update. The
same start, prompts and random numbers for all arms of a seed; with the default's trust factor, which is 0 where the policy's
judgement of a batch does not follow its outcomes, and without it, where every batch has its actor loss.

Reported: the share of right answers over the last ten batches of a run, for each seed; the lowest share of a batch after the
tenth, where a collapse shows; the share of batches that had an actor loss; and, over what one pass whitens with, the spread of a
batch's raw advantages over that of the batch before: of the third batch, which is the first to have one, and the smallest and
largest from the tenth on.

    OMP_NUM_THREADS=1 python benchmarks/passes_learning.py --seeds 1 2 3 4 5 --json benchmarks/results/passes_learning.json
    python benchmarks/passes_learning.py --trained benchmarks/results/passes_learning.json      (the table of what is there)
"""

import copy
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from one_file import Rollout, RunningSums, Transformer, imitate, ppo_loss, train
from report import arguments, show, signed, spread
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl import one_pass
from vimpo_verl.batch import compute_batch, compute_targets
from vimpo_verl.compare.statistics import mean_interval
from vimpo_verl.config import VimpoConfig

LAM = 1.0


class Loss:
    """A run's loss: L_V + c_A * L_A, one update a batch.

    Args:
        config: the knobs, beta a number.
        passes: "two" or "one".
    """

    def __init__(self, config: VimpoConfig, passes: str):
        self.config, self.passes, self.before = config, passes, None
        self.coeffs: list[float] = []  # c_A, a batch
        self.spreads: list[float] = []  # the raw advantages' standard deviation, a batch

    def __call__(self, rollout: Rollout, log_prob: Tensor, logits: Tensor) -> Tensor:
        token_kl = F.exact_kl(logits.detach(), rollout.ref_logits)
        advantages, target, coeff = (self._two if self.passes == "two" else self._one)(rollout, log_prob, token_kl)
        self.coeffs.append(float(coeff))
        loss = F.value_loss(log_prob, rollout.ref_log_prob, token_kl, target, rollout.mask, self.config.beta).mean()
        return loss + coeff * ppo_loss(rollout, log_prob, advantages) if coeff else loss

    def _two(self, rollout: Rollout, log_prob: Tensor, token_kl: Tensor) -> tuple[Tensor, Tensor, float]:
        batch = compute_batch(
            old_log_prob=log_prob.detach(), ref_log_prob=rollout.ref_log_prob, token_kl=token_kl, lam=LAM,
            response_mask=rollout.mask, outcome=rollout.outcome, group=rollout.group, config=self.config,
        )  # fmt: skip
        self.spreads.append(batch.metrics["vimpo/advantage_std"])
        return batch.advantages, batch.returns[:, 0], batch.actor_coeff  # every token of this task is valid

    def _one(self, rollout: Rollout, log_prob: Tensor, token_kl: Tensor) -> tuple[Tensor, Tensor, float]:
        batch = compute_targets(
            response_mask=rollout.mask, outcome=rollout.outcome, group=rollout.group, config=self.config,
            before=self.before,
        )  # fmt: skip
        known = self.before is not None and self.before.says_something
        before = (self.before.advantage_mean, self.before.advantage_std) if known else None
        found = one_pass.advantages(
            log_prob, rollout.ref_log_prob, token_kl, rollout.mask, config=self.config, beta=self.config.beta, lam=LAM,
            before=before,
        )  # fmt: skip
        target = batch.returns[:, 0]
        sums = one_pass.sequence_sums(
            found, rollout.mask, group=torch.tensor(rollout.group), is_real=torch.ones(len(rollout.mask)),
            outcome=rollout.outcome, target=target, token_kl=token_kl, entropy=torch.zeros_like(token_kl),
        )  # fmt: skip
        metrics = one_pass.metrics(one_pass.cat([sums]), self.config, self.config.beta, before)
        self.before = one_pass.Statistics.of_metrics(metrics)
        self.spreads.append(self.before.advantage_std)
        return found.whitened, target, batch.actor_coeff


def arms(alphas: list[float]) -> dict[str, Callable[[], Loss]]:
    """Name -> what makes the loss of a run."""
    found = {"value loss alone": lambda: Loss(VimpoConfig(beta=0.05, use_actor=False), "two")}
    for trust, alpha, passes in product((True, False), alphas, ("two", "one")):
        config = VimpoConfig(beta=0.05, actor_alpha=alpha, actor_trust=trust)
        name = f"alpha {alpha:g}{'' if trust else ' without trust'}, {passes}"
        found[name] = lambda config=config, passes=passes: Loss(config, passes)
    return found


def summary(curve: list[float], loss: Loss) -> dict:
    """What is kept of a run. The first batch's policy is the reference, so the spread of the second is over nothing."""
    growth = [now / before for before, now in zip(loss.spreads[1:], loss.spreads[2:], strict=False)]
    steady = growth[7:]  # of the tenth batch and later
    return {
        "curve": curve,
        "batches with an actor loss": mean(coeff > 0 for coeff in loss.coeffs),
        "spread of batch 3 to 2": growth[0],
        "later": [min(steady), max(steady)],
    }


def row(arm: str, runs: dict[str, list[dict]]) -> dict:
    ends = [end(run) for run in runs[arm]]
    return {
        "arm": arm,
        "share of right answers": mean(ends),
        "of each seed": " ".join(f"{share:.2f}" for share in ends),
        "to two passes": to_two_passes(arm, runs),
        "lowest after batch 10": min(min(run["curve"][10:]) for run in runs[arm]),
        "batches with an actor loss": mean(run["batches with an actor loss"] for run in runs[arm]),
        "spread of batch 3 to 2": spread(run["spread of batch 3 to 2"] for run in runs[arm]),
        "later": spread(ratio for run in runs[arm] for ratio in run["later"]),
    }


def end(run: dict) -> float:
    return mean(run["curve"][-10:])


def to_two_passes(arm: str, runs: dict[str, list[dict]]) -> str | None:
    """Mean difference of a seed's two runs, and its 95 % interval."""
    other = f"{arm.removesuffix(', one')}, two"
    if not arm.endswith(", one") or len(runs[arm]) < 2:
        return None
    differences = [end(one) - end(two) for one, two in zip(runs[arm], runs[other], strict=True)]
    found = mean_interval(differences, 0.95)
    return signed(found.value, found.half_width)


def train_all(seeds: list[int], alphas: list[float], batches: int, lr: float) -> dict[str, list[dict]]:
    """Arm -> its run of each seed."""
    runs: dict[str, list[dict]] = {name: [] for name in arms(alphas)}
    for seed in seeds:
        torch.manual_seed(seed)
        task, start = RunningSums(), Transformer(vocabulary=11, positions=21)
        imitate(start, task, accuracy=0.34, seed=seed)
        for name, make in arms(alphas).items():
            policy, loss = copy.deepcopy(start), make()
            curve = train(policy, task, loss, batches=batches, lr=lr, seed=seed)
            runs[name].append(summary(curve, loss))
            print(seed, name, f"{end(runs[name][-1]):.3f}", flush=True)
    return runs


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], seeds=[1, 2, 3, 4, 5], alphas=[0.1, 0.3, 1.0], batches=60, lr=1e-3, trained=""
    )
    if options.trained:
        runs = json.loads(Path(options.trained).read_text())["runs"]
    else:
        runs = train_all(options.seeds, options.alphas, options.batches, options.lr)
    show("One pass against two on running sums", [row(arm, runs) for arm in runs], options.json, runs=runs)


if __name__ == "__main__":
    main()
