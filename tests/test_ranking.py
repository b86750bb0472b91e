"""vimpo_verl.ranking and evaluate.py --self-rank on tiny models, without vLLM.

Claimed: best-of-n and weighted majority are what they are called, ties included, and do not depend on the scores' unit
or on the order of the answers; the scores are the plain formulas in float64; the tokens that were written are scored;
what is missing is said before anything is generated.
"""

import itertools
import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_credit import lines, make_model, make_run, make_tokenizer
from test_evaluate import StandIn, evaluate, write_data
from transformers import AutoModelForCausalLM

from vimpo_verl import checkpoint, ranking
from vimpo_verl.evaluation import majority
from vimpo_verl.ranking import best_of_n, vote_weights, weighted_majority

SCORES = (-1.5, 0.0, 0.25, 3.0)


def every_question(n):
    """All answers of n samples, "" among them, with all scores; "a" is right."""
    for answers in itertools.product(["a", "b", "c", ""], repeat=n):
        for scores in itertools.product(SCORES, repeat=n):
            yield list(answers), [answer == "a" for answer in answers], list(scores)


def test_best_of_n_is_right_as_often_as_shuffled_answers_with_the_first_highest():
    for answers, right, scores in every_question(3):
        firsts = []
        for order in itertools.permutations(range(3)):
            order = [i for i in order if answers[i]]
            firsts += [right[max(order, key=lambda i: scores[i])]] if order else [False]
        assert best_of_n(answers, right, scores) == pytest.approx(sum(firsts) / len(firsts))


def test_weighted_majority_is_the_plain_sum_of_standardised_exponentials():
    for answers, right, scores in every_question(3):
        voters = [i for i in range(3) if answers[i]]
        mean = sum(scores[i] for i in voters) / max(1, len(voters))
        spread = math.sqrt(sum((scores[i] - mean) ** 2 for i in voters) / max(1, len(voters)))
        votes = {}
        for i in voters:
            weight = math.exp((scores[i] - mean) / spread) if spread else 1.0
            votes[answers[i]] = votes.get(answers[i], 0.0) + weight
        leaders = [answer for answer in votes if votes[answer] > max(votes.values()) - 1e-9]
        expected = sum(answer == "a" for answer in leaders) / len(leaders) if leaders else 0.0
        assert weighted_majority(answers, right, scores) == pytest.approx(expected), (answers, scores)


def test_equal_scores_leave_the_majority_and_the_average():
    generator = random.Random(0)
    for _ in range(200):
        answers = [generator.choice("abc") for _ in range(7)]
        right = [answer == "a" for answer in answers]
        assert weighted_majority(answers, right, [0.1] * 7) == majority(answers, right)
        assert best_of_n(answers, right, [0.1] * 7) == pytest.approx(sum(right) / 7)


@pytest.mark.parametrize("choose", [best_of_n, weighted_majority])
def test_neither_unit_nor_origin_nor_order_matters(choose):
    generator = random.Random(1)
    for _ in range(200):
        samples = [(generator.choice(["a", "b", "c", ""]), generator.gauss(0, 1)) for _ in range(8)]
        answers, scores = map(list, zip(*samples, strict=True))
        right = [answer == "a" for answer in answers]
        expected = choose(answers, right, scores)
        assert choose(answers, right, [5e-4 * score - 7 for score in scores]) == expected
        assert choose(answers[::-1], right[::-1], scores[::-1]) == expected


def test_a_score_can_outvote_the_majority():
    answers, right = ["a", "b", "b"], [True, False, False]
    assert majority(answers, right) == 0.0
    assert weighted_majority(answers, right, [4.0, 0.0, 0.1]) == best_of_n(answers, right, [4.0, 0.0, 0.1]) == 1.0
    assert vote_weights([2.0, 2.0]) == [1.0, 1.0]


@pytest.mark.parametrize("choose", [best_of_n, weighted_majority])
def test_refused(choose):
    with pytest.raises(ValueError, match="scores must be finite"):
        choose(["a"], [True], [math.nan])
    with pytest.raises(ValueError):
        choose(["a", "b"], [True, False], [1.0])


