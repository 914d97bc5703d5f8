"""Nothing is lost: runs that are killed, stopped, stuck, or go on with other processes end as if nothing had happened."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from check_distributed import workers
from safetensors.torch import load_file

from genrec_llm.checkpoints import is_complete

FILES = ("adapter_model.safetensors", "id_tokens.safetensors")
OTHER_PROCESSES = 2e-5
"""Largest difference of a trained value between numbers of processes: gradients are summed in another order."""
STEPS = 24


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_backbone("t5-untied", folder / "base")
    tiny.save_log(folder / "log.csv", users=60)
    return folder


def command(ground: Path, strategy: str, run: Path, *extra: str, processes: int = 2) -> list[str]:
    """Steps with validation in between, a checkpoint every third, dropout as it is; the best is exported."""
    return tiny.launch_command(
        strategy, "finetune", "--dataset", str(ground / "log.csv"), "--backbone", str(ground / "base"),
        "--output-dir", str(run), "--max-steps", str(STEPS), "--global-batch-size", "16", "--lora-r", "2",
        "--rows-learning-rate", "3e-3", "--logging-steps", "1", "--eval-strategy", "steps", "--eval-steps", "3",
        "--save-strategy", "steps", "--save-steps", "3", *extra, processes=processes,
    )  # fmt: skip


def started(line: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=tiny.REPOSITORY, env=tiny.environment() | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], wanted: Callable[[str], object]) -> str:
    """Output up to the first line that is wanted."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if wanted(line):
            return "".join(lines)
    raise AssertionError("the run ended before what was waited for:\n" + "".join(lines)[-4000:])


