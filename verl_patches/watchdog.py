"""Seam: what happens when a stage of training stands still.

Touches PPOTrainer's methods init, fit and STAGES, by subclassing: the family's trainers derive from WatchedTrainer; and
reads ReplayBuffer's partitions and keys by status. Checked against verl 0.9.1; no upstream issue.

verl waits without a bound for answers, rewards and weight syncs: a reward that never returns is a run that stands still
in silence until somebody looks. Here a thread knows which stage the trainer is in and looks at what the driver can see
without asking anybody: prompts, answers and rewards in the replay buffer's own copy of their states, and the bytes of
the checkpoint that is being written. While nothing new comes it says so, after half an hour, an hour, two hours and so
on; at the stage's bound it ends the run, with the stage's name and the stacks of the process that waits.

Processor time is not looked at: a collective that hangs spins, and the driver does not see the other nodes.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from vimpo_verl.timeouts import KNOBS, Timeouts

AUTO_BOUND = 4 * 3600.0  # seconds, where a timeout is "auto" and the stage is one that does not take that long
FIRST_WARNING = 1800.0  # seconds without anything new, or a quarter of the bound where that is less
INTERVAL = 5.0  # seconds between two looks, or less where a bound is short
LONGEST_TICK = 10.0  # seconds between two looks that count: a process that was stopped has not waited
GRACE = 60.0  # seconds that the process has to end by itself once the bound is passed
SIGNAL = signal.SIGUSR2  # not SIGINT, which a shell makes its background processes ignore


class StageTimeout(RuntimeError):
    """A stage has stood still for longer than its bound."""


@dataclass(frozen=True)
class Stage:
    """A part of training that is watched.

    Attributes:
        name: as messages call it.
        knob: the timeout, of vimpo_verl.timeouts, that holds for it.
        auto_bound: seconds without anything new after which "auto" ends the run; None: it does not, because a healthy
            stage may take any time and shows the driver nothing.
        partition: of the replay buffer, whose prompts it waits for; None: no such wait.
        goes_on: whether it goes on after the method that begins it has returned.
    """

    name: str
    knob: str = "stage_timeout"
    auto_bound: float | None = None
    partition: str | None = None
    goes_on: bool = False


class StageClock:
    """How long a stage has been running, and for how long nothing new has come about in it; both in seconds."""

    def __init__(self, stage: Stage, bound: float | None):
        self.stage, self.bound = stage, bound
        self.running = self.still = 0.0
        self._seen: set | None = None
        self._first_warning = FIRST_WARNING if bound is None else min(FIRST_WARNING, bound / 4)
        self._next_warning = self._first_warning

    def tick(self, seconds: float, seen: AbstractSet) -> None:
        """Look at the stage; the first look counts no time, because the stage may just have begun.

        Args:
            seconds: since the last look.
            seen: all that has come about so far. What has been seen before may be missing: verl empties its copy of
                the states for a moment whenever it asks for them anew.
        """
        if self._seen is None:
            self._seen = set(seen)
            return
        self.running += seconds
        self.still += seconds
        if seen - self._seen:
            self._seen |= seen
            self.still, self._next_warning = 0.0, self._first_warning

    @property
    def is_over(self) -> bool:
        """Whether the bound is reached."""
        return self.bound is not None and self.still >= self.bound

    def warning_is_due(self) -> bool:
        """Whether to say something now: at the first warning's time, and whenever that has doubled."""
        if self.still < self._next_warning:
            return False
        self._next_warning *= 2
        return True


