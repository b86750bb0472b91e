"""Claim: installing the package leaves the runs of others alone.

What Ray pickles of verl's programs can be pickled, with and without the package at the other end; verl's registry, trainers
and classes derived from them are what they were, unless VIMPO or reward noise is asked for; and where VIMPO is asked for and
another trainer runs, that trainer says so. That whole GRPO runs are the same bit for bit is in test_end_to_end.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray.cloudpickle
import verl
from test_validation import compose, validate, vimpo

ROOT = Path(__file__).parent.parent
VERL = Path(verl.__file__).parent
WRAPPED = ("validate_config", "need_reference_policy")


# ---- functions ---------------------------------------------------------------------------------------------------


def runners() -> list[str]:
    """Modules of verl with something decorated by ray.remote that start as `python -m`, or use what the package wraps."""
    found = []
    for path in sorted(VERL.rglob("*.py")):
        text = path.read_text()
        if "\n@ray.remote" in text and ("\n@hydra.main" in text or any(f"{name}(" in text for name in WRAPPED)):
            found.append(".".join(("verl", *path.relative_to(VERL).with_suffix("").parts)))
    return found


def pickle_runners(*arguments: str, **environment: str) -> str:
    command = [sys.executable, str(ROOT / "tests/pickle_runners.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pickled_runners(tmp_path_factory) -> Path:
    """The plugin is loaded."""
    folder = tmp_path_factory.mktemp("runners")
    pickle_runners("dump", *runners(), str(folder))
    return folder


@pytest.mark.parametrize("plugins", ["auto", "vimpo_cpu"])
def test_task_runners_are_pickled_and_take_what_stands_at_the_other_end(pickled_runners, plugins):
    """verl's own runners, by value: the one of one_step_off_policy uses both functions, in a method of __main__."""
    said = pickle_runners("load", str(pickled_runners), VERL_USE_EXTERNAL_PLUGINS=plugins)
    assert "foreign" not in said
    both = "need_reference_policy=own validate_config=own"
    for runner, used in {
        "verl.experimental.one_step_off_policy.main_ppo:OneStepTaskRunner": both,
        "verl.experimental.fully_async_policy.fully_async_main:FullyAsyncTaskRunner": "",
        "verl.experimental.fully_async_policy.fully_async_trainer:FullyAsyncTrainer": "need_reference_policy=own",
        "verl.trainer.main_ppo:TaskRunnerV1": "",
        "verl.trainer.main_ppo_v0:TaskRunner": both,
    }.items():
        assert f"{runner} {used}".strip() in said.splitlines()


def test_whoever_imported_a_function_before_the_plugin_has_the_new_one():
    """verl.utils takes validate_config by name before plugins are loaded."""
    import verl.utils
    import verl.utils.config

    assert verl.utils.validate_config is verl.utils.config.validate_config
    assert hasattr(verl.utils.validate_config, "__wrapped__")


def test_a_wrapped_function_keeps_name_signature_and_result(monkeypatch):
    import inspect
    import types

    from verl_patches.functions import wrap

    def verls(a, b=2):
        """Says."""
        return a, b

    module, user = types.ModuleType("module_of_verl"), types.ModuleType("module_of_a_user")
    module.verls = user.verls = user.under_another_name = verls
    verls.__module__, verls.__qualname__ = "module_of_verl", "verls"
    for each in (module, user):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    wrap(module, "verls", lambda function, *args, **kwargs: ("ours", function(*args, **kwargs)))
    assert module.verls is user.verls is not verls
    assert module.verls(1, b=3) == ("ours", (1, 3))
    assert module.verls.__doc__ == "Says." and inspect.signature(module.verls) == inspect.signature(verls)
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(module.verls)) is module.verls


def test_nothing_of_ours_is_a_proxy():
    """wrapt's proxies cannot be pickled; of wrapt, only the hooks on imports are used."""
    for folder in ("verl_patches", "vimpo_verl"):
        for path in (ROOT / folder).rglob("*.py"):
            used = {line.strip() for line in path.read_text().splitlines() if "wrapt." in line}
            assert all("wrapt.when_imported(" in line for line in used), path


