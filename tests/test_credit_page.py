"""The page of `vimpo credit`: what a reader can do with it, and what text in it can not do.

Claimed: tokens can be reached and walked by keyboard; marks that change the direction of text are shown by name and change
nothing after them; labels of curves are whole; on a phone the fixed bars are small. Most of that needs a browser: those
tests are skipped where there is no Chromium. Not claimed: that it looks well.
"""

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from importlib import resources

import pytest

from vimpo_verl.credit import page

# Unicode's property Bidi_Control: all that have no other purpose than the direction of text.
CONTROLS = {
    letter: unicodedata.bidirectional(letter)
    for letter in map(chr, range(sys.maxunicode + 1))
    if unicodedata.bidirectional(letter) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
} | {"\N{LEFT-TO-RIGHT MARK}": "LRM", "\N{RIGHT-TO-LEFT MARK}": "RLM", "\N{ARABIC LETTER MARK}": "ALM"}

TEXTS = ["The", " a", "\u202e", "bc", "\n", "x", "\u2067", "d", " e", "\u05d0", "\u2066", "f", "<|end|>"]
JUDGEMENTS = [2.39e-6, -1.23e-10, 0.3, -1234.5]  # the first is the longest: S +0.00000239


def answer(judgement, reward):
    each = [judgement / len(TEXTS)] * len(TEXTS)
    numbers = {name: each for name in ("log_prob", "ref_log_prob", "kl", "td", "value", "advantage")}
    tokens = {"id": list(range(len(TEXTS))), "text": TEXTS, "special": [0] * 12 + [1], "mask": [1] * 13, **numbers}
    start = {"where": "1.jsonl:1", "times": 1, "reward": reward, "baseline": 0.5}
    return {**start, "judgement": judgement, "residual": judgement - reward + 0.5, "tokens": tokens}


@pytest.fixture(scope="module")
def html():
    prompts = [
        {"text": "What is \u202e1+1\u202c?", "baseline": 0.5, "answers": [answer(size, 1), answer(-size, 0)]}
        for size in JUDGEMENTS
    ]
    limits = {"td": 0.1, "value": 0.1, "advantage": 0.1}
    overall = {"prompts": len(prompts), "answers": 2 * len(prompts)}
    return page.html(
        {"version": 1, "settings": {}, "overall": overall, "notes": [], "colour_limit": limits, "prompts": prompts}
    )


def test_every_mark_of_direction_is_known_by_its_name():
    script = resources.files("vimpo_verl.credit").joinpath("page.js").read_text("utf-8")
    known = {chr(int(code, 16)): name for code, name in re.findall(r'"\\u([0-9a-f]{4})": "(\w{3})"', script)}
    assert known == CONTROLS and set(page.BIDI) == CONTROLS.keys()


def test_the_source_of_the_page_reads_from_left_to_right_and_loses_nothing(html):
    assert not CONTROLS.keys() & set(html)
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert json.loads(block)["prompts"][0]["answers"][0]["tokens"]["text"] == TEXTS


# ---- in a browser ----

