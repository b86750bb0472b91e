"""Claim: a stage that passes the bound ends the run, with a message that names the stage; verl's stages are all watched."""

import inspect
import subprocess
import sys
import textwrap
import time

import pytest

from verl_patches.watchdog import STAGES, StageTimeout, Watchdog, WatchedTrainer


def test_a_stage_beyond_the_bound_is_ended_and_named(capfd):
    watchdog = Watchdog(0.4, lambda stage: ", waiting for 3 prompts")
    started = time.monotonic()
    with (
        pytest.raises(
            StageTimeout, match="step 7: generation has been running for 0 s, waiting for 3 prompts, more than"
        ),
        watchdog.watching(),
    ):
        watchdog.enter("step 7: generation")
        time.sleep(30)
    assert 0.4 <= time.monotonic() - started < 5
    said = capfd.readouterr().err
    assert "the run will be ended at 0 s" in said, "a warning before the end"
    assert "test_watchdog.py" in said, "the stack of the thread that waits"


def test_stages_within_the_bound_are_left_alone():
    watchdog = Watchdog(0.4)
    with watchdog.watching():
        for stage in range(8):
            watchdog.enter(str(stage))
            time.sleep(0.1)
        watchdog.enter(None)
        time.sleep(0.6)


def test_an_error_of_the_stage_is_the_error():
    watchdog = Watchdog(5)
    with pytest.raises(KeyError, match="lost"), watchdog.watching():
        watchdog.enter("update")
        raise KeyError("lost")


def test_without_a_bound_nothing_is_watched():
    with Watchdog(None).watching():
        pass


def test_a_process_that_does_not_react_is_ended():
    """Python runs signal handlers in the main thread only, which is deaf here."""
    program = """
        import signal, time
        from verl_patches.watchdog import SIGNAL, Watchdog
        watchdog = Watchdog(0.3, grace=0.3)
        with watchdog.watching():
            watchdog.enter("the weight sync")
            signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=40)
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
                from verl_patches.watchdog import Watchdog
                watchdog = Watchdog(1.0)
                with watchdog.watching():
                    watchdog.enter("step 2: the weight sync")
                    ray.get(hangs.remote())
        ray.get(Runner.remote().run.remote())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "StageTimeout" in done.stderr and "step 2: the weight sync has been running" in done.stderr


def test_every_stage_is_a_method_that_verl_calls():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = "".join(inspect.getsource(getattr(PPOTrainer, name)) for name in ("fit", "step", "_step_once"))
    for method in STAGES:
        assert f"self.{method}(" in source and callable(getattr(PPOTrainer, method))


class Verls:
    """A step in verl's order."""

    global_steps = 3

    def __init__(self):
        self.seen = []


for name in STAGES:
    setattr(Verls, name, lambda self, *args, name=name: self.seen.append((name, self.watchdog._stage[0])))


class Watched(WatchedTrainer, Verls):
    pass


@pytest.mark.parametrize("method", STAGES)
def test_the_stage_is_entered_before_verls_method_runs(method):
    trainer = Watched()
    trainer.watchdog = Watchdog(100)
    getattr(trainer, method)()
    stage, goes_on = STAGES[method]
    assert trainer.seen == [(method, f"step 3: {stage}")]
    assert trainer.watchdog._stage[0] == (f"step 3: {stage}" if goes_on else f"step 3: what follows {stage}")
