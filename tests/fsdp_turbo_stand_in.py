"""In the place of the package fsdp_turbo, which is on no package index: what verl's engine calls of it, by torch's FSDP2.

Only for tests of verl's own part of that engine (verl/workers/engine/fsdp/fsdp_turbo_impl.py). It shards as verl's FSDP2
engine does, over one data-parallel group, and has no sequence or expert parallelism. Nothing about the package is shown by it.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class _ParallelState:
    def is_group_enable(self, name):
        return False

    def get_data_rank(self):
        return torch.distributed.get_rank()

    def get_data_group_size(self):
        return torch.distributed.get_world_size()

    def get_data_group(self):
        return torch.distributed.group.WORLD


class _FSDPTurbo:
    def __init__(self, config, module):
        for layer in module.model.layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy())
        self.model = fully_shard(module, mp_policy=MixedPrecisionPolicy())


def _clip_grad_norm(model, max_norm):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return getattr(norm, "full_tensor", lambda: norm)().item()


def install(monkeypatch) -> None:
    """Put the modules in place for a test, and register verl's engine for the device cpu, as verl_patches.cpu does FSDP's."""
    from verl.workers.engine import FSDPTurboEngineWithLMHead
    from verl.workers.engine.base import EngineRegistry

    from verl_patches.cpu.fsdp_engine import NoOffload

    modules = {
        "fsdp_turbo": {},
        "fsdp_turbo.distributed": {},
        "fsdp_turbo.distributed.parallel_state": {
            "init_parallel_state": lambda config: None,
            "get_parallel_state": _ParallelState,
        },
        "fsdp_turbo.fsdp_turbo_config": {
            "FSDPTurboConfig": None,
            "_dict_to_dataclass": lambda cls, given: SimpleNamespace(
                distributed=SimpleNamespace(fsdp_plan=SimpleNamespace())
            ),
        },
        "fsdp_turbo.fsdp_turbo": {"FSDPTurbo": _FSDPTurbo},
        "fsdp_turbo.training": {},
        "fsdp_turbo.training.clip_grads": {"clip_grad_norm": _clip_grad_norm},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    engine = type("CPUFSDPTurboEngine", (NoOffload, FSDPTurboEngineWithLMHead), {})
    monkeypatch.setitem(EngineRegistry._engines["language_model"]["fsdp_turbo"], "cpu", engine)
