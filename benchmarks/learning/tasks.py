"""The tasks: each has an exact verifier, an exact accuracy and the exact advantage of every token.

running_sums   every token decides: credit has little to give without noise (examples/one_file.py)
needles        K of T tokens decide, the rest are free: T / K is the dilution of the reward
path_star      the first token decides, the rest follow from it
reversal       every token decides, and nothing is known at the start
"""

import one_file
import torch
from one_file import Rollout, Transformer
from torch import Tensor, nn

HELD_OUT, HELD_OUT_SEED = 1024, 556


class OneRightAnswer(one_file.RunningSums):
    """A task whose prompts have one right answer each, `answers`: so values are products of probabilities, and exact."""

    start_accuracy = 0.34

    def make_policy(self) -> Transformer:
        return Transformer(self.vocabulary, self.prompt_tokens + self.response_tokens)

    def teacher(self) -> "OneRightAnswer":
        """What the starting policy imitates, until `accuracy` of it is `start_accuracy`."""
        return self

    @torch.no_grad()
    def advantages(self, policy: Transformer, rollout: Rollout) -> Tensor:
        """[B, T] A(s_t, y_t) of the policy. After a wrong token the value is 0; before, the rest must come out right."""
        prompts = rollout.sequences[:, : self.prompt_tokens]
        answers = self.answers(prompts)
        log_prob, _ = policy.score(torch.cat([prompts, answers], 1), self.response_tokens)
        right = rollout.sequences[:, self.prompt_tokens :] == answers
        return advantages_of(log_prob.flip(1).cumsum(1).flip(1).exp(), right)

    def first_wrong(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """[B] the place of the first wrong token, T if there is none; and whether only one token does not follow."""
        prompts, responses = rollout.sequences[:, : self.prompt_tokens], rollout.sequences[:, self.prompt_tokens :]
        right = responses == self.answers(prompts)
        return right.cumprod(1).sum(1), (~self.follows(prompts, responses)).sum(1) == 1

    def follows(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """[B, T] bool: whether a token is right, given the tokens before it, right or wrong."""
        return responses == self.answers(prompts)


class RunningSums(OneRightAnswer):
    """As in examples/one_file.py. A token follows if it is the one before it plus its digit."""

    def follows(self, prompts: Tensor, responses: Tensor) -> Tensor:
        before = nn.functional.pad(responses, (1, 0))[:, :-1]
        return responses == (before + prompts[:, :-1]) % 10


class Reversal(OneRightAnswer):
    """The prompt's bits in reverse, learnt from nothing: the setting of a published table on a CPU (arXiv 2604.06159)."""

    start_accuracy = 0.0
    vocabulary = 2

    def __init__(self, length: int = 8):
        self.prompt_tokens = self.response_tokens = length

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (count, self.prompt_tokens), generator=generator)

    def answers(self, prompts: Tensor) -> Tensor:
        return prompts.flip(1)


class PathStar(OneRightAnswer):
    """GRAPHS stars of `arms` paths of T nodes (arXiv 2403.06963, with graphs that are learnt instead of given in the prompt).

    The prompt names graph and goal, the last node of one arm; the answer is that arm. Its first node is the pivot, each
    other follows from the one before. The start walks along any arm, so it is right once in `arms` times.
    """

    GRAPHS = 16

    def __init__(self, tokens: int = 10, arms: int = 4):
        self.prompt_tokens, self.response_tokens, self.arms = 2, tokens, arms
        self.vocabulary, self.start_accuracy = arms + self.GRAPHS, 0.9 / arms
        noise = torch.rand(self.GRAPHS, tokens, arms, generator=torch.Generator().manual_seed(0))
        self.nodes = noise.argsort(-1)  # [graph, place, arm] -> node

    def teacher(self) -> "PathStar":
        return _AnyArm(self.response_tokens, self.arms)

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        graph = torch.randint(self.GRAPHS, (count,), generator=generator)
        return torch.stack([graph + self.arms, torch.randint(self.arms, (count,), generator=generator)], 1)

    def answers(self, prompts: Tensor) -> Tensor:
        graph, goal = prompts[:, 0] - self.arms, prompts[:, 1]
        return self._walk(graph, self._arm_of(graph, goal, -1))

    def follows(self, prompts: Tensor, responses: Tensor) -> Tensor:
        graph = prompts[:, 0] - self.arms
        right = [responses[:, 0] == self.answers(prompts)[:, 0]]
        for place in range(1, self.response_tokens):
            known = responses[:, place - 1].clamp(max=self.arms - 1)
            right.append(responses[:, place] == self.nodes[graph, place, self._arm_of(graph, known, place - 1)])
        return torch.stack(right, 1)

    def _arm_of(self, graph: Tensor, node: Tensor, place: int) -> Tensor:
        return (self.nodes[graph, place] == node[:, None]).int().argmax(1)

    def _walk(self, graph: Tensor, arm: Tensor) -> Tensor:
        return self.nodes[graph].gather(2, arm[:, None, None].expand(-1, self.response_tokens, 1))[..., 0]


class _AnyArm(PathStar):
    """Paths to anywhere."""

    def answers(self, prompts: Tensor) -> Tensor:
        return self._walk(prompts[:, 0] - self.arms, torch.randint(self.arms, (len(prompts),)))


def advantages_of(rest: Tensor, right: Tensor) -> Tensor:
    """A_t = V(s_{t+1}) - V(s_t), where V is 0 after a wrong token.

    Args:
        rest: [B, T], the probability that the tokens from t on come out right, given that those before are.
        right: [B, T] bool, whether token t is right.
    """
    alive = right.cumprod(1)
    before = nn.functional.pad(alive, (1, 0), value=1)[:, :-1] * rest
    after = alive * nn.functional.pad(rest, (0, 1), value=1.0)[:, 1:]
    return after - before


class MemorylessPolicy(nn.Module):
    """Logits of every response token from the prompt and the position alone: one small network, gated by the position.

    A forward a prompt gives them all, and probabilities of whole answers are exact products.
    """

    def __init__(self, vocabulary: int, prompt_tokens: int, response_tokens: int, width: int = 64):
        super().__init__()
        self.digits = nn.Parameter(torch.randn(prompt_tokens, vocabulary, width))
        self.gates = nn.Parameter(torch.randn(response_tokens, width))
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def logits(self, prompts: Tensor) -> Tensor:
        """[B, P] -> [B, T, V]; equal prompts in a row share a forward"""
        distinct, index = torch.unique_consecutive(prompts, dim=0, return_inverse=True)
        features = self.digits[torch.arange(distinct.shape[1]), distinct].sum(1, keepdim=True)
        x = features * self.gates
        return self.head(self.norm(x + self.down(nn.functional.relu(self.up(x)))))[index]

    def score(self, sequences: Tensor, response_tokens: int) -> tuple[Tensor, Tensor]:
        logits = self.logits(sequences[:, :-response_tokens])
        return logits.log_softmax(-1).gather(-1, sequences[:, -response_tokens:, None])[..., 0], logits

    @torch.no_grad()
    def sample(self, prompts: Tensor, response_tokens: int) -> tuple[Tensor, Tensor]:
        log_p = self.logits(prompts).log_softmax(-1)
        responses = torch.distributions.Categorical(logits=log_p).sample()
        return torch.cat([prompts, responses], 1), log_p.gather(-1, responses[..., None])[..., 0]


class Needles:
    """K decisions, evenly spread over T tokens; the j-th decision's right token is the prompt's j-th digit plus j.

    The other tokens are free. The policy knows prompt and position only, so a value is a product of probabilities.
    """

    start_accuracy = 0.34
    digits = 8
    vocabulary = digits + 1  # and the blank

    def __init__(self, tokens: int = 64, decisions: int = 4):
        self.prompt_tokens, self.response_tokens = decisions, tokens
        self.places = torch.arange(decisions) * (tokens // decisions) + tokens // decisions // 2

    def teacher(self) -> "Needles":
        return self

    def make_policy(self) -> MemorylessPolicy:
        return MemorylessPolicy(self.vocabulary, self.prompt_tokens, self.response_tokens)

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, K]"""
        return torch.randint(1, self.vocabulary, (count, self.prompt_tokens), generator=generator)

    def decisions(self, prompts: Tensor) -> Tensor:
        """[B, K], the right token of each decision"""
        return (prompts - 1 + torch.arange(self.prompt_tokens)) % self.digits + 1

    def answers(self, prompts: Tensor) -> Tensor:
        """[B, T], a right answer: its free tokens are random, so imitating it leaves them free"""
        free = torch.randint(1, self.vocabulary, (len(prompts), self.response_tokens))
        return free.index_copy(1, self.places, self.decisions(prompts))

    def judge(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        right = (responses[:, self.places] == self.decisions(prompts)).all(1)
        return right.float(), torch.ones(responses.shape)

    def accuracy(self, policy: MemorylessPolicy, prompts: Tensor) -> float:
        return self._decision_log_probs(policy, prompts).sum(1).exp().mean().item()

    @torch.no_grad()
    def _decision_log_probs(self, policy: MemorylessPolicy, prompts: Tensor) -> Tensor:
        log_p = policy.logits(prompts)[:, self.places].log_softmax(-1)
        return log_p.gather(-1, self.decisions(prompts)[..., None])[..., 0]

    def advantages(self, policy: MemorylessPolicy, rollout: Rollout) -> Tensor:
        """[B, T] A(s_t, y_t) of the policy; 0 on free tokens"""
        prompts = rollout.sequences[:, : self.prompt_tokens]
        rest = self._decision_log_probs(policy, prompts).flip(1).cumsum(1).flip(1).exp()
        right = rollout.sequences[:, self.prompt_tokens :][:, self.places] == self.decisions(prompts)
        zeros = rest.new_zeros(len(prompts), self.response_tokens)
        return zeros.index_copy(1, self.places, advantages_of(rest, right))

    def first_wrong(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """[B] the place of the first wrong decision, T if there is none; and whether it is the only one"""
        prompts, responses = rollout.sequences[:, : self.prompt_tokens], rollout.sequences[:, self.prompt_tokens :]
        right = responses[:, self.places] == self.decisions(prompts)
        number = right.cumprod(1).sum(1)
        places = torch.cat([self.places, torch.tensor([self.response_tokens])])
        return places[number], (~right).sum(1) == 1


TASKS = {"running_sums": RunningSums, "needles": Needles, "path_star": PathStar, "reversal": Reversal}