# ---- trainers ----------------------------------------------------------------------------------------------------

MODES = {"sync": "PPOTrainerSync", "colocate_async": "PPOTrainerColocateAsync"}


@pytest.fixture
def stock(request):
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return TRAINER_REGISTRY[request.param]


@pytest.fixture
def no_initialisation(monkeypatch):
    """PPOTrainer.__init__ makes a replay buffer, which needs Ray."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    monkeypatch.setattr(PPOTrainer, "__init__", lambda self, config: setattr(self, "config", config))


def derive(trainer: type) -> type:
    """As a user does it, with what was found in the registry."""

    class OfAUser(trainer):
        def __init__(self, config):
            super().__init__(config)
            self.of_a_user = True

        def _compute_advantage(self, batch, metrics):
            metrics["of_a_user"] = 1.0
            return super()._compute_advantage(batch, metrics)

    return OfAUser


def test_verls_registry_and_trainers_are_verls():
    from verl.trainer.ppo.v1 import trainer_base

    names = {mode: trainer.__name__ for mode, trainer in trainer_base.TRAINER_REGISTRY.items()}
    assert names == {**MODES, "separate_async": "PPOTrainerSeparateAsync"}
    classes = {owner for trainer in trainer_base.TRAINER_REGISTRY.values() for owner in trainer.__mro__}
    ours = {
        f"{owner.__name__}.{name}"
        for owner in classes
        for name, value in vars(owner).items()
        if str(getattr(getattr(value, "__func__", value), "__module__", "")).startswith(("vimpo_verl", "verl_patches"))
    }
    assert ours == {"PPOTrainer.__new__"}


@pytest.mark.parametrize("stock", MODES, indirect=True)
@pytest.mark.parametrize("derived", [False, True])
def test_another_estimator_gets_the_very_class(stock, derived, no_initialisation):
    """verl's, or the user's with all that is the user's: not a subclass, so that not one method of ours is in it."""
    called = derive(stock) if derived else stock
    config = compose()
    for trainer in (called(config=config), called(config)):
        assert type(trainer) is called and trainer.config is config
        assert hasattr(trainer, "of_a_user") == derived


@pytest.mark.parametrize("stock", MODES, indirect=True)
def test_vimpo_is_put_in_front_of_a_derived_trainer(stock, no_initialisation, capsys):
    from verl_patches.checkpoints import CheckpointedTrainer
    from verl_patches.family_trainer import FamilyTrainer
    from verl_patches.one_pass import OnePassTrainer
    from verl_patches.trainer import VimpoTrainer
    from verl_patches.watchdog import WatchedTrainer

    called = derive(stock)
    config = vimpo()
    validate(config)
    capsys.readouterr()
    trainer = called(config=config)
    assert trainer.of_a_user and isinstance(trainer, called)
    ours = (WatchedTrainer, CheckpointedTrainer, OnePassTrainer, VimpoTrainer, FamilyTrainer)
    assert type(trainer).__mro__[1:7] == (*ours, called)
    (line,) = capsys.readouterr().out.splitlines()
    assert "VIMPO in force on verl" in line and type(trainer).__name__ in line
    assert "beta='auto'" in line and "lam=1.0" in line


@pytest.mark.parametrize("stock", MODES, indirect=True)
def test_a_derived_trainer_may_take_more_than_a_configuration(stock, no_initialisation):
    class OfAUser(stock):
        def __init__(self, name, config, size=1):
            super().__init__(config)
            self.name, self.size = name, size

    config = vimpo()
    validate(config)
    for asked in (compose(), config):
        trainer = OfAUser("a name", asked, size=2)
        assert (trainer.name, trainer.size) == ("a name", 2)
        assert (type(trainer) is OfAUser) == (asked is not config) and isinstance(trainer, OfAUser)


def test_a_trainer_is_copied_as_it_is(no_initialisation):
    """copy and pickle make an object without a configuration."""
    import copy

    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    config = vimpo()
    validate(config)
    for trainer in (PPOTrainerSync(compose()), PPOTrainerSync(config)):
        assert type(copy.copy(trainer)) is type(trainer)


