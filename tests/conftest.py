"""Shared by all tests: the profiles of hypothesis, the marker `gpu`, and models."""

import os

import before_verl  # noqa: F401  first: verl and Triton read it when they are imported
import pytest
import torch
from hypothesis import HealthCheck, settings

# The machine may be small and busy: no deadline a case. The long mode is `HYPOTHESIS_PROFILE=long bash tests/run.sh`.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=200, **_COMMON)
settings.register_profile("long", max_examples=10_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items):
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with a tiny policy and reference; a process group for verl's workers in this process."""
    import engine_harness

    folder = tmp_path_factory.mktemp("models")
    engine_harness.make_models(folder)
    engine_harness.start_process_group()
    yield folder
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tied_models(models):
    """The same with the output matrix tied to the embedding."""
    import engine_harness

    engine_harness.make_models(models / "tied", tied=True)
    return models / "tied"


@pytest.fixture(scope="session")
def moe_models(tmp_path_factory):
    """Folder with a tiny policy and reference that are mixtures of experts."""
    import engine_harness

    folder = tmp_path_factory.mktemp("moe")
    engine_harness.make_moe_models(folder)
    return folder


@pytest.fixture
def own_forward(monkeypatch):
    """verl's fused kernels replace the forward of the model's class, for every model of this process made before or after."""
    from transformers import Qwen3ForCausalLM

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Whatever a function makes by new_empty and does not write is NaN."""
    original = torch.Tensor.new_empty

    def new_empty(self, *size, **kwargs):
        made = original(self, *size, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
