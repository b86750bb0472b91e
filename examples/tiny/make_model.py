"""Make the tiny model: a Qwen3 of 0.1 million parameters, its tokenizer, and a supervised warm-up.

The warm-up stops when a sampled answer is right about a third of the time: often enough that a group of eight samples
holds right and wrong answers, seldom enough that there is something left to learn.
"""

import argparse
import random
from pathlib import Path

import torch
from task import EOS, LENGTH, PAD, SEPARATOR, VOCABULARY, answer, distinct_questions, sample_digits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}" + SEPARATOR + "{% endif %}"
)
PROMPT_TOKENS = LENGTH + len(SEPARATOR)
EVALUATION_SEED = 987_654_321
BAR = "{desc} |{bar:40}| {n:.2f} of {total:.2f} [{elapsed}]"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocab_size: int, **special_tokens: int) -> Qwen3ForCausalLM:
    """vocab_size must equal len(tokenizer): verl masks surplus entries in vLLM only, and log-probs would differ."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **special_tokens},
    )
    return Qwen3ForCausalLM(config).float()


def encode(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> torch.Tensor:
    """[B, T] whole sequences: question, separator, answer, end."""
    texts = [question + SEPARATOR + answer(question) + EOS for question in questions]
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def answer_log_probs(model: Qwen3ForCausalLM, sequences: torch.Tensor) -> torch.Tensor:
    """[B, T] log-probability of each token of the right answer, given the right tokens before it."""
    logits = model(input_ids=sequences[:, :-1]).logits[:, PROMPT_TOKENS - 1 :]
    targets = sequences[:, PROMPT_TOKENS:]
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


@torch.no_grad()
def sampled_accuracy(model: Qwen3ForCausalLM, sequences: torch.Tensor) -> float:
    """Exactly what sampling at temperature 1 would give on average: only the right answer scores."""
    return answer_log_probs(model, sequences).sum(-1).exp().mean().item()


def warm_up(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    """Train on fresh questions until the accuracy is reached; returns the accuracy."""
    rng = random.Random(args.seed)
    held_out = encode(tokenizer, distinct_questions(512, EVALUATION_SEED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    progress = tqdm(total=args.accuracy, desc="warm-up: accuracy", bar_format=BAR, mininterval=1.0)
    for step in range(args.max_steps):
        batch = encode(tokenizer, [sample_digits(rng) for _ in range(args.batch_size)])
        loss = -answer_log_probs(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % args.check_every == 0:
            accuracy = sampled_accuracy(model, held_out)
            progress.update(min(accuracy, args.accuracy) - progress.n)
            if accuracy >= args.accuracy:
                progress.close()
                return accuracy
    raise SystemExit(f"warm-up: accuracy {accuracy:.3f} after {args.max_steps} steps, wanted {args.accuracy}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--accuracy", type=float, default=0.32, help="stop when sampled answers are right this often")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-steps", type=int, default=20_000)
    parser.add_argument("--check-every", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    disable_progress_bar()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    special_tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = make_model(len(tokenizer), **special_tokens)
    accuracy = warm_up(model, tokenizer, args)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"model: {model.num_parameters():,} parameters, accuracy {accuracy:.3f}, in {args.out}")


if __name__ == "__main__":
    main()