def end_of(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and the rest of the output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    return process.returncode, output


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and every training process, which torchrun puts in sessions of their own."""
    for pid in [*workers(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def values(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in FILES for name, value in load_file(run / "adapter" / file).items()}


def difference(run: Path, other: Path) -> float:
    ours, theirs = values(run), values(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def step_line(line: str) -> bool:
    return "'loss'" in line


UNSAVED = ("--max-steps", "400", "--eval-strategy", "no", "--load-best-model-at-end", "false", "--save-steps", "10000")
"""No schedule asks for a checkpoint."""

# --- told to stop -------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.run(command(ground, "ddp", folder / "run", *UNSAVED))
    return folder / "run"


@pytest.mark.parametrize("to_all", [False, True], ids=["one process", "the launcher"])
def test_sigterm_saves_after_the_same_step_everywhere_and_the_run_goes_on_from_there(
    ground: Path, whole: Path, tmp_path: Path, to_all: bool
) -> None:
    """A checkpoint that no schedule asked for, and the final adapter of the run that nobody stopped, bit for bit."""
    process = started(command(ground, "ddp", tmp_path / "run", *UNSAVED))
    read_until(process, step_line)
    os.kill(process.pid if to_all else workers(process.pid)[1], signal.SIGTERM)
    code, output = end_of(process)
    assert code != 0 and output.count("is whole, and the same command goes on from it") == 1, output[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert is_complete(checkpoint) and 0 < int(checkpoint.name.removeprefix("checkpoint-")) < 400
    assert not (tmp_path / "run" / "adapter").exists()
    assert f"going on from {checkpoint}" in tiny.run(command(ground, "ddp", tmp_path / "run", *UNSAVED))
    assert difference(tmp_path / "run", whole) == 0.0


@pytest.mark.parametrize("verb", [True, False], ids=["genrec finetune", "the recipe alone"])
def test_sigterm_saves_in_one_process_too(ground: Path, tmp_path: Path, verb: bool) -> None:
    """The launcher of one process dies at once; the verb waits for the recipe below it."""
    line = command(ground, "cpu", tmp_path / "run", *UNSAVED, processes=1)
    recipe = line.index("recipes/finetune.py")
    start = ["-m", "genrec_llm.cli", "finetune", "--strategy", "cpu"] if verb else [line[recipe]]
    process = started([sys.executable, *start, *line[recipe + 1 :]])
    read_until(process, step_line)
    os.kill(process.pid, signal.SIGTERM)
    code, output = end_of(process)
    assert code == 143 and output.count("is whole, and the same command goes on from it") == 1, output[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert is_complete(checkpoint)


# --- gone and stuck -------------------------------------------------------------


def test_a_killed_process_is_named_by_those_that_are_left(ground: Path, tmp_path: Path) -> None:
    process = started(command(ground, "ddp", tmp_path / "run", "--max-steps", "100000"))
    read_until(process, step_line)
    victim = workers(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    code, output = end_of(process)
    assert code != 0
    gone = rf"error: process 1 on \S+ \(pid {victim}, after step \d+\) is gone \(what failed here: .*\); training ends here"
    assert re.search(gone, output), output[-3000:]


def test_a_stuck_process_is_named_and_ends_the_run(ground: Path, tmp_path: Path) -> None:
    """SIGSTOP; a tenth of --ddp-timeout without a sign of life is the limit."""
    process = started(command(ground, "ddp", tmp_path / "run", "--max-steps", "100000", "--ddp-timeout", "120"))
    read_until(process, step_line)
    victim = workers(process.pid)[1]
    os.kill(victim, signal.SIGSTOP)
    code, output = end_of(process)
    assert code != 0
    assert re.search(rf"error: process 1 on \S+ \(pid {victim}, .*\) gave no sign of life for 12 s", output), output[
        -3000:
    ]


def restarted(ground: Path, run: Path, *options: str, **environment: str) -> tuple[int, str]:
    """A run whose second process is killed after its first checkpoint, under a launcher that may restart once."""
    line = command(ground, "ddp", run)
    place = line.index("--config_file")
    process = started([*line[:place], "--max_restarts", "1", *options, *line[place:]], **environment)
    while not list(run.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    return end_of(process, timeout=300)


def test_a_killed_process_is_started_anew_by_the_launcher_and_resumes(ground: Path, tmp_path: Path) -> None:
    tiny.run(command(ground, "ddp", tmp_path / "whole"))
    code, output = restarted(ground, tmp_path / "run", "--rdzv_backend", "c10d", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert code == 0 and "going on from" in output, output[-3000:]
    assert difference(tmp_path / "run", tmp_path / "whole") == 0.0


def test_restarts_that_would_meet_the_store_of_the_first_attempt_are_refused_at_once(
    ground: Path, tmp_path: Path
) -> None:
    """Gloo and NCCL would read the addresses of processes that are gone, and hang."""
    line = command(ground, "ddp", tmp_path / "run")
    line[line.index("--config_file") : line.index("--config_file")] = ["--max_restarts", "1"]
    code, output = end_of(started(line))
    assert code != 0 and "error: launch: after a restart (--max_restarts)" in output, output[-3000:]
    assert "'loss'" not in output


@pytest.mark.slow
def test_a_process_that_waits_for_its_data_for_ever_is_named(ground: Path, tmp_path: Path) -> None:
    """It lives, and so do its threads; the worker that reads for it is stopped."""
    more = ("--max-steps", "100000", "--ddp-timeout", "60", "--dataloader-num-workers", "1")
    process = started(command(ground, "ddp", tmp_path / "run", *more))
    read_until(process, step_line)
    victim = workers(process.pid)[1]
    for _ in range(30):  # an epoch has readers of its own
        listing = subprocess.run(
            ["ps", "--ppid", str(victim), "-o", "pid="], capture_output=True, text=True, check=False
        )
        for reader in listing.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(reader), signal.SIGSTOP)
        time.sleep(0.1)
    code, output = end_of(process, timeout=200)
    assert code != 0
    assert re.search(
        rf"error: process 1 on \S+ \(pid {victim}, .*\) is stuck: the others have waited for 4\d s", output
    )


@pytest.mark.slow
def test_sigterm_saves_with_readers_that_hear_it_too(ground: Path, tmp_path: Path) -> None:
    process = started(command(ground, "ddp", tmp_path / "run", *UNSAVED, "--dataloader-num-workers", "1"))
    read_until(process, step_line)
    os.kill(process.pid, signal.SIGTERM)
    _, output = end_of(process)
    assert output.count("is whole, and the same command goes on from it") == 1, output[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert is_complete(checkpoint)


# --- other processes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "before", "after"),
    [("zero2", 2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("ddp", 2, 4), ("ddp", 4, 2), ("zero1", 2, 4), ("zero1", 4, 1), ("zero2", 4, 2), ("zero2", 1, 4),
    ))],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(
    ground: Path, tmp_path: Path, strategy: str, before: int, after: int, precision: str
) -> None:
    """Moments, rates and the best checkpoint so far are kept: without dropout the end is that of one launch."""
    same = ["--dropout", "0", "--lora-dropout", "0", "--save-total-limit", "20"]
    if precision == "bf16":
        same.append("--bf16")
    tiny.run(command(ground, strategy, tmp_path / "whole", *same, processes=before))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > 12:
            shutil.rmtree(folder)
    output = tiny.run(command(ground, strategy, tmp_path / "run", *same, processes=after))
    assert f"checkpoint-12, written by a run of world size {before}" in output
    assert difference(tmp_path / "run", tmp_path / "whole") < (OTHER_PROCESSES if precision == "fp32" else 2e-2)
