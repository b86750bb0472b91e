"""`vimpo credit` on a tiny random Qwen3 with a byte-level tokenizer, through the command line.

Claimed: the numbers are the plain float64 formulas and do not depend on which other answers are there; whatever a model
wrote, the page shows it as text and runs and fetches nothing of it; each input format gives the tokens that the policy
saw, or a message; all problems are named at once. Not claimed here: what the page looks like.
"""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vimpo_verl import beta as betas
from vimpo_verl import checkpoint
from vimpo_verl.__main__ import main
from vimpo_verl.config import VimpoConfig
from vimpo_verl.credit.answers import choose, read_answers
from vimpo_verl.credit.tokens import pieces

PAD, END = "<|endoftext|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BETA = 5e-4
NASTY = ["</script><script>alert(1)</script>", "<!-- <script>", "a\n\n b\t", f"x{END}", "你好 é \u2028 & \U0001f600"]


def make_tokenizer(extra=()):
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, "<|im_start|>", END, *extra])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder, seed, vocabulary=260, extra=()):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer(extra).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("credit")
    make_model(folder / "policy", 0)
    make_model(folder / "ref", 1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "policy")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def credit(folder, answers, out, *more):
    """The JSON that the command writes."""
    arguments = ["credit", str(folder / "policy"), "--answers", str(answers), "--out", str(out), *map(str, more)]
    for name, value in (("--reference", folder / "ref"), ("--beta", BETA)):
        if name not in arguments:
            arguments += [name, str(value)]
    assert main(arguments) == 0
    return json.loads((out / "credit.json").read_text())


def refusal(capsys, *arguments):
    assert main(["credit", "--beta", str(BETA), *map(str, arguments)]) == 2
    return capsys.readouterr().err


ROWS = [
    {"prompt": "1+1=", "response": "2", "score": 1},
    {"prompt": "1+1=", "response": "three", "score": 0},
    {"prompt": "1+1=", "response": "4", "score": 0},
    {"prompt": "2+2=", "response": "4", "score": 0.5},
]


# ---- the numbers ----


def formula(folder, prompt_ids, ids, beta, lam, temperature):
    """Every equation in its plainest form, in float64, one token at a time."""
    logits = []
    for name in ("policy", "ref"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        with torch.no_grad():
            logits.append(model(torch.tensor([prompt_ids + ids])).logits[0] / temperature)
    log_p, log_q = (torch.log_softmax(x, -1) for x in logits)
    rows = {name: [] for name in ("log_prob", "ref_log_prob", "kl", "td", "value", "advantage")}
    for t, token in enumerate(ids):
        p, q = log_p[len(prompt_ids) + t - 1], log_q[len(prompt_ids) + t - 1]
        rows["log_prob"].append(p[token].item())
        rows["ref_log_prob"].append(q[token].item())
        rows["kl"].append((p.exp() * (p - q)).sum().item())
        rows["td"].append(beta * (rows["log_prob"][t] - rows["ref_log_prob"][t] - rows["kl"][t]))
    for t in range(len(ids)):
        rows["value"].append(-sum(rows["td"][t:]))
        rows["advantage"].append(sum(lam ** (k - t) * rows["td"][k] for k in range(t, len(ids))))
    return rows


def test_numbers_are_the_formula(folder, tokenizer, tmp_path):
    answers = lines(tmp_path / "a.jsonl", ROWS)
    settings = {"beta": 0.01, "lam": 0.7, "temperature": 0.8}
    options = [item for name, value in settings.items() for item in (f"--{name}", value)]
    data = credit(folder, answers, tmp_path, *options, "--dtype", "float64")
    assert {name: data["settings"][name] for name in settings} == settings
    first = data["prompts"][0]
    assert [answer["reward"] for answer in first["answers"]] == [1, 0, 0]
    for row, answer in zip(ROWS[:3], first["answers"], strict=True):
        ids = tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id]
        assert answer["tokens"]["id"] == ids
        expected = formula(folder, tokenizer(row["prompt"])["input_ids"], ids, **settings)
        for name, numbers in expected.items():
            assert answer["tokens"][name] == pytest.approx(numbers, rel=1e-9, abs=1e-15), name
        assert answer["baseline"] == pytest.approx(1 / 3)
        assert answer["judgement"] == pytest.approx(sum(expected["td"]))
        assert answer["residual"] == pytest.approx(sum(expected["td"]) - (row["score"] - 1 / 3))