def test_vimpo_says_which_method_of_a_derived_trainer_would_not_run(no_initialisation):
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class OfAUser(PPOTrainerSync):
        def _compute_ref_log_prob(self, batch, metrics):
            return batch

    assert type(OfAUser(compose())) is OfAUser
    with pytest.raises(TypeError, match="OfAUser._compute_ref_log_prob would never run"):
        OfAUser(vimpo())


def test_vimpo_says_whose_worker_it_would_replace(monkeypatch):
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from verl_patches.family_trainer import trainer_class
    from verl_patches.worker import VimpoActorRolloutRefWorker

    class WorkerOfAUser(ActorRolloutRefWorker):
        pass

    monkeypatch.setattr(PPOTrainer, "_init_resource_pool_mgr", lambda self: None)
    trainer = object.__new__(trainer_class(PPOTrainerSync, vimpo()))
    trainer.role_worker_mapping = {Role.ActorRolloutRef: ray.remote(ActorRolloutRefWorker)}
    trainer._init_resource_pool_mgr()
    assert trainer.role_worker_mapping[Role.ActorRolloutRef].__ray_actor_class__ is VimpoActorRolloutRefWorker
    trainer.role_worker_mapping = {Role.ActorRolloutRef: ray.remote(WorkerOfAUser)}
    with pytest.raises(RuntimeError, match="VimpoPPOTrainerSync has put WorkerOfAUser there"):
        trainer._init_resource_pool_mgr()


def test_grpo_steps_are_the_same_to_the_bit(models):
    """verl's trainer and worker, from the configuration to the weights, in processes with and without the plugin."""

    def run(plugins: str) -> dict:
        command = [sys.executable, str(ROOT / "tests/grpo_steps.py"), str(models)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "VERL_USE_EXTERNAL_PLUGINS": plugins}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    found, expected = run("auto"), run("vimpo_cpu")
    assert found.pop("plugin") and not expected.pop("plugin")
    assert found == expected
    registered, derived = found["registered"], found["derived"]
    assert (registered.pop("trainer"), derived.pop("trainer")) == ("PPOTrainerSync", "OfAUser")
    assert [step.pop("of_a_user") for step in derived["metrics"]] == [(1.0).hex()] * 2
    assert derived == registered and registered["worker"] == "verl.workers.engine_workers"
    assert registered["metrics"][0] != registered["metrics"][1] and len(registered["weights"]) > 10


# ---- VIMPO where it cannot be ------------------------------------------------------------------------------------

NOISE = "+algorithm.reward_noise.flip_prob=0.4"


def test_vimpo_is_not_in_force_without_validation(no_initialisation, capsys):
    """As where a main of one's own does not call validate_config: the workers would not have the knobs."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    with pytest.raises(RuntimeError, match="has not been validated. Call verl.utils.config.validate_config"):
        PPOTrainerSync(vimpo())
    assert "in force" not in capsys.readouterr().out


def older_trainer(name: str, config):
    """A trainer of verl that is none of v1's, up to its data loader."""
    from verl.trainer.ppo.utils import Role

    if name == "one_step_off_policy":
        from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer

        config.actor_rollout_ref.hybrid_engine = False
        return OneStepOffRayTrainer(config, None, {}, None)
    if name == "fully_async_policy":  # Ray makes an actor without arguments; its constructor wants more configuration
        from verl.experimental.fully_async_policy.fully_async_rollouter import FullyAsyncRollouter

        trainer = object.__new__(FullyAsyncRollouter.__ray_actor_class__)
        trainer.config, trainer.tokenizer, trainer.processor = config, None, None
        return trainer._create_dataloader(None, None, None, None)
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    class RayDAPOTrainer(RayPPOTrainer):
        """As a recipe has it: PRIME's makes its data loader by itself."""

        def _create_dataloader(self, *_):
            raise FileNotFoundError(self.config.data.train_files)

    trainer = RayDAPOTrainer if name == "recipe" else RayPPOTrainer
    return trainer(config, None, {Role.ActorRollout: None}, None)


