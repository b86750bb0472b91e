"""Write the tiny task as the parquet files that verl reads: train.parquet and test.parquet, without a common prompt."""

import argparse
from pathlib import Path

import pyarrow
import pyarrow.parquet
from task import DATA_SOURCE, answer, distinct_questions


def row(question: str, index: int, split: str) -> dict:
    """One example in verl's columns. The separator "=" after the digits comes from the chat template."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": question}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": answer(question)},
        "extra_info": {"split": split, "index": index},
    }


def write(path: Path, questions: list[str], split: str) -> None:
    rows = [row(question, index, split) for index, question in enumerate(questions)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=8192, help="number of training prompts")
    parser.add_argument("--test", type=int, default=256, help="number of validation prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    questions = distinct_questions(args.train + args.test, args.seed)
    write(args.out / "train.parquet", questions[: args.train], "train")
    write(args.out / "test.parquet", questions[args.train :], "test")
    print(f"data: {args.train} training and {args.test} validation prompts in {args.out}")


if __name__ == "__main__":
    main()
