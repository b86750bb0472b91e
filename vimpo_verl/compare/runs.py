"""Reads what a run of verl logged: verl's file logger, TensorBoard, or the console output.

Nothing is dropped in silence: every reader says in `RunLog.problems` what it could not read.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

Record = tuple[int, dict[str, float]]  # step, value of each metric


class UnreadableRun(Exception):
    """There is nothing to compare in a run; the message says where and why."""


@dataclass
class RunLog:
    """The metrics of one run.

    Attributes:
        name: how it is called in messages.
        source: "file", "tensorboard" or "console", and the files read.
        steps: step -> metric -> finite value. Where a resumed run logged a step again, the later value counts.
        problems: what could not be read, each a sentence.
    """

    name: str
    source: str = ""
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def series(self, key: str) -> dict[int, float]:
        """step -> value of one metric, by rising step."""
        return {step: values[key] for step, values in sorted(self.steps.items()) if key in values}

    @property
    def keys(self) -> set[str]:
        """Every metric that has a value at some step."""
        return {key for values in self.steps.values() for key in values}


# ---- which runs there are ----------------------------------------


@dataclass(frozen=True)
class Source:
    """Where one run's metrics are.

    Attributes:
        path: the run's folder or file.
        kind: "file", "tensorboard" or "console".
        files: from the oldest to the newest.
        problems: what of the folder is left out, each a sentence.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    problems: tuple[str, ...] = ()


_ATTEMPT = re.compile(r"metrics(?:\.(\d+))?\.jsonl")
_LOGS = ("*.log", "*.out", "*.txt")


def find_runs(path: Path) -> list[Source]:
    """The run in a file, or the runs in a folder. Several files are one run in two cases only:

    - metrics.jsonl and the earlier starts metrics.1.jsonl, ... of one folder, as the launch scripts here keep them;
    - TensorBoard's events of one folder, where each file goes on from the one before.

    Everything else is as verl lays it out (verl/utils/tracking.py): PROJECT/EXPERIMENT.jsonl, each file a run;
    PROJECT/EXPERIMENT/ with TensorBoard's events, each folder a run; and so in folders of folders. Where there is none of
    this, each console log (.log, .out, .txt) with steps in it is a run.

    Raises:
        UnreadableRun: there is no such path, or no step in it.
    """
    if not path.exists():
        raise UnreadableRun(f"{path} does not exist")
    if path.is_file():
        return [Source(path, _kind(path), (path,))]
    found = _runs_below(path)
    logs = sorted(file for pattern in _LOGS for file in path.glob(pattern) if file.is_file())
    if not found:
        found = [Source(log, "console", (log,)) for log in logs if _has_step(log)]
    empty = tuple(
        f"{file.name}: no step of a run in it (file)" for file in sorted(path.glob("*.jsonl")) if not _has_record(file)
    )
    if not found:
        said = [*empty, *(f"{log.name}: no step of a run in it (console)" for log in logs)]
        nothing = "no metrics*.jsonl, no TensorBoard events, no console log in it"
        raise UnreadableRun(f"{path}: {'; '.join(said) or nothing}")
    return [replace(found[0], problems=found[0].problems + empty), *found[1:]]


def _runs_below(folder: Path) -> list[Source]:
    """The runs with files for machines; links to folders are not followed."""
    jsonl = [file for file in sorted(folder.glob("*.jsonl")) if _has_record(file)]
    attempts = sorted((file for file in jsonl if _ATTEMPT.fullmatch(file.name)), key=_attempt)
    if attempts:
        others = tuple(_left_out(file) for file in jsonl if file not in attempts)
        return [Source(folder, "file", tuple(attempts), others)]
    if jsonl:
        return [Source(file, "file", (file,)) for file in jsonl]
    events = sorted(file for file in folder.glob("*tfevents*") if file.is_file())  # their names begin with their time
    if events:
        below = sorted({file.parent for file in folder.rglob("*tfevents*") if file.is_file()} - {folder})
        return [Source(folder, "tensorboard", tuple(events), tuple(map(_left_out, below)))]
    folders = (sub for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.is_symlink())
    return [run for sub in folders for run in _runs_below(sub)]


def _kind(file: Path) -> str:
    return "file" if file.suffix == ".jsonl" else "tensorboard" if "tfevents" in file.name else "console"


def _attempt(file: Path) -> tuple[bool, int]:
    """metrics.1.jsonl, metrics.2.jsonl, ... are earlier starts of a run, metrics.jsonl is the last."""
    number = _ATTEMPT.fullmatch(file.name)[1]
    return (False, int(number)) if number else (True, 0)


def _left_out(path: Path) -> str:
    return f"{path}: not read, as it is no part of this run; name it to have it compared"


# ---- one run ----------------------------------------


def read_run(path: Path) -> RunLog:
    """Read the run of a folder or a file that has one.

    Raises:
        UnreadableRun: there is no such path, no step in it, or more than one run.
    """
    sources = find_runs(path)
    if len(sources) > 1:
        raise UnreadableRun(f"{path} has several runs: {', '.join(str(source.path) for source in sources)}")
    return read_source(sources[0])