OLDER = ("v0", "recipe", "one_step_off_policy", "fully_async_policy")


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize(
    "asked", [("algorithm.adv_estimator=vimpo",), (NOISE,), ("algorithm.adv_estimator=vimpo", NOISE)], ids=str
)
def test_a_trainer_without_vimpo_says_so(name, asked, capsys):
    config = compose(*asked)
    validate(config)
    with pytest.raises(RuntimeError, match="is none of verl's v1 trainers") as error:
        older_trainer(name, config)
    for key in asked:
        assert key.removeprefix("+").split(".flip")[0] in str(error.value)
    assert "in force" not in capsys.readouterr().out


def run_with(runner: str, config) -> None:
    """verl's run_ppo with a task runner, as the mains that bring one call it."""
    from verl.trainer import main_ppo
    from verl.trainer.main_ppo_v0 import BaseTaskRunner

    class DAPOTaskRunner(BaseTaskRunner):
        """As verl-recipe has it."""

    if runner == "recipe":
        main_ppo.run_ppo(config, task_runner_class=ray.remote(num_cpus=1)(DAPOTaskRunner))
    elif runner == "v0":
        from verl.trainer.main_ppo_v0 import TaskRunner

        main_ppo.run_ppo(config, TaskRunner)
    elif runner == "one_step_off_policy":
        from verl.experimental.one_step_off_policy.main_ppo import OneStepTaskRunner

        main_ppo.run_ppo(config, task_runner_class=OneStepTaskRunner)
    elif runner == "fully_async_policy":
        from verl.experimental.fully_async_policy.fully_async_main import FullyAsyncTaskRunner

        main_ppo.run_ppo(config, task_runner_class=FullyAsyncTaskRunner)
    else:
        main_ppo.run_ppo(config, task_runner_class=main_ppo.TaskRunnerV1)


@pytest.fixture
def no_ray(monkeypatch):
    """Starting Ray is what must not happen, or, for others, all that happens."""

    def init(**kwargs):
        raise ConnectionError("Ray would be started")

    monkeypatch.setattr(ray, "init", init)


@pytest.mark.parametrize("asked", ["algorithm.adv_estimator=vimpo", NOISE])
@pytest.mark.parametrize("runner", OLDER)
def test_a_main_with_another_runner_is_refused_before_ray_starts(runner, asked, no_ray):
    """Although no configuration has been validated, and trainer.use_v1 says the opposite."""
    with pytest.raises(RuntimeError, match="none of verl's v1 trainers") as error:
        run_with(runner, compose(asked, "trainer.use_v1=True"))
    assert asked.removeprefix("+").split(".flip")[0] in str(error.value)


@pytest.mark.parametrize("runner", [*OLDER, "v1"])
def test_a_main_with_another_estimator_starts_ray(runner, no_ray):
    with pytest.raises(ConnectionError):
        run_with(runner, compose())


def test_vimpo_with_the_v1_runner_starts_ray(no_ray):
    with pytest.raises(ConnectionError):
        run_with("v1", vimpo())


def test_a_runner_of_a_main_is_known_by_the_name_it_was_started_by(monkeypatch):
    """python -m verl.experimental.one_step_off_policy.main_ppo: its classes are those of __main__."""
    from types import ModuleType, SimpleNamespace

    from verl_patches.other_runners import _makes_another_trainer

    class Runner:
        """Of a main that was started with `python -m`."""

    Runner.__module__ = "__main__"
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for name, refused in (("verl.experimental.one_step_off_policy.main_ppo", True), ("recipe.mine.main", False)):
        main.__spec__ = SimpleNamespace(name=name)
        assert _makes_another_trainer(Runner) == refused


@pytest.mark.parametrize("name", OLDER)
def test_a_trainer_without_vimpo_makes_its_data_loader_for_others(name):
    config = compose("data.train_files=no_such_file.parquet")
    validate(config)
    with pytest.raises(Exception, match="no_such_file"):
        older_trainer(name, config)
