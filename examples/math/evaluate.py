"""Accuracy of a model on prepared data sets: generate with vLLM, score with a reward function, estimate, write JSON and
a table.

Called by evaluate.sh, which merges a checkpoint first. Writes OUT/responses/<set>.jsonl, one line a question,
OUT/results.json and OUT/results.md. A set whose responses are there, of the same model, prompts and settings, is not
generated again; all responses are scored again, so that the results are of the data and the reward that were asked for.
With --self-rank the policy also ranks its own answers (docs/recipes.md, "The policy as its own verifier").
"""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

from vimpo_verl import ranking
from vimpo_verl.checkpoint import contents
from vimpo_verl.evaluation import summary

SETTINGS = ("n", "temperature", "top_p", "max_tokens", "seed", "engine")  # what responses depend on, beside the model
GENERATED = ("prompt_ids", "responses", "response_ids", "finished")  # what the engine adds to a question


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    missing = [str(path) for path in args.data if not path.is_file()]
    if missing:
        print(f"evaluate.py: no {', '.join(missing)}: make it with examples/math/prepare_data.py", file=sys.stderr)
        return 2
    if args.reference and not args.self_rank:
        print("evaluate.py: --reference is for --self-rank, which was not given", file=sys.stderr)
        return 2
    try:
        judge = make_judge(args.model, args.reference) if args.self_rank else None
    except ValueError as error:
        print("evaluate.py: --self-rank cannot go on:", *str(error).split("\n"), sep="\n  - ", file=sys.stderr)
        return 2
    settings, rows_of = responses_to(args, load_function(args.reward))
    made_by = {"model": args.model, "reward": args.reward, "limit": args.limit, **settings}
    if judge:
        judge.load(args.rank_dtype)
        for name, rows in rows_of.items():
            rows_of[name] = judged(rows, judge, name)
            store(stored_in(args.out, name), settings, rows_of[name])
        print(*(f"Note: {note}\n" for note in judge.notes), sep="", end="")
        made_by["self_rank"] = {"temperature": judge.temperature, "dtype": args.rank_dtype, "notes": judge.notes}
    results = {name: estimates(rows) for name, rows in rows_of.items()}
    (args.out / "results.json").write_text(json.dumps({"settings": made_by, "results": results}, indent=1))
    (args.out / "results.md").write_text(table(results))
    print(table(results))
    return 0


def responses_to(args: argparse.Namespace, score: Callable) -> tuple[dict, dict[str, list[dict]]]:
    """What the responses depend on, and of each set the questions with responses and scores, which are stored."""
    engine = None
    settings = settings_of(args)
    rows_of: dict[str, list[dict]] = {}
    for path in args.data:
        stored = stored_in(args.out, path.stem)
        questions = questions_of(path, args.limit)
        rows, reason = stored_responses(stored, settings, questions)
        if rows is None:
            print(f"{path.stem}: {reason}", flush=True)
            engine = engine or Engine(args, settings["model_contents"])
            if settings["model_contents"] is None:  # vLLM has put it into the cache by now
                settings = settings_of(args)
            rows = engine.generate(questions)
            store(stored, settings, rows)  # a reward that fails does not cost them
        rows_of[path.stem] = scored(rows, score)
        store(stored, settings, rows_of[path.stem])
        print(f"{path.stem}: {len(rows)} questions", flush=True)
    if engine:
        engine.close()
    return settings, rows_of


def stored_in(out: Path, name: str) -> Path:
    """Where the responses to a set are."""
    return out / "responses" / f"{name}.jsonl"


def make_judge(model: str, reference: Path | None):
    """The policy as its own verifier; a ValueError says what is missing."""
    from vimpo_verl.credit.judge import Judge  # torch and transformers, which nothing else here needs

    return Judge(Path(model), reference)


def judged(questions: list[dict], judge, name: str) -> list[dict]:
    """The questions with "self_rank": by name of the score one number a response."""
    from tqdm import tqdm

    progress = tqdm(questions, desc=f"{name}: self-rank", disable=None)
    return [{**row, "self_rank": judge.scores(row, f"{name}:{i}")} for i, row in enumerate(progress, start=1)]


