"""Megatron Core on a CPU, for the tests: what it asks of CUDA and of Transformer Engine, answered without them.

`install()` in a process of its own, before verl's Megatron engine is imported. What it stands in for: calls of torch.cuda,
tensors on the device "cuda", and the attention kernel, by an attention over packed sequences and context-parallel slices. All
else is Megatron Core's, mbridge's and Megatron-Bridge's: layers, parallel regions, pipelines, schedules, gradients, optimiser,
weights, adapters. To move a tensor between the two devices is to copy it, so that verl can give back what it offloads.
"""

import contextlib
import gc
import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from torch.overrides import TorchFunctionMode


class _OnTheCPU(TorchFunctionMode):
    """What is asked for on a GPU, or in pinned memory, is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func in (torch.Tensor.cpu, torch.Tensor.to):  # a copy on a GPU, whose memory verl then gives back
            moved = func(*args, **kwargs)
            return moved.clone() if moved.data_ptr() == args[0].data_ptr() else moved
        if func is torch.Tensor.type and len(args) == 1:  # Megatron's clipping asserts on the name
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


# Where examples/setup_env.sh puts Megatron Core and mbridge, out of the way of all other tests.
FOLDER = Path(sys.prefix) / "megatron"


def install() -> None:
    sys.path.insert(0, str(FOLDER))
    _torch_cuda()
    _keep_groups()
    _random_numbers()
    _layers()
    _experts()
    _weight_names()
    _megatron_bridge()
    _fused_kernel()
    _engine()


_groups = []  # that Megatron has made


def forget_groups() -> None:
    """As if Megatron had never been set up; each gloo group has threads that cost time as long as it is there."""
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    gc.collect()  # models hold on to their groups
    while _groups:
        with contextlib.suppress(ValueError):  # Megatron has destroyed it
            torch.distributed.destroy_process_group(_groups.pop())


def _keep_groups() -> None:
    new_group = torch.distributed.new_group

    def kept(*args, **settings):
        group = new_group(*args, **settings)
        if group is not torch.distributed.GroupMember.NON_GROUP_MEMBER:
            _groups.append(group)
        return group

    torch.distributed.new_group = kept


def _torch_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.synchronize = lambda *_: None
    torch.nn.Module.cuda = lambda self, device=None: self
    _OnTheCPU().__enter__()  # for the life of the process


def _random_numbers() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _layers() -> None:
    """mbridge asks for Transformer Engine's layers."""
    import mbridge.core.llm_bridge as llm_bridge

    def block_spec(config, use_transformer_engine, vp_stage=None):  # mbridge looks whether it takes a vp_stage
        return layers_of(config, vp_stage)

    llm_bridge.get_gpt_decoder_block_spec = block_spec


def layers_of(config, vp_stage=None):
    """What Transformer Engine has layers for: Megatron Core has its own of each but the norms and the packed attention."""
    from megatron.core.models.gpt import gpt_layer_specs

    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        replace_kernels(layer, config.qk_layernorm, bool(config.num_moe_experts))
    return spec


def replace_kernels(layer, qk_layernorm: bool, has_experts: bool) -> None:
    """In the specification of a layer."""
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if hasattr(attention, "kv_layernorm"):  # latent attention
        attention.q_layernorm = attention.kv_layernorm = Norm
    elif qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if has_experts:
        layer.submodules.mlp.submodules.experts = Experts


def _experts() -> None:
    """What the exchange of tokens asks of CUDA's streams, and the router of Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    class Stream:
        def __init__(self, *_, **__):
            """Whatever is asked of it has been done."""

        def __getattr__(self, name):
            return lambda *_: self

    torch.cuda.Stream, torch.cuda.current_stream = Stream, Stream
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None
    moe_utils.te_general_gemm = None
    all_to_all = torch.distributed.all_to_all_single

    def from_tensors(output, given, output_split_sizes=None, input_split_sizes=None, **settings):
        """Megatron makes lists of numbers of tensors on a GPU alone."""
        sizes = ([int(n) for n in x] if x is not None else None for x in (output_split_sizes, input_split_sizes))
        return all_to_all(output, given, *sizes, **settings)

    torch.distributed.all_to_all_single = from_tensors


def _weight_names() -> None:
    """Transformer Engine's layers have the norms before them inside, Megatron Core's own have not."""
    from mbridge.core.bridge import Bridge

    original = Bridge._weight_name_mapping_mcore_to_hf

    def mapping(self, name):
        try:
            return original(self, name)
        except NotImplementedError:
            inside = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            return original(self, inside.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"))

    Bridge._weight_name_mapping_mcore_to_hf = mapping


class _NothingInside(type):
    """A class of which every attribute is such a class."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _NothingInside(name, (), {})


class _TransformerEngine:
    """Finds transformer_engine and its modules, with classes of which there are no objects: names to be imported by."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "transformer_engine" else None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__path__, module.__getattr__ = [], lambda name: getattr(_NothingInside("TE", (), {}), name)
        return module

    def exec_module(self, module):
        """There is nothing in it."""


def _megatron_bridge() -> None:
    """Megatron-Bridge imports Transformer Engine, and knows the norms before layers by their names inside its layers.

    Called once Megatron Core has been imported, which has then seen that there is no Transformer Engine.
    """
    importlib.import_module(
        "megatron.core.transformer.multi_latent_attention"
    ).HAVE_TE = False  # believes that there is one
    sys.meta_path.append(_TransformerEngine())
    from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge

    know_norms(Qwen3Bridge, "decoder.layers", "model.layers")
    _adapters()


def know_norms(bridge, megatrons: str, published: str) -> None:
    """Add the norms before layers to a bridge's names; the arguments are where the layers are in either model."""
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    original = bridge.mapping_registry

    def with_norms(self):
        registry = original(self)
        norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
        return type(registry)(
            *registry.mappings,
            *(AutoMapping(f"{megatrons}.*.{m}.weight", f"{published}.*.{h}.weight") for m, h in norms.items()),
        )

    bridge.mapping_registry = with_norms


