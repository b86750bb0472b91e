"""Peak memory of a piece of code, from tensors.

On a GPU the allocator knows. On a CPU nothing does, so a dispatch mode adds up the storages that operators create and
that are still alive; what an operator allocates and frees inside itself is not seen.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of storages made inside the block and still alive.

    Args:
        large_elements: what `large` counts; None, nothing.
        last_dimension: count the bytes of tensors alone that have this size there when they are made, such as logits.

    Attributes:
        live: bytes alive now.
        peak: the largest `live` so far.
        large: shapes of tensors of at least `large_elements` elements made inside the block -> how many.
    """

    def __init__(self, large_elements: int | None = None, last_dimension: int | None = None):
        super().__init__()
        self.last_dimension = last_dimension
        self.live = self.peak = 0
        self.large: dict[tuple[int, ...], int] = {}
        self.large_elements = large_elements
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in _plain_tensors((args, kwargs)):
            self._count(tensor, new=False)  # made outside the block, unless it is known: views of it are not new
        result = function(*args, **(kwargs or {}))
        for tensor in _plain_tensors(result):
            self._count(tensor, new=True)
        return result

    def _count(self, tensor: torch.Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        counted = size if new and self._is_counted(tensor) else 0
        self.live += counted
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, counted)
        if new and self.large_elements and tensor.numel() >= self.large_elements:
            shape = tuple(tensor.shape)
            self.large[shape] = self.large.get(shape, 0) + 1

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return self.last_dimension is None or tensor.shape[-1:] == (self.last_dimension,)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _plain_tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in `tree` with a storage of their own: of a nested or a sharded one its parts, because its own says a size and
    holds nothing."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            if is_traceable_wrapper_subclass(leaf):
                names, _ = leaf.__tensor_flatten__()
                yield from _plain_tensors([getattr(leaf, name) for name in names])
            else:
                yield leaf


def extra_bytes(function: Callable[[], Any], device: str) -> int:
    """Largest sum of live tensors that `function` makes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with TensorMemory() as memory:
        function()
    return memory.peak
