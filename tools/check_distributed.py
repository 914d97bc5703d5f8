"""The same result on any number of processes and after any kill: trains, compares, and writes docs/distributed.md.

    python tools/check_distributed.py --out docs/results/distributed.json
    python tools/check_distributed.py --out docs/results/distributed.json --page     # the page alone, from the file

Everything goes through the real `accelerate launch` with the shipped files, in fp32, on a small T5 with an untied head and
random weights, on MovieLens-100K (--data-dir: the folder that holds ml-100k/) or on a made-up log. Three parts:

1. splits: a global batch of 8 as 2 processes x 4 examples, 4 x 2, and 2 x 2 x 2 steps of accumulation, without dropout,
   against one process: every step's loss, and the final adapter.
2. resumed: with dropout, killed (SIGKILL, all processes) and started again, against the run that nobody killed.
3. kills: the same in a loop, with one process, all or the launcher killed at random moments: while it starts, after a step,
   while a checkpoint or the adapter is written; perhaps once more after the restart.

On a machine with several GPUs it uses them, and FSDP2 joins the strategies; otherwise it runs on the CPU. Exits with 1 if
anything differs by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config

from genrec_llm.checkpoints import MANIFEST, is_complete
from genrec_llm.directory import ADAPTER, ROWS_FILE
from genrec_llm.errors import ConfigError, GenRecError, exits_cleanly
from genrec_llm.files import atomic_file, read_json, write_json
from genrec_llm.launch import training_command
from genrec_llm.model import GenRecUntiedT5
from genrec_llm.provenance import provenance
from genrec_llm.runs import LOG_FILE
from genrec_llm.tokenizer import bare_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "distributed.md"
STAGES = ("pretrain", "finetune")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
PARTS = ("splits", "resumed", "kills")
KILLED_STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
GLOBAL_BATCH = 8
SPLITS = ((2, 1), (4, 1), (2, 2))
"""Processes and accumulation steps that share a global batch."""
SPLIT_STEPS, RESUMED_STEPS = 40, 24
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of a step's loss: fp32 has 7 digits, sums of another order lose the last, and steps add up."""
LEARNING_RATE, ROWS_LEARNING_RATE = 1e-3, 3e-3
LORA_TOLERANCE, ROWS_TOLERANCE = LEARNING_RATE / 100, ROWS_LEARNING_RATE / 10
"""Largest difference of a trained value, as a share of one step of AdamW, which moves a weight by the learning rate whatever
the size of its gradient: where a gradient all but cancels, what is left is rounding, and decides part of the step."""
VICTIMS = ("one process", "all", "the launcher")
MOMENTS = ("start", "step", "checkpoint", "adapter")
TIMEOUT = 600.0
"""Seconds after which a launch is given up."""


# --- what is trained ----------------------------------------------------------------------------------------------------


