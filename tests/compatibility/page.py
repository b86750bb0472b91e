"""The part of docs/compatibility.md that says which releases of verl were run, made from results.json.

To rewrite that part of the page: .venv/bin/python tests/compatibility/page.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs/compatibility.md"
BEGIN, END = "<!-- made by tests/compatibility/page.py: begin -->", "<!-- made by tests/compatibility/page.py: end -->"


def render(results: dict) -> str:
    """The text between the two markers, from what matrix.py wrote."""
    versions = ", ".join(f"{name} {version}" for name, version in results["environment"].items())
    lines = [
        f"On {results['date']}, Python {results['python']}, {versions}, by "
        "`.venv/bin/python tests/compatibility/matrix.py`:",
        "",
        "| verl | contract tests | `vimpo check` | engine and trainer against float64 | three steps of the tiny run |",
        "| --- | --- | --- | --- | --- |",
    ]
    for release in results["releases"]:
        cells = [
            _tests(release["contract"]),
            _verdict(release["check"]),
            _tests(release["formula"]),
            _run(release["tiny_run"]),
        ]
        lines.append(f"| {release['verl']} | " + " | ".join(cells) + " |")
    lines += ["", f"The newest release on the package index that day was {results['newest']}."]
    return "\n".join(lines)


def _tests(part: dict) -> str:
    if part["ok"]:
        return f"{part['passed']} passed"
    return f"{part['passed']} passed, {len(part['failed'])} failed: " + ", ".join(
        f"`{name}`" for name in part["failed"][:3]
    )


def _verdict(part: dict) -> str:
    return "yes" if part["ok"] else "no: " + "; ".join(part["failed"][:3])


def _run(part: dict) -> str:
    return "kl " + ", ".join(f"{kl:g}" for kl in part["kl"]) if part["ok"] else "failed: " + "; ".join(part["failed"])


def with_section(page: str, section: str) -> str:
    """The page with its made part replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text())
    PAGE.write_text(with_section(PAGE.read_text(), render(results)))
