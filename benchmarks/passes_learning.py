"""Does VIMPO learn as well with statistics of the batch before (algorithm.vimpo.passes=one) as with the batch's own?

The plain loop of examples/one_file.py (running sums, 0.1 million parameters), with the package's own functions: two passes is
vimpo_verl.batch.compute_batch before the update, one pass is batch.compute_targets and vimpo_verl.one_pass in the update. The
same start, prompts and random numbers for all arms of a seed. Reported: the share of right answers over the last ten batches
of a run, for each seed, and the lowest share of a batch after the tenth, where a collapse shows.

    OMP_NUM_THREADS=1 python benchmarks/passes_learning.py --seeds 1 2 3 4 5 --json benchmarks/results/passes_learning.json
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from one_file import Rollout, RunningSums, Transformer, imitate, ppo_loss, train
from report import arguments, show
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl import one_pass
from vimpo_verl.batch import compute_batch, compute_targets
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

    def __call__(self, rollout: Rollout, log_prob: Tensor, logits: Tensor) -> Tensor:
        token_kl = F.exact_kl(logits.detach(), rollout.ref_logits)
        advantages, target, coeff = (self._two if self.passes == "two" else self._one)(rollout, log_prob, token_kl)
        loss = F.value_loss(log_prob, rollout.ref_log_prob, token_kl, target, rollout.mask, self.config.beta).mean()
        return loss + coeff * ppo_loss(rollout, log_prob, advantages) if coeff else loss

    def _two(self, rollout: Rollout, log_prob: Tensor, token_kl: Tensor) -> tuple[Tensor, Tensor, float]:
        batch = compute_batch(
            old_log_prob=log_prob.detach(), ref_log_prob=rollout.ref_log_prob, token_kl=token_kl, lam=LAM,
            response_mask=rollout.mask, outcome=rollout.outcome, group=rollout.group, config=self.config,
        )  # fmt: skip
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
        return found.whitened, target, batch.actor_coeff


def arms(alphas: list[float]) -> dict[str, Callable[[], Loss]]:
    """Name -> what makes the loss of a run."""
    found = {"value loss alone": lambda: Loss(VimpoConfig(beta=0.05, use_actor=False), "two")}
    for alpha in alphas:
        for passes in ("two", "one"):
            config = VimpoConfig(beta=0.05, actor_alpha=alpha)
            found[f"alpha {alpha:g}, {passes}"] = lambda config=config, passes=passes: Loss(config, passes)
    return found


def main() -> None:
    options = arguments(__doc__.splitlines()[0], seeds=[1, 2, 3, 4, 5], alphas=[0.1, 0.3, 1.0], batches=60, lr=1e-3)
    curves: dict[str, list[list[float]]] = {name: [] for name in arms(options.alphas)}
    for seed in options.seeds:
        torch.manual_seed(seed)
        task, start = RunningSums(), Transformer(vocabulary=11, positions=21)
        imitate(start, task, accuracy=0.34, seed=seed)
        for name, loss in arms(options.alphas).items():
            policy = copy.deepcopy(start)
            curves[name].append(train(policy, task, loss(), batches=options.batches, lr=options.lr, seed=seed))
            print(seed, name, f"{mean(curves[name][-1][-10:]):.3f}", flush=True)
    rows = [
        {
            "arm": name,
            "share of right answers": mean(mean(curve[-10:]) for curve in found),
            "of each seed": " ".join(f"{mean(curve[-10:]):.2f}" for curve in found),
            "lowest after batch 10": min(min(curve[10:]) for curve in found),
        }
        for name, found in curves.items()
    ]
    show("One pass against two on running sums", rows, options.json, curves=curves)


if __name__ == "__main__":
    main()