def test_defaults(folder, tmp_path):
    settings = credit(folder, lines(tmp_path / "a.jsonl", ROWS), tmp_path)["settings"]
    assert (settings["lam"], settings["temperature"], settings["baseline"]) == (1.0, 1.0, VimpoConfig().baseline)


def test_numbers_do_not_depend_on_the_other_answers(folder, tmp_path):
    """Bit for bit; but V0 is of the whole file, also of answers that are not shown."""
    rows = [{"prompt": "1+1=", "response": "x" * n, "score": n % 2} for n in range(1, 40, 6)]
    everything = credit(folder, lines(tmp_path / "all.jsonl", rows), tmp_path / "all", "--per-prompt", 99)
    backwards = credit(folder, lines(tmp_path / "back.jsonl", rows[::-1]), tmp_path / "back", "--per-prompt", 2)
    alone = credit(folder, lines(tmp_path / "one.jsonl", rows[:1]), tmp_path / "one")
    by_text = {tuple(a["tokens"]["id"]): a for a in everything["prompts"][0]["answers"]}
    assert len(by_text) == len(rows) and len(backwards["prompts"][0]["answers"]) == 2
    for answer in (*backwards["prompts"][0]["answers"], *alone["prompts"][0]["answers"]):
        assert answer["tokens"] == by_text[tuple(answer["tokens"]["id"])]["tokens"]
    assert backwards["prompts"][0]["baseline"] == everything["prompts"][0]["baseline"]
    assert alone["prompts"][0]["baseline"] == 1.0


def test_tokens_of_a_tool_have_no_td(folder, tmp_path):
    row = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9, 10], "response_mask": [1, 0, 0, 1], "score": 1}
    (answer,) = credit(folder, lines(tmp_path / "a.jsonl", [row]), tmp_path)["prompts"][0]["answers"]
    tokens = answer["tokens"]
    assert tokens["td"][1:3] == tokens["value"][1:3] == tokens["advantage"][1:3] == [0, 0]
    assert answer["judgement"] == pytest.approx(tokens["td"][0] + tokens["td"][3]) and tokens["td"][0] != 0


def test_layout_of_the_json(folder, tmp_path):
    data = credit(folder, lines(tmp_path / "a.jsonl", ROWS), tmp_path)
    assert set(data) == {"version", "settings", "overall", "notes", "colour_limit", "prompts"}
    assert data["overall"]["answers"] == 4 and data["overall"]["prompts"] == 2
    assert 0 <= data["overall"]["outcome_auc"] <= 1 and data["overall"]["kl"] > 0
    for prompt in data["prompts"]:
        assert set(prompt) == {"text", "baseline", "answers"}
        for answer in prompt["answers"]:
            assert set(answer) == {"where", "times", "reward", "baseline", "judgement", "residual", "tokens"}
            lengths = {name: len(column) for name, column in answer["tokens"].items()}
            numbers = {"log_prob", "ref_log_prob", "kl", "td", "value", "advantage"}
            assert set(lengths) == {"id", "text", "special", "mask"} | numbers
            assert len(set(lengths.values())) == 1


# ---- the page ----


