"""The reference refreshed from the policy: a copy shard by shard, and its place in a checkpoint. No seam: the worker calls it.

Policy and reference are sharded alike by verl's FSDP engine (same model, ranks and wrapping), so every rank copies its own shard
and nothing is gathered; the reference may be in host memory, as verl keeps a model that is not trained. A reference that has been
refreshed is on no disk but a checkpoint's: a file a rank beside the policy's, actor/reference_world_size_W_rank_R.pt.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def copy_weights(policy: Any, reference: Any) -> None:
    """Give the reference the policy's weights and buffers, on every rank its shard.

    Args:
        policy, reference: the modules of verl's FSDP engines.

    Raises:
        RuntimeError: the two are not sharded alike, naming what differs.
    """
    source, target = dict(_shards(policy)), dict(_shards(reference))
    different = sorted(
        name
        for name in source.keys() | target.keys()
        if getattr(source.get(name), "shape", None) != getattr(target.get(name), "shape", None)
    )
    if different:
        raise RuntimeError(
            f"algorithm.vimpo.ref_refresh_every: policy and reference are not sharded alike ({len(different)} tensors, such as "
            f"{different[0]}), so the reference cannot be refreshed; give both the same fsdp_config"
        )
    for name, shard in target.items():
        shard.copy_(source[name])


def save(reference: Any, folder: Path) -> None:
    """Write this rank's shard of the reference into a checkpoint's folder of the actor."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: shard.cpu().clone() for name, shard in _shards(reference)}, folder / _file_name())


@torch.no_grad()
def load(reference: Any, folder: Path) -> bool:
    """Give the reference the weights of a checkpoint, where it has some.

    Args:
        reference: the module of verl's FSDP engine.
        folder: the checkpoint's folder of the actor.

    Returns:
        Whether it has.

    Raises:
        RuntimeError: they were saved by another number of ranks, or are of another model.
    """
    path = folder / _file_name()
    if not path.exists():
        others = sorted(other.name for other in folder.glob("reference_world_size_*.pt"))
        if others:
            raise RuntimeError(
                f"{folder} has the refreshed reference of another number of ranks: {others[0]}, no {path.name}"
            )
        return False
    found, target = torch.load(path, map_location="cpu", weights_only=True), dict(_shards(reference))
    if {name: shard.shape for name, shard in found.items()} != {name: shard.shape for name, shard in target.items()}:
        raise RuntimeError(f"{path} holds the reference of another model")
    for name, shard in target.items():
        shard.copy_(found[name])
    return True


def _shards(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and this rank's part of each parameter and buffer."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        data = tensor.detach()
        yield name, data.to_local() if hasattr(data, "to_local") else data


def _file_name() -> str:
    return f"reference_world_size_{torch.distributed.get_world_size()}_rank_{torch.distributed.get_rank()}.pt"
