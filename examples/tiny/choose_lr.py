"""The learning rate of the quickstart: the same rates for GRPO and VIMPO, in plain torch instead of verl.

    HF_HUB_OFFLINE=1 .venv/bin/python examples/tiny/choose_lr.py --model outputs/tiny/model

The model, the task, the batch and the optimiser are those of run_tiny.sh; the losses and the training loop are those of
examples/one_file.py, so that a run takes seconds instead of minutes. Prints, over the seeds: the accuracy at the end, and
the lowest reward of any step on the way.
"""

import argparse
import random
import sys
from pathlib import Path
from statistics import mean

import torch
from make_model import encode, sampled_accuracy
from task import EOS, SEPARATOR, answer, distinct_questions, sample_digits
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[1]))
from one_file import Transformer, grpo_loss, train, vimpo_loss

LOSSES = {"grpo": grpo_loss, "vimpo": vimpo_loss}
HELD_OUT_SEED = 555


class Policy(nn.Module):
    """The quickstart's model with the two methods that the loop calls, score and sample."""

    score = Transformer.score

    def __init__(self, model: Qwen3ForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits

    @torch.no_grad()
    def sample(self, prompts: Tensor, response_tokens: int) -> tuple[Tensor, Tensor]:
        """As one_file.Transformer.sample."""
        sequence, log_probs, cache = [prompts], [], None
        for _ in range(response_tokens):
            output = self.model(input_ids=sequence[-1], past_key_values=cache, use_cache=True)
            cache, log_p = output.past_key_values, output.logits[:, -1].log_softmax(-1)
            sequence.append(torch.multinomial(log_p.exp(), 1))
            log_probs.append(log_p.gather(-1, sequence[-1]))
        return torch.cat(sequence, 1), torch.cat(log_probs, 1)


class Task:
    """The quickstart's task, for the loop: answers end with an end token."""

    response_tokens = 12  # as in run_tiny.sh

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, P]"""
        questions = [sample_digits(self.rng) + SEPARATOR for _ in range(count)]
        return torch.tensor(self.tokenizer(questions, add_special_tokens=False)["input_ids"])

    def judge(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [B] and mask [B, T], which is 1 up to the end token."""
        ended = (responses == self.tokenizer.eos_token_id).cumsum(1)
        mask = torch.nn.functional.pad(ended, (1, 0))[:, :-1] == 0
        questions = [text.removesuffix(SEPARATOR) for text in self.tokenizer.batch_decode(prompts)]
        written = [
            self.tokenizer.decode(row[valid]).removesuffix(EOS) for row, valid in zip(responses, mask, strict=True)
        ]
        right = [text == answer(question) for question, text in zip(questions, written, strict=True)]
        return torch.tensor(right, dtype=torch.float32), mask.float()


def run(algo: str, lr: float, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """One run; returns the accuracy at the end and the lowest reward of a step."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = Policy(Qwen3ForCausalLM.from_pretrained(args.model).float())
    rewards = train(policy, Task(tokenizer, seed), LOSSES[algo], batches=args.steps, lr=lr, seed=seed)
    held_out = encode(tokenizer, distinct_questions(512, HELD_OUT_SEED))
    return sampled_accuracy(policy.model, held_out), min(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 6e-4, 1e-3, 1.5e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    disable_progress_bar()
    print("    lr   algo  accuracy at the end: mean (each seed)      lowest reward on the way", flush=True)
    for lr in args.rates:
        for algo in LOSSES:
            accuracies, lowest = zip(*(run(algo, lr, seed, args) for seed in args.seeds), strict=True)
            each = " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            print(f"{lr:6.1e}  {algo:>5}  {mean(accuracies):.2f} ({each})  {min(lowest):.2f}", flush=True)


if __name__ == "__main__":
    main()
