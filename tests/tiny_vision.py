"""A tiny Qwen3-VL with tokenizer, processor and data, for a whole run: python tests/tiny_vision.py FOLDER.

Needs torchvision and qwen-vl-utils, as verl does for images; no hub. Two layers and random weights: it can be trained, not asked.
"""

import io
import random
import sys
from pathlib import Path

import pandas
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

PAD, EOS = "<pad>", "<eos>"
VISION = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
TURNS = ("<|im_start|>", "<|im_end|>")  # verl asks a Qwen3-VL's tokenizer for them
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz ?="
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
COLOURS = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
SIZES = ((24, 16), (16, 16), (32, 16))  # pixels; 4 by 4 a patch, 2 by 2 patches a token


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and those that stand for images."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *VISION.values(), *TURNS, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, extra_special_tokens=VISION
    )
    fast.add_tokens(list(TURNS), special_tokens=True)
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path) -> None:
    """Model, tokenizer and processor."""
    from vision_models import configuration  # here, because verl loads this file for the reward

    tokenizer = make_tokenizer()
    small = {
        "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**small),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**small),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    config = configuration("qwen3_vl")
    for name, token in VISION.items():
        ours = {"vision_bos_token": "vision_start_token", "vision_eos_token": "vision_end_token"}.get(name, name)
        setattr(config, f"{ours}_id", tokenizer.convert_tokens_to_ids(token))
    for part in (config, config.text_config):
        part.pad_token_id, part.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.text_config.head_dim = 32  # vLLM's CPU attention knows no smaller heads
    config.text_config.rope_parameters["mrope_section"] = [8, 4, 4]
    config.text_config.vocab_size = len(tokenizer)  # equal: verl masks surplus entries in vLLM only
    config.text_config.architectures = ["Qwen3ForCausalLM"]  # vLLM's CPU platform asks for one, and none is usual
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder)


def make_data(path: Path, rows: int) -> None:
    """A picture of one colour each, in verl's columns; every fourth question has none."""
    draw = random.Random(0)
    data = []
    for index in range(rows):
        letter, image = draw.choice(list(COLOURS)), io.BytesIO()
        Image.new("RGB", draw.choice(SIZES), COLOURS[letter]).save(image, format="PNG")
        with_image = index % 4 != 3
        data.append(
            {
                "data_source": "tiny_vision",
                "prompt": [{"role": "user", "content": "<image>which?" if with_image else "which?"}],
                "images": [{"bytes": image.getvalue()}] if with_image else [],
                "reward_model": {"style": "rule", "ground_truth": letter},
                "extra_info": {"index": index},
            }
        )
    pandas.DataFrame(data).to_parquet(path)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_) -> float:
    """Whether the first letter of the answer is in the right half of the alphabet for the colour: chance is a half."""
    return float(bool(solution_str) and (solution_str[0] < "i") == (ground_truth == "r"))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    make_model(out / "model")
    make_data(out / "train.parquet", 64)
