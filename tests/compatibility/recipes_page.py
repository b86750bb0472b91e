"""The part of docs/compatibility.md about scripts, and the README's fraction, made from recipes.json.

To write both again: .venv/bin/python tests/compatibility/recipes_page.py
"""

import json
import re
from collections import Counter
from pathlib import Path

import backing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE, README = ROOT / "docs/compatibility.md", ROOT / "README.md"
RESULTS = HERE / "recipes.json"
BEGIN = "<!-- made by tests/compatibility/recipes.py: begin -->"
END = "<!-- made by tests/compatibility/recipes.py: end -->"
# The one sentence of the README that has the fraction.
FRACTION = re.compile(
    r"\d+ of the \d+ example scripts of verl that run\s+plain GRPO take it, \d+ of the \d+ with another\s+loss or estimator"
)


def write(results: dict) -> None:
    """Rewrite both pages."""
    PAGE.write_text(with_section(PAGE.read_text(), render(results)))
    README.write_text(with_fraction(README.read_text(), results))


def with_section(page: str, section: str) -> str:
    """docs/compatibility.md with its made part replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def with_fraction(readme: str, results: dict) -> str:
    """The README with its fraction replaced; line breaks stay where they are."""
    numbers = iter([str(n) for plain in (True, False) for n in counts(results["checkouts"][0], plain)])
    return FRACTION.sub(lambda found: re.sub(r"\d+", lambda _: next(numbers), found.group()), readme)


def counts(checkout: dict, plain: bool) -> tuple[int, int]:
    """Scripts that take the switch, and all of them, of the plain GRPO scripts or of the others."""
    recipes = [recipe for recipe in checkout["recipes"] if recipe["plain"] == plain]
    return sum(accepted(recipe) for recipe in recipes), len(recipes)


def accepted(recipe: dict) -> bool:
    """Whether VIMPO's checks have nothing against it."""
    return recipe["engine"] != "?" and not recipe["refused"]


def summary(results: dict) -> str:
    """For the terminal: one line a checkout."""
    return "\n".join(
        f"{c['name']}: plain GRPO {'/'.join(map(str, counts(c, True)))}, others {'/'.join(map(str, counts(c, False)))}"
        for c in results["checkouts"]
    )


def render(results: dict) -> str:
    """The text between the two markers."""
    names = " ".join(f"{c['name'].upper()}_CHECKOUT" for c in results["checkouts"])
    lines = [
        f"On {results['date']}, on verl {results['verl']}, by `.venv/bin/python tests/compatibility/recipes.py --verl {names}`.",
        "Each script is run with a stub in python's place, and what it hands to `verl.trainer.main_ppo` is composed by Hydra",
        "and put through the driver's checks, with its own estimator and with `vimpo`. Nothing is trained: what has been run is",
        'below, under "Everything else".',
    ]
    for checkout in results["checkouts"]:
        lines += ["", *_checkout(checkout, results["verl"])]
    return "\n".join(lines)


def _checkout(checkout: dict, verl: str) -> list[str]:
    recipes = checkout["recipes"]
    mended = [recipe for recipe in recipes if recipe["mended"]]
    lines = [
        f"**{checkout['name']}**, commit {checkout['commit']} of {checkout['committed']}: {len(recipes)} scripts start "
        "`verl.trainer.main_ppo`.",
        "",
        "| engine | plain GRPO: take the switch | another loss or estimator |",
        "| --- | --- | --- |",
    ]
    engines = sorted({recipe["engine"] for recipe in recipes}, key=lambda name: (name == "?", name))
    for engine in engines:
        of_it = {"recipes": [recipe for recipe in recipes if recipe["engine"] == engine]}
        name = "does not compose" if engine == "?" else f"`{engine}`"
        lines.append(f"| {name} | {_of(counts(of_it, True))} | {_of(counts(of_it, False))} |")
    lines.append(f"| together | {_of(counts(checkout, True))} | {_of(counts(checkout, False))} |")
    lines += ["", *_reasons(recipes), "", *_backing(recipes)]
    lines += [
        "",
        f"{len(mended)} of them do not compose on verl {verl} as they stand, with their own estimator neither: they are newer or",
        "older. What this verl has no key for is left out, and they count by what the rest says.",
    ]
    if checkout["other_modules"]:
        started = sorted(checkout["other_modules"].items(), key=lambda item: (-len(item[1]), item[0]))
        lines += [
            "",
            "Other mains, not counted above (RL ones do not take the switch and say so): "
            + ", ".join(f"`{module}` {len(scripts)}" for module, scripts in started)
            + ".",
        ]
    return [*lines, "", *_table(recipes)]


