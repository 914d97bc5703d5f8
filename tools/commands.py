"""The programs that a tool starts: what they say goes into a log, and they end with the tool."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import FrameType
from typing import IO, TypeVar

from genrec_llm.errors import ConfigError, GenRecError

REPOSITORY = Path(__file__).resolve().parent.parent
STARTED = "--- started"
_LIBC = ctypes.CDLL(None)
_running: set[subprocess.Popen[bytes]] = set()
_stopped = Event()
Job = TypeVar("Job")


def script(name: str) -> str:
    """The path of a program of the repository from here, as it is to stand in a command."""
    return os.path.relpath(REPOSITORY / name)


def arguments_in(flags: Sequence[str]) -> set[str]:
    """Names of the arguments that flags of a recipe set."""
    names = (flag.removeprefix("--").split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--"))
    return {form for name in names for form in (name, name.removeprefix("no_"))}


def each(work: Callable[[Job], None], jobs: Sequence[Job], at_once: int) -> None:
    """Do the work of every job, some at a time, whatever becomes of the others.

    SIGTERM and Ctrl-C are passed on to what `run` has started: it saves and ends, and no other job is begun.

    Raises:
        ConfigError: what jobs have raised, all at the end.
    """
    problems: list[str] = []

    def tried(job: Job) -> None:
        try:
            work(job)
        except GenRecError as error:
            problems.extend(error.problems)

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and _stopped.is_set():
            return  # what was told to save is waited for
        _stopped.set()
        for process in [*_running]:
            process.send_signal(signal.SIGTERM)
        print(f"stopped by {signal.Signals(number).name}: the same command goes on", file=sys.stderr, flush=True)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(tried, jobs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if problems:
        raise ConfigError(problems)


def run(command: Sequence[str], log: Path) -> int:
    """Run a Python program with one thread, as part of `each`; its exit code."""
    with log.open("ab") as file:
        begin(file)
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, preexec_fn=with_parent,
        )  # fmt: skip
    _running.add(process)
    if _stopped.is_set():
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait()
    finally:
        _running.discard(process)


def with_parent() -> None:
    """In a new process: it is told to stop when its parent is gone, and Ctrl-C is the parent's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; elsewhere it goes on to its end


def begin(log: IO[bytes]) -> None:
    """Write into a log that a process starts here."""
    log.write(f"\n{STARTED} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
    log.flush()


def last_error(log: Path) -> str:
    """What a failed run said last: its `error:` lines, or the last line that is not empty."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A log goes on where the process before ended; only the last process counts.
    starts = [place for place, line in enumerate(lines) if line.startswith(STARTED)]
    lines = lines[starts[-1] + 1 :] if starts else lines
    errors = [line for line in lines if line.startswith("error:")]
    return " ".join(errors) or (lines[-1] if lines else "it said nothing")
