"""The page: one HTML file with its style, its script and its data in it, and nothing from anywhere else.

What models wrote is data: it is in a JSON block whose `<`, `>` and `&` are escaped, and the script shows it as text
only. A content security policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import html as escaping
import json
from importlib import resources

# What turns the direction of text around: the page shows it by name, and its source does not have it.
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_DIGITS = 4  # of the numbers in the page; credit.json has all
_NUMBERS = ("log_prob", "ref_log_prob", "kl", "td", "value", "advantage")

EQUATIONS = """\
ρ_t   = β · log( π(y_t|s_t) / π_ref(y_t|s_t) )            log-ratio of policy and reference
κ_t   = β · KL( π(·|s_t) ‖ π_ref(·|s_t) )                 over the whole vocabulary
td_t  = ρ_t − κ_t                                         token TD residual
V(s_t) = V(s_{t+1}) − td_t,   V(s_{T+1}) = 0              implied value, relative to the end
A_t   = Σ_{k≥t} λ^(k−t) · td_k                            advantage, before whitening
V0    = mean reward of the prompt's answers
S     = Σ_t td_t                                          the policy's own judgement of its answer
residual = S − (R − V0)                                   what the value loss ½·residual² drives to 0"""

EXPLANATION = {
    "td": "How far this token moves the value. Blue: up, the policy prefers it to what else it could have written by "
    "more than the reference does; orange: down.",
    "value": "How far the value has come from V0 before this token: V(s_t) + S = Σ_{k<t} td_k. Blue: above V0; orange: "
    "below.",
    "advantage": "What the policy sees coming from this token on, before whitening over the batch. Blue: gain; orange: "
    "loss.",
    "curve": "V0 + Σ_{k<t} td_k = V(s_t) + V0 + S: it starts at V0 and ends at V0 + S. The policy has judged an answer "
    "rightly where the curve ends at R; the bar beside its end is the residual. With an arrow, R is off the scale.",
}
# No script but ours, nothing fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
KEY = (
    "R: reward. V0: mean reward of the prompt's answers. S = Σ td: the policy's own judgement. Residual = S − (R − V0)."
)
HINT = "Point at a token for its numbers; a click or the Tab key holds it, arrow keys walk, Escape lets go."


def html(data: dict) -> str:
    """The page of what `report.as_json` returns."""
    style, script = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(digest)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>vimpo credit</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            _head(data),
            _controls(data["colour_limit"]),
            '<main id="prompts"><noscript>The answers are shown by the script in this file.</noscript></main>',
            f'<footer id="readout" aria-live="polite">{HINT}</footer>',
            f'<script type="application/json" id="data">{_as_data(data)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>\n",
        ]
    )


def _head(data: dict) -> str:
    settings = [(name.replace("_", " "), value) for name, value in data["settings"].items() if value is not None]
    facts = [(name.replace("_", " "), _number(value)) for name, value in data["overall"].items() if value is not None]
    rows = "".join(
        f"<dt>{escaping.escape(name)}</dt><dd>{escaping.escape(str(value))}</dd>" for name, value in settings
    )
    figures = "".join(f"<span><b>{value}</b> {escaping.escape(name)}</span>" for name, value in facts)
    notes = "".join(f"<li>{escaping.escape(note)}</li>" for note in data["notes"])
    meaning = "".join(f"<dt>{name}</dt><dd>{escaping.escape(text)}</dd>" for name, text in EXPLANATION.items())
    return (
        f'<header><h1>Credit of tokens</h1><p class="figures">{figures}</p>'
        f"<details><summary>Models and settings</summary><dl>{rows}</dl></details>"
        f'<details><summary>What is what</summary><pre class="equations">{escaping.escape(EQUATIONS)}</pre>'
        f'<dl>{meaning}</dl></details><ul class="notes">{notes}</ul><p class="key">{KEY}</p></header>'
    )


def _controls(limits: dict[str, float]) -> str:
    radios = "".join(
        f'<label><input type="radio" name="quantity" value="{name}"{" checked" if name == "td" else ""}>'
        f"<span>{name}</span></label>"
        for name in limits
    )
    return (
        f"<nav><fieldset><legend>Colour tokens by</legend>{radios}</fieldset>"
        '<div class="scale"><output id="low"></output><i></i><output id="high"></output>'
        '</div><label class="check"><input type="checkbox" id="rewards"> Curves on the scale of rewards</label>'
        '<small id="meaning"></small></nav>'
    )


def _as_data(data: dict) -> str:
    """JSON that cannot end its script element, whatever text is in it."""
    text = json.dumps(_for_page(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # JSON has these in strings only, where the escapes mean the same. Lone surrogates cannot be written as UTF-8.
    for character in f"<>&\u2028\u2029{BIDI}":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _for_page(data: dict) -> dict:
    return {
        "limits": data["colour_limit"],
        "explanation": EXPLANATION,
        "prompts": [
            {**prompt, "answers": [{**answer, "tokens": _rounded(answer["tokens"])} for answer in prompt["answers"]]}
            for prompt in data["prompts"]
        ],
    }


def _rounded(tokens: dict) -> dict:
    short = {name: [float(f"{x:.{_DIGITS}g}") for x in tokens[name]] for name in _NUMBERS}
    # The rest in the rare case that there is something to say.
    flags = {
        name: tokens[name]
        for name in ("special", "mask")
        if len(set(tokens[name])) > 1 or tokens[name][0] != (name == "mask")
    }
    return {"id": tokens["id"], "text": tokens["text"], **flags, **short}


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
