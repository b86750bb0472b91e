"""What defines a run: a frozen setting, with a name made of what differs from the centre."""

from dataclasses import dataclass, fields

LABELS = {
    "rloo": "RLOO",
    "kl_in_reward": "KL in the reward",
    "vimpo_paper": "VIMPO, paper's constants",
    "pacs": "PACS",
    "v05": "V0.5",
}


@dataclass(frozen=True)
class Setting:
    """One run. The defaults are the study's centre; grids.py varies them one axis at a time.

    Attributes:
        arm: a name of arms.ARMS.
        lr: learning rate.
        coeff: what ties the arm to the reference: GRPO's kl_loss_coef; for VIMPO and for the KL in the reward beta * T.
        alpha: the push of VIMPO's actor loss (actor_alpha); 0 trains with the value loss alone.
        trust: what multiplies c_A: "none", or "batch" for max(0, correlation).
        kappa: the policy that kappa belongs to, "current" or "old".
        form: of VIMPO's value loss: the paper's "regression", or "clipped", its gradient through PPO's clipped ratio. The
            same for one update a batch.
        model: "one_file", the transformer of examples/one_file.py, or "qwen3", the quickstart's.
        task, tokens, decisions: the task and its size; decisions is needles' K, and path_star's number of arms.
        batches, updates, staleness: batches sampled, optimiser steps on each, and how many batches old they are.
        prompts, responses: of a batch.
        flip_prob, flip_kind: share of flipped rewards, of whole "group"s or of single "response"s.
        seed: of the initial weights, prompts, flips and sampling. Prompts and flips are the same for every arm.
    """

    arm: str
    lr: float = 1e-3
    coeff: float = 0.0
    alpha: float = 0.0
    trust: str = "batch"
    kappa: str = "current"
    form: str = "regression"
    model: str = "one_file"
    task: str = "running_sums"
    tokens: int = 10
    decisions: int = 4
    batches: int = 80
    updates: int = 1
    staleness: int = 0
    prompts: int = 32
    responses: int = 8
    flip_prob: float = 0.0
    flip_kind: str = "group"
    seed: int = 1

    def __post_init__(self):
        if self.form == "clipped" and self.alpha > 0:
            raise ValueError("the clipped value loss has no actor loss beside it here: alpha must be 0")

    @property
    def name(self) -> str:
        """The same for the same setting, on any machine."""
        differing = [f for f in fields(self) if f.name != "arm" and getattr(self, f.name) != f.default]
        return "-".join([self.arm, *(f"{f.name}={getattr(self, f.name):g}" if isinstance(getattr(self, f.name), float)
                                     else f"{f.name}={getattr(self, f.name)}" for f in differing)])  # fmt: skip

    @property
    def label(self) -> str:
        """The arm, as tables and pictures call it."""
        if self.arm == "grpo":
            return "GRPO, KL loss" if self.coeff > 0 else "GRPO"
        if self.arm != "vimpo":
            return LABELS.get(self.arm, self.arm)
        if self.alpha > 0:
            return f"VIMPO, actor {self.alpha:g}"
        value_loss = "VIMPO, clipped" if self.form == "clipped" else "VIMPO, value loss"
        return f"{value_loss}, old kappa" if self.kappa == "old" else value_loss

    @property
    def trial(self) -> str:
        """What is tuned of an arm: learning rate, tie to the reference, updates a batch."""
        parts = [f"{self.lr:g}"]
        parts += [f"tie {self.coeff:g}"] if self.coeff > 0 else []
        parts += [f"{self.updates} updates"] if self.updates > 1 else []
        return ", ".join(parts)

    @property
    def point(self) -> str:
        """What differs from the centre beside arm, trial and seed: where on an axis it is."""
        tuned = ("arm", "lr", "coeff", "alpha", "trust", "kappa", "form", "model", "seed")
        moved = [f for f in fields(self) if f.name not in tuned and getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in moved) or "the centre"
