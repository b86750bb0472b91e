"""FSDP1 and FSDP2 engines for the device cpu.

Touches: verl.workers.engine.base.EngineRegistry (registration), with subclasses of FSDPEngineWithLMHead and
FSDPEngineWithValueHead of verl.workers.engine.fsdp.transformer_impl, when that module is imported; and, for FSDP1,
torch.distributed.fsdp._init_utils._check_module_states_for_sync_module_states (wrapped when that module is imported).
Checked with: verl 0.9.1, which registers both engines for the devices cuda and npu only; torch 2.13.0.
Why: verl's classes run on a CPU as they are, but for two things. A forward-only engine (the reference policy) and
offload_policy=True ask for CPU offload, which pins host memory, and there is no pinned memory without an accelerator.
And verl builds FSDP1 with sync_module_states=True, for which torch refuses parameters on a CPU, although gloo can
broadcast them.
"""

import dataclasses
from contextlib import contextmanager

import wrapt

from verl_patches.functions import wrap

BACKENDS = ["fsdp", "fsdp2"]
FSDP1_CHECK = "_check_module_states_for_sync_module_states"


@contextmanager
def _without_offload(engine):
    """Let the engine build its module from a configuration that asks for no offload: the parameters are on the CPU."""
    config = engine.engine_config
    engine.engine_config = dataclasses.replace(config, forward_only=False, offload_policy=False)
    try:
        yield
    finally:
        engine.engine_config = config


class NoOffload:
    """Mixin for verl's FSDP engines: the same module, without offload to the CPU it is already on."""

    def _build_fsdp_module(self, module):
        with _without_offload(self):
            return super()._build_fsdp_module(module)


def _cpu_version_of(engine_class) -> type:
    return type(f"CPU{engine_class.__name__}", (NoOffload, engine_class), {"__doc__": "verl's engine on a CPU."})


def _accept(torchs, *args, **kwargs):
    """Parameters on the CPU are where they belong."""


def install() -> None:
    @wrapt.when_imported("torch.distributed.fsdp._init_utils")
    def _wrap(module):
        wrap(module, FSDP1_CHECK, _accept)

    @wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")
    def _register(module):
        engines = {
            "language_model": module.FSDPEngineWithLMHead,
            "value_model": module.FSDPEngineWithValueHead,
        }
        for model_type, engine_class in engines.items():
            register = module.EngineRegistry.register(model_type=model_type, backend=BACKENDS, device="cpu")
            register(_cpu_version_of(engine_class))
