"""verl's VeOmni engine with the real VeOmni on a CPU, for tests/test_derived_engines.py.

VeOmni is not in the environment of the tests: where it is, verl imports it in every process, and it changes transformers'
attention there. examples/setup_env.sh puts it in a folder of its own, which only the processes of these tests look into.

It wants several processes (with one it shards nothing), and verl registers the engine for CUDA and NPU only.
"""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from engine_harness import Setting, StepResult, Workers, knobs_of, run_one_pass_step, run_step

FOLDER = Path(__file__).parent.parent / ".venv" / "veomni"


def is_there() -> bool:
    return (FOLDER / "veomni").is_dir()


def import_engine():
    """The module of verl's VeOmni engine, with the engine registered for the device cpu; and VeOmni's log quiet.

    verl knows the tokens that stand for images by the numbers that published models have; ours have others.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    import logging

    import verl.workers.engine.veomni.transformer_impl as implementation
    from verl.workers.engine.base import EngineRegistry
    from vision_models import IMAGE, VIDEO

    logging.disable(logging.INFO)
    for tokens in implementation.VL_TYPE2INDEX.values():
        tokens.update(IMAGE_INPUT_INDEX=IMAGE, VIDEO_INPUT_INDEX=VIDEO)
    if "cpu" not in EngineRegistry._engines["language_model"]["veomni"]:
        register = EngineRegistry.register(model_type="language_model", backend=["veomni"], device="cpu")
        register(implementation.VeOmniEngineWithLMHead)
    return implementation


@contextmanager
def _in_float32(implementation, worker_of):
    """Yield a maker of workers that compute in float32: verl gives VeOmni no way to say so, and it takes bfloat16."""
    original = implementation.MixedPrecisionConfig
    implementation.MixedPrecisionConfig = partial(original, param_dtype="float32")

    def make(*args):
        worker = worker_of(*args)
        worker.engine._autocast_dtype = torch.float32
        return worker

    try:
        yield make
    finally:
        implementation.MixedPrecisionConfig = original


def make_worker(worker_cls, path: Path, setting: Setting, forward_only: bool, offload: bool):
    """A TrainingWorker on the VeOmni engine, with a learning rate of 0."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        HFModelConfig,
        TrainingWorkerConfig,
        VeOmniEngineConfig,
        VeOmniOptimizerConfig,
    )

    worker = worker_cls(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(path),
                load_tokenizer=False,
                use_remove_padding=setting.use_remove_padding,
                enable_gradient_checkpointing=setting.gradient_checkpointing,
            ),
            engine_config=VeOmniEngineConfig(
                forward_only=forward_only,
                param_offload=offload,
                optimizer_offload=offload and not forward_only,
                mixed_precision=True,
                attn_implementation="sdpa",
                moe_implementation="eager",
                use_torch_compile=False,
                use_dynamic_bsz=setting.micro_batch_size is None,
                max_token_len_per_gpu=setting.max_token_len,
                infer_max_token_len_per_gpu=setting.max_token_len,
                micro_batch_size_per_gpu=setting.micro_batch_size,
                infer_micro_batch_size_per_gpu=setting.micro_batch_size,
            ),
            optimizer_config=VeOmniOptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=1e9, total_training_steps=10),
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )
    worker.reset()
    return worker


def make_workers(models: Path, setting: Setting, offload: bool, make=make_worker) -> Workers:
    """Policy with VIMPO's loss, and reference, as engine_harness.make_workers makes them on FSDP."""
    from verl.workers.config import VeOmniActorConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from verl_patches.policy_loss_config import VimpoPolicyLossConfig
    from verl_patches.worker import VimpoTrainingWorker

    actor = make(VimpoTrainingWorker, models / "policy", setting, False, offload)
    ref = make(TrainingWorker, models / ("policy" if setting.equal_models else "ref"), setting, True, offload)
    config = VeOmniActorConfig(
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=10.0,
        policy_loss=VimpoPolicyLossConfig(loss_mode="vimpo", vimpo=knobs_of(setting)),
    )
    actor.set_loss_fn(partial(ppo_loss, config=config))
    actor.use_vimpo_loss(knobs_of(setting), ref)
    return Workers(actor, ref)


def steps_on_rank(rank: int, cases: list[tuple]) -> list[StepResult]:
    """A step for each (models, samples, setting, offload, in one pass) of `cases`, one after the other, in this rank's process.

    A setting with dtype="fp32" is computed in float32, one with "bf16" as verl configures VeOmni.
    """
    implementation = import_engine()
    results = []
    for models, samples, setting, offload, in_one_pass in cases:
        step = run_one_pass_step if in_one_pass else run_step
        if setting.dtype == "fp32":
            with _in_float32(implementation, make_worker) as make:
                workers = make_workers(models, setting, offload, make)
                results.append(step(models, setting, samples, workers))
        else:
            results.append(step(models, setting, samples, make_workers(models, setting, offload)))
    return results
