"""The platform "cpu".

Touches: verl.plugin.platform.PlatformRegistry (registration), whose platforms stand behind verl.utils.device.
Checked with: verl 0.9.1, which ships platforms for NVIDIA, Ascend and ROCm only.
Why: without it verl falls back to "nvidia" on a machine without an accelerator and fails at the first torch.cuda call.
"""

import types
from contextlib import contextmanager

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _nothing(*args, **kwargs) -> None:
    """A call that has no meaning on a CPU."""


def _zero(*args, **kwargs) -> int:
    """A device-memory statistic: there is no device memory."""
    return 0


# What verl calls on torch.cuda without asking, and torch.cpu lacks.
_MISSING_IN_TORCH_CPU = {
    "is_available": lambda: False,
    "get_device_name": lambda *args: "CPU",
    "get_rng_state": lambda *args: torch.get_rng_state(),
    "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
    "manual_seed_all": torch.manual_seed,
    "mem_get_info": lambda *args: (0, 0),
    **dict.fromkeys(("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device"), _nothing),
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), _zero),
}


class CPUDeviceModule(types.ModuleType):
    """torch.cpu with the functions of torch.cuda that verl needs."""

    def __init__(self):
        super().__init__("verl_patches.cpu.device")
        self.__dict__.update(_MISSING_IN_TORCH_CPU)

    def __getattr__(self, name):
        return getattr(torch.cpu, name)


class PlatformCPU(PlatformBase):
    """One host, no accelerator; Ray schedules it as logical GPUs (ray.init(num_gpus=...))."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CPUDeviceModule()

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        """Only by VERL_PLATFORM=cpu, never by detection: a CPU is everywhere."""
        return False

    def current_device(self):
        """A device, not an index: verl passes it to Tensor.to, where a bare index means CUDA."""
        return torch.device("cpu")

    def device_count(self):
        return 1

    def get_device_capability(self, device_index=0):
        return None, None

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    set_device = synchronize = empty_cache = set_allocator_settings = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        """verl's resource pools ask for this; a logical GPU needs no hardware."""
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        """No: weights then go from the trainer to vLLM through POSIX shared memory."""
        return False


def install() -> None:
    """Make VERL_PLATFORM=cpu a name that verl knows."""
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
