"""The policy as its own verifier: scores of an evaluation's answers, among which `vimpo_verl.ranking` chooses."""

from dataclasses import replace
from pathlib import Path

from vimpo_verl.credit import models, scoring
from vimpo_verl.credit.answers import answers_of
from vimpo_verl.credit.inputs import describe_pair
from vimpo_verl.credit.tokens import Encoded, Encoder

JUDGEMENT, LOG_PROB = "S", "mean log-prob"


class Judge:
    """Scores answers by a policy and its reference: their configurations first, their weights with `load`.

    The temperature of the distributions and the estimator of kappa are those of the policy's run, where its
    configuration is found, else 1 and the exact one: S is about the policy that was trained, whatever the temperature
    at which the answers were sampled.

    Args:
        policy, reference: as for `inputs.describe_pair`.

    Raises:
        ValueError: what is wrong with them, a line each.
    """

    def __init__(self, policy: Path, reference: Path | None):
        self._policy, self._reference, run, problems = describe_pair(policy, reference)
        if problems:
            raise ValueError("\n".join(problems))
        self.temperature, self._lam = run.temperature, run.lam
        self._vimpo = replace(run.vimpo, beta=1.0)  # a ranking does not depend on it
        # vLLM's chat, which wrote the answers, gives the template no arguments.
        self._encoder = Encoder(self._policy.tokenizer)

    def load(self, dtype: str, device: str | None = None) -> None:
        """The weights; arguments and errors as for `models.load_pair`."""
        self._models = models.load_pair(self._policy, self._reference, device, dtype)

    @property
    def notes(self) -> list[str]:
        """What a reader must know about the tokens of the answers so far."""
        return list(self._encoder.notes)

    def scores(self, row: dict, where: str) -> dict[str, list[float]]:
        """Scores of the answers to one question, in nats.

        Args:
            row: with prompt, responses and accs, as examples/math/evaluate.py stores them.
            where: for messages.

        Returns:
            "S": S / beta = sum_t (log pi - log pi_ref - kappa_t), so that beta is in no number; "mean log-prob": of a
            token under the policy. One number a response.

        Raises:
            ValueError: an answer has no tokens, or a number is not finite.
        """
        (group,), problems = self._encoder.encode([list(answers_of(row, where))])
        if problems:
            raise ValueError("\n".join(problems))
        known: dict[tuple[int, ...], tuple[float, float]] = {}  # an answer that was sampled twice is scored once
        for encoded in group:
            ids = tuple(encoded.response_ids)
            known[ids] = known.get(ids) or self._scores_of(encoded)
        judgements, log_probs = zip(*(known[tuple(encoded.response_ids)] for encoded in group), strict=True)
        return {JUDGEMENT: list(judgements), LOG_PROB: list(log_probs)}

    def _scores_of(self, encoded: Encoded) -> tuple[float, float]:
        statistics = scoring.statistics_of(*self._models, encoded, self.temperature)
        credit = scoring.credit_of(statistics, encoded.answer, encoded.response_mask, self._vimpo, self._lam)
        return credit.judgement, credit.log_prob.mean().item()
