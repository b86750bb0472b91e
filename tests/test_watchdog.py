"""Claim: a stage that stands still is said, again and again, and at its bound the run is ended and the stage named.

What goes on is left alone, however long it takes. verl's stages are all watched; validation and start-up have bounds of
their own.
"""

import inspect
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl_patches import watchdog as module
from verl_patches.watchdog import (
    AUTO_BOUND,
    CALLBACK,
    KNOBS,
    LONGEST_TICK,
    STAGES,
    START_OF_TRAINING,
    START_UP,
    Stage,
    StageClock,
    StageTimeout,
    Watchdog,
    WatchedTrainer,
    watchdog_of,
)
from vimpo_verl.config import VimpoConfig

MINUTE, HOUR = 60, 3600
FOR_EVER = 1e6  # seconds of grace: these tests' own process is not to be ended


def looks(clock: StageClock, hours: float, seen=lambda minute: set()):
    """Looks at it every minute: the minutes of the warnings, and that of the end or None."""
    warned = []
    clock.tick(0, seen(0))
    for minute in range(1, int(hours * 60) + 1):
        clock.tick(MINUTE, seen(minute))
        if clock.is_over:
            return warned, minute
        if clock.warning_is_due():
            warned.append(minute)
    return warned, None


def test_a_stage_that_stands_still_is_said_at_growing_intervals():
    assert looks(StageClock(Stage("update"), None), hours=20) == ([30, 60, 120, 240, 480, 960], None)
    assert looks(StageClock(Stage("sync"), AUTO_BOUND), hours=20) == ([30, 60, 120], 240)
    assert looks(StageClock(Stage("sync"), 20 * MINUTE), hours=20) == ([5, 10], 20)


def test_the_first_look_counts_no_time():
    """The stage may have begun just before it, and the look before have been long ago."""
    clock = StageClock(Stage("update"), MINUTE)
    clock.tick(HOUR, {"answer"})
    assert (clock.running, clock.still, clock.is_over) == (0, 0, False)


def test_a_long_validation_goes_on_as_long_as_answers_come():
    """Ten hours, an answer every hour, with a bound of two."""
    clock = StageClock(Stage("validation"), 2 * HOUR)
    warned, end = looks(clock, hours=10, seen=lambda minute: {f"answer {minute // 60}"})
    assert end is None and clock.running == 10 * HOUR
    assert warned[:3] == [30, 90, 150], "one in every pause"
    assert looks(clock, hours=10, seen=lambda minute: {"answer 10"})[1] == 120, "and no longer than that"


def test_only_what_has_never_been_there_is_new():
    """verl's copy of the states is empty while it asks for them, and prompts that are evicted leave it."""
    states = [{"a", "b"}, set(), {"a"}, {"a", "b"}]
    clock = StageClock(Stage("generation"), HOUR)
    assert looks(clock, hours=5, seen=lambda minute: states[minute % 4])[1] == 60


def test_a_stage_beyond_the_bound_is_ended_and_named(capfd):
    watchdog = Watchdog({"stage_timeout": 0.4}, describe=lambda stage: ", waiting for 3 prompts", grace=FOR_EVER)
    started = time.monotonic()
    message = "generation has been running for 0 s, waiting for 3 prompts, more than algorithm.vimpo.stage_timeout=0.4"
    with pytest.raises(StageTimeout, match=f"step 7: {message}"), watchdog.watching():
        watchdog.enter(Stage("step 7: generation"))
        time.sleep(30)
    assert 0.4 <= time.monotonic() - started < 5
    said = capfd.readouterr().err
    assert said.count("the run will be ended at 0 s without anything new") == 2, "warnings before the end"
    assert "test_watchdog.py" in said, "the stack of the thread that waits"


def test_stages_within_the_bound_are_left_alone():
    watchdog = Watchdog({"stage_timeout": 0.4}, grace=FOR_EVER)
    with watchdog.watching():
        for stage in range(8):
            watchdog.enter(Stage(str(stage)))
            time.sleep(0.1)
        watchdog.enter(None)
        time.sleep(0.6)


def test_a_stage_in_which_something_moves_is_left_alone():
    began = time.monotonic()
    watchdog = Watchdog({"stage_timeout": 0.5}, observe=lambda: {int(5 * (time.monotonic() - began))}, grace=FOR_EVER)
    with watchdog.watching():
        watchdog.enter(Stage("validation"))
        time.sleep(1.5)