def _adapters() -> None:
    """What verl 0.9.1 asks of a Megatron-Bridge newer than the index has, by functions; the adapters are 0.3.1's own."""
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.lora import LoRA

    utils.create_peft = lambda settings, dtype: LoRA(dim=settings["rank"], alpha=settings["alpha"])
    utils.create_peft_hook = lambda adapters, training: lambda model: adapters(model, training=training)
    utils.HAVE_TE = False
    utils.load_peft_adapter_checkpoint = None  # imported whether there is one to load or not


def _fused_kernel() -> None:
    """verl's Triton kernel, by verl's functions for logits; like it, it leaves it to sequence parallelism to add up gradients."""
    from verl.models.mcore import model_forward_fused
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

    def linear_cross_entropy(hidden, weight, labels, temperature, *_):
        logits = (hidden @ weight.t()).transpose(0, 1) / temperature
        return vocab_parallel_log_probs_from_logits(logits.clone(), labels), vocab_parallel_entropy(logits)

    model_forward_fused.linear_cross_entropy = linear_cross_entropy


def _engine() -> None:
    """To verl's engine the device is a GPU: so that what it offloads goes there and back."""
    from verl.workers.engine import base
    from verl.workers.engine.megatron import transformer_impl

    base.get_device_name = transformer_impl.get_device_name = lambda: "cuda"


class Norm:
    """torch's RMSNorm, whose weight Megatron is told about where its inputs are slices of the sequence."""

    def __new__(cls, config, hidden_size, eps=1e-5, **_):
        norm = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


class Experts(torch.nn.Module):
    """The experts of this rank, one after the other, with the weights' names of Transformer Engine's grouped layers."""

    def __init__(self, num_local_experts, config, *_, **__):
        super().__init__()
        self.number, inner = num_local_experts, config.moe_ffn_hidden_size
        # Megatron-Bridge goes by the names of Transformer Engine's classes.
        self.linear_fc1, self.linear_fc2 = (
            type(f"TE{kind}ParallelGroupedLinear", (torch.nn.Module,), {})() for kind in ("Column", "Row")
        )
        shapes = {self.linear_fc1: (2 * inner, config.hidden_size), self.linear_fc2: (config.hidden_size, inner)}
        for layer, shape in shapes.items():
            for i in range(num_local_experts):
                weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
                weight.allreduce = config.expert_model_parallel_size == 1  # False: other ranks have other experts
                layer.register_parameter(f"weight{i}", weight)

    def forward(self, hidden, tokens_per_expert, probs):
        """[n, D] in the order of the experts, [n] weights -> [n, D]."""
        outputs = []
        for i, x in enumerate(hidden.split(tokens_per_expert.tolist())):
            gate, up = (x @ getattr(self.linear_fc1, f"weight{i}").t()).chunk(2, dim=-1)
            outputs.append((torch.nn.functional.silu(gate) * up) @ getattr(self.linear_fc2, f"weight{i}").t())
        return torch.cat(outputs) * probs.unsqueeze(-1), None


class PackedAttention(torch.nn.Module):
    """Causal attention inside each packed sequence, of which context-parallel ranks have a slice from either end."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **_):
        """[n, heads, dim] packed -> the same; [s, b, heads, dim] -> [s, b, heads * dim], padded on the right."""
        if packed_seq_params is None:
            output = _attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), None, self.scale)
            return output.permute(2, 0, 1, 3).flatten(2)
        from megatron.core import parallel_state as mpu

        ranks, rank, group = (
            mpu.get_context_parallel_world_size(),
            mpu.get_context_parallel_rank(),
            mpu.get_context_parallel_group(),
        )
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        where = [_places(bounds, r, ranks) for r in range(ranks)]
        if ranks > 1:
            gather = torch.distributed.nn.functional.all_gather
            key, value = (torch.cat(gather(x.contiguous(), group=group)) for x in (key, value))
        sequence, position = (torch.cat(x) for x in zip(*where, strict=True))
        mine = where[rank]
        allowed = (mine[0].unsqueeze(1) == sequence) & (mine[1].unsqueeze(1) >= position)
        output = _attention(*(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)), allowed, self.scale)
        return output.squeeze(0).transpose(0, 1)


def _places(bounds, rank, ranks):
    """Sequence and position of every row that a rank has."""
    sequences, positions = [], []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        half = (end - start) // (2 * ranks)
        whole = torch.arange(end - start)
        rows = (
            whole
            if ranks == 1
            else torch.cat([whole[rank * half :][:half], whole[(2 * ranks - 1 - rank) * half :][:half]])
        )
        positions.append(rows)
        sequences.append(torch.full_like(rows, i))
    return torch.cat(sequences), torch.cat(positions)


def _attention(query, key, value, allowed, scale):
    """[b, heads, s, dim]; fewer heads of key and value are shared."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=scale
    )
