"""Claims about examples/math/prepare_data.py: from files laid out as each public source lays them out it makes what verl reads,
with the right question, answer and index; it says clearly what is missing; a second run changes nothing; the manifest is true.

The fixtures (fixtures/math_sources.json) are ours, in the columns and file names of the sources; "seen" says where those were
looked up. Not covered: the hub itself and the size of the real sets.
"""

import hashlib
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples/math"))

import prepare_data  # noqa: E402
from math_sources import SOURCES, DataError  # noqa: E402

FIXTURES = json.loads((Path(__file__).parent / "fixtures/math_sources.json").read_text())


def lay_out(folder: Path, name: str, change=None) -> Path:
    """The files of a set's fixture under folder/name, as on the hub; `change` edits the rows of every file."""
    for path, rows in FIXTURES[name]["files"].items():
        target = folder / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = change(json.loads(json.dumps(rows))) if change else rows
        if target.suffix == ".jsonl":
            target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Every set, prepared from the fixtures."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in SOURCES:
        lay_out(source, name)
    assert prepare_data.main(["--from", str(source), "--out", str(out)]) == 0
    return out


QUESTIONS_AND_ANSWERS = {
    "guru_math": [
        ("What is $3 \\cdot 14$?", "42"),
        ("What is half of one third?", "\\frac{1}{6}"),
        ("Solve $x^2=4$ for $x$.", "-2,2"),
    ],
    "dapo_math": [
        ("How many divisors has 12?", "6"),
        ("What is the remainder of $2^{10}$ by 7?", "2"),
        ("Find $1+2+\\dots+9$.", "45"),
    ],
    "gsm8k_train": [
        ("Ann has 3 pens and buys 4. How many has she?", "7"),
        ("A town of 900 people doubles and gains 334. How many live there?", "2134"),
    ],
    "gsm8k_test": [("Bob walks 2 km and 5 km. How far?", "7")],
    "math500": [("Compute $\\frac12+\\frac13$.", "\\frac{5}{6}"), ("Name the day after Monday.", "\\text{Tuesday}")],
    "aime2024": [
        ("Find the least positive integer with 24 divisors.", "360"),
        ("Find the remainder of 1001 by 1000.", "001"),
    ],
    "aime2025": [("Find $7 \\cdot 11$.", "77"), ("Find $8 \\cdot 11$.", "88")],
    "olympiadbench": [
        ("Determine $2+2$.", "4"),
        ("Find all roots of $(x-1)(x+2)$.", "1, -2"),
        ("There are ten balls.\n\nHow many are red?", "3"),
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_question_and_answer_of_each_source(written, name):
    rows = rows_of(written, name)
    asked = [(row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]) for row in rows]
    guru = " Please output the final answer within \\boxed{}."
    ending = guru if name == "guru_math" else f"\n\n{prepare_data.INSTRUCTION}"
    assert asked == [(question + ending, answer) for question, answer in QUESTIONS_AND_ANSWERS[name]]


def test_index_is_the_row_of_the_source(written):
    assert [row["extra_info"]["index"] for row in rows_of(written, "dapo_math")] == [0, 1, 3], "row 2 is a duplicate"
    for name in SOURCES:
        indices = [row["extra_info"]["index"] for row in rows_of(written, name)]
        assert len(set(indices)) == len(indices) and all(isinstance(index, int) for index in indices)


def test_verl_reads_all_sets_together(written):
    """One schema, so that verl can join files, and the columns that its data set and reward loop take."""
    schemas = {str(pyarrow.parquet.read_schema(written / f"{name}.parquet")) for name in SOURCES}
    assert len(schemas) == 1
    for name, source in SOURCES.items():
        for row in rows_of(written, name):
            assert row["data_source"] == name and row["ability"] == "math" and row["reward_model"]["style"] == "rule"
            assert row["extra_info"]["split"] == source.use
            assert row["prompt"][-1]["role"] == "user" and row["prompt"][-1]["content"].count("\\boxed") == 1


def test_verls_data_set_reads_all_sets_together(written):
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    files = [str(written / f"{name}.parquet") for name in SOURCES]
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(written / "cache")})
    samples = list(RLHFDataset(files, tokenizer=None, config=config))
    expected = [row for name in SOURCES for row in rows_of(written, name)]
    assert [sample["raw_prompt"] for sample in samples] == [row["prompt"] for row in expected]
    assert [sample["index"] for sample in samples] == [row["extra_info"]["index"] for row in expected]
    assert [sample["data_source"] for sample in samples] == [row["data_source"] for row in expected]


