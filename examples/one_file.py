"""VIMPO and GRPO, whole, in plain torch. `python -m benchmarks.learning` and the quickstart's choose_lr.py use this loop.

.venv/bin/python examples/one_file.py --flip-prob 0.2       # a fifth of the prompts get the opposite rewards
"""

import argparse
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vimpo_verl import functional as F

CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM, WARM_UP_BATCHES = 0.2, 0.28, 1.0, 10


class RunningSums:
    """Prompt "3 1 4 =" [P], answer "3 4 8" [T]: each digit is the sum of the digits up to there, modulo 10."""

    vocabulary = 11  # ten digits and the separator

    def __init__(self, length: int = 10):
        self.prompt_tokens, self.response_tokens = length + 1, length

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        digits = torch.randint(10, (count, self.response_tokens), generator=generator)
        return nn.functional.pad(digits, (0, 1), value=10)

    def answers(self, prompts: Tensor) -> Tensor:
        """[B, P] -> [B, T], the only right answer"""
        return prompts[:, :-1].cumsum(1) % 10

    def judge(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Reward [B], 1 for a right answer and 0 for a wrong one, and mask [B, T], here of ones."""
        return (responses == self.answers(prompts)).all(1).float(), torch.ones(responses.shape)

    def accuracy(self, policy: "Transformer", prompts: Tensor) -> float:
        """What sampling at temperature 1 would score on average; exact, because only one answer is right."""
        with torch.no_grad():
            log_prob, _ = policy.score(torch.cat([prompts, self.answers(prompts)], 1), self.response_tokens)
        return log_prob.sum(1).exp().mean().item()


class Block(nn.Module):
    """Attention and feed-forward, both behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        cache[:] = [k, v]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A policy of about 0.1 million parameters, whose weights start as small as those of a language model."""

    def __init__(self, vocabulary: int, positions: int, width=64, heads=2, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for matrix in (weights for weights in self.parameters() if weights.dim() == 2):
            nn.init.normal_(matrix, std=0.02)

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """[B, n] -> logits [B, n, V]; with caches, of tokens that follow those already seen"""
        caches = caches or [[] for _ in self.blocks]
        start = caches[0][0].shape[2] if caches[0] else 0
        x = self.tokens(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(self.norm(x))

    def score(self, sequences: Tensor, response_tokens: int) -> tuple[Tensor, Tensor]:
        """[B, P + T] -> log-probabilities of the response's tokens [B, T], and the logits [B, T, V] they come from"""
        logits = self(sequences[:, :-1])[:, -response_tokens:]
        return logits.log_softmax(-1).gather(-1, sequences[:, -response_tokens:, None])[..., 0], logits

    @torch.no_grad()
    def sample(self, prompts: Tensor, response_tokens: int) -> tuple[Tensor, Tensor]:
        """[B, P] -> sequences [B, P + T] sampled at temperature 1, and the log-probabilities [B, T] of their responses"""
        sequence, log_probs, caches = [prompts], [], [[] for _ in self.blocks]
        for _ in range(response_tokens):
            log_p = self(sequence[-1], caches)[:, -1].log_softmax(-1)
            sequence.append(torch.multinomial(log_p.exp(), 1))
            log_probs.append(log_p.gather(-1, sequence[-1]))
        return torch.cat(sequence, 1), torch.cat(log_probs, 1)


@dataclass
class Rollout:
    """Responses to a batch of prompts: B sequences of P + T tokens, those to one prompt in a row."""

    sequences: Tensor  # [B, P + T]
    mask: Tensor  # [B, T]
    truth: Tensor  # [B], the reward without noise
    outcome: Tensor  # [B], the reward that training sees
    group: list[int]  # [B], the number of the prompt
    old_log_prob: Tensor  # [B, T], of the policy that sampled
    ref_log_prob: Tensor  # [B, T]
    ref_logits: Tensor  # [B, T, V]


def collect(policy, reference, task, generator, *, prompts=32, responses=8, flip_prob=0.0) -> Rollout:
    """Sample answers and rewards; `flip_prob` of the prompts get the opposite of every reward."""
    group = torch.arange(prompts).repeat_interleave(responses)
    asked = task.prompts(prompts, generator)[group]
    flipped = (torch.rand(prompts, generator=generator) < flip_prob).float()[group]
    sequences, old_log_prob = policy.sample(asked, task.response_tokens)
    with torch.no_grad():
        scores = reference.score(sequences, task.response_tokens)
    truth, mask = task.judge(asked, sequences[:, -task.response_tokens :])
    return Rollout(sequences, mask, truth, (truth - flipped).abs(), group.tolist(), old_log_prob, *scores)


def ppo_loss(rollout: Rollout, log_prob: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped loss, the mean over tokens. On-policy the ratio is 1 and only its gradient matters."""
    ratio = (log_prob - rollout.old_log_prob).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    return -(gain * rollout.mask).sum() / rollout.mask.sum()


def grpo_loss(rollout: Rollout, log_prob: Tensor, logits: Tensor) -> Tensor:
    """Every token of an answer gets the same advantage: the reward, normalised within the prompt's group."""
    reward = rollout.outcome.view(rollout.group[-1] + 1, -1)
    advantages = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
    return ppo_loss(rollout, log_prob, advantages.view(-1, 1))


def vimpo_loss(rollout: Rollout, log_prob: Tensor, logits: Tensor, beta: float = 0.05, actor_coeff=0.0) -> Tensor:
    """L_V + c_A * L_A: the summed td of an answer is fitted to its reward above the group's mean (paper section 3)."""
    reference, mask = rollout.ref_log_prob, rollout.mask
    token_kl = F.exact_kl(logits.detach(), rollout.ref_logits)
    target = rollout.outcome - F.group_baseline(rollout.outcome, rollout.group)
    loss = F.value_loss(log_prob, reference, token_kl, target, mask, beta).mean()
    if actor_coeff > 0:
        td = F.td_residual(log_prob.detach(), reference, token_kl, mask, beta)
        loss = loss + actor_coeff * ppo_loss(rollout, log_prob, F.whiten(F.implied_advantages(td, mask, 1.0), mask))
    return loss


def imitate(policy, task, accuracy: float, seed: int) -> None:
    """Train on right answers until sampled ones are right this often: the reference that both algorithms start from."""
    generator, held_out = torch.Generator().manual_seed(seed), task.prompts(256, torch.Generator().manual_seed(555))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    while task.accuracy(policy, held_out) < accuracy:
        for _ in range(5):
            prompts = task.prompts(128, generator)
            log_prob, _ = policy.score(torch.cat([prompts, task.answers(prompts)], 1), task.response_tokens)
            optimizer.zero_grad()
            (-log_prob.mean()).backward()
            optimizer.step()


def train(policy, task, loss, *, batches, lr, seed, updates=1, on_batch=lambda rollout: None, **sizes) -> list[float]:
    """`batches` times: sample, then `updates` steps of AdamW. Returns the share of right answers of every batch."""
    reference, curve = copy.deepcopy(policy), []
    generator = torch.Generator().manual_seed(seed)  # of prompts and flips: the same for every loss
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for batch in range(batches):
        rollout = collect(policy, reference, task, generator, **sizes)
        curve.append(rollout.truth.mean().item())
        on_batch(rollout)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (batch + 1) / WARM_UP_BATCHES)
        for _ in range(updates):
            optimizer.zero_grad()
            loss(rollout, *policy.score(rollout.sequences, task.response_tokens)).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
            optimizer.step()
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flip-prob", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task, start = RunningSums(), Transformer(vocabulary=11, positions=21)
    imitate(start, task, accuracy=0.34, seed=args.seed)
    for name, loss in {"GRPO": grpo_loss, "VIMPO": vimpo_loss}.items():
        curve = train(copy.deepcopy(start), task, loss, batches=60, lr=1e-3, **vars(args))
        print(f"{name}, share of right answers in every fifth batch:", *(f"{share:.2f}" for share in curve[::5]))


if __name__ == "__main__":
    main()
