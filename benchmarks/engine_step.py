"""Joint pass and update of VIMPO against GRPO's passes, on verl's own FSDP engine: time, peak memory, model forwards.

Side by side in one process, with the workers of tests/engine_harness.py and a random-weight Qwen3 of the given shape.
Four recipes: GRPO (old log-probs, update), GRPO with KL (old, reference, update with KL loss), VIMPO in two passes (joint
pass, update) and in one (update). Everything of a step but generation. The stages of all recipes are timed in turn; one ratio
is to GRPO and one to GRPO with KL, in the same round: the median over the rounds, and the smallest and largest. --tokens,
--vocabulary and --ranks take several values, for growth: each is varied with the first of the others. Several ranks are
processes of one gloo group, which share the tokens and this machine. --clock cpu counts processor seconds, for a machine that
others use, too. --micro-batch: samples that a forward takes at once. The reference is stored as each recipe has it by default: in
float32 for GRPO with KL, which is verl's default, and in the precision of the forward for VIMPO, which its trainer sets.

    python benchmarks/engine_step.py --repeats 9 --json benchmarks/results/engine_step_cpu.json
    OMP_NUM_THREADS=1 python benchmarks/engine_step.py --tokens 1024 512 2048 \\
        --vocabulary 32000 64000 128000 --ranks 1 2 --json benchmarks/results/growth_cpu.json
    python benchmarks/engine_step.py --shape qwen3-1.7b --vocabulary 151936 --tokens 16384 --length 2048 --micro-batch 4 \\
        --dtype bf16 --json benchmarks/results/engine_step_gpu.json      (on a GPU)
"""

import contextlib
import sys
import tempfile
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import before_verl  # noqa: F401  first: verl reads it when it is imported
import engine_harness as harness
import torch
from report import arguments, interleaved, save, show, spread
from tensor_memory import TensorMemory, extra_bytes

from vimpo_verl.one_pass import Statistics

# hidden, intermediate, layers, heads, key-value heads, head dimension
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 16),
    "small": (256, 512, 4, 4, 2, 64),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128),
}
RECIPES = ("grpo", "grpo_kl", "vimpo", "vimpo_one_pass")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(folder: Path, shape: str, vocabulary: int) -> None:
    """One random-weight model, as policy and as reference."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, intermediate, layers, heads, kv_heads, head_dim = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        Qwen3ForCausalLM(config).save_pretrained(folder / "policy")
    (folder / "ref").symlink_to(folder / "policy")


def make_samples(tokens: int, vocabulary: int, length: int) -> list[harness.Sample]:
    """tokens / length samples of `length` tokens, half of them prompt, in groups of two."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(max(2, tokens // length)):
        ids = tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist())
        half = length // 2
        samples.append(harness.Sample(f"p{i // 2}", ids[:half], ids[half:], (1,) * (length - half), float(i % 2)))
    return samples


