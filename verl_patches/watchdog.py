"""Seam: a bound on how long a stage of training may take.

Touches PPOTrainer's methods init, fit and STAGES, by subclassing: VIMPO's trainers derive from WatchedTrainer. Checked against
verl 0.9.1; no upstream issue.

verl waits without a bound for answers, rewards and weight syncs: a reward that never returns is a run that stands still in
silence until somebody looks. Here a thread knows which stage the trainer is in, says so when a stage has taken a quarter of
the bound, and ends the run at the bound, with the stage's name and the stacks of the process that waits.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType

GRACE = 60.0  # seconds that the process has to end by itself once the bound is passed
SIGNAL = signal.SIGUSR2  # not SIGINT, which a shell makes its background processes ignore


class StageTimeout(RuntimeError):
    """A stage took longer than the bound."""


class Watchdog:
    """Watches the stages of the process's main thread.

    Args:
        bound: seconds that a stage may take; None for no bound.
        describe: stage -> what to add to the message: what it is waiting for, if that is known.
        grace: seconds from the bound to the end of the process, should the main thread not react.
    """

    def __init__(self, bound: float | None, describe: Callable[[str], str] = lambda stage: "", grace: float = GRACE):
        self.bound, self.describe, self.grace = bound, describe, grace
        self._stage: tuple[str, float] | None = None  # name, when it began
        self._verdict: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of the `with` block, in the main thread.

        Raises:
            StageTimeout: wherever the main thread is, when a stage passes the bound.
        """
        if self.bound is None:
            yield
            return
        done = threading.Event()
        previous = signal.signal(SIGNAL, _interrupt)
        threading.Thread(target=self._watch, args=(done,), daemon=True, name="watchdog").start()
        try:
            yield
        except BaseException:
            if self._verdict is None:
                raise
            raise StageTimeout(self._verdict) from None
        finally:
            done.set()
            signal.signal(SIGNAL, previous)

    def enter(self, stage: str | None) -> None:
        """The main thread begins a stage, or none that is watched."""
        self._stage = None if stage is None else (stage, time.monotonic())

    def _watch(self, done: threading.Event) -> None:
        warned = None
        while not done.wait(min(1.0, self.bound / 20)):
            stage = self._stage
            if stage is None:
                continue
            seconds = time.monotonic() - stage[1]
            if seconds >= self.bound:
                self._end(stage[0], seconds)
                return
            if seconds >= self.bound / 4 and warned != stage:
                warned = stage
                _say(f"{self._sentence(stage[0], seconds)}; the run will be ended at {self.bound:.0f} s")

    def _sentence(self, stage: str, seconds: float) -> str:
        return f"{stage} has been running for {seconds:.0f} s{self.describe(stage)}"

    def _end(self, stage: str, seconds: float) -> None:
        self._verdict = (
            f"{self._sentence(stage, seconds)}, more than algorithm.vimpo.stage_timeout={self.bound:g} allows: the run is "
            "ended. Above: where it waits"
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        _say(self._verdict)
        signal.pthread_kill(threading.main_thread().ident, SIGNAL)
        time.sleep(self.grace)
        _say(f"the process did not end within {self.grace:.0f} s of that: ending it")
        time.sleep(2.0)  # Ray passes a worker's output on to the driver a little later
        os._exit(1)


def _interrupt(signum, frame):
    raise KeyboardInterrupt  # the one exception that Ray's calls let through


def _say(sentence: str) -> None:
    print(f"vimpo_verl: {sentence}", file=sys.stderr, flush=True)


NOT_IN_EVERY_VERL = {"prepare_step"}  # new in 0.9.1; before, handing out prompts counts to what follows the weight sync
# Method of verl's v1 trainer -> the stage that it begins; and whether the stage goes on after the method.
STAGES = {
    "prepare_step": ("handing out prompts", False),
    "on_sample_begin": ("generation and rewards", True),
    "on_sample_end": ("putting the rollout to sleep", False),
    "_compute_old_log_prob": ("the joint pass", False),
    "_compute_advantage": ("the advantages", False),
    "_update_actor": ("the update", False),
    "_save_checkpoint": ("the checkpoint", False),
    "on_step_end": ("the weight sync", False),
    "_validate": ("validation", False),
}


def install(v1: ModuleType) -> None:
    """Check that verl's trainer has the stages. `v1` is the module verl.trainer.ppo.v1."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    missing = [
        name for name in ("init", "fit", *STAGES) if not hasattr(PPOTrainer, name) and name not in NOT_IN_EVERY_VERL
    ]
    if missing:
        raise RuntimeError(f"PPOTrainer has no {', '.join(missing)}")


class WatchedTrainer:
    """In front of a v1 trainer: tells the watchdog each stage that begins."""

    watchdog = Watchdog(None)

    def init(self) -> None:
        """As verl's, watched."""
        with self.watchdog.watching():
            self.watchdog.enter("start-up: workers, rollout, checkpoint")
            super().init()

    def fit(self, *args, **kwargs) -> None:
        """As verl's, watched."""
        with self.watchdog.watching():
            self.watchdog.enter("the start of training")
            super().fit(*args, **kwargs)
            self.watchdog.enter(None)


def _staged(method: str, stage: str, goes_on: bool) -> Callable:
    def enter_and_call(self, *args, **kwargs):
        self.watchdog.enter(f"step {self.global_steps}: {stage}")
        result = getattr(super(WatchedTrainer, self), method)(*args, **kwargs)
        if not goes_on:
            self.watchdog.enter(f"step {self.global_steps}: what follows {stage}")
        return result

    enter_and_call.__name__ = method
    return enter_and_call


for _method, (_stage, _goes_on) in STAGES.items():
    setattr(WatchedTrainer, _method, _staged(_method, _stage, _goes_on))