def test_summary():
    questions = [(["a", "b"], [True, False]), (["b", "a"], [False, True])]
    found = ranking.summary(questions, {"S": [[1, 0], [0, 1]], "x": [[0, 1], [0, 1]]})
    assert {name: estimate["value"] for name, estimate in found.items()} == {
        "best-of-2 by S": 1.0,
        "weighted majority@2 by S": 1.0,
        "best-of-2 by x": 0.5,
        "weighted majority@2 by x": 0.5,
    }
    with pytest.raises(ValueError):
        ranking.summary(questions, {"S": [[1, 0]]})
    with pytest.raises(ValueError, match="no questions"):
        ranking.summary([], {"S": []})


# ---- evaluate.py --self-rank ----

ANSWERS = ["4", "five", "4", "6"]


class Writes(StandIn):
    """In place of vLLM: ANSWERS, in tokens that are not the ones that the tokenizer would make of them."""

    closed = 0

    def generate(self, questions):
        StandIn.generated += 1
        prompt_ids = list(b"what vLLM made of the prompt")
        ids = [[3, 5, 7], [11, 13], [3, 5, 7], [17, 19, 23, 29]]
        more = {"prompt_ids": prompt_ids, "responses": ANSWERS, "response_ids": ids, "finished": [True] * 4}
        return [question | more for question in questions]

    def close(self):
        Writes.closed += 1


@pytest.fixture
def self_rank(tmp_path, monkeypatch):
    """Evaluates a tiny policy on aime.parquet with a tiny reference: exit status and results."""
    monkeypatch.setattr(evaluate, "Engine", Writes)
    make_model(tmp_path / "policy", 0)
    make_model(tmp_path / "ref", 1)
    write_data(tmp_path / "aime.parquet")
    (tmp_path / "reward.py").write_text(
        "def compute_score(s, response, truth, e=None): return float(response == truth)"
    )

    def once(*more):
        options = {"model": "policy", "data": "aime.parquet", "out": ".", "reward": "reward.py"}
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(tmp_path / value))]
        status = evaluate.main([*arguments, "--n", "4", *map(str, more)])
        found = tmp_path / "results.json"
        return status, json.loads(found.read_text()) if found.exists() else None

    return once


def plain_scores(folder, prompt_ids, ids, temperature=1.0):
    """S / beta and mean log-prob, in float64, one token at a time."""
    log_p, log_q = (
        torch.log_softmax(model(torch.tensor([prompt_ids + ids])).logits[0] / temperature, -1)
        for model in (
            AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64) for name in ("policy", "ref")
        )
    )
    judgement, log_prob = 0.0, 0.0
    for t, token in enumerate(ids):
        p, q = log_p[len(prompt_ids) + t - 1], log_q[len(prompt_ids) + t - 1]
        judgement += (p[token] - q[token] - (p.exp() * (p - q)).sum()).item()
        log_prob += p[token].item()
    return judgement, log_prob / len(ids)


def stored(tmp_path):
    return json.loads((tmp_path / "responses/aime.jsonl").read_text().split("\n")[1])


def test_scores_and_figures_are_those_of_the_tokens_that_were_written(self_rank, tmp_path):
    before = Writes.closed
    status, written = self_rank("--self-rank", "--reference", tmp_path / "ref")
    assert status == 0 and Writes.closed == before + 1, "vLLM gave its memory back before the models were loaded"
    row = stored(tmp_path)
    expected = [plain_scores(tmp_path, row["prompt_ids"], ids) for ids in row["response_ids"]]
    for i, name in enumerate(("S", "mean log-prob")):
        scores = [pair[i] for pair in expected]
        assert row["self_rank"][name] == pytest.approx(scores, rel=1e-4)
        found = written["results"]["aime"]
        assert found[f"best-of-4 by {name}"]["value"] == best_of_n(ANSWERS, row["accs"], scores)
        assert found[f"weighted majority@4 by {name}"]["value"] == weighted_majority(ANSWERS, row["accs"], scores)
    assert written["settings"]["self_rank"] == {"temperature": 1.0, "dtype": "float32", "notes": []}
    assert "best-of-4 by S" in (tmp_path / "results.md").read_text()