def read_source(source: Source) -> RunLog:
    """Read one run.

    Raises:
        UnreadableRun: there is no step in it, or its files are not of one run.
    """
    run = RunLog(name=str(source.path), problems=list(source.problems))
    first = None  # step of the run
    for file in source.files:
        records = list(_READERS[source.kind](file, run.problems))
        start = min((step for step, _ in records), default=None)
        if source.kind == "tensorboard" and None not in (first, start) and start <= first:
            raise UnreadableRun(_starts_over(source, file, start))
        first = start if first is None else first
        for step, values in records:
            run.steps.setdefault(step, {}).update(_finite(step, values, run.problems))
    names = ", ".join(file.name for file in source.files)
    run.source = f"{source.kind}: {names}"
    run.problems = _summarised(run.problems)
    if not run.steps:
        found = "; ".join([*run.problems, f"{names}: no step of a run in it ({source.kind})"])
        raise UnreadableRun(f"{source.path}: {found}")
    return run


def _starts_over(source: Source, file: Path, step: int) -> str:
    return (
        f"{source.path}: {file.name} starts over at step {step}, so the {len(source.files)} files there are not one run that "
        "was resumed (one TENSORBOARD_DIR for several runs?): name the file that is meant"
    )


# ---- what is not a finite number ----------------------------------------


def _finite(step: int, values: dict, problems: list[str]) -> dict[str, float]:
    kept = {}
    for key, value in values.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            kept[key] = float(value)
        else:
            problems.append(f"{key}: no finite number at some steps, first at step {step}: {value!r}")
    return kept


def _summarised(problems: list[str]) -> list[str]:
    """One sentence a metric: the first place where it is not a finite number, and at how many more."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for problem in problems:
        key = problem.split(": no finite number")[0] if ": no finite number" in problem else problem
        first.setdefault(key, problem)
        count[key] += 1
    return [text + (f" ({count[key]} times)" if count[key] > 1 else "") for key, text in first.items()]


# ---- verl's file logger ----------------------------------------


def _read_jsonl(file: Path, problems: list[str]) -> Iterator[Record]:
    """Lines {"step": 3, "data": {"critic/score/mean": 0.5, ...}}. orjson writes NaN as null."""
    with file.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is None:
                problems.append(f'{file.name}, line {number}: not {{"step": ..., "data": {{...}}}}: {_start(line)}')
            else:
                yield record


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
        return int(record["step"]), dict(record["data"])
    except (ValueError, KeyError, TypeError):
        return None


def _has_record(file: Path) -> bool:
    """Whether it is of verl's file logger: other files of JSON lines may be long, and lie beside a run's."""
    with file.open(errors="replace") as lines:
        return any('"step"' in line and '"data"' in line and _record(line) for line in lines)


def _start(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


# ---- console ----------------------------------------

# Ray's coloured prefix, a progress bar or srun's label may stand before it.
_STEP = re.compile(r"(?<![\w/])step:(\d+) - (?=\S+:)")
_NUMBER = re.compile(r"^(?:np\.\w+\()?([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|inf|nan))\)?$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _read_console(file: Path, problems: list[str]) -> Iterator[Record]:
    """Lines "step:3 - critic/score/mean:0.5 - ..." of verl's console logger."""
    with file.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            found = _STEP.search(line)
            if found:
                pairs = _COLOUR.sub("", line[found.end() :]).strip().split(" - ")
                yield int(found.group(1)), dict(_pairs(pairs, f"{file.name}, line {number}", problems))


def _has_step(file: Path) -> bool:
    with file.open(errors="replace") as lines:
        return any(_STEP.search(line) for line in lines)


def _pairs(parts: list[str], where: str, problems: list[str]) -> Iterator[tuple[str, float]]:
    for part in parts:
        key, _, text = part.rpartition(":")
        number = _NUMBER.match(text.strip())
        if key and number:
            yield key, float(number.group(1))
        elif text.strip() not in ("True", "False"):
            problems.append(f"{where}: not 'metric:number': {_start(part)}")


# ---- TensorBoard ----------------------------------------


def _read_tensorboard(file: Path, problems: list[str]) -> Iterator[Record]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError:
        problems.append(f"{file.name}: TensorBoard is not installed here: pip install tensorboard, or name the log")
        return
    loaded = 0
    for event in LegacyEventFileLoader(str(file)).Load():
        loaded += 1
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, {value.tag: value.simple_value}
    whole, cut_off = _records_of(file)
    if loaded < whole or cut_off:  # TensorBoard's own reader stops there without a word
        problems.append(f"{file.name}: damaged or cut off after event {loaded}")


def _records_of(file: Path) -> tuple[int, bool]:
    """How many whole records there are, by their lengths, and whether something follows the last.

    A record is its length in 8 bytes, 4 of checksum, itself, 4 of checksum.
    """
    position, count, size = 0, 0, file.stat().st_size
    with file.open("rb") as content:
        while position + 12 <= size:
            content.seek(position)
            end = position + 16 + struct.unpack("<Q", content.read(8))[0]
            if end > size:
                break
            position, count = end, count + 1
    return count, position < size


_READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    "file": _read_jsonl,
    "tensorboard": _read_tensorboard,
    "console": _read_console,
}
