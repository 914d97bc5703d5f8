"""Programs that a tool starts: what they said, and that they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from commands import arguments_in, begin, each, last_error, run

from genrec_llm.errors import ConfigError, DataError

TOOL = """
import sys
from pathlib import Path
sys.path.insert(0, {tools!r})
from commands import each, run
folder = Path({folder!r})
each(lambda name: run([str(folder / "child.py"), name], folder / f"{{name}}.log"), ["a", "b", "c"], 2)
"""
CHILD = """
import os, signal, sys, time
from pathlib import Path
name = sys.argv[1]
def save(*_):
    time.sleep(3 * (name == "b"))
    Path(__file__).with_name(name + ".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(__file__).with_name(name + ".begun").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_what_was_started_saves_and_ends_with_the_tool(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "tool.py").write_text(TOOL.format(tools=str(tiny.REPOSITORY / "tools"), folder=str(tmp_path)))
    tool = subprocess.Popen(
        [sys.executable, str(tmp_path / "tool.py")], env=tiny.environment(), stderr=subprocess.PIPE, text=True
    )
    until(lambda: all((tmp_path / f"{name}.begun").is_file() for name in "ab"))
    tool.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(1)
        tool.send_signal(number)
    said = tool.communicate(timeout=30)[1]
    assert tool.returncode and ("the same command goes on" in said) == (number != signal.SIGKILL)
    if number != signal.SIGKILL:  # it waited for them
        assert {path.name for path in tmp_path.glob("*.saved")} == {"a.saved", "b.saved"}
    until(lambda: all((tmp_path / f"{name}.saved").is_file() for name in "ab"))
    until(lambda: not any(alive(int((tmp_path / f"{name}.begun").read_text())) for name in "ab"))
    assert not (tmp_path / "c.begun").exists()


def until(met, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "not met in time"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()


def test_every_job_is_done_and_all_problems_are_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("import sys; print('error: no', sys.argv[1]); sys.exit(len(sys.argv[1]))")
    done = []

    def work(name: str) -> None:
        code = run([str(tmp_path / "fail.py"), name], tmp_path / f"{name}.log")
        done.append((name, code))
        if name != "bb":
            raise (ConfigError if name == "a" else DataError)(last_error(tmp_path / f"{name}.log"))

    with pytest.raises(ConfigError) as caught:
        each(work, ["a", "bb", "ccc"], 2)
    assert sorted(done) == [("a", 1), ("bb", 2), ("ccc", 3)]
    assert sorted(caught.value.problems) == ["error: no a", "error: no ccc"]


def test_the_last_process_of_a_log_counts_and_a_progress_bar_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        begin(file)
        file.write(b"error: of before\n")
        begin(file)
        file.write(b"\r 1%\nerror: another training is writing there\n\r 58%|####| 311/540\r 59%|####|")
    assert last_error(log) == "error: another training is writing there"
    with log.open("ab") as file:
        begin(file)
    assert last_error(log) == "it said nothing"


def test_the_arguments_that_flags_set() -> None:
    assert arguments_in(["--max-history", "20", "--dropout=0.1", "-x", "--no_kernels"]) >= {
        "max_history",
        "dropout",
        "kernels",
    }
