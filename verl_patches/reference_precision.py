"""Seam: a reference that is stored in the precision that it is computed in, half of what verl's default stores and moves.

Touches the key fsdp_config.model_dtype of the reference, and the buffers of the module that verl's FSDPEngine has built of it.
Checked against verl 0.9.1 (FSDPEngine._build_module, _build_fsdp_module); no upstream issue.

verl keeps the parameters of a model that is only run forward in host memory, in model_dtype, float32 by default. In every forward
FSDP casts each parameter to mixed_precision.param_dtype, bfloat16 by default, after it has come over the bus. Cast when it is
loaded, it is the same number: rounding is element by element, and nothing else reads the parameter. Buffers are another matter.
FSDP does not cast the policy's, and verl stores a model's buffers in model_dtype, too: rotary frequencies in bfloat16 gave a KL
of 7e-5 nats a token between equal weights. So the reference takes the policy's buffers, which its own would be.
"""

from collections.abc import Mapping
from typing import Any

import torch

STRATEGIES = ("fsdp", "fsdp2")  # where verl stores and casts as described above
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stored_in(strategy: str, policys: Any) -> str | None:
    """model_dtype for the reference of a policy: the precision of the forward, where that is a half one and the policy's is not.

    Args:
        strategy: of the policy.
        policys: its fsdp_config, a DictConfig.

    Returns:
        A name of verl's, or the policy's own value; fp32 for none, which verl's engine takes for a policy alone as that.
    """
    own = policys.get("model_dtype")
    stored = torch.float32 if own is None else dtype_of(own)
    mixed_precision = policys.get("mixed_precision") or {}
    computed = dtype_of(mixed_precision.get("param_dtype", "bf16")) if isinstance(mixed_precision, Mapping) else None
    if strategy in STRATEGIES and stored == torch.float32 and computed in HALF:
        return HALF[computed]
    return "fp32" if own is None else own


def dtype_of(name: Any) -> torch.dtype | None:
    """What verl takes a precision's name for; None where it knows no such name."""
    from verl.utils.torch_dtypes import PrecisionType

    try:
        return PrecisionType.to_dtype(name)
    except RuntimeError:
        return None


@torch.no_grad()
def take_buffers(reference: torch.nn.Module, policy: torch.nn.Module) -> None:
    """Give the reference the policy's buffers, in their precision, on the device where its own are.

    Args:
        reference, policy: the modules of verl's FSDP engines, before the first forward, which is when FSDP1 casts its buffers.

    Raises:
        RuntimeError: the two have not the same buffers.
    """
    found, wanted = (dict(_buffers(module)) for module in (reference, policy))
    different = sorted(found.keys() ^ wanted.keys())
    if different:
        raise RuntimeError(
            f"policy and reference have different buffers ({len(different)}, such as {different[0]}): are they one model?"
        )
    for (place, name), (owner, buffer) in found.items():
        owner._buffers[name] = wanted[place, name][1].detach().to(buffer.device, copy=True)


def _buffers(module: torch.nn.Module) -> list[tuple[tuple[str, str], tuple[torch.nn.Module, torch.Tensor]]]:
    """((place of the module, name of the buffer), (the module, the buffer)); without torch's cleaning of FSDP1's names."""
    return [
        ((place, name), (owner, buffer))
        for place, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