def save_backbone(folder: Path) -> Path:
    """A T5 v1.1 checkpoint with a head of its own and random weights, as it would be published."""
    torch.manual_seed(0)
    tokenizer = bare_tokenizer("t5")
    config = T5Config(
        vocab_size=len(tokenizer) + 28, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, num_decoder_layers=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    GenRecUntiedT5(config).save_pretrained(folder)
    published = {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    write_json(folder / "config.json", read_json(folder / "config.json") | published)
    tokenizer.save_pretrained(folder)
    return folder


def save_log(path: Path, *, users: int = 200, items: int = 120) -> Path:
    """A made-up log in which an item is often followed by the next one."""
    draw = np.random.default_rng(0)
    lines = ["user,item,timestamp"]
    for user in range(users):
        item = int(draw.integers(items))
        for step in range(int(draw.integers(5, 30))):
            lines.append(f"u{user},i{item},{1_000_000 + 100 * step}")
            item = (item + 1) % items if draw.random() < 0.8 else int(draw.integers(items))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ground:
    """Where the runs of a check lie, and what they train on.

    Args:
        folder: of backbone, data and runs.
        dataset: flags that name the data.
    """

    folder: Path
    dataset: tuple[str, ...]

    @classmethod
    def make(cls, folder: Path, data_dir: Path | None = None) -> Ground:
        """Save the backbone, and a log where there is no folder of MovieLens-100K."""
        save_backbone(folder / "base")
        if data_dir is None:
            return cls(folder, ("--dataset", str(save_log(folder / "log.csv"))))
        return cls(folder, ("--dataset", "movielens-100k", "--data-dir", str(data_dir)))

    def command(self, strategy: str, stage: str, run: str, *more: str, processes: int = 2) -> list[str]:
        """The launch of a stage in fp32 with every step's loss in the log."""
        return training_command(
            stage,
            [
                *self.dataset, "--backbone", str(self.folder / "base"), "--output-dir", str(self.folder / run),
                "--global-batch-size", str(GLOBAL_BATCH), "--lora-r", "4", "--learning-rate", str(LEARNING_RATE),
                "--rows-learning-rate", str(ROWS_LEARNING_RATE), "--logging-steps", "1", "--disable-tqdm", "true",
                *(("--masks-per-sequence", "3") if stage == "pretrain" else ()), *more,
            ],
            strategy=strategy,
            processes=None if strategy in ("cpu", "single_gpu") else processes,
        )  # fmt: skip

    def shown(self, command: Sequence[str]) -> str:
        """A command without the places of this machine."""
        text = shlex.join(command).replace(str(self.folder), "WORK").replace(f"{REPOSITORY}/", "")
        return re.sub(r"--data-dir \S+", "--data-dir DATA", text)


# --- launching and killing ----------------------------------------------------------------------------------------------


class Launch:
    """A command that runs from the root of the repository, one thread a process; its output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self.log, self.began, self.code, self.peak_mib = log, time.time(), None, 0.0
        paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": paths, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | own | {"HF_HUB_OFFLINE": "1"} | environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    code: int | None

    @property
    def output(self) -> str:
        """What the command has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def steps(self) -> int:
        """Steps whose loss has been printed."""
        return self.output.count("'loss'")

    def poll(self) -> int | None:
        """Exit code, None while it runs. `wait4` also tells the peak memory of its largest process, children included."""
        if self.code is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_mib = usage.ru_maxrss / 1024
        return self.code

    def until(self, reached: Callable[[], bool], every: float = 0.002) -> bool:
        """Wait until something is so; False if the command ended before.

        Raises:
            ConfigError: neither happened in time; everything is killed.
        """
        end = time.monotonic() + TIMEOUT
        while self.poll() is None:
            if reached():
                return True
            if time.monotonic() > end:
                self.kill("all")
                raise ConfigError(f"a launch did not end within {TIMEOUT:.0f} s:\n{self.output[-3000:]}")
            time.sleep(every)
        return False

    def wait(self) -> int:
        """Exit code, when it has ended."""
        self.until(lambda: False, every=0.05)
        assert self.code is not None
        return self.code

    def workers(self) -> list[int]:
        """Process ids of the training processes, in the order of their ranks."""
        return workers(self.process.pid)

    def kill(self, victim: str, rank: int = 0) -> list[int]:
        """SIGKILL to one process, to all, or to the launcher; to the launcher too where there is nobody else yet.

        Returns:
            Training processes that were there and were not killed.
        """
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGSTOP)  # it shall start nobody in the meantime
        there = self.workers()
        chosen = there[rank % len(there) :][:1] if there and victim == "one process" else []
        if victim == "all":
            chosen = there
        with suppress(ProcessLookupError):
            for pid in chosen:
                os.kill(pid, signal.SIGKILL)
            self.process.send_signal(signal.SIGCONT if chosen and victim == "one process" else signal.SIGKILL)
        return [pid for pid in there if pid not in chosen]


def workers(launcher: int) -> list[int]:
    """Process ids of a launcher's training processes, without what they started themselves, in the order of their ranks."""
    listing = subprocess.run(["ps", "-ewwo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    below = {launcher}
    for _ in range(4):
        below |= {int(pid) for pid, parent, *_ in rows if int(parent) in below}
    ranks: dict[int, int] = {}
    for pid, _, *arguments in rows:
        if (
            int(pid) in below
            and arguments
            and re.search(r"recipes/\w+\.py", arguments[0])
            and "accelerate" not in arguments[0]
        ):
            with suppress(OSError):  # it has ended in the meantime
                ranks[int(pid)] = int(environment_of(int(pid)).get("RANK", "0"))
    readers = {int(pid) for pid, parent, *_ in rows if int(parent) in ranks}
    return sorted(ranks.keys() - readers, key=lambda pid: ranks[pid])


def environment_of(pid: int) -> dict[str, str]:
    """Environment variables that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def finished(command: Sequence[str], log: Path) -> Launch:
    """A launch that ended well.

    Raises:
        ConfigError: it did not, with the end of what it printed.
    """
    launch = Launch(command, log)
    if launch.wait():
        raise ConfigError(f"exit code {launch.code}: {shlex.join(command)}\n{launch.output[-3000:]}")
    return launch


# --- comparing ----------------------------------------------------------------------------------------------------------


def trained_values(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LoRA and id rows of a finished run."""
    return load_file(run / ADAPTER / "adapter_model.safetensors"), load_file(run / ADAPTER / ROWS_FILE)


def losses(run: Path) -> list[float]:
    """The unrounded loss of every step."""
    return [entry["loss"] for entry in read_json(run / LOG_FILE) if "loss" in entry]


@dataclass(frozen=True)
class Difference:
    """How far a run is from another; 0.0 means bit for bit."""

    loss: float
    """Largest relative difference of a step's loss."""
    lora: float
    """Largest difference of a LoRA weight."""
    rows: float
    """Largest difference of a number in an item's or user's row."""

    @property
    def nothing(self) -> bool:
        """Whether the runs are equal."""
        return self.loss == self.lora == self.rows == 0.0


def difference(run: Path, other: Path) -> Difference:
    """Compare whole loss trajectories and final adapters.

    Raises:
        ConfigError: they have other steps or other tensors, or a tensor holds nothing or no numbers.
    """
    ours, theirs = losses(run), losses(other)
    problems = [] if len(ours) == len(theirs) else [f"{run}: {len(ours)} steps, {other}: {len(theirs)}"]
    largest = []
    for mine, reference in zip(trained_values(run), trained_values(other), strict=True):
        shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (mine, reference)]
        if shapes[0] != shapes[1] or not all(value.numel() and value.isfinite().all() for value in mine.values()):
            problems.append(f"{run}: tensors that are not whole, or not those of {other}")
        else:
            largest.append(max(float((mine[name] - reference[name]).abs().max()) for name in mine))
    if problems:
        raise ConfigError(problems)
    return Difference(max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), *largest)


# --- 1: splits ----------------------------------------------------------------------------------------------------------


def one_process(ground: Ground, stage: str) -> dict[str, Any]:
    """The run that all others are compared with."""
    return _measured(ground, "single_gpu" if torch.cuda.is_available() else "cpu", stage, 1, 1)


def split(ground: Ground, strategy: str, stage: str, processes: int, accumulation: int) -> dict[str, Any]:
    """One row: a strategy and a split against one process."""
    row = _measured(ground, strategy, stage, processes, accumulation)
    found = difference(ground.folder / _name(strategy, stage, processes, accumulation), ground.folder / f"{stage}-one")
    row["loss_difference"], row["lora_difference"], row["rows_difference"] = found.loss, found.lora, found.rows
    return row


def _name(strategy: str, stage: str, processes: int, accumulation: int) -> str:
    return f"{stage}-one" if processes == 1 else f"{stage}-{strategy}-{processes}-{accumulation}"


def _measured(ground: Ground, strategy: str, stage: str, processes: int, accumulation: int) -> dict[str, Any]:
    name = _name(strategy, stage, processes, accumulation)
    command = ground.command(
        strategy, stage, name, "--dropout", "0", "--lora-dropout", "0", "--max-steps", str(SPLIT_STEPS),
        "--gradient-accumulation-steps", str(accumulation), "--eval-strategy", "no", "--save-strategy", "no",
        "--load-best-model-at-end", "false", "--skip-memory-metrics", str(not torch.cuda.is_available()).lower(),
        processes=processes,
    )  # fmt: skip
    began = time.monotonic()
    launch = finished(command, ground.folder / f"{name}.log")
    whole = time.monotonic() - began
    summary = next(entry for entry in reversed(read_json(ground.folder / name / LOG_FILE)) if "train_runtime" in entry)
    gpu = [
        value
        for key, value in summary.items()
        if re.fullmatch(r"before_init_mem_gpu|(init|train)_mem_gpu_alloc_delta", key)
    ]
    peak = (sum(gpu) + summary["train_mem_gpu_peaked_delta"]) / 2**20 if gpu else launch.peak_mib
    return {
        "strategy": strategy,
        "stage": stage,
        "world_size": processes,
        "examples": GLOBAL_BATCH // processes // accumulation,
        "accumulation": accumulation,
        "steps": SPLIT_STEPS,
        "seconds": round(summary["train_runtime"], 2),
        "command_seconds": round(whole, 1),
        "peak_memory_mib": round(peak),
        "command": ground.shown(command),
    }


# --- 2 and 3: kills -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Whom to kill, and when."""

    victim: str
    """One of `VICTIMS`."""
    moment: str
    """One of `MOMENTS`."""
    number: int = 0
    """Of the step or of the checkpoint, counted from the launch on."""
    delay: float = 0.0
    """Seconds to wait then."""
    rank: int = 0
    """Of the one process."""

    def __str__(self) -> str:
        who = f"process {self.rank}" if self.victim == "one process" else self.victim
        when = {
            "start": f"{self.delay:.1f} s after the launch",
            "step": f"after step {self.number} of the launch",
            "checkpoint": f"{1000 * self.delay:.0f} ms into checkpoint {self.number} of the launch",
            "adapter": f"{1000 * self.delay:.0f} ms into writing the adapter",
        }
        return f"{who} {when[self.moment]}"


def random_kill(draw: random.Random) -> Kill:
    """A victim and a moment."""
    moment = draw.choices(MOMENTS, weights=(2, 4, 5, 1))[0]
    number = draw.randint(1, RESUMED_STEPS - 6) if moment == "step" else draw.randint(1, 6)
    delay = {"start": draw.uniform(1, 15), "step": 0.0}.get(moment, draw.uniform(0, 0.03))
    victim = draw.choices(VICTIMS, weights=(2, 2, 1))[0]  # a launcher's workers finish their checkpoint
    return Kill(victim, moment, number, delay, draw.randrange(2))


class Checkpoints:
    """Looks at a run's checkpoints all the time; says whether there was ever none that is whole after there had been one.

    A context; `lost` is valid after it.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.had, self.lost, self.looks = run, False, False, 0
        self.ended = threading.Event()

    def newest_whole(self) -> str | None:
        """Path of the newest checkpoint that counts."""
        folders = sorted(self.run.glob("checkpoint-*"), key=lambda path: -int(path.name.removeprefix("checkpoint-")))
        for folder in folders:
            with suppress(FileNotFoundError):  # deleted while it was read: a newer one is whole, or something is lost
                if is_complete(folder):
                    return str(folder)
        return None

    def being_written(self, since: float) -> str | None:
        """Name of the checkpoint that a launch is writing now; an older one without manifest is being deleted."""
        steps = {int(path.name.removeprefix("checkpoint-")): path for path in self.run.glob("checkpoint-*")}
        last = max(steps, default=None)
        with suppress(FileNotFoundError):
            if last is not None and not (steps[last] / MANIFEST).exists() and steps[last].stat().st_mtime > since:
                return steps[last].name
        return None

    def _look(self) -> None:
        while not self.ended.wait(0.05):
            # A listing may be older than a deletion; three in a row are not.
            whole = any(self.newest_whole() for _ in range(3 if self.had else 1))
            self.lost = self.lost or (self.had and not whole)
            self.had, self.looks = self.had or whole, self.looks + 1

    def __enter__(self) -> Checkpoints:
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()


def moment_of(kill: Kill, launch: Launch, checkpoints: Checkpoints) -> Callable[[], bool]:
    """A question that is answered with True when the moment of a kill has come, but for its delay."""
    if kill.moment == "start":
        return lambda: True
    if kill.moment == "step":
        return lambda: launch.steps >= kill.number
    if kill.moment == "adapter":
        return lambda: (checkpoints.run / "final").exists()
    seen: set[str] = set()

    def reached() -> bool:
        name = checkpoints.being_written(launch.began)
        new = name is not None and name not in seen
        seen.update([name] if name else [])
        return new and len(seen) >= kill.number

    return reached


@dataclass
class Story:
    """What happened to a run that was killed."""

    kills: list[str] = field(default_factory=list)
    resumed_from: list[str | None] = field(default_factory=list)
    """Checkpoint of each launch after the first; None for a start from the beginning."""
    problems: list[str] = field(default_factory=list)


def killed_and_relaunched(command: Sequence[str], run: Path, kills: Sequence[Kill]) -> Story:
    """Launch a run again and again, killing it, until nobody is left to kill and it ends by itself."""
    story, waiting = Story(), list(kills)
    with Checkpoints(run) as checkpoints:
        for number in range(len(kills) + 1):
            newest = checkpoints.newest_whole()
            launch = Launch(command, run.with_name(f"{run.name}-{number}.log"))
            hit = False
            if waiting:
                kill = waiting.pop(0)
                hit = launch.until(moment_of(kill, launch, checkpoints))
                if hit:
                    time.sleep(kill.delay)
                    hit = launch.poll() is None
            if hit:
                left = launch.kill(kill.victim, kill.rank)
                story.kills.append(str(kill))
            code = launch.wait()
            if hit:
                _await_end(left, story)
            said = re.search(r"going on from (\S*checkpoint-\d+)", launch.output)
            started = "examples an epoch" in launch.output
            if started and (said[1] if said else None) != newest:
                story.problems.append(
                    f"launch {number + 1} went on from {said and said[1]}, the newest whole was {newest}"
                )
            if number:
                story.resumed_from.append(Path(newest).name if newest else None)
            if not hit:
                if code:
                    story.problems.append(f"launch {number + 1} ended with exit code {code}: {launch.output[-2000:]}")
                break
    if checkpoints.lost:
        story.problems.append("there was a moment without a whole checkpoint after there had been one")
    return story


def _await_end(pids: Sequence[int], story: Story) -> None:
    """Those that a kill left behind have to end by themselves, before they could meet the next launch."""
    end = time.monotonic() + 60
    while left := [pid for pid in pids if _alive(pid)]:
        if time.monotonic() > end:
            story.kills[-1] += f" ({len(left)} left behind by their launcher, ended by hand)"
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Interrupted:
    """Kills runs and compares them with those that nobody killed, which are made once a strategy and stage."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.wholes = {(strategy, stage): threading.Lock() for strategy in [*STRATEGIES, "fsdp2"] for stage in STAGES}

    def command(self, strategy: str, stage: str, run: str, limit: int = 2) -> list[str]:
        """Dropout as it is, a checkpoint and a validation every third step, the best checkpoint at the end."""
        return self.ground.command(
            strategy, stage, run, "--max-steps", str(RESUMED_STEPS), "--eval-strategy", "steps", "--eval-steps", "3",
            "--save-strategy", "steps", "--save-steps", "3", "--save-total-limit", str(limit), "--validation-users", "50",
            "--ddp-timeout", "120",
        )  # fmt: skip

    def whole(self, strategy: str, stage: str) -> Path:
        """The run that nobody killed."""
        run = self.ground.folder / f"{stage}-{strategy}-whole"
        with self.wholes[strategy, stage]:
            if not run.exists():
                finished(self.command(strategy, stage, run.name), run.with_suffix(".log"))
        return run

    def row(self, name: str, strategy: str, stage: str, kills: Sequence[Kill], limit: int = 2) -> dict[str, Any] | None:
        """One row; None if the run ended before anybody could be killed."""
        whole = self.whole(strategy, stage)
        run = self.ground.folder / name
        began = time.monotonic()
        command = self.command(strategy, stage, name, limit)
        story = killed_and_relaunched(command, run, kills)
        if not story.kills and not story.problems:
            shutil.rmtree(run)
            return None
        found = None
        try:
            found = difference(run, whole)
        except (OSError, GenRecError) as error:
            story.problems.append(f"cannot be compared: {error}")
        return {
            "strategy": strategy,
            "stage": stage,
            "world_size": 2,
            "save_total_limit": limit,
            "kills": story.kills,
            "resumed_from": story.resumed_from,
            "resumed_equal": bool(found and found.nothing),
            "loss_difference": found and found.loss,
            "adapter_difference": found and max(found.lora, found.rows),
            "problems": [problem.replace(f"{self.ground.folder}/", "") for problem in story.problems],
            "seconds": round(time.monotonic() - began, 1),
            "command": self.ground.shown(command),
        }


def resumed(interrupted: Interrupted, strategy: str, stage: str) -> dict[str, Any]:
    """All processes are killed after step 10, whose last checkpoint is that of step 9."""
    row = interrupted.row(f"{stage}-{strategy}-resumed", strategy, stage, [Kill("all", "step", 10)])
    if row is None:
        raise ConfigError(f"{strategy}, {stage}: the run ended before it could be killed")
    return row


def random_turn(interrupted: Interrupted, seed: int, turn: int) -> dict[str, Any]:
    """One turn of the loop: strategy, stage, victims and moments at random, drawn anew where they came too late."""
    draw, row = random.Random(f"{seed} {turn}"), None
    while row is None:
        strategy, stage, limit = draw.choice(KILLED_STRATEGIES), draw.choice(STAGES), draw.choice((1, 2))
        kills = [random_kill(draw) for _ in range(draw.choice((1, 1, 2)))]
        row = interrupted.row(f"turn-{turn}", strategy, stage, kills, limit)
    return row


# --- the page -----------------------------------------------------------------------------------------------------------


def faults(results: Mapping[str, Any]) -> list[str]:
    """What is not as promised, one sentence each."""
    found = []
    for row in results["splits"]:
        limits = {"loss": LOSS_TOLERANCE, "lora": LORA_TOLERANCE, "rows": ROWS_TOLERANCE}
        found += [
            f"{row['stage']}, {row['strategy']}, {_split(row)}: {name} beyond its tolerance"
            for name, limit in limits.items()
            if row.get(f"{name}_difference", 0.0) > limit
        ]
    for row in [*results["resumed"], *results["kills"]]:
        about = f"{row['stage']}, {row['strategy']}, {'; '.join(row['kills'])}"
        found += [f"{about}: {problem}" for problem in row["problems"]]
        if not row["resumed_equal"]:
            found.append(f"{about}: not the run that nobody killed")
    return found


def _split(row: Mapping[str, Any]) -> str:
    parts = [row["world_size"], row["examples"], *([row["accumulation"]] if row["accumulation"] > 1 else [])]
    return "×".join(map(str, parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def _made(parts: str, made: Mapping[str, Any]) -> str:
    """What made some parts, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    launches = f"{made['jobs']} launch{'' if made['jobs'] == 1 else 'es'}"
    seeds = "seed of weights, draws and dropout 0" + (f", of the kills {made['seed']}" if "kills" in parts else "")
    return (
        f"- {parts}: `{made['command']}`\n"
        f"  at commit {made['commit']}, {made['time']}, {made['hardware']}, {launches} at a time; {seeds};\n"
        f"  {versions}.\n"
    )


def page(results: Mapping[str, Any]) -> str:
    """The whole text of docs/distributed.md."""
    equal = {(row["stage"], row["strategy"]): row for row in results["resumed"]}
    rows = []
    for row in results["splits"]:
        again = (
            equal.get((row["stage"], row["strategy"])) if (row["world_size"], row["accumulation"]) == (2, 1) else None
        )
        rows.append(
            [
                row["stage"], row["strategy"], _split(row), _number(row.get("loss_difference")),
                _number(row.get("lora_difference")), _number(row.get("rows_difference")),
                ("bit for bit" if again["resumed_equal"] else _number(again["adapter_difference"])) if again else "–",
                f"{row['seconds']:.1f}", f"{row['command_seconds']:.0f}", f"{row['peak_memory_mib']:,}",
            ]
        )  # fmt: skip
    right = sum(row["resumed_equal"] and not row["problems"] for row in results["kills"])
    kills = [
        [number, row["stage"], row["strategy"], row["save_total_limit"], "; ".join(row["kills"]),
         ", ".join(name or "the start" for name in row["resumed_from"]),
         "yes" if row["resumed_equal"] and not row["problems"] else "NO"]
        for number, row in enumerate(results["kills"], 1)
    ]  # fmt: skip
    head = ["stage", "strategy", "split", "loss", "LoRA", "rows", "resumed", "training s", "command s", "peak MiB"]
    makers: dict[str, list[str]] = {}  # parts that one command made
    for part in PARTS:
        makers.setdefault(json.dumps(results["made"][part]), []).append(part)
    return PAGE_TEXT.format(
        splits=_table(head, rows),
        kills=_table(["", "stage", "strategy", "kept", "killed", "went on from", "equal"], kills),
        right=right,
        turns=len(results["kills"]),
        times=sum(len(row["kills"]) for row in results["kills"]),
        faults="\n".join(f"- {fault}" for fault in faults(results)) or "Nothing is beyond its tolerance.",
        data=results["made"]["splits"]["data"],
        made="\n".join(_made(", ".join(parts), json.loads(made)) for made, parts in makers.items()),
        loss_tolerance=LOSS_TOLERANCE,
        lora_tolerance=LORA_TOLERANCE,
        rows_tolerance=ROWS_TOLERANCE,
        split_steps=SPLIT_STEPS,
        resumed_steps=RESUMED_STEPS,
    )


PAGE_TEXT = """\
# The same result everywhere

Written by `tools/check_distributed.py` from [results/distributed.json](results/distributed.json), which also holds the
launch line of every row; a test fails when the two differ.

## Splits

One global batch of 8 as processes × examples (× accumulation steps), in fp32 without dropout, {split_steps} steps through
the real `accelerate launch`, on {data}. The backbone is a T5 with an untied head, d 64, 2 + 2 layers and random
weights; pretraining hides 3 items of a history. Against one process:

- **loss**: the largest relative difference of a step's loss over the whole trajectory, unrounded (tolerance
  {loss_tolerance:g}: fp32 sums in another order);
- **LoRA**, **rows**: the largest difference of a value of the final adapter (tolerances {lora_tolerance:g} and
  {rows_tolerance:g}, a hundredth and a tenth of one step of AdamW, which divides a gradient by its own size: where one all
  but cancels, what is left is rounding. So it is with single numbers in the row of a user who is hardly seen);
- **resumed**: with dropout, killed after step 10 and launched again, against the run that nobody killed: all losses and the
  final adapter;
- seconds of training and of the whole command, most of which are imports, and the peak memory of the largest process.
  **The machine did other work at the same time**: the seconds are no comparison of strategies.

{splits}
{faults}

FSDP2 is in the table where the machine has several GPUs: without them accelerate trains independent copies, which the
recipes refuse.

## Kills

{turns} turns with {times} times `kill -9`, of one process, all of them or the launcher: while a launch starts, after a
step, while a checkpoint is written (as soon as its folder is there, and up to 30 ms on), while the adapter is written.
Then the same command again, and perhaps another kill. Two processes, {resumed_steps} steps with dropout, a checkpoint every
third step, `save_total_limit` 1 or 2 ("kept"), the best checkpoint at the end. A turn is right when all losses and the
adapter equal those of the run that nobody killed bit for bit, each launch went on from the newest checkpoint that was
whole, and there was a whole checkpoint at every moment after the first.

**{right} of {turns} right.**

{kills}
## Made by

{made}"""


# --- main ---------------------------------------------------------------------------------------------------------------


def write_page(results: Mapping[str, Any]) -> None:
    """Write docs/distributed.md."""
    with atomic_file(PAGE) as temporary:
        temporary.write_text(page(results), encoding="utf-8")


@exits_cleanly
def main() -> None:
    """Run the three parts, writing after each row; then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="json file of results")
    parser.add_argument("--data-dir", type=Path, help="folder that holds ml-100k/; without it a made-up log")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run; the file's rows of other parts are kept"
    )
    parser.add_argument("--kills", type=int, default=20, help="turns of the kill loop")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument(
        "--jobs", type=int, default=1, help="launches at a time, where there are cores and memory for them"
    )
    parser.add_argument("--page", action="store_true", help="run nothing; write docs/distributed.md from the json file")
    args = parser.parse_args()
    if args.page:
        write_page(read_json(args.out))
        return
    several_gpus = torch.cuda.device_count() > 1
    strategies = [*STRATEGIES, *(["fsdp2"] if several_gpus else [])]
    fits = [part for part in SPLITS if not several_gpus or part[0] <= torch.cuda.device_count()]
    data = "MovieLens-100K" if args.data_dir else "a made-up log of 200 users and 120 items"
    results = read_json(args.out) if args.out.is_file() else {"made": {}} | {part: [] for part in PARTS}
    made = provenance() | {"seed": args.seed, "data": data, "jobs": args.jobs}
    results |= {"made": results["made"] | {part: made for part in args.parts}} | {part: [] for part in args.parts}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        ground = Ground.make(Path(folder), args.data_dir)
        interrupted = Interrupted(ground)
        pairs = [(strategy, stage) for stage in STAGES for strategy in strategies]
        rows: list[tuple[str, Future[dict[str, Any]]]] = []
        if "splits" in args.parts:
            results["splits"] += pool.map(lambda stage: one_process(ground, stage), STAGES)
            rows += [("splits", pool.submit(split, ground, *pair, *part)) for pair in pairs for part in fits]
        if "resumed" in args.parts:
            rows += [("resumed", pool.submit(resumed, interrupted, *pair)) for pair in pairs]
        if "kills" in args.parts:
            rows += [("kills", pool.submit(random_turn, interrupted, args.seed, turn)) for turn in range(args.kills)]
        for part, done in rows:
            row = done.result()
            results[part].append(row)
            write_json(args.out, results)
            shown = ", ".join(f"{key} {value}" for key, value in row.items() if key != "command")
            print(f"{part}: {shown}", flush=True)
    write_page(results)
    print(f"written to {args.out} and {PAGE.relative_to(REPOSITORY)}")
    if found := faults(results):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