class Page(HTMLParser):
    """Elements and scripts, as a browser would find them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.inside = dict(attributes)

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts.append((self.inside.get("type"), data))

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None


def test_what_models_wrote_is_text_in_the_page(folder, tmp_path):
    rows = [{"prompt": f"p {text}", "response": text, "score": i % 2} for i, text in enumerate(NASTY)]
    data = credit(folder, lines(tmp_path / "a.jsonl", rows), tmp_path, "--prompts", 9)
    text = (tmp_path / "credit.html").read_text(encoding="utf-8")
    page = Page(text)
    (_, block), (_, script) = page.scripts
    assert [kind for kind, _ in page.scripts] == ["application/json", None]
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [a for _, a in page.elements if {"src", "href"} & set(a) or any(name.startswith("on") for name in a)]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|innerHTML|document\.write|eval\(", text)
    assert "alert(1)</" not in text
    shown = json.loads(block)["prompts"]
    for prompt, all_of_it, row in zip(shown, data["prompts"], rows, strict=True):
        assert prompt["text"] == row["prompt"]
        ended = row["response"] if row["response"].endswith(END) else row["response"] + END
        assert "".join(prompt["answers"][0]["tokens"]["text"]) == ended
        assert prompt["answers"][0]["tokens"]["special"][-1] == 1
        assert prompt["answers"][0]["tokens"]["td"] == pytest.approx(all_of_it["answers"][0]["tokens"]["td"], rel=1e-3)


def test_tokens_that_are_half_a_character(tokenizer):
    ids = tokenizer("é你a\n")["input_ids"]
    assert pieces(tokenizer, ids) == ["", "é", "", "", "你", "a", "\n"]
    assert pieces(tokenizer, ids[:1]) == ["\ufffd"], "a character that is cut off at the end"
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(259) for _ in range(generator.randrange(30))]
        texts = pieces(tokenizer, ids)
        assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)


def test_tokens_whose_space_depends_on_what_is_before():
    """SentencePiece's way: the space at the beginning of a text is not shown, that of a later word is."""
    space = "\u2581"
    tokenizer = Tokenizer(models.WordLevel({f"{space}so": 0, f"{space}it": 1, "is": 2}, unk_token="is"))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0, 1, 2, 0]) == ["so", " it", "is", " so"]


# ---- the formats ----


def test_formats_give_the_same_tokens(folder, tokenizer, tmp_path):
    """Messages, evaluate.py's responses, and verl's dump, whose prompts lack special tokens, with the data."""
    messages = [{"role": "user", "content": "1+1="}]
    plain = lines(tmp_path / "a.jsonl", [{"prompt": messages, "response": "2", "score": 1}])
    evaluated = {"prompt": messages, "responses": ["2", "2"], "accs": [1.0, 1.0], "finished": [True, False]}
    evaluation = lines(tmp_path / "b.jsonl", [{"settings": {}}, evaluated])
    dumped = {"input": "user\n1+1=\nassistant\n", "output": "2", "gts": "2", "score": 1.0, "step": 3, "uid": "x_0_0"}
    (tmp_path / "rollout").mkdir()
    lines(tmp_path / "rollout/9.jsonl", [])
    lines(tmp_path / "rollout/10.jsonl", [dumped])
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("1", "1+1=")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")

    first = credit(folder, plain, tmp_path / "a")["prompts"][0]
    assert first["text"] == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    ended, cut_off = credit(folder, evaluation, tmp_path / "b")["prompts"][0]["answers"]
    assert ended["tokens"] == first["answers"][0]["tokens"]
    assert cut_off["tokens"]["id"] == ended["tokens"]["id"][:-1]
    exact = {**evaluated, "prompt_ids": [5, 6], "response_ids": [[7, 8], [9]]}
    answers, problems = read_answers(lines(tmp_path / "d.jsonl", [exact]))
    assert not problems and [(a.prompt_ids, a.response_ids) for a in answers] == [((5, 6), (7, 8)), ((5, 6), (9,))]
    third = credit(folder, tmp_path / "rollout", tmp_path / "c", "--data", tmp_path / "train.parquet")["prompts"][0]
    assert third["text"] == first["text"] and third["answers"][0]["tokens"] == first["answers"][0]["tokens"]


def test_a_dump_without_its_data_is_refused(folder, tmp_path, capsys):
    dump = lines(tmp_path / "1.jsonl", [{"input": "user\n1\nassistant\n", "output": "2", "score": 1.0}])
    arguments = [folder / "policy", "--reference", folder / "ref", "--answers", dump, "--out", tmp_path]
    assert "give the run's parquet with --data" in refusal(capsys, *arguments)


