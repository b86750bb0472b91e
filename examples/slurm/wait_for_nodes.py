"""Wait until as many nodes as are named have joined a Ray cluster with their GPUs, saying who has and who has not.

They are counted, because Slurm's name of a node need not be its host name; names are for the messages. Exit status 0
when all have, 1 when they have not in time. With --timeout 0 it looks once. With --watch it looks, once they have joined,
until Ray misses one of them, prints "lost: NAME" and ends with status 3.
"""

import argparse
import time

import ray

LOST = 3


def short(name: str) -> str:
    """A host's name without its domain, which Slurm leaves out and Ray may not."""
    return name.split(".")[0]


def joined(address: str, gpus_per_node: int) -> set[str] | None:
    """Short names of the nodes of the cluster that are alive and have their GPUs; None where no cluster answers."""
    try:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        nodes = ray.nodes()
    except Exception as error:  # Ray raises many kinds while a head is starting or going down
        print(f"no cluster at {address}: {type(error).__name__}: {error}", flush=True)
        return None
    return {
        short(node["NodeManagerHostname"])
        for node in nodes
        if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus_per_node
    }


def missing_from(here: set[str], expected: list[str]) -> str:
    """Names, separated by spaces."""
    return " ".join(name for name in expected if short(name) not in here)


def wait(address: str, expected: list[str], gpus_per_node: int, timeout: float) -> bool:
    """Whether all of `expected` have joined within `timeout` seconds; prints every change."""
    deadline, before = time.monotonic() + timeout, None
    while True:
        here = joined(address, gpus_per_node) or set()
        missing = missing_from(here, expected)
        if here != before:
            there = " ".join(sorted(here)) or "none"
            print(
                f"{len(here)} of {len(expected)} nodes have joined: {there}; missing: {missing or 'none'}", flush=True
            )
        if len(here) >= len(expected):
            return True
        if time.monotonic() >= deadline:
            exclude = missing.replace(" ", ",")
            print(f"gave up on {missing}: leave them out with sbatch --exclude={exclude}", flush=True)
            return False
        before = here
        time.sleep(2)


def watch(address: str, expected: list[str], gpus_per_node: int) -> str:
    """Name of a lost node, once Ray has given one up. No answer is no loss: the head's own end is seen by its srun."""
    while True:
        here = joined(address, gpus_per_node)
        if here is not None and len(here) < len(expected):
            return missing_from(here, expected)
        time.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--timeout", type=float, help="seconds")
    task.add_argument("--watch", action="store_true", help="nodes that have joined, until one is lost")
    parser.add_argument("nodes", nargs="+", help="host names as Slurm knows them")
    args = parser.parse_args()
    if args.watch:
        print(f"lost: {watch(args.address, args.nodes, args.gpus_per_node)}", flush=True)
        raise SystemExit(LOST)
    raise SystemExit(0 if wait(args.address, args.nodes, args.gpus_per_node, args.timeout) else 1)


if __name__ == "__main__":
    main()
