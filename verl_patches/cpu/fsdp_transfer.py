"""No moves of an FSDP model between host and device.

Touches: verl.utils.fsdp_utils.load_fsdp_model_to_gpu and offload_fsdp_model_to_cpu (wrapped when that module is imported,
before the engines import them by name).
Checked with: verl 0.9.1.
Why: host and device are the same memory, so there is nothing to move; for FSDP1 verl would build the device
"cpu:<current_device()>" from it, which does not parse.
"""

import wrapt

from verl_patches.functions import wrap

MOVES = ("load_fsdp_model_to_gpu", "offload_fsdp_model_to_cpu")


def _stay(verls, *args, **kwargs):
    """The model is where it belongs."""


def install() -> None:
    @wrapt.when_imported("verl.utils.fsdp_utils")
    def _wrap(module):
        for move in MOVES:
            wrap(module, move, _stay)
