"""The command line of `vimpo compare`."""

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vimpo_verl.compare import report
from vimpo_verl.compare.comparison import Comparison, Side, compare
from vimpo_verl.compare.metrics import AXES
from vimpo_verl.compare.runs import Source, UnreadableRun, find_runs, read_source

# At the end of a name, as in grpo-seed3 or, with Hydra's overrides, algorithm.adv_estimator=grpo,data.seed=3.
_SEED = re.compile(r"(?:[-_.]?seed[-_]?\d+|,?(?:\w+\.)*seed=\d+)$", re.IGNORECASE)
_RUN_FILES = ("metrics", "log", "run")  # names of a run's files that say nothing about which run it is
_EVENTS = "tensorboard"  # and of the folder in it
CANNOT_WRITE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN[,RUN...]",
        help="a run's folder, verl's metrics file, TensorBoard events or console log, or a folder with several runs, "
        "as verl's PROJECT; wildcards are allowed, and = and , in paths that exist. Runs of one label are seeds of one "
        "side; without LABEL it is the run's name without -seed<number>. The others are compared with the first side",
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
    """Write and print the comparison; 0, 1 if a run that was named could not be read at all, 2 if nothing was written."""
    sides, unreadable = read_sides(arguments.runs)
    if not sides:
        for problem in unreadable:
            write(f"vimpo compare: {problem}")
        return 1
    axes = [axis for axis in AXES if axis.name in arguments.by]
    comparison = compare(sides, axes, arguments.last, arguments.confidence)
    text = report.text(comparison, unreadable, arguments.confidence)
    try:  # before anything is printed: whoever reads that may stop
        written, note = _write_files(comparison, text, unreadable, arguments)
    except OSError as error:
        write(text)
        print(f"vimpo compare: --out {arguments.out} cannot be written: {error}", file=sys.stderr)
        return CANNOT_WRITE
    write(f"{text}{note}")
    write(f"Written: {', '.join(map(str, written))}")
    return 1 if unreadable else 0


def _write_files(
    comparison: Comparison, text: str, unreadable: list[str], arguments: argparse.Namespace
) -> tuple[list[Path], str]:
    """The files written, and what is to be said of those that are not."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = [arguments.out / "comparison.md", arguments.out / "comparison.json"]
    written[0].write_text(text, encoding="utf-8")
    data = report.as_json(comparison, unreadable, arguments.confidence)
    written[1].write_text(json.dumps(data, indent=1), encoding="utf-8")
    if arguments.no_plots or not comparison.tables:
        return written, ""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return written, "\nNo plots: matplotlib is not installed here: pip install matplotlib"
    from vimpo_verl.compare import plots

    return [*written, *plots.draw(comparison, arguments.out, arguments.confidence)], ""


# ---- which runs are meant ----------------------------------------


def read_sides(specifications: Sequence[str]) -> tuple[list[Side], list[str]]:
    """Runs by label, in the order of the command line, and the runs that could not be read at all.

    Args:
        specifications: "[LABEL=]PATH[,PATH...]", wildcards in a PATH allowed.
    """
    sides: dict[str, Side] = {}
    unreadable, seen = [], set()
    for name, source in _sources(specifications, unreadable):
        if source.path.resolve() in seen:
            unreadable.append(f"{source.path} is named twice: a run cannot be two seeds")
            continue
        seen.add(source.path.resolve())
        try:
            run = read_source(source)
        except (UnreadableRun, OSError) as error:
            unreadable.append(str(error))
            continue
        sides.setdefault(name, Side(name, [])).runs.append(run)
    return list(sides.values()), unreadable


def _sources(specifications: Sequence[str], unreadable: list[str]) -> Iterator[tuple[str, Source]]:
    """Every run with its label; paths without a run are put into `unreadable`."""
    for specification in specifications:
        label, paths = label_and_paths(specification)
        for path in paths:
            try:
                sources = find_runs(path)
            except (UnreadableRun, OSError) as error:
                unreadable.append(str(error))
                continue
            for source in sources:
                yield label or (label_of(path) if len(sources) == 1 else label_within(path, source)), source


def label_and_paths(text: str) -> tuple[str, list[Path]]:
    """The parts of "[LABEL=]PATH[,PATH...]", where paths may have "=" and "," in them, as Hydra's multirun makes them.

    The whole as paths that exist comes first, then the label up to that "=" after which fewest paths are missing.
    """
    whole, missing = _paths(text)
    if not missing:
        return "", whole
    splits = [(text[:at], *_paths(text[at + 1 :])) for at, letter in enumerate(text) if letter == "="]
    label, paths, missing = min([*splits, ("", whole, missing)], key=lambda split: split[2])
    if missing < len(paths):
        return label, paths
    label, equals, rest = text.partition("=")  # nothing is there: say it of what was probably meant
    if not equals:
        return "", whole
    return ("", [Path(text)]) if "/" in label else (label, _paths(rest)[0])


def _paths(text: str) -> tuple[list[Path], int]:
    """The paths in "PATH[,PATH...]", each as long as it can be and exist, and how many of them do not exist."""
    found, missing, pieces = [], 0, text.split(",")
    while pieces:
        lengths = range(len(pieces), 0, -1)
        length = next((length for length in lengths if _existing(",".join(pieces[:length]))), 0)
        found += _existing(",".join(pieces[:length])) if length else [Path(pieces[0])]
        missing += length == 0
        pieces = pieces[max(length, 1) :]
    return found, missing


def _existing(pattern: str) -> list[Path]:
    if os.path.exists(pattern):  # Path.exists() raises where a list of paths is too long for a name
        return [Path(pattern)]
    return [Path(match) for match in sorted(glob.glob(pattern))]


def label_of(path: Path) -> str:
    """The run's name without its seed: outputs/grpo-seed3 and outputs/grpo-seed3/metrics.jsonl are both grpo."""
    path = path.absolute()
    if path.is_file():
        says_nothing = "tfevents" in path.name or path.stem in _RUN_FILES
        path = path.parent if says_nothing else path.with_suffix("")
    path = path.parent if path.name == _EVENTS else path
    return _SEED.sub("", path.name) or path.name


def label_within(folder: Path, source: Source) -> str:
    """One of several runs in a folder: of PROJECT/EXPERIMENT-seed1.jsonl in PROJECT it is PROJECT/EXPERIMENT."""
    where = source.path.parent if source.path.name == _EVENTS else source.path
    parents = where.relative_to(folder).parts[:-1]
    return "/".join([folder.absolute().name, *parents, label_of(source.path)])


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return value