@pytest.mark.parametrize("name", SOURCES)
def test_reward_takes_the_ground_truth_for_right(written, name):
    from vimpo_verl.rewards.math import compute_score

    for row in rows_of(written, name):
        answer = row["reward_model"]["ground_truth"]
        assert compute_score(name, f"So it is \\boxed{{{answer}}}.", answer, row["extra_info"])["score"] == 1.0


def test_manifest_is_true(written):
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest.keys() == SOURCES.keys()
    for name, entry in manifest.items():
        target = written / entry["file"]
        assert entry["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
        assert entry["rows"] == len(rows_of(written, name)) == len(QUESTIONS_AND_ANSWERS[name])
    assert manifest["dapo_math"]["left_out"]["duplicates"] == 1


def test_second_run_changes_nothing_and_a_damaged_file_is_made_anew(tmp_path, capsys):
    source, out = lay_out(tmp_path / "source", "math500"), tmp_path / "out"
    arguments = ["--from", str(source), "--out", str(out), "--sets", "math500"]
    assert prepare_data.main(arguments) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert prepare_data.main(arguments) == 0
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    assert "is there (2 rows)" in capsys.readouterr().out
    (out / "math500.parquet").write_bytes(b"damaged")
    assert prepare_data.main(arguments) == 0
    assert (out / "math500.parquet").read_bytes() == before["math500.parquet"][0]
    assert prepare_data.main([*arguments, "--force"]) == 0
    assert (out / "math500.parquet").stat().st_mtime_ns > before["math500.parquet"][1]


def test_changed_source_is_read_anew(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    prepare_data.prepare(["aime2025"], out, lay_out(source, "aime2025"))

    def corrected(rows):
        rows[0]["answer"] = "78"
        return rows

    prepare_data.prepare(["aime2025"], out, lay_out(source, "aime2025", corrected))
    assert [row["reward_model"]["ground_truth"] for row in rows_of(out, "aime2025")] == ["78", "78"]


def test_limit(tmp_path):
    prepare_data.prepare(["olympiadbench"], tmp_path, lay_out(tmp_path / "source", "olympiadbench"), limit=2)
    assert [row["extra_info"]["index"] for row in rows_of(tmp_path, "olympiadbench")] == [0, 1]


def test_other_number_of_rows_is_reported(tmp_path, capsys):
    prepare_data.prepare(["aime2024"], tmp_path, lay_out(tmp_path / "source", "aime2024"))
    assert "expected 30: is this another version of HuggingFaceH4/aime_2024?" in capsys.readouterr().out


def without(column):
    def change(rows):
        for row in rows:
            del row[column]
        return rows

    return change


def with_answer(answer):
    def change(rows):
        rows[1]["answer"] = answer
        return rows

    return change


def with_value(column, value):
    """The second row with another value in a column."""

    def change(rows):
        if len(rows) > 1:  # a set's other files may have one row
            rows[1][column] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "math500",
            without("answer"),
            r"math500: no column answer in HuggingFaceH4/MATH-500 .* it has problem, solution",
        ),
        ("guru_math", without("reward_model"), r"guru_math: no column reward_model"),
        ("math500", with_answer("  "), r"math500: 1 rows have no answer: rows 1 of the source.*--drop-bad-rows"),
        ("math500", with_answer(None), r"math500: 1 rows have no answer: rows 1"),
        ("math500", with_answer("$$"), r"math500: 1 rows have no answer: rows 1"),
        ("math500", with_answer(r"\boxed{ }"), r"math500: 1 rows have no answer: rows 1"),
        ("gsm8k_train", with_answer("seven, without the marker"), r"gsm8k_train: 1 rows have no answer"),
        ("gsm8k_train", with_answer("The marker, and then #### $$"), r"gsm8k_train: 1 rows have no answer: rows 1"),
        ("math500", with_value("problem", ""), r"math500: 1 rows have no question: rows 1 .*--drop-bad-rows"),
        ("guru_math", with_value("prompt", None), r"guru_math: 1 rows have no question: rows 1 .*--drop-bad-rows"),
        ("guru_math", with_value("prompt", []), r"guru_math: 1 rows have no question: rows 1"),
        (
            "guru_math",
            with_value("prompt", [{"role": "user", "content": None}]),
            r"guru_math: 1 rows have no question: rows 1",
        ),
        ("guru_math", with_value("reward_model", None), r"guru_math: 1 rows have no answer: rows 1"),
        ("dapo_math", with_value("prompt", None), r"dapo_math: 1 rows have no question: rows 1 .*--drop-bad-rows"),
        ("dapo_math", with_value("prompt", []), r"dapo_math: 1 rows have no question: rows 1"),
        ("math500", with_answer("1" * 1001), r"math500: 1 rows have an answer of more than 1000 characters: rows 1"),
    ],
)
def test_clear_errors(tmp_path, name, change, message):
    if name == "gsm8k_train":  # files of one row have no row 1
        source = lay_out(tmp_path / "source", name, lambda rows: change(rows) if len(rows) > 1 else rows)
    else:
        source = lay_out(tmp_path / "source", name, change)
    with pytest.raises(DataError, match=message):
        prepare_data.prepare([name], tmp_path / "out", source)
    assert not (tmp_path / "out" / f"{name}.parquet").exists()


