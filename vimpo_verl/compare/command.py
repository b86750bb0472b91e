"""The command line of `vimpo compare`."""

import argparse
import glob
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vimpo_verl.compare import report
from vimpo_verl.compare.comparison import Side, compare
from vimpo_verl.compare.metrics import AXES
from vimpo_verl.compare.runs import UnreadableRun, read_run

_SEED = re.compile(r"[-_.]?seed[-_]?\d+$", re.IGNORECASE)
_RUN_FILES = ("metrics", "log", "run")  # names of a run's files that say nothing about which run it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN[,RUN...]",
        help="a run's folder, verl's metrics file, TensorBoard events or console log; wildcards are allowed. Runs of "
        "one label are seeds of one side; without LABEL it is the folder's name without -seed<number>. The others are "
        "compared with the first side",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        help="folder for the table, JSON and plots (default: %(default)s)",
    )
    names = [axis.name for axis in AXES]
    parser.add_argument("--by", nargs="+", choices=names, default=names, help="what to align by (default: all)")
    parser.add_argument(
        "--last", type=_fraction, default=0.1, help="a value is the mean over this last fraction (default: %(default)s)"
    )
    parser.add_argument(
        "--confidence", type=_fraction, default=0.95, help="of the intervals over seeds (default: %(default)s)"
    )
    parser.add_argument("--no-plots", action="store_true", help="only the table and the JSON")


def main(arguments: argparse.Namespace, write: Callable[[str], None] = print) -> int:
    """Print and write the comparison; 0, or 1 if a run that was named could not be read at all."""
    sides, unreadable = read_sides(arguments.runs)
    if not sides:
        for problem in unreadable:
            write(f"vimpo compare: {problem}")
        return 1
    axes = [axis for axis in AXES if axis.name in arguments.by]
    comparison = compare(sides, axes, arguments.last, arguments.confidence)
    text = report.text(comparison, unreadable, arguments.confidence)
    write(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "comparison.md").write_text(text, encoding="utf-8")
    data = report.as_json(comparison, unreadable, arguments.confidence)
    (arguments.out / "comparison.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    plots = [] if arguments.no_plots or not comparison.tables else _plots(comparison, arguments, write)
    written = [arguments.out / "comparison.md", arguments.out / "comparison.json", *plots]
    write(f"Written: {', '.join(map(str, written))}")
    return 1 if unreadable else 0


def read_sides(specifications: Sequence[str]) -> tuple[list[Side], list[str]]:
    """Runs by label, in the order of the command line, and the runs that could not be read at all.

    Args:
        specifications: "[LABEL=]PATH[,PATH...]", wildcards in a PATH allowed.
    """
    sides: dict[str, Side] = {}
    unreadable, seen = [], set()
    for specification in specifications:
        label, _, paths = specification.rpartition("=")
        for path in _paths(paths):
            if path.resolve() in seen:
                unreadable.append(f"{path} is named twice: a run cannot be two seeds")
                continue
            seen.add(path.resolve())
            try:
                run = read_run(path)
            except UnreadableRun as error:
                unreadable.append(str(error))
                continue
            name = label or label_of(path)
            sides.setdefault(name, Side(name, [])).runs.append(run)
    return list(sides.values()), unreadable


def _paths(text: str) -> list[Path]:
    found = []
    for pattern in text.split(","):
        found += [Path(match) for match in sorted(glob.glob(pattern))] or [Path(pattern)]
    return found


def label_of(path: Path) -> str:
    """The run's name without its seed: outputs/grpo-seed3 and outputs/grpo-seed3/metrics.jsonl are both grpo."""
    path = path.absolute()
    name = path.stem if path.is_file() and path.stem not in _RUN_FILES and "tfevents" not in path.name else None
    if name is None:
        name = path.parent.name if path.is_file() else path.name
    return _SEED.sub("", name) or name


def _plots(comparison, arguments: argparse.Namespace, write: Callable[[str], None]) -> list[Path]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        write("No plots: matplotlib is not installed here: pip install matplotlib")
        return []
    from vimpo_verl.compare import plots

    return plots.draw(comparison, arguments.out, arguments.confidence)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return value
