"""From prompts and answers to tokens, and from tokens back to pieces of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimpo_verl.credit.answers import Answer

END_ADDED = "Text has no end token: {} was added to answers that were not cut off."
TOKENIZED_AGAIN = "Answers were tokenized again; where the policy wrote the same text in other tokens, numbers differ."


@dataclass(frozen=True)
class Encoded:
    """An answer in tokens."""

    answer: Answer
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]


class Encoder:
    """Makes the tokens that the policy saw and wrote, as far as text tells.

    Args:
        tokenizer: of both models.
        data: parquet files of the run, in which prompts without special tokens are looked up.
        template: arguments of the chat template.
        max_response_tokens: an answer of as many tokens was cut off; None: not known.
    """

    def __init__(
        self, tokenizer, data: Sequence[Path] = (), template: Mapping[str, Any] | None = None,
        max_response_tokens: int | None = None,
    ):  # fmt: skip
        self.tokenizer, self.data, self.template = tokenizer, data, dict(template or {})
        self.max_response_tokens = max_response_tokens
        self.notes: dict[str, None] = {}

    def encode(self, groups: Sequence[Sequence[Answer]]) -> tuple[list[list[Encoded]], list[str]]:
        """Tokens of all answers, and what is wrong, each a sentence."""
        encoded, problems = [], []
        prompts = self._prompts_in_data({group[0].prompt for group in groups if group[0].decoded})
        for group in groups:
            prompt_ids, problem = self._prompt_ids(group[0], prompts)
            problems += [problem] if problem else []
            encoded.append([self._encoded(answer, prompt_ids) for answer in group])
            problems += [f"{e.answer.where}: the answer has no tokens" for e in encoded[-1] if not e.response_ids]
        return encoded, problems

    def _encoded(self, answer: Answer, prompt_ids: list[int]) -> Encoded:
        if answer.response_ids is not None:
            ids = list(answer.response_ids)
        else:
            ids = self._ended(self.tokenizer(answer.response, add_special_tokens=False)["input_ids"], answer.finished)
        return Encoded(answer, prompt_ids, ids, list(answer.response_mask or [1] * len(ids)))

    def _ended(self, ids: list[int], finished: bool | None) -> list[int]:
        """With the end token, which decoding took away, unless the answer was cut off."""
        end = self.tokenizer.eos_token_id
        if finished is False or end is None or (ids and ids[-1] == end):
            return ids
        if finished is None and self.max_response_tokens is not None and len(ids) >= self.max_response_tokens:
            return ids
        self.notes[f"Text has no end token: {self.tokenizer.eos_token} was added to answers that were not cut off."] = (
            None
        )
        self.notes |= {END_ADDED.format(self.tokenizer.eos_token): None, TOKENIZED_AGAIN: None}
        return [*ids, end]

    def _prompt_ids(self, answer: Answer, prompts: Mapping[str, list[int]]) -> tuple[list[int], str]:
        if answer.prompt_ids is not None:
            ids = list(answer.prompt_ids)
        elif not isinstance(answer.prompt, str):
            ids = self.of_messages(answer.prompt)
        elif answer.decoded and answer.prompt in prompts:
            ids = prompts[answer.prompt]
        elif answer.decoded and self._template_has_special_tokens():
            return [], (
                f"{answer.where}: verl's dump has lost the chat template's special tokens, and the prompt "
                f"{answer.prompt!r:.80} is in no file of data: give the run's parquet with --data"
            )
        else:
            ids = self.tokenizer(answer.prompt, add_special_tokens=False)["input_ids"]
        return ids, "" if ids else f"{answer.where}: the prompt is empty: the first token has no state to be in"

    def of_messages(self, messages: list[dict]) -> list[int]:
        """As verl makes a prompt: the chat template, with the head of the answer to come."""
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self.template
            )
        )

    def _template_has_special_tokens(self) -> bool:
        if not self.tokenizer.chat_template:
            return False
        ids = self.of_messages([{"role": "user", "content": "0"}])
        return bool(set(ids) & set(special_ids(self.tokenizer)))

    def _prompts_in_data(self, texts: set[str]) -> dict[str, list[int]]:
        """Decoded prompt -> its tokens, for those of `texts` that a row of the data gives."""
        found: dict[str, list[int]] = {}
        for messages in _messages_in(self.data) if texts else ():
            # The template is slow, and few rows of a large set are looked for.
            if not any(str(messages[-1]["content"]).strip() in text for text in texts - found.keys()):
                continue
            ids = self.of_messages(messages)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if text in texts:
                found[text] = ids
            if found.keys() == texts:
                break
        return found


def _messages_in(paths: Iterable[Path]) -> Iterable[list[dict]]:
    import pyarrow.parquet

    for path in paths:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["prompt"]):
            yield from (prompt for prompt in batch.column("prompt").to_pylist() if prompt)


def special_ids(tokenizer) -> set[int]:
    """Tokens that are no text, as the end of a turn."""
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the decoded whole, special tokens included.

    A token that ends within a character (byte-level tokenizers) adds "", and the token that completes it adds it.
    """
    texts: list[str] = []
    before, start = 0, 0  # ids[before:start] is context, ids[start:] has not been given out yet
    for end in range(1, len(ids) + 1):
        known = _decode(tokenizer, ids[before:start])
        text = _decode(tokenizer, ids[before:end])[len(known) :]
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        before, start = start, end
    return texts


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