def estimates(rows: list[dict]) -> dict[str, dict]:
    """The results of one set."""
    questions = [(row["preds"], [acc > 0 for acc in row["accs"]]) for row in rows]
    names = rows[0].get("self_rank", {}) if rows else {}
    return summary(questions) | ranking.summary(questions, {s: [row["self_rank"][s] for row in rows] for s in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or name")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="parquet files of prepare_data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--reward", default="pkg://vimpo_verl.rewards.math", help="pkg://module or a file, with compute_score"
    )
    parser.add_argument("--n", type=int, default=32, help="samples a question")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--max-prompt-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=None, help="the first LIMIT questions of each set, for a try")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument(
        "--self-rank", action="store_true", help="the policy also ranks its own answers; two models are loaded"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="for --self-rank, the model that training started from (default: as the run's configuration says)",
    )
    parser.add_argument(
        "--rank-dtype", choices=["float32", "bfloat16"], default="float32", help="of both models (default: %(default)s)"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    return parser


def settings_of(args: argparse.Namespace) -> dict:
    """What the responses depend on, beside the prompts."""
    return {"model_contents": model_contents(args.model), **{name: getattr(args, name) for name in SETTINGS}}


def model_contents(model: str) -> str | dict[str, str] | None:
    """What is in a model, wherever it is.

    Returns:
        Of a folder the sha256 of each file in it, by name. Of a name on the hub the commit in Hugging Face's cache; None
        if the cache does not have it.
    """
    folder = Path(model)
    if folder.is_dir():
        return contents(sorted(path for path in folder.iterdir() if path.is_file()), folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True)).name
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def load_function(where: str) -> Callable:
    """compute_score of a module (pkg://...) or a file, as verl's reward.custom_reward_function.path names it."""
    if where.startswith("pkg://"):
        return importlib.import_module(where[len("pkg://") :].replace("/", ".")).compute_score
    spec = importlib.util.spec_from_file_location("custom_reward", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


def questions_of(path: Path, limit: int | None) -> list[dict]:
    """Rows of a parquet file of verl: data_source, prompt, ground_truth, extra_info."""
    import pandas

    rows = (
        pandas.read_parquet(path).head(limit).to_dict("records")
        if limit
        else pandas.read_parquet(path).to_dict("records")
    )
    return [
        {
            "data_source": row["data_source"],
            "prompt": [dict(message) for message in row["prompt"]],
            "ground_truth": row["reward_model"]["ground_truth"],
            "index": row["extra_info"].get("index"),
        }
        for row in rows
    ]


class Engine:
    """vLLM with the model, of which `model_contents` says what it is: of a name on the hub that commit is loaded."""

    def __init__(self, args: argparse.Namespace, model: str | dict | None):
        from vllm import LLM, SamplingParams

        length = args.max_prompt_tokens + args.max_tokens
        options = {
            "max_model_len": length,
            "tensor_parallel_size": args.tensor_parallel,
            "seed": args.seed,
            "revision": model if isinstance(model, str) else None,
            **args.engine,
        }
        self.llm = LLM(model=args.model, **options)
        self.sampling = SamplingParams(
            n=args.n, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed
        )

    def generate(self, questions: list[dict]) -> list[dict]:
        """The questions with "responses", n each. The prompt is what verl makes of it: the model's chat template."""
        outputs = self.llm.chat([question["prompt"] for question in questions], self.sampling, use_tqdm=True)
        return [
            {
                **question,
                "prompt_ids": list(output.prompt_token_ids),
                "responses": [sample.text for sample in output.outputs],
                "response_ids": [list(sample.token_ids) for sample in output.outputs],
                "finished": [sample.finish_reason == "stop" for sample in output.outputs],
            }
            for question, output in zip(questions, outputs, strict=True)
        ]

    def close(self) -> None:
        """End vLLM's process, and with it its hold on the GPU's memory."""
        self.llm.llm_engine.engine_core.shutdown()


def scored(questions: list[dict], score: Callable) -> list[dict]:
    """The questions with "accs" and "preds", one a response. A reward that is a number has the response as answer."""
    rows = []
    for question in questions:
        results = [
            score(question["data_source"], response, question["ground_truth"], {"index": question["index"]})
            for response in question["responses"]
        ]
        results = [result if isinstance(result, dict) else {"acc": result} for result in results]
        accs = [float(result.get("acc", result.get("score"))) for result in results]
        preds = [
            str(result.get("pred", response)) for result, response in zip(results, question["responses"], strict=True)
        ]
        rows.append({**question, "accs": accs, "preds": preds})
    return rows


def store(path: Path, settings: dict, rows: list[dict]) -> None:
    """First line the settings, then one question a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for record in ({"settings": settings}, *rows):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    part.rename(path)  # a file that is there is whole


def stored_responses(path: Path, settings: dict, questions: list[dict]) -> tuple[list[dict] | None, str]:
    """The questions with the responses of an earlier evaluation; None and the reason if there are none to be used."""
    if not path.exists():
        return None, "no responses yet"
    # Not splitlines(): a response may hold U+2028 and its like, which end no line of JSON.
    first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    before = first["settings"]
    other = [name for name in settings if settings[name] is None or before.get(name) != settings[name]]
    if [row["prompt"] for row in rest] != [question["prompt"] for question in questions]:
        other.append("prompts")
    if other:
        return None, f"the responses there are of other settings ({', '.join(other)}), new ones are generated"
    written = ({name: row[name] for name in GENERATED if name in row} for row in rest)
    return [{**question, **responses} for question, responses in zip(questions, written, strict=True)], ""


def table(results: dict[str, dict]) -> str:
    """Markdown, in percent, with 95 % intervals over the questions."""
    names = list(dict.fromkeys(name for result in results.values() for name in result))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for data_set, result in results.items():
        cells = [
            f"{100 * e['value']:.1f} ({100 * e['low']:.1f} to {100 * e['high']:.1f})" if e else ""
            for e in (result.get(name) for name in names)
        ]
        lines.append(f"| {data_set} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
