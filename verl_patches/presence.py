"""Seam: a process of the run that has not loaded this package is named at its start, before the first rollout.

Touches OmegaConf's resolvers (registration), and uses Ray. Checked against verl 0.9.1; no upstream issue.

verl's plugins are loaded in each process from its own environment, and an environment without this package runs nothing of it:
not on a node where it was not installed, nor where `uv run` starts the workers in a project that does not have it. Two things
work there all the same. What the driver puts into the configuration has to be resolved by verl's task runner, first of all: it
names the policy loss through a resolver that only the plugin registers, and OmegaConf's error is its name. And the trainer asks
Ray's nodes before it makes workers there.
"""

from types import ModuleType

from vimpo_verl import __version__

# What the error of a process without the plugin says: "Unsupported interpolation type ...".
RESOLVER = "vimpo_verl_is_missing_in_the_environment_of_this_process"
SECONDS = 600  # for a node to answer; `uv run` may make an environment first
WITH_WORKERS = ("GPU", "NPU")  # resources of Ray's nodes on which verl makes workers


def install(omegaconf: ModuleType) -> None:
    """Register the resolver, which gives back what it is given."""
    omegaconf.OmegaConf.register_new_resolver(RESOLVER, lambda target: target, replace=True)


def where_the_plugin_is(target: str) -> str:
    """A value for a configuration: `target` where the plugin is loaded, an error with RESOLVER's name elsewhere."""
    return f"${{{RESOLVER}:{target}}}"


def require_on_every_node() -> None:
    """Ask each node of the Ray cluster that verl makes workers on for this package, in the environment of the run's workers.

    Raises:
        RuntimeError: naming the nodes that lack it, or have another version.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def find():  # inside a function, so that Ray sends its code and not the name of a module that may not be there
        try:
            import vimpo_verl
        except ImportError:
            return None
        return vimpo_verl.__version__

    nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in nodes if any(node["Resources"].get(name) for name in WITH_WORKERS)] or nodes
    asked = {}
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[ray.remote(num_cpus=0)(find).options(scheduling_strategy=where).remote()] = node["NodeManagerAddress"]
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
    if silent:  # a node whose environment takes that long is left to Ray, which says what is wrong with it
        print(
            f"vimpo_verl: no answer within {SECONDS} s from {', '.join(asked[answer] for answer in silent)}", flush=True
        )
    found = {asked[answer]: ray.get(answer) for answer in answered}
    wrong = {address: version for address, version in found.items() if version != __version__}
    if wrong:
        lines = "\n".join(
            f"  {address}: {'vimpo_verl ' + version if version else 'no vimpo_verl'}"
            for address, version in wrong.items()
        )
        raise RuntimeError(
            f"the trainer runs with vimpo_verl {__version__}, but the environment of the workers on these nodes has another:\n"
            f"{lines}\nInstall it there, in the Python that Ray starts workers with, and run `vimpo check` in it. With `uv run`: "
            "in the project's environment (docs/install.md)"
        )
