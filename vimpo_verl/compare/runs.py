"""Reads what a run of verl logged: verl's file logger, TensorBoard, or the console output.

Nothing is dropped in silence: every reader says in `RunLog.problems` what it could not read.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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


def read_run(path: Path) -> RunLog:
    """Read one run.

    Args:
        path: a run's folder, verl's metrics file (.jsonl), a TensorBoard file, or a file with the console output.
            In a folder the best source wins: metrics*.jsonl, then other .jsonl, then TensorBoard, then .log, .out and .txt.

    Raises:
        UnreadableRun: there is no such path, or no step in it.
    """
    if not path.exists():
        raise UnreadableRun(f"{path} does not exist")
    run = RunLog(name=str(path))
    for source, read, files in _candidates(path):
        if not files:
            continue
        steps: dict[int, dict[str, float]] = {}
        for step, values in read(files, run.problems):
            steps.setdefault(step, {}).update(_finite(step, values, run.problems))
        if steps:
            run.source, run.steps = f"{source}: {', '.join(file.name for file in files)}", steps
            run.problems = _summarised(run.problems)
            return run
        run.problems.append(f"{', '.join(file.name for file in files)}: no step of a run in it ({source})")
    found = "; ".join(run.problems) or "no metrics*.jsonl, no TensorBoard events, no console log in it"
    raise UnreadableRun(f"{path}: {found}")


def _candidates(path: Path) -> Iterator[tuple[str, object, list[Path]]]:
    """Sources in the order of preference: what it is called, its reader, its files from the oldest to the newest."""
    if path.is_file():
        if path.suffix == ".jsonl":
            yield "file", _read_jsonl, [path]
        elif "tfevents" in path.name:
            yield "tensorboard", _read_tensorboard, [path]
        else:
            yield "console", _read_console, [path]
        return
    yield "file", _read_jsonl, sorted(path.glob("metrics*.jsonl"), key=_attempt)
    others = [file for file in path.glob("*.jsonl") if not file.name.startswith("metrics")]
    yield "file", _read_jsonl, sorted(others, key=_age)
    yield "tensorboard", _read_tensorboard, sorted(path.rglob("*tfevents*"), key=_age)
    logs = [file for pattern in ("*.log", "*.out", "*.txt") for file in path.glob(pattern)]
    yield "console", _read_console, sorted(logs, key=_age)


def _attempt(file: Path) -> tuple[bool, int]:
    """metrics.1.jsonl, metrics.2.jsonl, ... are earlier starts of a run, metrics.jsonl is the last."""
    number = re.search(r"\.(\d+)\.jsonl$", file.name)
    return (False, int(number.group(1))) if number else (True, 0)


def _age(file: Path) -> float:
    return file.stat().st_mtime


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


def _read_jsonl(files: Iterable[Path], problems: list[str]) -> Iterator[Record]:
    """Lines {"step": 3, "data": {"critic/score/mean": 0.5, ...}}. orjson writes NaN as null."""
    for file in files:
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                step, data = int(record["step"]), dict(record["data"])
            except (ValueError, KeyError, TypeError):
                problems.append(f'{file.name}, line {number}: not {{"step": ..., "data": {{...}}}}: {_start(line)}')
                continue
            yield step, data


def _start(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


# ---- console ----------------------------------------

# Ray's coloured prefix, a progress bar or srun's label may stand before it.
_STEP = re.compile(r"(?<![\w/])step:(\d+) - (?=\S+:)")
_NUMBER = re.compile(r"^(?:np\.\w+\()?([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|inf|nan))\)?$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _read_console(files: Iterable[Path], problems: list[str]) -> Iterator[Record]:
    """Lines "step:3 - critic/score/mean:0.5 - ..." of verl's console logger."""
    for file in files:
        with file.open(errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                found = _STEP.search(line)
                if found:
                    pairs = _COLOUR.sub("", line[found.end() :]).strip().split(" - ")
                    yield int(found.group(1)), dict(_pairs(pairs, f"{file.name}, line {number}", problems))


def _pairs(parts: list[str], where: str, problems: list[str]) -> Iterator[tuple[str, float]]:
    for part in parts:
        key, _, text = part.rpartition(":")
        number = _NUMBER.match(text.strip())
        if key and number:
            yield key, float(number.group(1))
        elif text.strip() not in ("True", "False"):
            problems.append(f"{where}: not 'metric:number': {_start(part)}")


# ---- TensorBoard ----------------------------------------


def _read_tensorboard(files: list[Path], problems: list[str]) -> Iterator[Record]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError:
        problems.append(f"{files[0].name}: TensorBoard is not installed here: pip install tensorboard")
        return
    for file in files:
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