def test_every_kind_of_bad_row_is_named_at_once(tmp_path):
    def spoiled(rows):
        rows[0]["answer"], rows[1]["problem"] = "$$", ""
        return rows

    with pytest.raises(DataError, match=r"1 rows have no question: rows 1 .*; 1 rows have no answer: rows 0 "):
        prepare_data.prepare(["math500"], tmp_path / "out", lay_out(tmp_path / "source", "math500", spoiled))


def test_row_of_another_layout_is_named(tmp_path):
    def as_text(rows):
        return [{**row, "prompt": "What is 1+1?"} for row in rows]

    with pytest.raises(
        DataError, match=r"guru_math: row 0 of the source, .*TypeError.*What is 1\+1\?.* another data set"
    ):
        prepare_data.prepare(["guru_math"], tmp_path / "out", lay_out(tmp_path / "source", "guru_math", as_text))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"math500": 3}', '{"math500": {"rows": 2}}', "\x00", '{"math500": {"recipe'],
    ids=str,
)
def test_corrupt_manifest_is_named_with_what_to_do(tmp_path, capsys, text):
    source, out = lay_out(tmp_path / "source", "math500"), tmp_path / "out"
    arguments = ["--from", str(source), "--out", str(out), "--sets", "math500"]
    assert prepare_data.main(arguments) == 0
    (out / "manifest.json").write_text(text)
    capsys.readouterr()
    assert prepare_data.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{out / 'manifest.json'} cannot be read" in error and "delete it" in error and "Traceback" not in error
    (out / "manifest.json").unlink()
    assert prepare_data.main(arguments) == 0


def test_bad_rows_are_left_out_on_request(tmp_path):
    source = lay_out(tmp_path / "source", "math500", with_answer(""))
    manifest = prepare_data.prepare(["math500"], tmp_path / "out", source, drop_bad_rows=True)
    assert manifest["math500"]["rows"] == 1 and manifest["math500"]["left_out"]["without_answer"] == 1


def test_sets_that_are_not_there(tmp_path, capsys):
    assert prepare_data.main(["--sets", "math5000", "--out", str(tmp_path)]) == 1
    assert "there is no set math5000; the sets are guru_math," in capsys.readouterr().err
    assert prepare_data.main(["--sets", "math500", "--from", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "math500 is not there: no folder" in capsys.readouterr().err
    (tmp_path / "empty/math500").mkdir(parents=True)
    assert prepare_data.main(["--sets", "math500", "--from", str(tmp_path / "empty"), "--out", str(tmp_path)]) == 1
    assert "holds no file" in capsys.readouterr().err


def test_hub_that_cannot_be_reached_is_explained(tmp_path, monkeypatch, capsys):
    import datasets

    def unreachable(*arguments, **keywords):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert prepare_data.main(["--sets", "math500", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "HuggingFaceH4/MATH-500" in error and "ConnectionError: no network" in error and "--from FOLDER" in error


def test_hub_is_asked_for_the_right_parts(tmp_path, monkeypatch):
    """The hub itself is not there in tests; what it would be asked for is."""
    import datasets

    asked = []

    def load_dataset(name, configuration=None, *, split=None, **keywords):
        asked.append((name, configuration, split, keywords))
        return datasets.Dataset.from_list(FIXTURES["aime2025"]["files"]["aime2025-I.jsonl"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare_data.prepare(["aime2025"], tmp_path)
    assert asked == [("opencompass/AIME2025", part, "test", {}) for part in ("AIME2025-I", "AIME2025-II")]
