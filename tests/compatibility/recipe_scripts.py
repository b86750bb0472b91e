"""What the shell scripts of a checkout of verl or verl-recipe would start: module and arguments, found by running them.

A script runs in a throw-away copy of its checkout, with an empty home, on a path that has a few tools of the shell and, in
the place of python and of all that starts one (uv, ray, torchrun, ...), a stub that writes its arguments down. Nothing else is
there to be started: no python, no curl, no pip. Where the kernel lets a user have a network of his own, it is an empty one.
"""

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Of the shell's world the scripts get these, as links to what is installed.
TOOLS = [
    "awk",
    "basename",
    "bash",
    "cat",
    "cp",
    "cut",
    "date",
    "dirname",
    "echo",
    "env",
    "expr",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "ls",
    "mkdir",
    "mktemp",
    "nproc",
    "printf",
    "pwd",
    "readlink",
    "realpath",
    "rm",
    "sed",
    "seq",
    "sh",
    "sleep",
    "sort",
    "tail",
    "tee",
    "test",
    "touch",
    "tr",
    "true",
    "uname",
    "uniq",
    "wc",
    "which",
    "xargs",
]
STARTERS = ("python", "python3", "uv", "ray", "torchrun", "hf", "huggingface-cli", "nohup", "srun", "nsys")
# What computes something for the script (`python3 -c ...`) gets no answer, as where no package is installed.
STUB = """#!{bash}
name=${{0##*/}}
for argument in "$@"; do
    if [ "$argument" = -m ]; then
        printf '%s\\0' "$name" "$@" >"$(mktemp {folder}/call-XXXXXXXX)"
        exit 0
    fi
done
case "$name" in python*) exit 1 ;; esac
"""
SECONDS = 20
PLACEHOLDERS = 20  # variables that a script may ask for, one after the other
VALUES = {"INFER_BACKEND": "vllm"}  # of those that cannot be just anything; the others get 1
# bash, of a variable that `set -u` or ${NAME:?} wants: "FILE: line 9: NAME: unbound variable", or the script's own words.
ASKED = re.compile(r"^\S+: line \d+: ([A-Za-z_]\w*): (?!command not found|cannot |No such)")


@dataclass(frozen=True)
class Command:
    """One start of a module.

    Attributes:
        launcher: the program that the script called, such as "uv" or "python3".
        module: what stands behind -m.
        arguments: what stands behind the module; Hydra's overrides and options.
    """

    launcher: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class ScriptRun:
    """What running a script showed.

    Attributes:
        commands: what it started, in the order of its calls.
        given: names of the variables that it had to be given, with the values of VALUES.
        error: the last line it said where it started nothing, else "".
    """

    commands: tuple[Command, ...]
    given: tuple[str, ...] = ()
    error: str = ""


def find_scripts(checkout: Path, folders: tuple[str, ...]) -> list[Path]:
    """The shell scripts below these folders of a checkout, sorted, as paths inside it."""
    found = [path.relative_to(checkout) for folder in folders for path in (checkout / folder).rglob("*.sh")]
    return sorted(path for path in found if ".git" not in path.parts)


class Sandbox:
    """A place to run the scripts of one checkout in.

    Args:
        checkout: the folder of verl's or verl-recipe's sources.
        folder: an empty folder, for the copy of them and for the stubs.
    """

    def __init__(self, checkout: Path, folder: Path):
        self.root, self.bin, self.home = folder / "checkout", folder / "bin", folder / "home"
        self.calls = folder / "calls"
        shutil.copytree(checkout, self.root, symlinks=True, ignore=shutil.ignore_patterns(".git"))
        for made in (self.bin, self.home, self.calls):
            made.mkdir()
        for tool in TOOLS:
            if path := shutil.which(tool):
                (self.bin / tool).symlink_to(Path(path).resolve() if tool != "sh" else path)
        for name in STARTERS:
            stub = self.bin / name
            stub.write_text(STUB.format(bash=shutil.which("bash"), folder=self.calls))
            stub.chmod(0o755)
        self._bash = [shutil.which("bash")]
        if shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
            self._bash = [shutil.which("unshare"), "-rn", *self._bash]

    @property
    def without_network(self) -> bool:
        """Whether the kernel gives the scripts an empty network of their own."""
        return len(self._bash) > 1

    # `ulimit` of a builtin nobody may raise would end a script with `set -e`.
    _no_limits = {"BASH_FUNC_ulimit%%": "() { :; }"}

    def run(self, script: Path) -> ScriptRun:
        """Run a script from the root of its checkout, giving it what variables it says that it needs."""
        given: dict[str, str] = {}
        for _ in range(PLACEHOLDERS):
            commands, said = self._run_once(script, given)
            asked = [found.group(1) for line in said if (found := ASKED.match(line)) and found.group(1) not in given]
            if commands or not asked:
                break
            given[asked[-1]] = VALUES.get(asked[-1], "1")
        error = "" if commands else _last_words(said)
        return ScriptRun(tuple(commands), tuple(given), error.replace(f"{self.root}/", ""))

    def _run_once(self, script: Path, given: dict[str, str]) -> tuple[list[Command], list[str]]:
        for call in self.calls.iterdir():
            call.unlink()
        env = {"PATH": str(self.bin), "HOME": str(self.home), "USER": "user", "LANG": "C", **self._no_limits, **given}
        process = subprocess.Popen(
            [*self._bash, str(script)], cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=SECONDS)
            said = err.splitlines() + out.splitlines()[-1:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what the script has left in the background
            process.communicate()
            said = [f"nothing was started in {SECONDS} s"]
        calls = sorted(self.calls.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [parse_call(path.read_text().split("\0")[:-1]) for path in calls], said


def parse_call(words: list[str]) -> Command:
    """What a stub has written down, its own name first, such as ["uv", "run", "python3", "-m", "verl.trainer.main_ppo"]."""
    at = words.index("-m")
    return Command(words[0], words[at + 1], tuple(words[at + 2 :]))


def _last_words(said: list[str]) -> str:
    """The last line that is neither bash's trace (set -x) nor empty."""
    lines = [line.strip() for line in said if line.strip() and not re.match(r"\++ ", line)]
    return lines[-1] if lines else "it started nothing"