def _of(accepted_and_all: tuple[int, int]) -> str:
    return "{} of {}".format(*accepted_and_all) if accepted_and_all[1] else ""


def _reasons(recipes: list[dict]) -> list[str]:
    by_kind = {
        plain: Counter(key for r in recipes if r["plain"] == plain for key in r["refused"]) for plain in (True, False)
    }
    reasons = sorted(by_kind[True] | by_kind[False], key=lambda key: (-by_kind[True][key] - by_kind[False][key], key))
    if not reasons:
        return ["Nothing is refused."]
    rows = [f"| `{short(key)}` | {by_kind[True][key] or ''} | {by_kind[False][key] or ''} |" for key in reasons]
    return ["| refused for (a script may have several) | plain GRPO | others |", "| --- | --- | --- |", *rows]


def _backing(recipes: list[dict]) -> list[str]:
    """What the scripts that take the switch do, and what has gone along that path."""
    lines = [
        "What the acceptances rest on. Whole run: by verl, Ray and vLLM; engine: verl's own engine on tiny models, against",
        "float64 or against FSDP's step; formula: the gradient through verl's loss; driver: a warning says that it has no part.",
        "",
        "| what a script has | plain GRPO | others | has run as | in `tests/` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for path in backing.PATHS:
        plain, others = (
            [r for r in recipes if accepted(r) and r["plain"] == kind and path.has(r)] for kind in (True, False)
        )
        if plain or others:
            tests = ", ".join(f"`{test}`" for test in path.tests)
            seen = "; ".join(text for text in (tests, path.remark) if text)
            lines.append(f"| {path.name} | {len(plain) or ''} | {len(others) or ''} | {path.level} | {seen} |")
    return lines


def _table(recipes: list[dict]) -> list[str]:
    lines = [
        "<details><summary>Every script</summary>",
        "",
        "| script | engine | kind | with `vimpo` | of it not run | left out |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in sorted(recipes, key=lambda recipe: recipe["script"]):
        verdict = (
            "yes" if accepted(recipe) else ", ".join(f"`{short(key)}`" for key in recipe["refused"]) or recipe["own"]
        )
        left_out = ", ".join(
            dict.fromkeys(f"`{short(override.lstrip('+').split('=')[0])}`" for override in recipe["mended"][:3])
        )
        more = f" and {len(recipe['mended']) - 3} more" if len(recipe["mended"]) > 3 else ""
        lines.append(
            f"| {recipe['script'].removeprefix('examples/')} | {recipe['engine']} | {kind(recipe)} | {verdict} "
            f"| {'; '.join(backing.not_run(recipe)) if accepted(recipe) else ''} | {left_out}{more} |"
        )
    return [*lines, "", "</details>"]


def kind(recipe: dict) -> str:
    """ "plain GRPO", or what is other than that."""
    given = recipe["settings"]
    estimator = given.get("algorithm.adv_estimator", "gae")
    loss = given.get("actor_rollout_ref.actor.policy_loss.loss_mode")
    others = [estimator] if estimator != "grpo" else []
    others += [loss] if loss and loss != estimator else []
    others += ["distillation"] if given.get("distillation.enabled") else []
    return "plain GRPO" if recipe["plain"] else ", ".join(others)


def short(key: str) -> str:
    """A key of verl's configuration without the sections that all of them share."""
    return key.removeprefix("actor_rollout_ref.").removeprefix("algorithm.")


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text()))
