"""Batches for the engine tests: samples, and what verl's agent loop would store for them."""

from dataclasses import dataclass, replace

import torch
from tensordict import NonTensorStack, TensorDict

VOCABULARY = 48
EOS = 1
LIMIT = 12  # tokens, of the longest responses


@dataclass(frozen=True)
class Sample:
    """One response: `mask` is 1 on the tokens that the policy wrote."""

    uid: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    mask: tuple[int, ...]
    outcome: float
    is_padding: bool = False
    image: object = None  # tests/vision_models.py: what a vision-language model is given beside the tokens


def make_samples(seed: int = 0, prompts: int = 4, group_size: int = 2, tool_tokens: bool = True) -> list[Sample]:
    """Samples of ragged length in group order; every third has tool output in the middle, the last one no valid
    token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def tokens(count):
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    samples = []
    for p in range(prompts):
        prompt = tokens(draw(2, 7))
        for _ in range(group_size):
            response = tokens(draw(4, LIMIT + 1))
            mask = [1] * len(response)
            if tool_tokens and len(samples) % 3 == 0:
                mask[1:3] = [0, 0]
            samples.append(Sample(f"p{p}", prompt, response, tuple(mask), float(draw(0, 2))))
    if tool_tokens:
        samples[-1] = replace(samples[-1], mask=(0,) * len(samples[-1].mask))
    return samples


def make_uneven_samples() -> list[Sample]:
    """Groups of 1, 3 and 4; one empty response; the group of 4 cut at the limit, one of them with tool output."""
    samples = make_samples(seed=5, prompts=8, group_size=1, tool_tokens=False)
    uids = ("one", "three", "three", "three", "four", "four", "four", "four")
    samples = [replace(s, uid=uid, outcome=float(i % 2)) for i, (s, uid) in enumerate(zip(samples, uids, strict=True))]
    samples[2] = replace(samples[2], response=(), mask=())
    for i in range(4, 8):
        response = (samples[i].response * 3)[:LIMIT]
        samples[i] = replace(samples[i], prompt=samples[4].prompt, response=response, mask=(1,) * LIMIT)
    samples[5] = replace(samples[5], mask=(1, 1, 0, 0) + (1,) * (LIMIT - 4))
    return samples


def placeholders(count: int) -> list[Sample]:
    """Placeholder samples as verl makes them: padding_utils.construct_minimal_padding_template."""
    return [Sample("pad", (EOS,) * 127, (EOS,), (0,), 0.0, is_padding=True)] * count


# ---- in verl's no-padding format -------------------------------------------------------------------------------------


def nested(rows: list) -> torch.Tensor:
    """Ragged rows as verl stores them; rows that are not tensors are tokens, and may be empty."""
    rows = [row if isinstance(row, torch.Tensor) else torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def to_tensordict(samples: list[Sample], **meta) -> TensorDict:
    """The fields that verl's agent loop stores, for these samples, and non-tensor `meta`."""
    from verl.utils import tensordict_utils as tu

    fields = {
        "input_ids": nested([s.prompt + s.response for s in samples]),
        "position_ids": nested([position_ids(s) for s in samples]),
        "prompts": nested([s.prompt for s in samples]),
        "responses": nested([s.response for s in samples]),
        "response_mask": nested([s.mask for s in samples]),
        "loss_mask": nested([s.mask for s in samples]),
    }
    if any(s.image for s in samples):
        fields["multi_modal_inputs"] = NonTensorStack(*[s.image.inputs if s.image else {} for s in samples])
    data = TensorDict(fields, batch_size=len(samples))
    tu.assign_non_tensor(data, **meta)
    return data


def position_ids(sample: Sample):
    """[T] tokens' positions, or [4, T] with those of an image's rows and columns, as verl stores them."""
    return sample.image.position_ids if sample.image else range(len(sample.prompt + sample.response))


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """[B] rows of ragged length -> [B, T], zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def response_part(rows, samples: list[Sample]) -> list[torch.Tensor]:
    """Results over prompt and response -> over the response, where position t - 1 predicts token t."""
    return [row[len(s.prompt) - 1 : len(s.prompt) + len(s.response) - 1] for row, s in zip(rows, samples, strict=True)]
