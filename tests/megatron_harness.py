"""verl's real Megatron engine on a tiny model and several gloo ranks, for the tests; the steps are engine_harness's."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from engine_harness import Setting, Workers, knobs_of


@dataclass(frozen=True)
class MegatronSetting(Setting):
    """What Megatron has besides; none of it may change the result."""

    strategy: str = "megatron"
    tensor_parallel: int = 1
    sequence_parallel: bool = True
    pipeline_parallel: int = 1
    virtual_pipeline: int | None = None
    context_parallel: int = 1
    expert_parallel: int = 1
    distributed_optimizer: bool = False
    megatron_bridge: bool = False  # in mbridge's place, as verl has it by itself
    adapters: bool = False  # the reference is the policy without them
    transformer: dict = field(default_factory=dict)
    engine: dict = field(default_factory=dict)


def make_megatron_workers(models, setting: MegatronSetting) -> Workers:
    """As VimpoActorRolloutRefWorker.init_model builds them, but for the rollout."""
    from functools import partial

    from verl.workers.config import McoreActorConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from verl_patches.lora_reference import AdaptersOff
    from verl_patches.policy_loss_config import VimpoPolicyLossConfig
    from verl_patches.worker import VimpoTrainingWorker

    actor = make_megatron_worker(VimpoTrainingWorker, models / "policy", setting, forward_only=False)
    if setting.lora_rank:
        ref = AdaptersOff(actor)
    else:
        ref_path = models / ("policy" if setting.equal_models else "ref")
        ref = make_megatron_worker(TrainingWorker, ref_path, setting, forward_only=True)
    actor_config = McoreActorConfig(
        strategy="megatron",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=10.0,
        policy_loss=VimpoPolicyLossConfig(loss_mode="vimpo", vimpo=knobs_of(setting)),
        **setting.actor,
    )
    actor.set_loss_fn(partial(ppo_loss, config=actor_config))
    actor.use_vimpo_loss(knobs_of(setting), ref)
    return Workers(actor, adapters_off(actor, ref) if setting.adapters else ref)


def adapters_off(actor, ref):
    """The policy without its adapters, whose stand-in is what the policy's weights have more than the reference's."""
    from contextlib import contextmanager

    from verl_patches.lora_reference import AdaptersOff

    policys, references = ([p for chunk in w.engine.module for p in chunk.parameters()] for w in (actor, ref))

    class Adapters:
        @staticmethod
        @contextmanager
        def disable_adapter(modules):
            assert modules is actor.engine.module
            kept = [p.data for p in policys]
            for policy, reference in zip(policys, references, strict=True):
                policy.data = reference.data
            try:
                yield
            finally:
                for policy, data in zip(policys, kept, strict=True):
                    policy.data = data

    actor.engine.peft_cls = Adapters
    return AdaptersOff(actor)


def make_megatron_worker(worker_cls, path, setting: MegatronSetting, forward_only: bool):
    """A TrainingWorker with SGD, so that parameters move by lr * gradient."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig, TrainingWorkerConfig
    from verl.workers.config.engine import EngineRouterReplayConfig

    if setting.router_replay and not forward_only:
        replay = {"router_replay": EngineRouterReplayConfig(mode="R3" if setting.routes else "R2")}
    else:
        replay = {}
    transformer = {
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "attention_backend": "local",
        "sequence_parallel": setting.sequence_parallel and setting.tensor_parallel > 1,  # mbridge looks at nothing else
        **setting.transformer,
    }
    if setting.megatron_bridge:
        from megatron_on_cpu import layers_of

        transformer["transformer_layer_spec"] = layers_of
    dynamic = setting.micro_batch_size is None
    engine = McoreEngineConfig(
        tensor_model_parallel_size=setting.tensor_parallel,
        sequence_parallel=setting.sequence_parallel,
        pipeline_model_parallel_size=setting.pipeline_parallel,
        virtual_pipeline_model_parallel_size=setting.virtual_pipeline,
        context_parallel_size=setting.context_parallel,
        expert_model_parallel_size=setting.expert_parallel,
        vanilla_mbridge=not setting.megatron_bridge,
        forward_only=forward_only,
        override_transformer_config=transformer,
        use_dynamic_bsz=dynamic,
        max_token_len_per_gpu=setting.max_token_len,
        infer_max_token_len_per_gpu=setting.max_token_len,
        micro_batch_size_per_gpu=setting.micro_batch_size,
        infer_micro_batch_size_per_gpu=setting.micro_batch_size,
        use_distributed_optimizer=setting.distributed_optimizer,
        dtype={"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}[setting.dtype],
        **setting.engine,
        **replay,
    )
    if setting.dtype == "fp32":
        object.__setattr__(engine, "dtype", "fp32")  # the engine can, its configuration has no word for it
    model = HFModelConfig(
        path=str(path),
        load_tokenizer=False,
        use_remove_padding=setting.use_remove_padding,
        use_fused_kernels=setting.use_fused_kernels,
        lora={"rank": setting.lora_rank, "alpha": 2 * setting.lora_rank} if setting.lora_rank else {},
    )
    object.__setattr__(model, "tokenizer", type("Tokenizer", (), {"pad_token_id": 1}))
    if setting.adam_eps is None:
        optimizer = {"optimizer": "sgd", "override_optimizer_config": {"sgd_momentum": 0.0}}
    else:
        optimizer = {"optimizer": "adam", "override_optimizer_config": {"adam_eps": setting.adam_eps}}
    if setting.dtype == "fp16":  # verl's choice there, which is Transformer Engine's
        optimizer["override_optimizer_config"]["use_precision_aware_optimizer"] = False
    worker = worker_cls(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=McoreOptimizerConfig(
                lr=setting.lr, weight_decay=0.0, clip_grad=1e9, total_training_steps=10,
                lr_warmup_steps=0, lr_decay_steps=10, lr_decay_style="constant", **optimizer,
            ),
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )  # fmt: skip
    worker.reset()
    return worker


def exported(engine, select) -> dict[str, torch.Tensor]:
    """Hugging Face name -> what `select` finds of the parameters, whole, on every rank: as the engine exports its weights."""
    with nullcontext() if engine.mode else engine.eval_mode():  # brings back what is offloaded
        parameters = [p for chunk in engine.module for p in chunk.parameters()]
        kept = [p.data for p in parameters]
        for p in parameters:
            p.data = select(p).detach().to(p.dtype).view_as(p).clone()
        try:
            export = engine.bridge.export_weights if engine.vanilla_bridge else engine.bridge.export_hf_weights
            return {name: tensor.detach().clone() for name, tensor in export(engine.module)}
        finally:
            for p, data in zip(parameters, kept, strict=True):
                p.data = data