def test_reference_and_temperature_are_those_of_the_run(self_rank, tmp_path, monkeypatch):
    run = make_run(tmp_path, tmp_path / "run")
    actor = run / "checkpoints/global_step_5/actor"
    (actor / "model_world_size_1_rank_0.pt").touch()

    def merger(command, **_):
        shutil.copytree(tmp_path / "policy", command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(checkpoint.subprocess, "run", merger)
    status, written = self_rank("--self-rank", "--model", actor / "merged", "--temperature", "0.5")
    assert status == 0 and written["settings"]["self_rank"]["temperature"] == 0.9
    assert written["settings"]["temperature"] == 0.5, "of the sampling"
    row = stored(tmp_path)
    expected = [plain_scores(tmp_path, row["prompt_ids"], ids, temperature=0.9)[0] for ids in row["response_ids"]]
    assert row["self_rank"]["S"] == pytest.approx(expected, rel=1e-4)


def test_responses_of_an_earlier_version_have_no_tokens_and_are_tokenized_again(self_rank, tmp_path, capsys):
    assert self_rank()[0] == 0
    assert "self_rank" not in stored(tmp_path)
    settings, row, _ = (tmp_path / "responses/aime.jsonl").read_text().split("\n")
    row = json.loads(row)
    del row["response_ids"], row["prompt_ids"]
    lines(tmp_path / "responses/aime.jsonl", [json.loads(settings), row])
    before = StandIn.generated
    assert self_rank("--self-rank", "--reference", tmp_path / "ref")[0] == 0
    assert StandIn.generated == before
    tokenizer = make_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2="}], add_generation_prompt=True, return_dict=False
    )
    ids = [*tokenizer("five")["input_ids"], tokenizer.eos_token_id]
    assert stored(tmp_path)["self_rank"]["S"][1] == pytest.approx(plain_scores(tmp_path, prompt, ids)[0], rel=1e-4)
    assert "Note: Answers were tokenized again" in capsys.readouterr().out


def test_what_is_missing_is_said_before_anything_is_generated(self_rank, tmp_path, capsys):
    before = StandIn.generated
    make_model(tmp_path / "other", 2, vocabulary=300, extra=["<x>"])
    assert self_rank("--self-rank")[0] == 2
    assert "give --reference, the model that training started from" in capsys.readouterr().err
    assert self_rank("--self-rank", "--reference", tmp_path / "other")[0] == 2
    message = capsys.readouterr().err
    assert "260 (policy) and 300 (reference)" in message and "tokenizers differ" in message
    assert self_rank("--reference", tmp_path / "ref")[0] == 2
    assert "--reference is for --self-rank" in capsys.readouterr().err
    assert StandIn.generated == before


def test_the_recipes_page_has_the_measured_figures():
    """docs/recipes.md, "The policy as its own verifier", against benchmarks/results/self_rank.json."""
    root = Path(__file__).parent.parent
    stored = json.loads((root / "benchmarks/results/self_rank.json").read_text())["over_seeds"]
    keys = ("algorithm", "flip_prob", "answers of", "figure")
    found = {tuple(row[key] for key in keys): row for row in stored}
    assert {row["seeds"] for row in stored if not row["figure"].startswith("AUC")} == {5}
    page = (root / "docs/recipes.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| trained by | flipped groups |"))
    figures = [name.strip() for name in head.strip("|").split("|")][3:]
    figures[-1] = "weighted majority@8 by mean log-prob"  # "the same by" there
    table = page.split(head)[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 8
    for line in table:
        algorithm, flipped, answers_of, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        cell = (algorithm, {"none": 0.0, "20 %": 0.2}[flipped], answers_of)
        rows = [found[(*cell, figure)] for figure in figures]
        assert cells == [f"{100 * r['mean']:.1f} ({100 * r['low']:.1f} to {100 * r['high']:.1f})" for r in rows]
