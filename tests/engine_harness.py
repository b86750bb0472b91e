"""verl's real FSDP engine and training workers on a tiny model, without Ray, for the tests of joint pass and update.

A batch is a list of `Sample`s (engine_samples.py), so that a test can reorder it, pad it, or deal it out to ranks.
`run_step` does with it what VIMPO's trainer does in a step: joint pass, `compute_batch` over the whole batch, update.
With several processes (`run_on_ranks`) each rank holds a contiguous part of the list, as with verl's dispatch.
"""

import os
import socket
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import ulysses_on_cpu
from engine_samples import EOS, VOCABULARY, Sample, nested, padded, response_part, to_tensordict
from tensordict import TensorDict

from vimpo_verl.one_pass import Statistics


@dataclass(frozen=True)
class Setting:
    """How a step is computed: none of it may change the result."""

    strategy: str = "fsdp2"
    use_remove_padding: bool = True
    micro_batch_size: int | None = 2  # None: dynamic batch size
    max_token_len: int = 64
    gradient_checkpointing: bool = False
    dtype: str = "fp32"
    ref_model_dtype: str = "fp32"  # what the reference is stored in
    sp_size: int = 1
    use_fused_kernels: bool = False
    fused_backend: str = "torch"  # verl's name
    lora_rank: int = 0
    attention: str = "sdpa"  # transformers' name
    router_replay: bool = False
    routes: dict | None = None  # sample -> experts of each token, of the rollout
    # What does change the result:
    temperature: float = 1.0
    mini_batches: int = 1
    epochs: int = 1
    lr: float = 0.0
    adam_eps: float | None = None  # AdamW with it in SGD's place
    lam: float = 1.0
    knobs: dict = field(default_factory=dict)
    actor: dict = field(default_factory=dict)
    equal_models: bool = False
    before: Statistics | None = None  # of the batch before, for run_one_pass_step


def make_models(folder: Path, tied: bool = False, layers: int = 2, hidden: int = 32) -> None:
    """Write a tiny Qwen3 `policy` and a `ref` near it, whose distributions are far from uniform.

    With `tied`, the output matrix is the embedding, as in small models.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    save_near_each_other(Qwen3ForCausalLM(config), folder)


def make_moe_models(folder: Path) -> None:
    """The same of Qwen3's mixtures of experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    save_near_each_other(Qwen3MoeForCausalLM(config), folder)