class Watchdog:
    """Watches the stages of one thread, which should be the process's main thread.

    Args:
        timeouts: knob -> seconds without anything new after which a stage ends the run; "auto", the stage's own bound;
            None or missing, no bound.
        observe: all that has come about so far. Called from another thread.
        describe: stage -> what to add to the message: what it is waiting for, if that is known. From that thread, too.
        grace: seconds from the bound to the end of the process, should the main thread not react.
        section: where the timeouts stand in verl's configuration.
    """

    def __init__(
        self,
        timeouts: Mapping[str, float | str | None],
        observe: Callable[[], AbstractSet] = frozenset,
        describe: Callable[[Stage], str] = lambda stage: "",
        grace: float = GRACE,
        section: str = "algorithm.vimpo",
    ):
        self.timeouts, self.observe, self.describe, self.grace = timeouts, observe, describe, grace
        self.section = section
        self._clock: StageClock | None = None
        self._verdict: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of the `with` block.

        Raises:
            StageTimeout: wherever the main thread is, when a stage passes its bound. Another thread cannot be
                interrupted: there the process ends.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        previous = signal.signal(SIGNAL, _interrupt) if in_main_thread else None
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done, in_main_thread), daemon=True, name="watchdog").start()
        try:
            yield
        except BaseException:
            if self._verdict is None:
                raise
            raise StageTimeout(self._verdict) from None
        finally:
            done.set()
            if in_main_thread:
                signal.signal(SIGNAL, previous or signal.SIG_DFL)

    def enter(self, stage: Stage | None) -> None:
        """The thread begins a stage, or none that is watched."""
        self._clock = None if stage is None else StageClock(stage, self._bound_of(stage))

    def _bound_of(self, stage: Stage) -> float | None:
        timeout = self.timeouts.get(stage.knob)
        return stage.auto_bound if timeout == "auto" else timeout

    def _watch(self, done: threading.Event, in_main_thread: bool) -> None:
        bounds = [timeout for timeout in self.timeouts.values() if isinstance(timeout, (int, float))]
        interval = min([INTERVAL, *(bound / 20 for bound in bounds)])
        last = time.monotonic()
        while not done.wait(interval):
            now = time.monotonic()
            seconds, last = min(now - last, LONGEST_TICK), now
            clock = self._clock
            if clock is None:
                continue
            clock.tick(seconds, self.observe())
            if clock.is_over:
                self._end(clock, in_main_thread)
            elif clock.warning_is_due():
                _say(f"{self._sentence(clock)}; {self._outlook(clock)}")

    def _sentence(self, clock: StageClock) -> str:
        news = "" if clock.still == clock.running else f", nothing new for {clock.still:.0f} s"
        return f"{clock.stage.name} has been running for {clock.running:.0f} s{self.describe(clock.stage)}{news}"

    def _outlook(self, clock: StageClock) -> str:
        if clock.bound is None:
            return f"the run is not ended for that ({self.section}.{clock.stage.knob}={self.timeouts.get(clock.stage.knob)})"
        return f"the run will be ended at {clock.bound:.0f} s without anything new ({self.section}.{clock.stage.knob})"

    def _end(self, clock: StageClock, in_main_thread: bool) -> None:
        knob, timeout = clock.stage.knob, self.timeouts[clock.stage.knob]
        allowed = f"auto ({clock.bound:g} s)" if timeout == "auto" else f"{timeout:g}"
        self._verdict = (
            f"{self._sentence(clock)}, more than {self.section}.{knob}={allowed} allows: the run is ended. Above: where it "
            "waits"
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        _say(self._verdict)
        if in_main_thread:
            signal.pthread_kill(threading.main_thread().ident, SIGNAL)
            time.sleep(self.grace)
            _say(f"the process did not end within {self.grace:.0f} s of that: ending it")
        else:
            _say("it waits in another thread than the main one, which alone can be interrupted: ending the process")
        time.sleep(2.0)  # Ray passes a worker's output on to the driver a little later
        os._exit(1)


def _interrupt(signum, frame):
    raise KeyboardInterrupt  # the one exception that Ray's calls let through


def _say(sentence: str) -> None:
    print(f"vimpo_verl: {sentence}", file=sys.stderr, flush=True)


START_UP = Stage("start-up: workers, rollout, checkpoint", "startup_timeout")
START_OF_TRAINING = Stage("the start of training", "startup_timeout")
CALLBACK = Stage("the checkpoint callback")  # the user's own; an upload may take any time
NOT_IN_EVERY_VERL = {"prepare_step"}  # new in 0.9.1; before, handing out prompts counts to what follows the weight sync
# Method of verl's v1 trainer -> the stage that it begins.
STAGES = {
    "prepare_step": Stage("handing out prompts"),
    "on_sample_begin": Stage("generation and rewards", auto_bound=AUTO_BOUND, partition="train", goes_on=True),
    "on_sample_end": Stage("putting the rollout to sleep", auto_bound=AUTO_BOUND),
    "_compute_old_log_prob": Stage("the joint pass"),
    "_compute_advantage": Stage("the advantages"),
    "_update_actor": Stage("the update"),
    "_save_checkpoint": Stage("the checkpoint", auto_bound=AUTO_BOUND),
    "on_step_end": Stage("the weight sync", auto_bound=AUTO_BOUND),
    "_validate": Stage("validation", "validation_timeout", auto_bound=AUTO_BOUND, partition="val"),
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
    """In front of a v1 trainer with `knobs` and `estimator`: tells the watchdog each stage that begins, and what is to see."""

    watchdog = Watchdog({})

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.watchdog = watchdog_of(
            self.knobs, self._come_about, self._waiting_for, section=f"algorithm.{self.estimator}"
        )

    def init(self) -> None:
        """As verl's, watched."""
        with self.watchdog.watching():
            self.watchdog.enter(START_UP)
            super().init()

    def fit(self, *args, **kwargs) -> None:
        """As verl's, watched."""
        with self.watchdog.watching():
            self.watchdog.enter(START_OF_TRAINING)
            super().fit(*args, **kwargs)
            self.watchdog.enter(None)

    def _run_checkpoint_callback(self, *args) -> None:
        self._enter(CALLBACK)
        super()._run_checkpoint_callback(*args)

    def _enter(self, stage: Stage) -> None:
        self.watchdog.enter(replace(stage, name=f"step {self.global_steps}: {stage.name}"))

    def _come_about(self) -> set:
        """Prompts by state, answers (which verl stores with their rewards) and files with their sizes."""
        buffer = self.replay_buffer
        found = set()
        for partition in ("train", "val"):  # copied at once: verl's thread changes them
            for state in ("running_keys", "finished_keys", "failure_keys"):
                found |= {(state, key) for key in set(getattr(buffer, state).get(partition, ()))}
            found |= set(buffer.partitions.get(partition, ()))
        if step := getattr(self, "global_steps", None):  # not before start-up's end
            found |= _file_sizes(Path(self.config.trainer.default_local_dir) / f"global_step_{step}")
        return found

    def _waiting_for(self, stage: Stage) -> str:
        buffer = self.replay_buffer
        waiting = sum(len(keys.get(stage.partition, ())) for keys in (buffer.pending_keys, buffer.running_keys))
        return f", waiting for the answers and rewards of {waiting} prompts" if waiting else ""


def watchdog_of(knobs: Timeouts, *functions: Callable, **options: str) -> Watchdog:
    """The watchdog of a configuration; `functions` are Watchdog's observe and describe, `options` its other arguments."""
    return Watchdog({name: getattr(knobs, name) for name in KNOBS}, *functions, **options)


def _file_sizes(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            with contextlib.suppress(OSError):  # renamed or removed meanwhile
                found.add((path, os.stat(path).st_size))
    return found


def _staged(method: str, stage: Stage) -> Callable:
    def enter_and_call(self, *args, **kwargs):
        self._enter(stage)
        result = getattr(super(WatchedTrainer, self), method)(*args, **kwargs)
        if not stage.goes_on:
            self._enter(Stage(f"what follows {stage.name}"))
        return result

    enter_and_call.__name__ = method
    return enter_and_call


for _method, _stage in STAGES.items():
    setattr(WatchedTrainer, _method, _staged(_method, _stage))