def test_start_up_and_validation_have_bounds_of_their_own():
    watchdog = Watchdog({"stage_timeout": 0.2, "validation_timeout": None, "startup_timeout": 60.0}, grace=FOR_EVER)
    with watchdog.watching():
        for stage in (START_UP, START_OF_TRAINING, STAGES["_validate"]):
            watchdog.enter(stage)
            time.sleep(0.4)
    with pytest.raises(StageTimeout, match="the update"), watchdog.watching():
        watchdog.enter(STAGES["_update_actor"])
        time.sleep(30)


def test_an_error_of_the_stage_is_the_error():
    watchdog = Watchdog({"stage_timeout": 5})
    with pytest.raises(KeyError, match="lost"), watchdog.watching():
        watchdog.enter(Stage("update"))
        raise KeyError("lost")


def test_without_a_bound_a_stage_is_only_warned_of(monkeypatch, capfd):
    monkeypatch.setattr(module, "FIRST_WARNING", 0.1)
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    watchdog = watchdog_of(VimpoConfig(stage_timeout=None))
    with watchdog.watching():
        watchdog.enter(Stage("step 3: the weight sync", auto_bound=0.2))
        time.sleep(1.0)
    said = capfd.readouterr().err
    assert "the run is not ended for that (algorithm.vimpo.stage_timeout=None)" in said
    assert 2 <= said.count("step 3: the weight sync has been running for") <= 4, "0.1, 0.2, 0.4 and 0.8 s"


def test_auto_ends_what_can_only_be_dead():
    """And no stage that shows the driver nothing and may take any time."""
    watchdog = watchdog_of(VimpoConfig())
    stages = (START_UP, START_OF_TRAINING, CALLBACK, *STAGES.values())
    bounds = {stage.name: watchdog._bound_of(stage) for stage in stages}
    assert {name for name, bound in bounds.items() if bound} == {
        "generation and rewards", "putting the rollout to sleep", "the checkpoint", "the weight sync", "validation",
    }  # fmt: skip
    assert set(bounds.values()) == {AUTO_BOUND, None} and AUTO_BOUND == 4 * HOUR
    for page in ("vimpo_verl/timeouts.py", "docs/configuration.md", "docs/reliability.md"):
        assert "four hours" in (Path(__file__).parent.parent / page).read_text(), page


def test_a_number_holds_for_every_stage():
    watchdog = watchdog_of(VimpoConfig(stage_timeout=1.0, validation_timeout=2.0, startup_timeout=3.0))
    assert {watchdog._bound_of(stage) for stage in (START_UP, START_OF_TRAINING)} == {3.0}
    assert watchdog._bound_of(STAGES["_validate"]) == 2.0
    others = [stage for method, stage in STAGES.items() if method != "_validate"]
    assert {watchdog._bound_of(stage) for stage in (CALLBACK, *others)} == {1.0}
    assert set(KNOBS) == {field.name for field in fields(VimpoConfig) if field.name.endswith("_timeout")}


def run_program(program: str, timeout: float = 40) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


IN_A_THREAD = """
    import threading, time
    from verl_patches.watchdog import Stage, Watchdog
    def train():
        watchdog = Watchdog({"stage_timeout": 0.4})
        with watchdog.watching():
            watchdog.enter(Stage("the weight sync"))
            time.sleep(SECONDS)
            print("trained")
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
"""


def test_outside_the_main_thread():
    done = run_program(IN_A_THREAD.replace("SECONDS", "0.2"))
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    done = run_program(IN_A_THREAD.replace("SECONDS", "60"))
    assert done.returncode == 1 and not done.stdout
    assert "the weight sync has been running" in done.stderr and "in train" in done.stderr, "stage and stack"
    assert "the run will be ended at" in done.stderr, "warned of before"


