"""The task: running sums modulo 10.

Prompt "3141592653=", answer "3489487903": each digit of the answer is the sum of the digits up to there, modulo 10. The
answer can be checked, takes ten tokens, and there are ten billion prompts, so no prompt needs to be seen twice.
"""

import random
from itertools import accumulate

LENGTH = 10
DIGITS = "0123456789"
SEPARATOR = "="
PAD, EOS = "<pad>", "<|im_end|>"  # verl expects the end-of-turn token of Qwen, and its newline, of a Qwen3
VOCABULARY = [PAD, EOS, "\n", SEPARATOR, *DIGITS]
DATA_SOURCE = "running_sums"


def answer(digits: str) -> str:
    """The running sums of `digits`, modulo 10."""
    return "".join(str(total % 10) for total in accumulate(int(digit) for digit in digits))


def sample_digits(rng: random.Random) -> str:
    """One question."""
    return "".join(rng.choices(DIGITS, k=LENGTH))


def distinct_questions(count: int, seed: int) -> list[str]:
    """`count` different questions, the same ones for the same seed."""
    rng = random.Random(seed)
    questions: dict[str, None] = {}
    while len(questions) < count:
        questions.setdefault(sample_digits(rng))
    return list(questions)