class Stages:
    """The stages of a step of each recipe, over the same workers and batch, of which every rank has its share."""

    def __init__(self, folder: Path, samples: list[harness.Sample], mine: slice, setting: harness.Setting):
        from verl.workers.engine_workers import TrainingWorker
        from verl.workers.utils.losses import ppo_loss

        self.all_samples, self.samples, self.mine, self.setting = samples, samples[mine], mine, setting
        self.workers = harness.make_workers(folder, setting)
        self.verls_ref = self.workers.ref
        if setting.ref_model_dtype != "fp32":
            self.verls_ref = harness.make_worker(
                TrainingWorker, folder / "ref", replace(setting, ref_model_dtype="fp32"), forward_only=True
            )
        self.vimpo_loss = self.workers.actor.loss_fn
        self.actor_config = self.vimpo_loss.ppo_loss.keywords["config"]
        self.ppo_loss = ppo_loss
        self.per_token = harness.gather_rows(self.joint_pass())
        from vimpo_verl.batch import compute_batch

        padded = harness.padded
        self.batch = compute_batch(
            old_log_prob=padded(self.per_token["log_probs"]),
            ref_log_prob=padded(self.per_token["ref_log_probs"]),
            token_kl=padded(self.per_token["token_kl"]),
            response_mask=padded([torch.tensor(s.mask) for s in samples]),
            outcome=torch.tensor([s.outcome for s in samples]),
            group=[s.uid for s in samples],
            config=harness.knobs_of(setting),
            lam=1.0,
        )
        # Equal models have no advantages; those of a batch before that had some.
        before = Statistics(advantage_mean=0.0, advantage_std=0.1, residual_rms=0.5, outcome_correlation=0.5)
        self.one_pass_data = harness.one_pass_data(samples, self.batch, replace(setting, before=before))

    def of(self, recipe: str) -> dict[str, Any]:
        """Name -> what to call."""
        old = {"old log-probs": partial(self.infer, self.workers.actor, True)}
        ref = {"reference": partial(self.infer, self.verls_ref, False)}
        return {
            "grpo": {**old, "update": partial(self.update, kl=False)},
            "grpo_kl": {**old, **ref, "update": partial(self.update, kl=True)},
            "vimpo": {"joint pass": self.joint_pass, "update": self.update_vimpo},
            "vimpo_one_pass": {"update": self.update_in_one_pass},
        }[recipe]

    def joint_pass(self):
        return harness.joint_pass(self.workers, self.samples, self.setting)

    def infer(self, worker, entropy: bool):
        data = harness.to_tensordict(self.samples, temperature=1.0, calculate_entropy=entropy, compute_loss=False)
        return worker.infer_batch(data)

    def update_vimpo(self):
        self.workers.actor.set_loss_fn(self.vimpo_loss)
        return self._train()

    def update_in_one_pass(self):
        self.workers.actor.set_loss_fn(self.vimpo_loss)
        return self.workers.actor.train_mini_batch(self.one_pass_data[self.mine])

    def update(self, kl: bool):
        from verl.workers.config import FSDPActorConfig

        config = FSDPActorConfig(
            strategy=self.setting.strategy, rollout_n=2, ppo_micro_batch_size_per_gpu=1, use_kl_loss=kl
        )
        self.workers.actor.set_loss_fn(partial(self.ppo_loss, config=config))
        return self._train()

    def _train(self):
        data = harness.training_data(self.all_samples, self.per_token, self.batch, self.setting)[self.mine]
        return self.workers.actor.train_mini_batch(data)


