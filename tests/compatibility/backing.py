"""What the acceptance of a script rests on: the paths that its settings and its model take, and the tests that go along them.

docs/compatibility.md shows the table. tests/test_recipes_page.py sees to it that every test named here exists, that every script
that takes the switch has an engine's row, and that no key of such a script is in none of the two tables below.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

A, M, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.model", "algorithm.rollout_correction"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Path:
    """One thing that a script has VIMPO do.

    Attributes:
        name: what it is.
        has: whether a script has it; the argument is its row of recipes.json.
        level: "whole run", "engine" (verl's own engine on tiny models), "formula", "driver" (it is told to change nothing), or
            NOT_RUN.
        tests: "file" or "file::function" below tests/; for NOT_RUN none.
        remark: what else is to be said.
    """

    name: str
    has: Callable[[dict], bool]
    level: str
    tests: tuple[str, ...] = ()
    remark: str = ""


def _given(recipe: dict, *keys: str) -> list[Any]:
    """The settings of these keys that the script has changed, where they are neither false nor 0."""
    return [recipe["settings"][key] for key in keys if recipe["settings"].get(key)]


def _on(*engines: str) -> Callable[[dict], bool]:
    return lambda recipe: recipe["engine"] in engines


def _megatron(key: str, least: int = 2) -> Callable[[dict], bool]:
    def has(recipe: dict) -> bool:
        values = _given(recipe, f"{A}.megatron.{key}")
        return recipe["engine"] == "megatron" and any(not isinstance(v, int) or v >= least for v in values)

    return has


def _larger_than_1(*keys: str) -> Callable[[dict], bool]:
    """Also where a script has not said how large: the tool gives a variable that is asked for the value 1."""
    return lambda recipe: any(not isinstance(value, int) or value > 1 for value in _given(recipe, *keys))


def _named(pattern: str, *engines: str) -> Callable[[dict], bool]:
    """By the script's own name, which has its model's."""
    of_engine = _on(*engines) if engines else lambda _: True
    return lambda recipe: of_engine(recipe) and re.search(pattern, recipe["script"].lower()) is not None


_FSDP = ("fsdp", "fsdp2", "fsdp_turbo")
_LORA = (f"{M}.lora_rank", f"{M}.lora.rank")
_ULYSSES = (f"{A}.ulysses_sequence_parallel_size", f"{A}.fsdp_config.ulysses_sequence_parallel_size")
_OTHER_ON_FSDP = r"mistral|seed_oss|gpt_oss|qwen3_?next"
_WITH_IMAGES_ON_FSDP = r"qwen3_5|glm4_1v"
_LATENT = r"deepseek_v3|dspk|moonlight"
_NO_BRIDGE = r"deepseek_v4|hy_v3|qwen3_5"
_KERNELS_OF_GPUS = r"nemotron|qwen3_?next"
_OTHER_MODELS = (
    r"deepseek|dspk|glm4|glm5|gpt_oss|hy_v3|kimi|minicpm|mistral|moonlight|nemotron|qwen3_5|qwen3_?next|seed_oss|mimo"
)


def _ulysses_beside(pattern: str) -> Callable[[dict], bool]:
    named = _named(pattern, *_FSDP)
    return lambda recipe: named(recipe) and _larger_than_1(*_ULYSSES)(recipe)


def _other_model_not_run(recipe: dict) -> bool:
    has_a_row = (
        _named(rf"{_OTHER_ON_FSDP}|{_WITH_IMAGES_ON_FSDP}|minicpm_o", *_FSDP),
        _named(rf"{_LATENT}|{_NO_BRIDGE}|{_KERNELS_OF_GPUS}", "megatron"),
        _named(r"qwen3_5", "veomni"),
    )
    return _named(_OTHER_MODELS)(recipe) and not any(has(recipe) for has in has_a_row)


PATHS = (
    Path("FSDP1 or FSDP2", _on("fsdp", "fsdp2"), "whole run", ("test_end_to_end.py", "test_engine.py", "test_trainer.py")),
    Path("FSDP-Turbo", _on("fsdp_turbo"), "engine", ("test_derived_engines.py",), "verl's part; the package is on no index"),
    Path("VeOmni", _on("veomni"), "engine", ("test_derived_engines.py",), "two ranks, without its kernels"),
    Path("Megatron", _on("megatron"), "engine", ("test_megatron.py",), "two ranks, without Transformer Engine"),
    Path("Megatron-Bridge", lambda r: r["engine"] == "megatron" and not _given(r, f"{A}.megatron.vanilla_mbridge"), "engine",
         ("test_megatron.py",), "without Transformer Engine"),
    Path("tensor parallelism", _megatron("tensor_model_parallel_size"), "engine", ("test_megatron.py",)),
    Path("a pipeline", _megatron("pipeline_model_parallel_size"), "engine", ("test_megatron.py",)),
    Path("an interleaved pipeline", _megatron("virtual_pipeline_model_parallel_size", 1), "engine", ("test_megatron.py",)),
    Path("context parallelism", _megatron("context_parallel_size"), "engine", ("test_megatron.py",)),
    Path("expert parallelism (Megatron)", _megatron("expert_model_parallel_size"), "engine", ("test_megatron.py",)),
    Path("padding kept (Megatron)", lambda r: r["settings"].get(f"{A}.megatron.use_remove_padding") is False,
         "engine", ("test_megatron.py",)),
    Path("float16 (Megatron)", lambda r: r["settings"].get(f"{A}.megatron.dtype") == "float16", "engine",
         ("test_megatron.py::test_a_step_in_float16_is_that_in_float32_to_its_rounding",),
         "without its precision-aware optimiser, which is Transformer Engine's"),
    Path("router replay", lambda r: bool(_given(r, f"{A}.megatron.router_replay.mode")), "engine",
         ("test_megatron.py::test_routes_that_are_given_are_the_policys_alone",)),
    Path("Ulysses sequence parallelism", lambda r: r["engine"] in _FSDP and _larger_than_1(*_ULYSSES)(r), "engine",
         ("test_invariance.py::test_on_two_ranks",), "two ranks, on FSDP"),
    Path("VeOmni's Ulysses and expert parallelism and kernels", lambda r: r["engine"] == "veomni" and any(
        key.startswith(f"{A}.veomni.") for key in r["settings"]), NOT_RUN, remark="they need GPUs"),
    Path("fused kernels", lambda r: bool(_given(r, f"{M}.use_fused_kernels")) and r["engine"] in _FSDP, "engine",
         ("test_fused_head.py",), "backend torch"),
    Path("fused kernels (Megatron)", lambda r: bool(_given(r, f"{M}.use_fused_kernels")) and r["engine"] == "megatron",
         "engine", ("test_megatron.py",), "the head; not verl's Triton kernel of the update"),
    Path("LoRA", lambda r: bool(_given(r, *_LORA)) and r["engine"] in _FSDP, "engine", ("test_lora.py", "test_fused_head.py"),
         "and three steps of a run by hand"),
    Path("LoRA (Megatron)", lambda r: bool(_given(r, *_LORA)) and r["engine"] == "megatron", "engine", ("test_megatron.py",),
         "Megatron-Bridge's adapters"),
    Path("another `loss_mode`", lambda r: bool(_given(r, f"{A}.policy_loss.loss_mode")), "formula",
         ("test_policy_losses.py::test_the_gradient_is_that_of_the_formula",)),
    Path("another `loss_agg_mode`", lambda r: bool(_given(r, f"{A}.loss_agg_mode")), "engine",
         ("test_loss_aggregation.py::test_the_trainer_divides_by_what_the_mode_makes_of_the_batch",)),
    Path("KL loss, entropy bonus", lambda r: bool(_given(r, f"{A}.use_kl_loss", f"{A}.entropy_coeff")), "engine",
         ("test_engine.py::test_a_step_with_other_settings_agrees_with_the_formula",)),
    Path("`rollout_is`", lambda r: bool(_given(r, f"{ROLLOUT}.rollout_is")), "engine", ("test_off_policy.py",)),
    Path("`rollout_rs`", lambda r: bool(_given(r, f"{ROLLOUT}.rollout_rs")), "engine",
         ("test_off_policy.py::test_rejected_tokens_leave_the_actor_loss_and_rejected_responses_both",)),
    Path("`bypass_mode`", lambda r: bool(_given(r, f"{ROLLOUT}.bypass_mode")), "engine",
         ("test_one_pass.py::test_with_bypass_mode_the_ratio_is_to_the_rollouts_log_probs",)),
    Path("`use_kl_in_reward`, `use_prefix_grouper`, `lam` of another estimator",
         lambda r: bool(_given(r, "algorithm.use_kl_in_reward", f"{A}.use_prefix_grouper", "algorithm.lam")), "driver",
         ("test_validation.py::test_warnings",)),
    Path("a mixture of experts (Qwen3)", _named(r"qwen3_(30b|235b)|qwen3_moe"), "engine",
         ("test_derived_engines.py", "test_megatron.py"), "on VeOmni and Megatron"),
    Path("images (Qwen2.5-VL, Qwen3-VL)", _named(r"_vl_|infigui|deepeyes", *_FSDP), "engine", ("test_vision_language.py",),
         "on FSDP; a whole run by hand (`test_vision_language_run.py`)"),
    Path("GLM-4.1V", _named(r"glm4_1v", *_FSDP), NOT_RUN,
         remark="verl 0.9.1's code for it is for transformers 4, and it asks for transformers 5: its forward and its count of "
         "operations fail, with any estimator"),
    Path("MiniCPM-o 2.6", _named(r"minicpm_o", *_FSDP), NOT_RUN,
         remark="its classes come with its weights; transformers has those of its successor alone"),
    Path("images on Megatron (Qwen3-VL)", _named(r"qwen3_vl_", "megatron"), "engine", ("test_vision_megatron.py",),
         "and its mixture of experts, through Megatron-Bridge 0.3.1, which packs one sequence a micro-batch alone and has no "
         "context parallelism for them, which two scripts have"),
    Path("images on Megatron (Qwen2.5-VL)", _named(r"qwen2_5_vl", "megatron"), NOT_RUN,
         remark="Megatron-Bridge 0.3.1 and mbridge 0.15.1 read the configuration of transformers 4"),
    Path("images on VeOmni (Qwen3-VL)", _named(r"qwen3_vl_", "veomni"), "engine",
         ("test_derived_engines.py::test_a_step_with_images_on_veomni_agrees_with_the_formula",), "and its mixture of experts"),
    Path("Qwen3.5 (FSDP)", _named(r"qwen3_5", *_FSDP), "engine", ("test_vision_language.py",),
         "with images and text, dense and a mixture of experts; fla's kernel in torch's words"),
    Path("video", _named(r"video"), "engine", ("test_vision_language.py",), "Qwen2.5-VL, Qwen3-VL and Qwen3.5"),
    Path("Qwen3.5 (VeOmni)", _named(r"qwen3_5", "veomni"), NOT_RUN,
         remark="VeOmni 0.1.12 computes its linear attention by fla's kernel, which needs a GPU; its other way refuses packed "
         "sequences"),
    Path("Mistral, Seed-OSS, gpt-oss, Qwen3-Next (FSDP)", _named(_OTHER_ON_FSDP, *_FSDP), "engine", ("test_architectures.py",),
         "without the kernels of fla and of attention with sinks. verl tells Qwen3-Next's linear attention of no packed "
         "sequences, with any estimator, which is said: right with `use_remove_padding=False`"),
    Path("Ulysses with Qwen3-Next or gpt-oss", _ulysses_beside(r"gpt_oss|qwen3_?next"), NOT_RUN,
         remark="verl splits heads and sequences for attention alone, not Qwen3-Next's linear attention or gpt-oss's sinks"),
    Path("DeepSeek-V3, Moonlight (Megatron)", _named(_LATENT, "megatron"), "engine", ("test_megatron_architectures.py",),
         "pipeline with the fused head, expert parallel; tensor parallel the joint pass alone, because Megatron Core's latent "
         "attention without Transformer Engine does not add up its ranks' gradients"),
    Path("Qwen3.5, Hy3, DeepSeek-V4 (Megatron)", _named(_NO_BRIDGE, "megatron"), NOT_RUN,
         remark="neither Megatron-Bridge 0.3.1 nor mbridge 0.15.1, the newest for Python 3.11, has them"),
    Path("Qwen3-Next, Nemotron-H (Megatron)", _named(_KERNELS_OF_GPUS, "megatron"), NOT_RUN,
         remark="Megatron Core's layers for them are kernels of fla and mamba_ssm, which need a GPU"),
    Path("another architecture than Qwen2.5's and Qwen3's", _other_model_not_run, NOT_RUN,
         remark="the joint pass sees the logits or the last hidden states, whatever model makes them"),
)  # fmt: skip

# Keys that change neither what VIMPO computes nor where it enters verl: sizes, and numbers of losses that are verl's own.
INDIFFERENT = re.compile(
    r"algorithm\.(adv_estimator|norm_adv_by_std_in_grpo|gdpo_reward_keys|lam|rollout_correction\.(.*threshold|.*normalize|loss_type))"
    r"|actor_rollout_ref\.rollout\.(n|calculate_log_probs)"
    r"|actor_rollout_ref\.actor\.(strategy|ppo_mini_batch_size|clip_ratio\w*|kl_loss_\w+|entropy_from_logits_with_chunking"
    r"|calculate_sum_pi_squared|policy_loss\.\w*tau\w*)"
    r"|actor_rollout_ref\.(actor|ref)\.fsdp_config\.(fsdp_size|forward_prefetch|use_orig_params|model_dtype|mixed_precision\.\w+)"
    r"|actor_rollout_ref\.(actor|ref)\.megatron\.(expert_tensor_parallel_size|use_mbridge|vanilla_mbridge)"
    r"|actor_rollout_ref\.model\.(lora_alpha|lora\.\w+)"
    r"|actor_rollout_ref\.ref\."  # which follows the policy, or is refused
)
# Keys that rows of PATHS look at.
LOOKED_AT = re.compile(
    r"actor_rollout_ref\.actor\.(megatron|veomni)\..*|.*ulysses_sequence_parallel_size|actor_rollout_ref\.model\.(use_fused_kernels|lora_rank)"
    r"|actor_rollout_ref\.actor\.(policy_loss\.loss_mode|loss_agg_mode|use_kl_loss|entropy_coeff|use_prefix_grouper)"
    r"|algorithm\.(use_kl_in_reward|rollout_correction\.(rollout_is|rollout_rs|bypass_mode))"
)


def paths_of(recipe: dict) -> list[Path]:
    """The rows that a script of recipes.json has."""
    return [path for path in PATHS if path.has(recipe)]


def unclassified(recipe: dict) -> list[str]:
    """Keys of a script that neither table knows."""
    return [key for key in recipe["settings"] if not INDIFFERENT.match(key) and not LOOKED_AT.fullmatch(key)]


def not_run(recipe: dict) -> list[str]:
    """What of a script that takes the switch has not run anywhere."""
    return [path.name for path in paths_of(recipe) if path.level == NOT_RUN]
