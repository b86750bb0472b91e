"""The command line of `vimpo credit`."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument(
        "policy", type=Path, help="a run's folder, a checkpoint (.../global_step_N) or a Hugging Face folder"
    )
    parser.add_argument(
        "--reference", type=Path, help="the model that training started from (default: as the run's configuration says)"
    )
    parser.add_argument(
        "--answers",
        type=Path,
        help="JSON lines with prompt, response and score; verl's rollout or validation dump, a file or its folder (the "
        "last step); or responses of examples/math/evaluate.py (default: the run's trainer.rollout_data_dir)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        help="the run's parquet files: verl's dumps lack special tokens (default: the run's)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("credit"), help="folder for credit.html and credit.json (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=_count, default=4, help="prompts to show, mixed ones first (default: %(default)s)"
    )
    parser.add_argument("--per-prompt", type=_count, default=8, help="answers to show of each (default: %(default)s)")
    parser.add_argument("--beta", type=_positive, help="default: as the checkpoint or the run's configuration says")
    parser.add_argument("--lam", type=_fraction, help="default: the run's, or 1")
    parser.add_argument("--temperature", type=_positive, help="of the rollout; default: the run's, or 1")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float64"], default="float32", help="default: %(default)s"
    )


def main(arguments: argparse.Namespace, write: Callable[[str], None] = print) -> int:
    """Score, write credit.json and credit.html; 0, or 2 with every problem found."""
    from vimpo_verl.credit.inputs import gather

    inputs, problems = gather(arguments)
    problems = problems or _unwritable(arguments.out)  # before the hours that scoring may take
    if not problems:
        try:
            data = _scored(inputs, arguments)
        except ValueError as error:
            problems = [str(error)]
    if problems:
        print("vimpo credit cannot go on:", *(f"  - {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return FAILED
    from vimpo_verl.credit import page, report

    written = arguments.out / "credit.json", arguments.out / "credit.html"
    written[0].write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
    written[1].write_text(page.html(data), encoding="utf-8")
    write(report.table(data))
    for note in data["notes"]:
        write(f"Note: {note}")
    write(f"Written: {', '.join(f'{path} ({path.stat().st_size / 1e6:.1f} MB)' for path in written)}")
    return 0


def _unwritable(folder: Path) -> list[str]:
    """Why nothing can be written to a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"--out {folder} cannot be written: {error}"]
    return [] if os.access(folder, os.W_OK) else [f"--out {folder} cannot be written: permission denied"]


def _scored(inputs, arguments: argparse.Namespace) -> dict:
    """Both models over all answers: the data of the report.

    Raises:
        ValueError: a checkpoint cannot be merged, or a number is not finite.
    """
    from tqdm import tqdm

    from vimpo_verl.credit import models, report, scoring

    policy, reference = models.load_pair(inputs.policy, inputs.reference, arguments.device, arguments.dtype)
    progress = tqdm(total=sum(map(len, inputs.groups)), desc="answers", disable=None)
    groups = []
    for group in inputs.groups:
        groups.append([])
        for encoded in group:
            statistics = scoring.statistics_of(policy, reference, encoded, inputs.temperature)
            mask = encoded.response_mask
            credit = scoring.credit_of(statistics, encoded.answer, mask, inputs.vimpo, inputs.lam)
            groups[-1].append(report.Scored(encoded, credit))
            progress.update()
    progress.close()
    settings = {**inputs.settings, "dtype": arguments.dtype}
    return report.as_json(groups, inputs.policy.tokenizer, settings, inputs.notes)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in [0, 1]")
    return value
