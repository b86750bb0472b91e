"""Checker processes for the reward function: started when needed, bounded, replaced when they die.

Safe from any thread, also in Ray actors: the bounds are in the checker process and in the waiting, never in signals here.
"""

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from vimpo_verl.rewards.checker import MEMORY_LIMIT, TIME_LIMIT

DIED = "checker died"
_START_SECONDS = 120  # importing sympy on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one answer may cost.

    Attributes:
        processes: checker processes at most, in each process that computes rewards.
        cpu_seconds: processor time for an answer.
        memory_mib: memory for an answer, beyond the checker's own.
    """

    processes: int = 2
    cpu_seconds: int = 3
    memory_mib: int = 1024

    @property
    def wall_seconds(self) -> float:
        """Waiting time for an answer: processor time comes slowly on a busy machine."""
        return 20.0 + 4.0 * self.cpu_seconds


class CheckerPool:
    """At most `limits.processes` checkers; a call waits for a free one."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._free: queue.LifoQueue[_Checker | None] = queue.LifoQueue()
        for _ in range(limits.processes):
            self._free.put(None)  # a place for a checker that is not started yet

    def compare(self, gold: str, answer: str, boxed: bool) -> str:
        """A verdict of vimpo_verl.rewards.checker, or DIED.

        A checker that is killed from outside, for want of memory on the node or by hand, says nothing about the answer: a
        fresh one is asked again. An answer that fells that one, too, is not the right one.

        Args: as for vimpo_verl.rewards.checker.compare.

        Raises:
            RuntimeError: no checker can be started.
        """
        verdict = self._ask(gold, answer, boxed)
        return self._ask(gold, answer, boxed) if verdict == DIED else verdict

    def _ask(self, gold: str, answer: str, boxed: bool) -> str:
        checker = self._free.get()
        try:
            if checker is None or not checker.is_alive():
                checker = _Checker(self.limits)
            verdict = checker.ask({"gold": gold, "answer": answer, "boxed": boxed}, self.limits.wall_seconds)
        except BaseException:
            if checker is not None:
                checker.kill()
            self._free.put(None)
            raise
        self._free.put(checker)
        return verdict

    def close(self) -> None:
        """End the checkers that are idle."""
        with contextlib.suppress(queue.Empty):
            while True:
                checker = self._free.get_nowait()
                if checker is not None:
                    checker.kill()


class _Checker:
    """One checker process."""

    def __init__(self, limits: Limits):
        command = [sys.executable, "-m", "vimpo_verl.rewards.checker", str(limits.cpu_seconds), str(limits.memory_mib)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run; the checker ends with its input
        )
        if self._receive(_START_SECONDS) != "ready":
            self.kill()
            raise RuntimeError(
                f"the checker of math answers does not start: {self._last_words()}. Try it: {sys.executable} -m "
                "vimpo_verl.rewards.checker 3 1024 < /dev/null"
            )
        self.process.stderr.close()  # the checker sends nothing there any more

    def is_alive(self) -> bool:
        """Whether it can take a request."""
        return self.process.poll() is None

    def ask(self, request: dict, seconds: float) -> str:
        """Its verdict; where there is none in `seconds`, the process is gone afterwards."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # it died between two requests
            verdict = None
        else:
            verdict = self._receive(seconds)
        if verdict is not None:
            if verdict in (TIME_LIMIT, MEMORY_LIMIT):
                self.kill()  # a computation was torn off: the next answer gets a fresh process
            return verdict
        timed_out = self.process.poll() is None and not self._ends_soon()
        self.kill()
        return TIME_LIMIT if timed_out or self.process.returncode == -signal.SIGXCPU else DIED

    def kill(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()

    def _receive(self, seconds: float) -> str | None:
        """The next verdict; None at the end of the output or of the time."""
        deadline = time.monotonic() + seconds
        descriptor, received = self.process.stdout.fileno(), b""
        poller = select.poll()  # not select(), which takes no descriptor above 1023
        poller.register(descriptor, select.POLLIN | select.POLLHUP)
        while not received.endswith(b"\n"):
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return None
            received += chunk
        return json.loads(received)["verdict"]

    def _ends_soon(self) -> bool:
        try:
            self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _last_words(self) -> str:
        lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.returncode}, no message"


_pools: dict[tuple[int, Limits], CheckerPool] = {}
_lock = threading.Lock()


def pool_for(limits: Limits) -> CheckerPool:
    """This process's pool with these limits; a forked child gets its own, not its parent's pipes."""
    key = (os.getpid(), limits)
    with _lock:
        if key not in _pools:
            _pools[key] = CheckerPool(limits)
            atexit.register(_pools[key].close)
        return _pools[key]