PROBE = """
const found = {};
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
for (const section of all("details.prompt")) section.open = true;
const press = (key, more = {}) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
const state = () => ({
  t: document.activeElement.dataset?.t ?? null, at: all(".at").map((span) => span.dataset.t).join(),
  readout: readout.textContent, cursors: all('.cursor[visibility="visible"]').length,
});
setTimeout(() => {  // "toggle" has filled the sections
  drawAll();
  const [first, second] = all(".answer");
  found.stops = all(".answer").map((box) => all('.tokens [tabindex="0"]', box).map((span) => span.dataset.t).join());
  found.names = all(".tokens").map((tokens) => tokens.getAttribute("aria-label"));
  first.querySelector('.tokens [tabindex="0"]').focus();
  found.focused = state();
  for (const key of ["ArrowLeft", "ArrowRight", "ArrowRight"]) press(key);
  found.walked = state();
  press("ArrowRight", {altKey: true});  // the browser's own: back and forth
  found.with_alt = state();
  found.stop_moved = all('.tokens [tabindex="0"]', first).map((span) => span.dataset.t).join();
  press("End"); press("ArrowRight");
  found.ended = state();
  press("Home");
  second.querySelector('.tokens [tabindex="0"]').focus();
  found.other = state();
  const fixed = (element) => ["fixed", "sticky"].includes(getComputedStyle(element).position);
  found.bars = all("body *").filter(fixed).reduce((sum, bar) => sum + bar.getBoundingClientRect().height, 0);
  found.height = innerHeight;
  press("Escape");
  found.released = state();

  const spans = all(".tokens span", first);
  found.places = spans.map((span) => { const box = span.getBoundingClientRect(); return [box.top, box.left, box.width]; });
  found.texts = spans.map((span) => span.textContent);
  found.marks = all(".mark", first).map((mark) => getComputedStyle(mark, "::before").content);
  found.question = all(".question")[0].textContent;
  found.labels = all("svg").flatMap((svg) => all("text", svg).map((text) => {
    const {x, y, width, height} = text.getBBox(), view = svg.viewBox.baseVal;
    return [text.textContent, x >= 0 && y >= 0 && x + width <= view.width && y + height <= view.height];
  }));
  const out = element("pre", "", JSON.stringify(found));
  out.id = "found";
  document.body.append(out);
}, 200);
"""


@pytest.fixture(scope="module")
def opened(html, tmp_path_factory):
    """Opens a page in Chromium as wide as a phone, and returns its elements as text."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    folder = tmp_path_factory.mktemp("page")

    def dom(text):
        (folder / "credit.html").write_text(text, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options += [f"--user-data-dir={folder}/profile", "--window-size=500,900", "--virtual-time-budget=2000"]
        command = [browser, *options, "--dump-dom", f"file://{folder}/credit.html"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True).stdout

    return dom


@pytest.fixture(scope="module")
def found(html, opened):
    """What the probe found. The page's own policy would not let it run."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    dom = opened(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    (block,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(block.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_page_runs_under_its_own_policy(html, opened):
    assert opened(html).count('<article class="answer">') == 2, "of the prompt that is open"


def test_tokens_are_reached_by_keyboard(found):
    assert found["stops"] == ["0"] * 2 * len(JUDGEMENTS), "one stop of the Tab key an answer"
    assert found["names"][:2] == [f"tokens of answer {n}; arrow keys, Home and End walk" for n in (1, 2)]
    assert (found["focused"]["t"], found["focused"]["at"], found["focused"]["cursors"]) == ("0", "0", 1)
    assert '"The"' in found["focused"]["readout"] and "token 1 of 13" in found["focused"]["readout"]
    assert found["walked"]["t"] == found["with_alt"]["t"] == found["stop_moved"] == "2"
    assert '"\\u202e"' in found["walked"]["readout"], "escaped: it shows nothing itself"
    assert found["ended"]["t"] == "12" and "<|end|>" in found["ended"]["readout"]
    assert (found["other"]["t"], found["other"]["at"], found["other"]["cursors"]) == ("0", "0", 1)
    assert (found["released"]["t"], found["released"]["cursors"]) == (None, 0)


def test_marks_of_direction_are_named_and_change_nothing_after_them(found):
    assert found["marks"] == ['"RLO"', '"RLI"', '"LRI"'] and found["question"] == "What is \u202e1+1\u202c?"
    assert found["texts"] == [text.replace("\n", "↵\n") for text in TEXTS], "and the text itself is kept, for copies"
    lines = [found["places"][:5], found["places"][5:]]
    for line in lines:
        lefts = [left for _, left, _ in line]
        assert lefts == sorted(lefts) and all(width > 2 for *_, width in line)


def test_labels_of_curves_are_whole(found):
    labels = dict(found["labels"])
    assert {"S +0.00000239", "S −0.00000239", "S +1234.500", "S −1.23e-10"} <= labels.keys()
    assert not [text for text, is_whole in found["labels"] if not is_whole]


def test_fixed_bars_are_small_on_a_phone(found):
    assert 0 < found["bars"] <= 0.13 * found["height"]