def save_near_each_other(model, folder: Path) -> None:
    """Write the model as `policy`, and as `ref` with every parameter moved a little."""
    model.save_pretrained(folder / "policy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "ref")


# ---- verl's workers --------------------------------------------------------------------------------------------------


def start_process_group(rank: int = 0, world_size: int = 1, port: int | None = None) -> None:
    """The environment that verl's workers read; the group itself is made by the first worker."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port or free_port()),
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_worker(worker_cls, path: Path, setting: Setting, forward_only: bool):
    """A TrainingWorker with SGD, so that parameters move by lr * gradient."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

    attention = ulysses_on_cpu.register() if setting.sp_size > 1 else setting.attention
    dynamic = setting.micro_batch_size is None
    if setting.adam_eps is None:
        optimizer = {"optimizer": "SGD"}
    else:
        optimizer = {"optimizer": "AdamW", "override_optimizer_config": {"eps": setting.adam_eps}}
    worker = worker_cls(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(path),
                load_tokenizer=False,
                use_remove_padding=setting.use_remove_padding,
                use_fused_kernels=setting.use_fused_kernels,
                fused_kernel_options={"impl_backend": setting.fused_backend},
                lora_rank=0 if forward_only else setting.lora_rank,
                target_modules="all-linear",
                enable_gradient_checkpointing=setting.gradient_checkpointing,
                override_config={"attn_implementation": attention},
            ),
            engine_config=FSDPEngineConfig(
                strategy=setting.strategy,
                forward_only=forward_only,
                model_dtype=setting.ref_model_dtype if forward_only else "fp32",
                use_torch_compile=False,
                use_orig_params=True,
                mixed_precision={"param_dtype": setting.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                ulysses_sequence_parallel_size=setting.sp_size,
                use_dynamic_bsz=dynamic,
                max_token_len_per_gpu=setting.max_token_len,
                infer_max_token_len_per_gpu=setting.max_token_len,
                micro_batch_size_per_gpu=setting.micro_batch_size,
                infer_micro_batch_size_per_gpu=setting.micro_batch_size,
            ),
            optimizer_config=FSDPOptimizerConfig(
                lr=setting.lr, weight_decay=0.0, clip_grad=1e9, total_training_steps=10, **optimizer
            ),
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )
    worker.reset()
    return worker


@dataclass
class Workers:
    """Actor with VIMPO's loss, and reference."""

    actor: object
    ref: object


def make_workers(models: Path, setting: Setting) -> Workers:
    """As VimpoActorRolloutRefWorker.init_model builds them, but for the rollout."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from verl_patches import reference_precision
    from verl_patches.lora_reference import AdaptersOff
    from verl_patches.policy_loss_config import VimpoPolicyLossConfig
    from verl_patches.worker import VimpoTrainingWorker

    actor = make_worker(VimpoTrainingWorker, models / "policy", setting, forward_only=False)
    if setting.lora_rank:
        ref = AdaptersOff(actor)
    else:
        ref_path = models / ("policy" if setting.equal_models else "ref")
        ref = make_worker(TrainingWorker, ref_path, setting, forward_only=True)
        if setting.strategy in reference_precision.STRATEGIES:
            reference_precision.take_buffers(ref.engine.module, actor.engine.module)
    actor_config = FSDPActorConfig(
        strategy=setting.strategy,
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
    return Workers(actor, ref)


def knobs_of(setting: Setting):
    from vimpo_verl.config import VimpoConfig

    # beta is large, so that neither branch of the loss drowns in the other.
    return VimpoConfig(**{"beta": 0.1, **setting.knobs})


# ---- a step ----------------------------------------------------------------------------------------------------------


@dataclass
class StepResult:
    """Everything that a step produced, on rank 0, for the whole batch in the order of the samples."""

    per_token: dict[str, list[torch.Tensor]]  # over the response
    batch: object  # VimpoBatch
    gradients: list[dict[str, torch.Tensor]]  # of each mini-batch, before clipping
    parameters: dict[str, torch.Tensor]  # after the step
    metrics: dict[str, float]  # as logged


def run_step(models: Path, setting: Setting, samples: list[Sample], workers: Workers | None = None) -> StepResult:
    """One step on all ranks of the process group; `samples` is the whole batch and every rank takes its part."""
    from verl.utils.metric import reduce_metrics

    from vimpo_verl.batch import compute_batch

    workers = workers or _make_workers_of(setting)(models, setting)
    ranks = workers.actor.engine.get_data_parallel_size()
    mine = slice_of_rank(len(samples), workers.actor.engine.get_data_parallel_rank(), ranks)
    per_token = gather_rows(joint_pass(workers, samples[mine], setting))
    batch = compute_batch(
        old_log_prob=padded(per_token["log_probs"]),
        ref_log_prob=padded(per_token["ref_log_probs"]),
        token_kl=padded(per_token["token_kl"]),
        response_mask=padded([torch.tensor(s.mask) for s in samples]),
        outcome=torch.tensor([s.outcome for s in samples]),
        group=[s.uid for s in samples],
        config=knobs_of(setting),
        lam=setting.lam,
        is_padding=torch.tensor([s.is_padding for s in samples]),
    )
    data = training_data(samples, per_token, batch, setting)[mine]
    gradients = []
    with recorded_gradients(workers.actor.engine, gradients):
        output = workers.actor.train_mini_batch(data)
    metrics = reduce_metrics(dict(output["metrics"])) if output is not None else {}  # None: not its group's first rank
    return StepResult(per_token, batch, gradients, parameters_of(workers.actor.engine), {**batch.metrics, **metrics})


def run_one_pass_step(
    models: Path, setting: Setting, samples: list[Sample], workers: Workers | None = None
) -> StepResult:
    """The same without a pass before the update: `per_token` is empty, and the batch's metrics come from the update."""
    from verl.utils.metric import reduce_metrics

    from vimpo_verl.batch import compute_targets

    workers = workers or make_workers(models, setting)
    batch = compute_targets(
        response_mask=padded([torch.tensor(s.mask) for s in samples]),
        outcome=torch.tensor([s.outcome for s in samples]),
        group=[s.uid for s in samples],
        config=knobs_of(setting),
        before=setting.before,
        is_padding=torch.tensor([s.is_padding for s in samples]),
    )
    engine = workers.actor.engine
    mine = slice_of_rank(len(samples), engine.get_data_parallel_rank(), engine.get_data_parallel_size())
    data = one_pass_data(samples, batch, setting)[mine]
    gradients = []
    with recorded_gradients(engine, gradients):
        output = workers.actor.train_mini_batch(data)
    metrics = reduce_metrics(dict(output["metrics"])) if output is not None else {}
    metrics = {name.removeprefix("of_batch/"): value for name, value in metrics.items()}
    return StepResult({}, batch, gradients, parameters_of(engine), {**batch.metrics, **metrics})


def run_step_both_ways(
    models: Path, setting: Setting, samples: list[Sample], workers: Workers
) -> tuple[StepResult, StepResult]:
    """A step in two passes, and the same in one with that step's statistics for those of the batch before (lr=0)."""
    two = run_step(models, setting, samples, workers)
    before = Statistics.of_metrics(two.batch.metrics)
    return two, run_one_pass_step(models, replace(setting, before=before), samples, workers)


def _make_workers_of(setting: Setting):
    if setting.strategy != "megatron":
        return make_workers
    from megatron_harness import make_megatron_workers

    return make_megatron_workers


def slice_of_rank(length: int, rank: int, ranks: int) -> slice:
    share = length // ranks
    return slice(rank * share, (rank + 1) * share)


def joint_pass(workers: Workers, samples: list[Sample], setting: Setting) -> dict[str, list[torch.Tensor]]:
    """VIMPO's joint pass; results over the response."""
    from verl_patches.joint_pass import joint_infer_batch

    data = to_tensordict(samples, temperature=setting.temperature, calculate_entropy=True, compute_loss=False)
    add_routes(data, [setting.routes.get(s) for s in samples] if setting.routes else None, setting)
    output = joint_infer_batch(
        workers.actor, workers.ref, data, knobs_of(setting).kl_estimator, knobs_of(setting).kl_top_k
    )
    if output is None:  # only the first rank of a sequence-parallel group collects
        return {}
    names = ("log_probs", "entropy", "ref_log_probs", "token_kl")
    result = {name: response_part(output[name].unbind(), samples) for name in names}
    if "routed_experts" in output.keys():  # recorded, of the whole sequence
        result["routed_experts"] = list(output["routed_experts"].unbind())
    return result


def add_routes(data: TensorDict, routes: list | None, setting: Setting) -> None:
    """What verl's worker and agent loop add to a batch where the routes of tokens through experts are to be those recorded."""
    from verl.utils import tensordict_utils as tu

    if setting.router_replay:
        tu.assign_non_tensor(data, enable_routing_replay=True)
    if routes is not None:
        data["routed_experts"] = torch.nested.as_nested_tensor(routes, layout=torch.jagged)


def gather_rows(mine: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """The rows of all ranks that collected some, in order, on every rank."""
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    names = next(part for part in parts if part)
    return {name: [row for part in parts for row in part.get(name, [])] for name in names}


class training_data:
    """What the trainer leaves in the TransferQueue for the update; indexed by the slice of a rank."""

    def __init__(self, samples, per_token, batch, setting):
        self.samples, self.per_token, self.batch, self.setting = samples, per_token, batch, setting

    def __getitem__(self, mine: slice) -> TensorDict:
        from verl.utils import tensordict_utils as tu

        data = self.basics(mine)
        samples = self.samples[mine]
        for name, source in {
            "old_log_probs": "log_probs",
            "ref_log_prob": "ref_log_probs",
            "token_kl": "token_kl",
        }.items():
            data[name] = nested(self.per_token[source][mine])
        data["advantages"] = self.over_response(self.batch.advantages[mine], samples)
        tu.assign_non_tensor(data, vimpo_at_old_policy=True)
        return data

    def over_response(self, rows: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
        return nested([row[: len(s.response)] for row, s in zip(rows, samples, strict=True)])

    def basics(self, mine: slice) -> TensorDict:
        """What is the same in one pass and in two."""
        samples, setting = self.samples[mine], self.setting
        mini_batch_size = len(self.samples) // setting.mini_batches
        data = to_tensordict(
            samples,
            temperature=setting.temperature,
            calculate_entropy=setting.actor.get("entropy_coeff", 0) != 0,
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=mini_batch_size,
            mini_batch_size=mini_batch_size,
            epochs=setting.epochs,
            seed=42,
            dataloader_kwargs={"shuffle": False},
            vimpo_actor_coeff=self.batch.actor_coeff,
            vimpo_beta=self.batch.beta.value,
            vimpo_value_scale=self.batch.value_scale,
        )
        data["returns"] = self.over_response(self.batch.returns[mine], samples)
        data["vimpo_is_real"] = torch.tensor([float(not s.is_padding) for s in samples])
        recorded = self.per_token.get("routed_experts")
        add_routes(
            data, [setting.routes[s] for s in samples] if setting.routes else recorded and recorded[mine], setting
        )
        return data


class one_pass_data(training_data):
    """The same in one pass: the update finds log-probs, kappa and advantages."""

    def __init__(self, samples, batch, setting):
        super().__init__(samples, {}, batch, setting)

    def __getitem__(self, mine: slice) -> TensorDict:
        from verl.utils import tensordict_utils as tu

        samples, before = self.samples[mine], self.setting.before
        data = self.basics(mine)
        names = list(dict.fromkeys(s.uid for s in self.samples))
        data["vimpo_group"] = torch.tensor([names.index(s.uid) for s in samples])
        data["vimpo_outcome"] = torch.tensor([s.outcome for s in samples])
        data["vimpo_row"] = torch.arange(len(self.samples))[mine]
        tu.assign_non_tensor(
            data,
            vimpo_one_pass=True,
            vimpo_lam=self.setting.lam,
            vimpo_step=1,
            vimpo_advantage_mean=before.advantage_mean if before else 0.0,
            vimpo_advantage_std=before.advantage_std if before else -1.0,
        )
        return data


class recorded_gradients:
    """Context: keep the gradients of each optimiser step of `engine`, in full, before clipping."""

    def __init__(self, engine, into: list):
        self.engine, self.into = engine, into

    def __enter__(self):
        step = self.engine.optimizer_step

        def optimizer_step():
            scale = _loss_scale(self.engine)
            self.into.append(_full(self.engine, lambda parameter: _gradient(parameter) / scale))
            return step()

        self.engine.optimizer_step = optimizer_step

    def __exit__(self, *_):
        del self.engine.optimizer_step


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "main_grad"):  # Megatron's
        return parameter.main_grad
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # None: frozen, under LoRA


def _loss_scale(engine) -> float:
    """What Megatron multiplies the loss with in float16, until its optimiser divides the gradients by it."""
    return engine.optimizer.get_loss_scale().item() if hasattr(engine.optimizer, "get_loss_scale") else 1.0


def parameters_of(engine) -> dict[str, torch.Tensor]:
    return _full(engine, lambda parameter: parameter)


def _full(engine, select) -> dict[str, torch.Tensor]:
    """Name -> a copy of what `select` finds of each parameter, un-sharded, on every rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    module = engine.module
    if isinstance(module, list):  # Megatron's, by pipeline stage
        from megatron_harness import exported

        return exported(engine, select)
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            found = {name: select(p).detach().clone() for name, p in module.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in found.items()}
    found = {name: select(p).detach() for name, p in module.named_parameters()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


# ---- several processes -----------------------------------------------------------------------------------------------


def run_on_ranks(world_size: int, function, *args):
    """function(rank, *args) in processes of one gloo group; returns what each rank returned. One that fails ends
    all."""
    with tempfile.TemporaryDirectory() as folder:
        everything = (world_size, free_port(), Path(folder), function, args)
        torch.multiprocessing.start_processes(_on_rank, everything, world_size, daemon=True, start_method="spawn")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _on_rank(rank, world_size, port, folder, function, args):
    torch.set_num_threads(1)
    start_process_group(rank, world_size, port)
    torch.save(function(rank, *args), folder / str(rank))
    torch.distributed.destroy_process_group()
