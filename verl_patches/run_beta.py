"""The beta of a run: a number that was given, or measured over the first batch, then kept in every checkpoint. No seam:
VIMPO's trainer calls it.
"""

import sys
from dataclasses import replace
from pathlib import Path

from vimpo_verl import beta as betas
from vimpo_verl.beta import Beta
from vimpo_verl.config import VimpoConfig


class RunBeta:
    """The number that every update of a run uses.

    Args:
        knobs: VIMPO's configuration.

    Attributes:
        found: the number; None until the first batch of a run with `beta: auto`.
    """

    def __init__(self, knobs: VimpoConfig):
        self.knobs = knobs
        self.found = None if knobs.beta == "auto" else Beta(knobs.beta)

    @property
    def config(self) -> VimpoConfig:
        """The knobs for the next batch; their beta is "auto" where that batch is the one to measure."""
        return replace(self.knobs, beta=self.found.value) if self.found else self.knobs

    def fix(self, measured: Beta, step: int) -> None:
        """Keep what a batch was measured to have, unless there is a number already."""
        if self.found:
            return
        self.found = measured
        print(
            f"vimpo_verl: step {step}: algorithm.vimpo.beta=auto is beta={measured.value:.6g} for this run, from a mean "
            f"length of {measured.mean_length:.6g} tokens and rewards that differ by up to {measured.reward_range:.6g} "
            f"(beta_scale={measured.beta_scale:g})",
            flush=True,
        )
        if not measured.range_is_known:
            _say(
                f"step {step}: all rewards of the batch that algorithm.vimpo.beta=auto is measured over are equal: rewards of "
                "0 and 1 are assumed. With others, write a number for algorithm.vimpo.beta"
            )

    def save(self, folder: Path) -> None:
        """Put the number into a checkpoint that is being written, global_step_N."""
        if self.found:
            betas.save(self.found, folder)

    def restore(self, folder: Path) -> None:
        """Go on with the number of a checkpoint, global_step_N, unless another one is given.

        Raises:
            ValueError: the checkpoint's file cannot be read.
        """
        kept = betas.load(folder)
        if self.knobs.beta != "auto":
            if kept and kept.value != self.knobs.beta:
                _say(
                    f"algorithm.vimpo.beta={self.knobs.beta:g} is used as given; up to the checkpoint {folder} it was "
                    f"{kept.value:.6g}"
                )
        elif kept is None:
            _say(
                f"the checkpoint {folder} has no {betas.STATE}: algorithm.vimpo.beta=auto is measured anew over the first "
                "batch. An earlier version's default was 5e-4: to keep that, write +algorithm.vimpo.beta=5e-4"
            )
        else:
            self.found = kept
            print(f"vimpo_verl: beta={kept.value:.6g}, as in the checkpoint {folder}", flush=True)
            if kept.beta_scale not in (None, self.knobs.beta_scale):
                _say(
                    f"algorithm.vimpo.beta_scale={self.knobs.beta_scale:g} changes nothing in a run that is resumed: its beta "
                    f"was measured with {kept.beta_scale:g}. For another beta write a number for algorithm.vimpo.beta"
                )


def _say(sentence: str) -> None:
    print(f"vimpo_verl: {sentence}", file=sys.stderr, flush=True)
