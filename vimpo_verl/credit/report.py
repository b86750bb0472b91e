"""The result as data: plain dictionaries, lists, numbers and strings, the same in the JSON file and in the page."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vimpo_verl.credit.scoring import Credit, overall
from vimpo_verl.credit.tokens import Encoded, pieces, special_ids

VERSION = 1  # of the JSON's layout
QUANTITIES = ("td", "value", "advantage")
_CLIPPED = 0.98  # colours are full from this quantile on, so that one token does not make all others pale


@dataclass(frozen=True)
class Scored:
    """An answer with its numbers."""

    encoded: Encoded
    credit: Credit


def as_json(groups: Sequence[Sequence[Scored]], tokenizer, settings: dict, notes: list[str]) -> dict:
    """Everything that is known of the answers.

    Args:
        groups: answers by prompt.
        tokenizer: for the text of the tokens.
        settings: models, beta, lam and so on, as the page shows them.
        notes: what a reader must know of the input.
    """
    special = special_ids(tokenizer)
    credits = [[scored.credit for scored in group] for group in groups]
    masks = [[scored.encoded.response_mask for scored in group] for group in groups]
    return {
        "version": VERSION,
        "settings": settings,
        "overall": {"prompts": len(groups), "answers": sum(map(len, groups)), **overall(credits, masks)},
        "notes": notes,
        "colour_limit": _colour_limits([credit for group in credits for credit in group]),
        "prompts": [
            {
                "text": "".join(pieces(tokenizer, group[0].encoded.prompt_ids)),
                "baseline": group[0].credit.baseline,
                "answers": [_answer(scored, tokenizer, special) for scored in group],
            }
            for group in groups
        ],
    }


def _answer(scored: Scored, tokenizer, special: set[int]) -> dict:
    credit, ids = scored.credit, scored.encoded.response_ids
    return {
        "where": scored.encoded.answer.where,
        "times": scored.encoded.answer.times,
        "reward": credit.reward,
        "baseline": credit.baseline,
        "judgement": credit.judgement,
        "residual": credit.residual,
        "tokens": {
            "id": ids,
            "text": pieces(tokenizer, ids),
            "special": [int(id_ in special) for id_ in ids],
            "mask": scored.encoded.response_mask,
            "log_prob": credit.log_prob.tolist(),
            "ref_log_prob": credit.ref_log_prob.tolist(),
            "kl": credit.kl.tolist(),
            "td": credit.td.tolist(),
            "value": credit.value.tolist(),
            "advantage": credit.advantage.tolist(),
        },
    }


def _colour_limits(credits: Sequence[Credit]) -> dict[str, float]:
    """Where the colour of each quantity is full. Values are coloured by how far they have gone from V0."""
    shown = {
        "td": [credit.td for credit in credits],
        "value": [credit.value + credit.judgement for credit in credits],
        "advantage": [credit.advantage for credit in credits],
    }
    return {name: torch.cat(shown[name]).abs().quantile(_CLIPPED).item() for name in QUANTITIES}


def table(data: dict) -> str:
    """A line an answer, for the terminal."""
    lines = ["prompt  answer  times  tokens       R      V0  S=sum td  residual"]
    for p, prompt in enumerate(data["prompts"], start=1):
        for a, answer in enumerate(prompt["answers"], start=1):
            tokens = len(answer["tokens"]["id"])
            lines.append(
                f"{p:6}  {a:6}  {answer['times']:5}  {tokens:6}  {answer['reward']:6.3g}  {answer['baseline']:6.3f}  "
                f"{answer['judgement']:+8.4f}  {answer['residual']:+8.4f}"
            )
    figures = {name: "none" if x is None else f"{x:.4g}" for name, x in data["overall"].items()}
    lines.append(
        f"over the answers shown: mean kl {figures['kl']}, outcome correlation {figures['outcome_correlation']}, "
        f"outcome AUC {figures['outcome_auc']}"
    )
    return "\n".join(lines)