def test_a_process_that_was_stopped_has_not_waited():
    """As a scheduler does that suspends a job: the clock goes on meanwhile."""
    program = """
        import os, time
        from verl_patches import watchdog as module
        module.LONGEST_TICK = 0.1
        watchdog = module.Watchdog({"stage_timeout": 1.0}, grace=0.1)
        with watchdog.watching():
            watchdog.enter(module.Stage("update"))
            print("ready", flush=True)
            time.sleep(0.3)  # from here on stopped
            time.sleep(0.2)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 0, process.stderr.read().decode()
    assert LONGEST_TICK <= 10


def test_a_process_that_does_not_react_is_ended():
    """Python runs signal handlers in the main thread only, which is deaf here."""
    program = """
        import signal, time
        from verl_patches.watchdog import SIGNAL, Stage, Watchdog
        watchdog = Watchdog({"stage_timeout": 0.3}, grace=0.3)
        with watchdog.watching():
            watchdog.enter(Stage("the weight sync"))
            signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
            time.sleep(60)
    """
    done = run_program(program)
    assert done.returncode == 1
    assert "the weight sync has been running" in done.stderr and "did not end within" in done.stderr


def test_a_wait_inside_ray_is_ended():
    """ray.get, where verl's driver waits for its workers; in a Ray actor, as verl's TaskRunner is."""
    program = """
        import ray, time
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        @ray.remote(num_cpus=1)
        def hangs():
            time.sleep(1000)
        @ray.remote(num_cpus=1)
        class Runner:
            def run(self):
                from verl_patches.watchdog import Stage, Watchdog
                watchdog = Watchdog({"stage_timeout": 1.0})
                with watchdog.watching():
                    watchdog.enter(Stage("step 2: the weight sync"))
                    ray.get(hangs.remote())
        ray.get(Runner.remote().run.remote())
    """
    done = run_program(program, timeout=90)
    assert done.returncode == 1
    assert "StageTimeout" in done.stderr and "step 2: the weight sync has been running" in done.stderr


def test_every_stage_is_a_method_that_verl_calls():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = "".join(inspect.getsource(getattr(PPOTrainer, name)) for name in ("fit", "step", "_step_once"))
    for method in STAGES:
        assert f"self.{method}(" in source and callable(getattr(PPOTrainer, method))


class Verls:
    """A step in verl's order."""

    def __init__(self, config=None):
        self.seen, self.knobs, self.global_steps = [], VimpoConfig(), 3

    def _run_checkpoint_callback(self, *args):
        self.seen.append(("_run_checkpoint_callback", self.watchdog._clock.stage.name))


for name in STAGES:
    setattr(Verls, name, lambda self, *args, name=name: self.seen.append((name, self.watchdog._clock.stage.name)))


class Watched(WatchedTrainer, Verls):
    estimator = "vimpo"


@pytest.mark.parametrize("method", STAGES)
def test_the_stage_is_entered_before_verls_method_runs(method):
    trainer = Watched(None)
    getattr(trainer, method)()
    stage = STAGES[method]
    assert trainer.seen == [(method, f"step 3: {stage.name}")]
    entered = trainer.watchdog._clock
    assert entered.stage.name == (f"step 3: {stage.name}" if stage.goes_on else f"step 3: what follows {stage.name}")
    assert entered.bound == (stage.auto_bound if stage.goes_on else None)


def test_the_checkpoint_callback_is_a_stage_of_its_own():
    """An upload of the user's, which may take longer than the checkpoint's files."""
    trainer = Watched(None)
    trainer._run_checkpoint_callback("held")
    assert trainer.seen == [("_run_checkpoint_callback", "step 3: the checkpoint callback")]
    assert trainer.watchdog._clock.bound is None


@pytest.fixture
def trainer(tmp_path):
    """With verl's own replay buffer."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    trainer = Watched(None)
    trainer.replay_buffer = ReplayBuffer("sync", {}, 1, "drop", {})
    trainer.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(tmp_path)))
    return trainer


@pytest.mark.parametrize("partition", ["train", "val"])
def test_what_the_driver_sees_of_generation(trainer, monkeypatch, partition):
    """Each prompt that begins or ends and each answer; through verl's own reading of the states."""
    import transfer_queue

    stored, seen = {}, set()
    monkeypatch.setattr(transfer_queue, "kv_list", lambda: {partition: stored})
    for key, tag, news, waiting in (
        ("uid", {"is_prompt": True, "status": "pending"}, 0, 1),
        ("uid", {"is_prompt": True, "status": "running"}, 1, 1),
        ("uid_0_0", {"status": "success"}, 1, 1),
        ("uid_1_0", {"status": "success"}, 1, 1),
        ("uid_1_0", {"status": "success"}, 0, 1),
        ("uid", {"is_prompt": True, "status": "finished"}, 1, 0),
    ):
        stored[key] = {"global_steps": 3, **tag}
        trainer.replay_buffer._sync_metadata_from_transfer_queue()
        found = trainer._come_about()
        assert len(found - seen) == news
        seen |= found
        said = trainer._waiting_for(Stage("any", partition=partition))
        assert said == (", waiting for the answers and rewards of 1 prompts" if waiting else "")
        assert trainer._waiting_for(STAGES["_update_actor"]) == ""


def test_what_the_driver_sees_of_a_checkpoint(trainer, tmp_path):
    assert trainer._come_about() == set()
    shard = tmp_path / "global_step_3/actor/model.pt"
    shard.parent.mkdir(parents=True)
    seen = set()
    for size in (1, 10, 100):
        shard.write_bytes(b"x" * size)
        assert trainer._come_about() - seen == {(str(shard), size)}
        seen |= trainer._come_about()
    del trainer.global_steps  # as before start-up's end
    assert trainer._come_about() == set()
