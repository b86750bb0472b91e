"""What Ray does with the task runners of verl: `pickle_runners.py dump MODULE... FOLDER` and, in another process, `load FOLDER`.

`dump` runs each module under the name __main__, as `python -m` does, with Hydra not starting its main, and writes a file
"MODULE:NAME" for every class or function of it that is decorated with ray.remote. `load` reads them, and prints for each which
of the functions of verl that the package wraps it uses, and whether what it got is this process's own.
"""

import runpy
import sys
from pathlib import Path

import hydra
import ray.cloudpickle
from ray.actor import ActorClass
from ray.remote_function import RemoteFunction

WRAPPED = {"validate_config": "verl.utils.config", "need_reference_policy": "verl.trainer.ppo.utils"}


def remote_things(module: str) -> dict[str, type]:
    """Name -> what Ray pickles, for what a module itself defines."""
    found = {}
    for name, value in runpy.run_module(module, run_name="__main__").items():
        if isinstance(value, ActorClass):
            found[name] = value.__ray_metadata__.modified_class
        elif isinstance(value, RemoteFunction):
            found[name] = value._function
    return {name: thing for name, thing in found.items() if thing.__module__ == "__main__"}


def dump(modules: list[str], folder: Path) -> None:
    hydra.main = lambda **_: lambda main: lambda: None
    for module in modules:
        for name, thing in remote_things(module).items():
            (folder / f"{module}:{name}").write_bytes(ray.cloudpickle.dumps(thing))


def load(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        thing = ray.cloudpickle.loads(path.read_bytes())
        functions = [f for c in thing.__mro__ for f in vars(c).values()] if isinstance(thing, type) else [thing]
        used = {
            f"{name}={'own' if f.__globals__[name] is getattr(sys.modules[module], name) else 'foreign'}"
            for f in functions
            for name, module in WRAPPED.items()
            if name in getattr(getattr(f, "__code__", None), "co_names", ()) and name in f.__globals__
        }
        print(path.name, *sorted(used))


if __name__ == "__main__":
    action, *modules, folder = sys.argv[1:]
    dump(modules, Path(folder)) if action == "dump" else load(Path(folder))
