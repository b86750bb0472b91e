"""Wait until as many nodes as are named have joined a Ray cluster with their GPUs, saying who has and who has not.

They are counted, because Slurm's name of a node need not be its host name; names are for the messages. Exit status 0
when all have, 1 when they have not in time. With --timeout 0 it looks once.
"""

import argparse
import time

import ray


def short(name: str) -> str:
    """A host's name without its domain, which Slurm leaves out and Ray may not."""
    return name.split(".")[0]


def joined(address: str, gpus_per_node: int) -> set[str]:
    """Short names of the nodes of the cluster that are alive and have their GPUs; none while there is no cluster."""
    try:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        nodes = ray.nodes()
    except Exception as error:  # Ray raises many kinds while a head is starting or going down
        print(f"no cluster at {address} yet: {type(error).__name__}: {error}", flush=True)
        return set()
    return {
        short(node["NodeManagerHostname"])
        for node in nodes
        if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus_per_node
    }


def wait(address: str, expected: list[str], gpus_per_node: int, timeout: float) -> bool:
    """Whether all of `expected` have joined within `timeout` seconds; prints every change."""
    deadline, before = time.monotonic() + timeout, None
    while True:
        here = joined(address, gpus_per_node)
        missing = [name for name in expected if short(name) not in here]
        if here != before:
            there, not_there = " ".join(sorted(here)) or "none", " ".join(missing) or "none"
            print(f"{len(here)} of {len(expected)} nodes have joined: {there}; missing: {not_there}", flush=True)
        if len(here) >= len(expected):
            return True
        if time.monotonic() >= deadline:
            print(
                f"gave up on {' '.join(missing)}: leave them out with sbatch --exclude={','.join(missing)}", flush=True
            )
            return False
        before = here
        time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True, help="seconds")
    parser.add_argument("nodes", nargs="+", help="host names as Slurm knows them")
    args = parser.parse_args()
    raise SystemExit(0 if wait(args.address, args.nodes, args.gpus_per_node, args.timeout) else 1)


if __name__ == "__main__":
    main()