def test_choice_of_answers(tmp_path):
    rows = [{"prompt": "same", "response": str(n), "score": 1} for n in range(5)]
    rows += [{"prompt": "mixed", "response": str(n // 2), "score": int(n < 2)} for n in range(12)]
    answers, problems = read_answers(lines(tmp_path / "a.jsonl", rows))
    assert not problems
    mixed, same = choose(answers, prompts=2, per_prompt=4)
    assert [(a.response, a.reward, a.times) for a in mixed] == [("0", 1, 2), ("1", 0, 2), ("4", 0, 2), ("5", 0, 2)]
    assert len(same) == 4 and {a.times for a in same} == {1}


def make_run(folder, run, **more):
    """What a run leaves, with its checkpoint already merged."""
    from omegaconf import OmegaConf

    actor = run / "checkpoints/global_step_5/actor"
    for name in ("merged", "huggingface"):
        make_model(actor / name, 0)
    (run / checkpoint.LATEST).write_text("5")
    (run / "hydra/.hydra").mkdir(parents=True)
    config = {
        "algorithm": {"vimpo": {"beta": 0.02, "baseline": "leave_one_out"}, "lam": 0.5},
        "actor_rollout_ref": {"model": {"path": str(folder / "ref")}, "rollout": {"temperature": 0.9}},
        "trainer": {"rollout_data_dir": str(run / "rollout")},
        "data": {"train_files": str(run / "train.parquet"), "val_files": None, "max_response_length": 3},
    }
    OmegaConf.save(OmegaConf.merge(config, more), run / "hydra/.hydra/config.yaml")
    (run / "rollout").mkdir()
    dumped = [
        {"input": "user\n1+1=\nassistant\n", "output": text, "score": float(text == "2")} for text in ("2", "333")
    ]
    lines(run / "rollout/5.jsonl", dumped)
    row = {"prompt": [{"role": "user", "content": "1+1="}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), run / "train.parquet")
    return run


def test_a_runs_folder_is_enough(folder, tmp_path):
    run = make_run(folder, tmp_path / "run")
    assert main(["credit", str(run), "--out", str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out/credit.json").read_text())
    chosen = {name: data["settings"][name] for name in ("beta", "lam", "temperature", "baseline", "reference")}
    expected = {
        "beta": 0.02,
        "lam": 0.5,
        "temperature": 0.9,
        "baseline": "leave_one_out",
        "reference": str(folder / "ref"),
    }
    assert chosen == expected
    right, wrong = data["prompts"][0]["answers"]
    assert (right["baseline"], wrong["baseline"]) == (0.0, 1.0), "leave one out"
    assert len(right["tokens"]["id"]) == 2 and len(wrong["tokens"]["id"]) == 3, "an answer of full length was cut off"


@pytest.mark.parametrize("baseline", ["fused", "posterior_mean"])
def test_a_baseline_whose_priors_are_not_in_the_file_is_the_groups_mean_and_says_so(folder, tmp_path, capsys, baseline):
    run = make_run(folder, tmp_path / "run", algorithm={"vimpo": {"baseline": baseline}})
    assert main(["credit", str(run), "--out", str(tmp_path / "out")]) == 0
    assert (
        f"Note: V0 is the group's mean here: the answers do not have the priors of the run's baseline={baseline}"
        in (capsys.readouterr().out)
    )
    data = json.loads((tmp_path / "out/credit.json").read_text())
    assert [answer["baseline"] for answer in data["prompts"][0]["answers"]] == [0.5, 0.5]


def test_what_verl_fills_a_batch_up_with_is_no_answer(tmp_path):
    """With rollouts on demand nearly every dump has such rows."""
    dumped = [{"input": "q", "output": "2", "score": 1.0, "uid": "0a38be07-0000-4000-8000-000000000000_0_0"}]
    dumped += [{"input": "", "output": "", "score": 0.0, "uid": f"pad{'0a38be07' * 4}_{i}_0"} for i in range(2)]
    answers, problems = read_answers(lines(tmp_path / "d.jsonl", dumped))
    assert [answer.prompt for answer in answers] == ["q"] and problems == []


SOURCES = {
    "the checkpoint's vimpo_state.json": (
        0.125,
        0.125,
    ),  # what the run came to use, whatever its last configuration says
    "the run's configuration": (None, 0.02),
}


@pytest.mark.parametrize("source", SOURCES)
def test_beta_is_the_one_of_the_run(folder, tmp_path, capsys, source):
    in_the_checkpoint, expected = SOURCES[source]
    run = make_run(folder, tmp_path / "run")
    if in_the_checkpoint:
        betas.save(betas.Beta(in_the_checkpoint), run / "checkpoints/global_step_5")
    assert main(["credit", str(run), "--out", str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out/credit.json").read_text())
    assert data["settings"]["beta"] == expected
    assert f"Note: beta={expected}, from {source}" in capsys.readouterr().out
    tokens = data["prompts"][0]["answers"][0]["tokens"]
    columns = zip(tokens["log_prob"], tokens["ref_log_prob"], tokens["kl"], strict=True)
    assert tokens["td"] == pytest.approx([expected * (p - q - kl) for p, q, kl in columns])


def test_a_beta_that_nobody_knows_is_asked_for(folder, tmp_path, capsys):
    """A run with beta=auto whose checkpoint has no number: an earlier version's, or a Hugging Face folder."""
    run = make_run(folder, tmp_path / "run", algorithm={"vimpo": {"beta": "auto"}})
    for policy in ([run], [folder / "policy", "--reference", folder / "ref"]):
        answers = lines(tmp_path / "a.jsonl", ROWS)
        assert main(["credit", *map(str, policy), "--answers", str(answers), "--out", str(tmp_path)]) == 2
        assert "  - beta: not known: there is no vimpo_state.json" in capsys.readouterr().err
    given = ["--beta", "0.3", "--out", str(tmp_path / "out")]
    assert main(["credit", str(run), *given]) == 0 and "Note: beta=0.3, as given" in capsys.readouterr().out
    (run / "checkpoints/global_step_5/vimpo_state.json").write_text("{")
    assert main(["credit", str(run), *given]) == 2
    assert "global_step_5/vimpo_state.json: the run's beta cannot be read" in capsys.readouterr().err


def test_a_reference_from_the_hub_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    """run_math.sh names its model as the hub does."""
    snapshot = tmp_path / "models--org--base/snapshots/abc"
    make_model(snapshot, 1)
    (tmp_path / "models--org--base/refs").mkdir()
    (tmp_path / "models--org--base/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    answers = lines(tmp_path / "a.jsonl", ROWS)
    named = credit(folder, answers, tmp_path / "out", "--reference", "org/base")
    assert named["prompts"] == credit(folder, answers, tmp_path / "out")["prompts"]


def test_sampled_kl_of_the_run(folder, tmp_path):
    run = make_run(folder, tmp_path / "run", algorithm={"vimpo": {"kl_estimator": "k2"}})
    assert main(["credit", str(run), "--out", str(tmp_path / "out")]) == 0
    tokens = json.loads((tmp_path / "out/credit.json").read_text())["prompts"][0]["answers"][0]["tokens"]
    ratio = [p - q for p, q in zip(tokens["log_prob"], tokens["ref_log_prob"], strict=True)]
    assert tokens["kl"] == pytest.approx([x * x / 2 for x in ratio])
    assert tokens["td"] == pytest.approx([0.02 * (x - x * x / 2) for x in ratio])


# ---- what cannot work ----


def test_all_problems_at_once(folder, tmp_path, capsys):
    other = make_model(tmp_path / "other", 2, vocabulary=262, extra=["<tool>"])
    rows = [{"prompt": "1", "response": "", "score": 1}, {"prompt": "1", "response": "x"}, {"output": "x", "score": 1}]
    rows += [{"prompt": 3, "response": "x", "score": 1}, {"prompt": "1", "response": "x", "score": None}]
    answers = lines(tmp_path / "a.jsonl", rows)
    text = refusal(
        capsys, folder / "policy", "--reference", other, "--answers", answers, "--data", tmp_path / "no.parquet"
    )
    for message in (
        "260 (policy) and 262 (reference) vocabulary entries",
        "tokenizers differ, for example in '<tool>': missing (policy), 259 (reference)",
        "a.jsonl:1: the answer is empty",
        "a.jsonl:2: no score (it has prompt, response)",
        "a.jsonl:3: no input (it has output, score)",
        "a.jsonl:4: prompt must be text, messages",
        "a.jsonl:5: score must be a finite number, found None",
        "no.parquet: there is no such file",
    ):
        assert message in text, message


def test_paths_that_are_nothing(folder, tmp_path, capsys):
    text = refusal(capsys, tmp_path / "policy", "--reference", tmp_path, "--answers", tmp_path / "a.jsonl")
    assert f"policy: {tmp_path}/policy: there is no such folder" in text
    assert f"reference: {tmp_path} is no model" in text and "a.jsonl: there is no such file" in text
    text = refusal(capsys, folder / "policy")
    assert "give --reference" in text and "give --answers FILE" in text
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n')
    text = refusal(capsys, folder / "policy", "--reference", folder / "ref", "--answers", tmp_path / "bad.jsonl")
    assert "bad.jsonl:1: no JSON" in text


def test_tokens_that_the_models_cannot_take(folder, tmp_path, capsys):
    rows = [{"prompt": "1", "response": "x" * 300, "score": 1}, {"prompt": "", "response": "x", "score": 1}]
    rows += [{"prompt_ids": [1], "response_ids": [999], "score": 1}]
    answers = lines(tmp_path / "a.jsonl", rows)
    text = refusal(capsys, folder / "policy", "--reference", folder / "ref", "--answers", answers, "--out", tmp_path)
    assert "a.jsonl:1: prompt and answer have 302 tokens, the models take 256" in text
    assert "a.jsonl:2: the prompt is empty" in text
    assert "a.jsonl:3: token 999 is not among the models' 260 vocabulary entries" in text


def test_numbers_that_are_not_finite_are_named(folder, tmp_path, capsys):
    broken = make_model(tmp_path / "broken", 1)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(broken)
    answers = lines(tmp_path / "a.jsonl", ROWS)
    text = refusal(capsys, folder / "policy", "--reference", broken, "--answers", answers, "--out", tmp_path)
    assert "a.jsonl:1: ref_log_prob of token 1 is nan" in text and not (tmp_path / "credit.json").exists()


# ---- a merged model that is stale ----


def test_credit_is_of_the_shards_that_there_are(folder, tmp_path, monkeypatch):
    """All weights of the shard halved, its size and times as before. In place of verl's merger: load, save."""
    run = make_run(folder, tmp_path / "run")
    actor = run / "checkpoints/global_step_5/actor"
    shard = actor / "model_world_size_1_rank_0.pt"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    merges = []

    def merger(command, **_):
        merges.append(command)
        model = AutoModelForCausalLM.from_pretrained(folder / "policy")
        model.load_state_dict(torch.load(shard))
        model.save_pretrained(command[-1])
        return subprocess.CompletedProcess(command, 0)

    def kl(name):
        assert main(["credit", str(run), "--out", str(tmp_path / name)]) == 0
        return json.loads((tmp_path / name / "credit.json").read_text())["overall"]["kl"]

    torch.save(weights, shard)
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    monkeypatch.setattr(checkpoint.subprocess, "run", merger)
    first = kl("first")
    assert len(merges) == 1, "what it was merged from is not known"
    assert kl("again") == first and len(merges) == 1
    size = shard.stat().st_size
    torch.save({name: weight / 2 for name, weight in weights.items()}, shard)
    os.utime(shard, ns=times)
    assert shard.stat().st_size == size
    halved = kl("halved")
    shutil.rmtree(actor / "merged")
    assert halved == kl("fresh") != first and len(merges) == 3
    (actor / "optim_world_size_1_rank_0.pt").touch()
    assert kl("more") == halved and len(merges) == 3, "no part of the model"
    (actor / "huggingface/generation_config.json").write_text("{}")
    assert kl("configured") == halved and len(merges) == 4


# ---- checkpoints with LoRA ----


@pytest.mark.parametrize("alpha", [8, 0])
def test_adapters_are_merged(folder, tmp_path, alpha):
    """verl's merger leaves the base model's weights with the adapter beside them."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder / "policy")
    base.save_pretrained(tmp_path)
    adapted = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora_adapter")
    ids = torch.tensor([[1, 2, 3]])
    if alpha == 0:
        with pytest.raises(checkpoint.NotAModel, match="lora_train_meta.json"):
            checkpoint._apply_adapter(tmp_path)
        return
    checkpoint._apply_adapter(tmp_path)
    with torch.no_grad():
        merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, adapted(ids).logits
        assert torch.allclose(merged, expected, atol=1e-5)
        assert not torch.allclose(
            merged, AutoModelForCausalLM.from_pretrained(folder / "policy")(ids).logits, atol=1e-2
        )
