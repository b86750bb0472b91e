#!/usr/bin/env python3
r"""Write the data sets of the math recipes as the parquet files that verl reads.

    python examples/math/prepare_data.py                                  every set, from the Hugging Face hub
    python examples/math/prepare_data.py --sets gsm8k_train gsm8k_test    some of them
    python examples/math/prepare_data.py --from FOLDER                    from FOLDER/<set>/, without a network

In a FOLDER lie the files of each source's repository as they are on the hub (`hf download --repo-type dataset NAME --local-dir
FOLDER/<set>`), parquet or JSON lines. Each set becomes OUT/<set>.parquet; OUT/manifest.json has rows, sources and hashes. What
is already there as it should be is left alone.

A row has verl's columns. extra_info.index is the number of the row in its source, so it stays the same when rows are left out;
the reward noise goes by it. To evaluate with several samples a question, set actor_rollout_ref.rollout.val_kwargs.n: no set
holds a question several times for that.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from math_sources import SOURCES, DataError, Example, Source

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
MAX_ANSWER = 1_000  # characters: vimpo_verl/rewards takes no longer answer from a response
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_AROUND_ANSWER = re.compile(r"\\boxed|\\[()\[\]]|[\s${}.]")  # the reward refuses an answer of nothing but these
_FORMAT_VERSION = 1  # of what is written; raise it to have everything written anew


@dataclass
class Written:
    """Rows for verl, and what was left out."""

    rows: list[dict] = field(default_factory=list)
    duplicates: int = 0
    without_question: list[int] = field(default_factory=list)
    without_answer: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return len(self.without_question) + len(self.without_answer) + len(self.too_long)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        prepare(args.sets, args.out, args.source, limit=args.limit, drop_bad_rows=args.drop_bad_rows, force=args.force)
    except DataError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument(
        "--out", type=Path, default=root / "outputs/data", help="default: outputs/data of the repository"
    )
    parser.add_argument("--sets", nargs="+", default=list(SOURCES), metavar="SET", help=f"of {', '.join(SOURCES)}")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="read FOLDER/<set>/ instead of the hub"
    )
    parser.add_argument("--limit", type=int, help="the first LIMIT rows of each set, for a try")
    parser.add_argument(
        "--drop-bad-rows", action="store_true", help="leave out rows without a question or a usable answer"
    )
    parser.add_argument("--force", action="store_true", help="write also what is already there")
    return parser


def prepare(
    names: Iterable[str],
    out: Path,
    folder: Path | None = None,
    *,
    limit: int | None = None,
    drop_bad_rows: bool = False,
    force: bool = False,
) -> dict[str, dict]:
    """Write sets and the manifest.

    Args:
        names: keys of SOURCES.
        out: folder to write to.
        folder: where the sources' files are, or None for the hub.
        limit: the first rows of each set only.
        drop_bad_rows: leave out rows without a question or a usable answer instead of stopping.
        force: write also what is already there.

    Returns:
        The manifest.

    Raises:
        DataError: a set, a column or an answer is missing; nothing is written of that set.
    """
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise DataError(f"there is no set {', '.join(unknown)}; the sets are {', '.join(SOURCES)}")
    out.mkdir(parents=True, exist_ok=True)
    manifest_path = out / "manifest.json"
    manifest = _read_manifest(manifest_path)
    for name in names:
        source, target = SOURCES[name], out / f"{name}.parquet"
        files = _local_files(name, source, folder) if folder else {}
        recipe = _recipe(source, files, limit, drop_bad_rows)
        if not force and _is_there(manifest.get(name), recipe, target):
            print(f"{name}: {target} is there ({manifest[name]['rows']} rows)")
            continue
        written = convert(name, source, _source_rows(name, source, files), limit, drop_bad_rows)
        _write_parquet(written.rows, target)
        manifest[name] = _entry(written, recipe, target)
        _write_text(manifest_path, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        print(f"{name}: {len(written.rows)} rows in {target}{_remarks(source, written, limit)}")
    return manifest


def convert(
    name: str, source: Source, rows: Iterable[dict], limit: int | None = None, drop_bad_rows: bool = False
) -> Written:
    """The rows of a source in verl's columns.

    Raises:
        DataError: the source has no rows, or rows without a question or a usable answer and drop_bad_rows is False.
    """
    written, seen = Written(), set()
    for index, row in enumerate(_with_progress(rows, name)):
        if limit is not None and len(written.rows) >= limit:
            break
        example = _read(name, source, row, index)
        question = example.messages[-1]["content"] if example.messages else ""
        if question and source.unique and question in seen:
            written.duplicates += 1
            continue
        seen.add(question)
        if not question:
            written.without_question.append(index)
        elif not _AROUND_ANSWER.sub("", example.answer):
            written.without_answer.append(index)
        elif len(example.answer) > MAX_ANSWER:
            written.too_long.append(index)
        else:
            written.rows.append(_row(name, source, example, index))
    _refuse_bad_rows(name, written, drop_bad_rows)
    return written


def _read(name: str, source: Source, row: dict, index: int) -> Example:
    try:
        return source.read(row)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(
            f"{name}: row {index} of the source, counted from 0, is not laid out as those of {source.hub} "
            f"({type(error).__name__}: {error}): {str(row)[:200]}. Is it another data set, or has its layout changed?"
        ) from error


def _row(name: str, source: Source, example: Example, index: int) -> dict[str, Any]:
    *before, last = example.messages
    content = last["content"]
    if r"\boxed" not in content:
        content = f"{content}\n\n{INSTRUCTION}"
    return {
        "data_source": name,
        "prompt": [*before, {"role": last["role"], "content": content}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": example.answer},
        "extra_info": {"split": source.use, "index": index, "name": example.name},
    }


def _refuse_bad_rows(name: str, written: Written, drop_bad_rows: bool) -> None:
    kinds = (
        (written.without_question, "no question"),
        (written.without_answer, "no answer"),
        (written.too_long, f"an answer of more than {MAX_ANSWER} characters"),
    )
    bad = [
        f"{len(rows)} rows have {what}: {_first_of(rows)} of the source, counted from 0" for rows, what in kinds if rows
    ]
    if bad and not drop_bad_rows:
        raise DataError(f"{name}: {'; '.join(bad)}. Look at them, and leave them out with --drop-bad-rows")
    if not written.rows:
        raise DataError(f"{name}: the source has no rows that can be used")


def _first_of(rows: list[int]) -> str:
    return f"rows {', '.join(map(str, rows[:10]))}{' ...' if len(rows) > 10 else ''}"


# ---- reading -------------------------------------------------------------------------------------------------------


def _source_rows(name: str, source: Source, files: dict[str, list[Path]]) -> Iterator[dict]:
    """Rows in the order of the source, with the needed columns only."""
    for configuration, split in source.parts:
        if files:
            dataset = _load_local(name, files[_part(configuration, split)])
        else:
            dataset = _load_from_hub(name, source, configuration, split)
        missing = [column for column in source.columns if column not in dataset.column_names]
        if missing:
            raise DataError(
                f"{name}: no column {', '.join(missing)} in {source.hub} ({configuration or 'default'}, {split}); it has "
                f"{', '.join(dataset.column_names)}. Is it another data set, or has its layout changed?"
            )
        yield from dataset.select_columns(list(source.columns))


def _load_from_hub(name: str, source: Source, configuration: str | None, split: str) -> Any:
    import datasets

    arguments = {"data_files": {split: source.files}} if source.files else {}
    try:
        return datasets.load_dataset(source.hub, configuration, split=split, **arguments)
    except Exception as error:  # network, permission, name, layout: datasets has an exception for each
        raise DataError(
            f"{name}: {source.hub} ({configuration or 'default'}, {split}) cannot be read from the hub: "
            f"{type(error).__name__}: {error}. Without a network: get it elsewhere with `hf download --repo-type dataset "
            f"{source.hub} --local-dir FOLDER/{name}`, then --from FOLDER"
        ) from error


def _load_local(name: str, files: list[Path]) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            _FORMATS[files[0].suffix], data_files={"rows": [str(file) for file in files]}, split="rows"
        )
    except Exception as error:
        raise DataError(
            f"{name}: {', '.join(map(str, files))} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _local_files(name: str, source: Source, folder: Path) -> dict[str, list[Path]]:
    """Part of the source -> its files under `folder`."""
    root = folder / name
    if not root.is_dir():
        raise DataError(
            f"{name} is not there: no folder {root}. Put the files of {source.hub} into it "
            f"(`hf download --repo-type dataset {source.hub} --local-dir {root}`), or leave it out with --sets"
        )
    return {
        _part(configuration, split): _files_of_part(name, source, root, configuration, split)
        for configuration, split in source.parts
    }


def _files_of_part(name: str, source: Source, root: Path, configuration: str | None, split: str) -> list[Path]:
    candidates = sorted(
        file for file in root.glob(source.files or "**/*") if file.suffix in _FORMATS and file.is_file()
    )
    candidates = [file for file in candidates if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    for word in filter(None, (configuration, split)):
        named = [file for file in candidates if _names(file.relative_to(root), word)]
        candidates = named or candidates
    first_format = [file for file in candidates if file.suffix == candidates[0].suffix]
    if not first_format:
        wanted = source.files or "*.parquet, *.jsonl, *.json or *.csv"
        raise DataError(f"{name}: {root} holds no file {wanted}; put the files of {source.hub} into it")
    return first_format


def _names(path: Path, word: str) -> bool:
    """Whether a folder of `path` is `word`, or its file is called so (test.jsonl, test-00000-of-00001.parquet)."""
    stem = path.stem.casefold()
    word = word.casefold()
    return word in (part.casefold() for part in path.parts[:-1]) or stem == word or stem.startswith(f"{word}-0")


def _part(configuration: str | None, split: str) -> str:
    return f"{configuration or 'default'}/{split}"


def _with_progress(rows: Iterable[dict], name: str) -> Iterable[dict]:
    from tqdm import tqdm

    return tqdm(rows, desc=name, unit=" rows", disable=None, mininterval=1.0)


# ---- writing -------------------------------------------------------------------------------------------------------


def _recipe(source: Source, files: dict[str, list[Path]], limit: int | None, drop_bad_rows: bool) -> dict[str, Any]:
    """Everything that the result depends on, as far as it can be known beforehand."""
    return {
        "format_version": _FORMAT_VERSION,
        "hub": source.hub,
        "parts": [_part(*part) for part in source.parts],
        "files_sha256": {f"{file.parent.name}/{file.name}": _sha256(file) for part in files.values() for file in part},
        "instruction": INSTRUCTION,
        "limit": limit,
        "drop_bad_rows": drop_bad_rows,
    }


def _read_manifest(path: Path) -> dict[str, dict]:
    """What earlier runs wrote. Raises DataError where it is not what this script writes."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest.values():
            entry["recipe"], entry["sha256"], entry["rows"]  # what _is_there looks at
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read: {type(error).__name__}: {error}. It only says which sets need not be made again: delete it, "
            "and they are"
        ) from error
    return manifest


def _is_there(entry: dict | None, recipe: dict[str, Any], target: Path) -> bool:
    return bool(entry) and entry["recipe"] == recipe and target.exists() and _sha256(target) == entry["sha256"]


def _entry(written: Written, recipe: dict[str, Any], target: Path) -> dict[str, Any]:
    return {
        "file": target.name,
        "rows": len(written.rows),
        "sha256": _sha256(target),
        "left_out": {
            "duplicates": written.duplicates,
            "without_question": len(written.without_question),
            "without_answer": len(written.without_answer),
            "too_long": len(written.too_long),
        },
        "recipe": recipe,
    }


def _remarks(source: Source, written: Written, limit: int | None) -> str:
    remarks = [f"{written.duplicates} duplicates left out"] if written.duplicates else []
    remarks += [f"{written.bad} rows without a question or a usable answer left out"] if written.bad else []
    least, most = source.rows
    if limit is None and not least <= len(written.rows) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        remarks.append(f"expected {expected}: is this another version of {source.hub}?")
    return f" ({'; '.join(remarks)})" if remarks else ""


def _write_parquet(rows: list[dict], target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    partial = target.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
    partial.replace(target)  # whole or not at all


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