@contextlib.contextmanager
def counted_forwards():
    """Yields a list that gets the number of sequences of every model forward."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    verls, forwards = FSDPEngineWithLMHead.forward_step, []

    def forward_step(self, micro_batch, loss_function, forward_only):
        forwards.append(len(micro_batch))
        return verls(self, micro_batch, loss_function, forward_only)

    FSDPEngineWithLMHead.forward_step = forward_step
    try:
        yield forwards
    finally:
        FSDPEngineWithLMHead.forward_step = verls


def measure(stages: Stages, repeats: int, clock: str) -> dict[str, dict[str, Any]]:
    """Recipe -> times of a step in each round, bytes of its passes and of its update, forwards a sequence."""
    calls = {(recipe, name): call for recipe in RECIPES for name, call in stages.of(recipe).items()}
    taken = interleaved(calls, repeats, clock)
    found = {}
    for recipe in RECIPES:
        mine = [(name, call) for (whose, name), call in calls.items() if whose == recipe]
        forwards, used = 0.0, {}
        for name, call in mine:
            with counted_forwards() as counted:
                used[name] = extra_bytes(call, DEVICE)
            forwards += sum(counted) / len(stages.samples)
        update_bytes = used.pop("update")
        rounds = zip(*(taken[recipe, name] for name, _ in mine), strict=True)
        found[recipe] = {
            "step s": [sum(stages_s) for stages_s in rounds],
            "update bytes": update_bytes,
            "passes bytes": max(used.values(), default=0),
            "forwards": forwards,
        }
    return found


def rows_of(found: dict[str, dict[str, Any]], **where: int) -> list[dict]:
    """A row for each recipe."""
    base, rows = found["grpo"], []
    for recipe, mine in found.items():
        to = {
            name: [own / others for own, others in zip(mine["step s"], found[name]["step s"], strict=True)]
            for name in ("grpo", "grpo_kl")
        }
        rows.append(
            {
                **where,
                "recipe": recipe,
                "forwards a sequence": mine["forwards"],
                "step s": median(mine["step s"]),
                "to GRPO": median(to["grpo"]),
                "rounds": spread(to["grpo"]),
                "to GRPO with KL": median(to["grpo_kl"]),
                "rounds with KL": spread(to["grpo_kl"]),
                "update MB": mine["update bytes"] / 1e6,
                "update ratio": mine["update bytes"] / base["update bytes"],
                "passes MB": mine["passes bytes"] / 1e6,
                "peak ratio": max(mine["update bytes"], mine["passes bytes"])
                / max(base["update bytes"], base["passes bytes"]),
            }
        )
    return rows


def large_tensors(stages: Stages, vocabulary: int) -> dict[str, dict[str, int]]:
    """Shapes of logits-sized tensors that the update of each recipe makes."""
    found = {}
    for recipe in RECIPES:
        with TensorMemory(large_elements=vocabulary * 64) as memory:
            stages.of(recipe)["update"]()
        found[recipe] = {str(shape): count for shape, count in sorted(memory.large.items()) if vocabulary in shape}
    return found


def on_rank(rank: int, folder: Path, tokens: int, vocabulary: int, ranks: int, options) -> tuple[dict, dict]:
    """What this rank measures with its share of the tokens, and the logits-sized tensors of its updates."""
    samples = make_samples(tokens, vocabulary, options.length)
    mine = harness.slice_of_rank(len(samples), rank, ranks)
    setting = harness.Setting(
        micro_batch_size=options.micro_batch,
        dtype=options.dtype,
        ref_model_dtype=options.dtype,
        use_fused_kernels=bool(options.fused),
        equal_models=True,
    )
    stages = Stages(folder, samples, mine, setting)
    return measure(stages, options.repeats, options.clock), large_tensors(stages, vocabulary)


def grid(options) -> list[tuple[int, int, int]]:
    """(tokens, vocabulary, ranks): each varied with the first of the others."""
    tokens, vocabulary, ranks = options.tokens[0], options.vocabulary[0], options.ranks[0]
    points = chain(
        ((t, vocabulary, ranks) for t in options.tokens),
        ((tokens, v, ranks) for v in options.vocabulary),
        ((tokens, vocabulary, r) for r in options.ranks),
    )
    return list(dict.fromkeys(points))


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], shape="small", vocabulary=[32_000], tokens=[2048], ranks=[1], length=256, repeats=5,
        micro_batch=1, dtype="fp32", fused=0, clock="wall",
    )  # fmt: skip
    harness.start_process_group()
    title = f"A step on verl's FSDP engine, {options.shape}"
    rows, large = [], {}
    for tokens, vocabulary, ranks in grid(options):
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), options.shape, vocabulary)
            share = (Path(folder), tokens, vocabulary, ranks, options)
            found, large = on_rank(0, *share) if ranks == 1 else harness.run_on_ranks(ranks, on_rank, *share)[0]
        rows += rows_of(found, tokens=tokens, V=vocabulary, ranks=ranks)
        print(rows[-1], flush=True)
        save(title, rows, options.json, logits_sized_tensors_of_update=large)
    show(title, rows, options.json, logits_sized_tensors_of_update=large)
    for recipe, shapes in large.items():
        print(f"logits-sized tensors made in the update of {recipe}: {sum(shapes.values())} {shapes}")


if __name__ == "__main__":
    main()
