"""The learning rate of the quickstart: the same rates for GRPO and VIMPO, in plain torch instead of verl.

    HF_HUB_OFFLINE=1 .venv/bin/python examples/tiny/choose_lr.py --model outputs/tiny/model

The model, the task, the batch and the optimiser are those of run_tiny.sh; sampling and the update are written out here, so
that a run takes seconds instead of minutes. Every update is on-policy, so the clipping of both algorithms is idle.
Prints, over the seeds: the accuracy at the end, and the lowest reward of any step on the way.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from make_model import encode, sampled_accuracy
from task import EOS, SEPARATOR, answer, distinct_questions, sample_digits
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from vimpo_verl import functional as F
from vimpo_verl.batch import compute_batch
from vimpo_verl.config import VimpoConfig

PROMPTS, RESPONSES, RESPONSE_TOKENS, WARM_UP = 32, 8, 12, 10  # as in run_tiny.sh
HELD_OUT_SEED = 555


@dataclass
class Rollout:
    """Sampled responses to PROMPTS prompts, RESPONSES each."""

    sequences: Tensor  # [B, P + T]
    mask: Tensor  # [B, T] 1 up to the end token
    outcome: Tensor  # [B]
    group: list[int]  # [B] number of the prompt

    def token_log_probs(self, model: Qwen3ForCausalLM) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, T] of the sampled tokens, and the logits [B, T, V] they come from."""
        tokens = self.mask.shape[1]
        logits = model(input_ids=self.sequences[:, :-1]).logits[:, -tokens:]
        sampled = self.sequences[:, -tokens:, None]
        return logits.log_softmax(-1).gather(-1, sampled)[..., 0], logits


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, tokenizer, rng: random.Random) -> Rollout:
    """Responses at temperature 1, with their rewards."""
    distinct = [sample_digits(rng) for _ in range(PROMPTS)]
    questions = [question for question in distinct for _ in range(RESPONSES)]
    prompts = tokenizer([question + SEPARATOR for question in questions], add_special_tokens=False)["input_ids"]
    sequences = inputs = torch.tensor(prompts)
    finished, mask, cache = torch.zeros(len(questions), dtype=torch.bool), [], None
    for _ in range(RESPONSE_TOKENS):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        inputs = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
        mask.append(~finished)
        finished = finished | (inputs[:, 0] == tokenizer.eos_token_id)
        sequences = torch.cat([sequences, inputs], dim=1)
    mask = torch.stack(mask, dim=1)
    outcome = [
        float(tokenizer.decode(row[-RESPONSE_TOKENS:][valid]).removesuffix(EOS) == answer(question))
        for row, valid, question in zip(sequences, mask, questions, strict=True)
    ]
    group = [index // RESPONSES for index in range(len(questions))]
    return Rollout(sequences, mask.float(), torch.tensor(outcome), group)


def policy_gradient(log_prob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """PPO's loss where the policy is the one that sampled: the ratio is 1 and only its gradient matters."""
    return -(advantages * (log_prob - log_prob.detach()).exp() * mask).sum() / mask.sum()


def grpo_loss(model: Qwen3ForCausalLM, reference: Qwen3ForCausalLM, rollout: Rollout) -> Tensor:
    log_prob, _ = rollout.token_log_probs(model)
    reward = rollout.outcome.view(PROMPTS, RESPONSES)
    advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
    return policy_gradient(log_prob, advantage.view(-1, 1), rollout.mask)


class VimpoLoss:
    """VIMPO's loss in one run: beta is measured over the first batch and then kept."""

    def __init__(self):
        self.config = VimpoConfig()

    def __call__(self, model: Qwen3ForCausalLM, reference: Qwen3ForCausalLM, rollout: Rollout) -> Tensor:
        log_prob, logits = rollout.token_log_probs(model)
        with torch.no_grad():
            ref_log_prob, ref_logits = rollout.token_log_probs(reference)
            token_kl = F.exact_kl(logits, ref_logits)
            batch = compute_batch(
                old_log_prob=log_prob,
                ref_log_prob=ref_log_prob,
                token_kl=token_kl,
                response_mask=rollout.mask,
                outcome=rollout.outcome,
                group=rollout.group,
                config=self.config,
                lam=1.0,
            )
        beta = batch.beta.value
        self.config = replace(self.config, beta=beta)
        value = F.value_loss(log_prob, ref_log_prob, token_kl, batch.returns[:, 0], rollout.mask, beta).mean()
        return value + batch.actor_coeff * policy_gradient(log_prob, batch.advantages, rollout.mask)


LOSSES = {"grpo": lambda: grpo_loss, "vimpo": VimpoLoss}  # makes the loss of a run


def train(algo: str, lr: float, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """One run; returns the accuracy at the end and the lowest reward of a step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model, reference = (Qwen3ForCausalLM.from_pretrained(args.model).float() for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    rewards, loss = [], LOSSES[algo]()
    for _ in range(args.steps):
        rollout = sample(model, tokenizer, rng)
        rewards.append(rollout.outcome.mean().item())
        optimizer.zero_grad()
        loss(model, reference, rollout).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held_out = encode(tokenizer, distinct_questions(512, HELD_OUT_SEED))
    return sampled_accuracy(model, held_out), min(rewards)


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
            accuracies, lowest = zip(*(train(algo, lr, seed, args) for seed in args.seeds), strict=True)
            each = " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            print(f"{lr:6.1e}  {algo:>5}  {mean(accuracies):.2f} ({each})  {min(lowest):.2f}", flush=True)


if __name__ == "__main__":
    main()
