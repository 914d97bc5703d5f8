"""Search hyperparameters, or work off a queue of runs, for hours; killed at any time, the same command goes on.

    python tools/sweep.py --space space.yaml --config recipes/configs/beauty_t5-micro/finetune.yaml \\
        --out runs/sweep --trials 40 --jobs 2 -- --num-train-epochs 20
    python tools/sweep.py --out runs/sweep --table

The space names arguments of training, model or data: a list of choices, or a range.

    space:
      learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
      dropout: [0.1, 0.2, 0.4]
      lora_r: {low: 4, high: 64, log: true}     # whole numbers at both ends: whole numbers in between

Or it lists points, and each is run once, in order; points may be added at the end later:

    grid:
      - {seed: 0}
      - {seed: 1, dropout: 0.4}

Each trial is recipes/finetune.py in a process of its own on the file trials/0007.yaml: the configuration, and the trial's
arguments over it. What stands behind `--` goes to every trial. A trial is worth the best validation NDCG@10 of its log; at
each validation a pruner may end it with SIGTERM. The test split is not opened here.

State is in study.db (Optuna, SQLite) and in the run directories: trials that had not ended are started again with the
same arguments and go on from their last checkpoint; those that ended never run again. A trial that is killed (out of
memory, a node that goes) is started again too, until it dies three times without a new checkpoint. With several GPUs,
start a sweep on each (CUDA_VISIBLE_DEVICES=1), in a folder of its own. Needs genrec-llm[sweep].
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import difflib
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import yaml
from ablation import finished
from commands import arguments_in, begin, last_error, with_parent

from genrec_llm.errors import ConfigError, DataError, exits_cleanly
from genrec_llm.files import atomic_file, read_json

if TYPE_CHECKING:
    import optuna

REPOSITORY = Path(__file__).resolve().parent.parent
OBJECTIVE = "eval_ndcg@10"
STUDY, LOCK = "study.db", "sweep.lock"
WRITTEN = ("output_dir", "config")
"""Arguments that the sweep gives to a trial itself."""
DEATHS = 3
"""So often in a row a trial is killed without a new checkpoint before it counts as failed."""
EPILOGUE = __doc__.split("\n", 1)[1]

Settings = dict[str, Any]


# --- what is searched -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What trials are made of.

    Args:
        ranges: choices (a list) or `{"low", "high", "log"}` by argument.
        grid: the points of a plain queue; one of the two is empty.
    """

    ranges: Mapping[str, Any]
    grid: list[Settings]

    @classmethod
    def read(cls, path: Path) -> Space:
        """From a YAML file.

        Raises:
            ConfigError: it is absent, no YAML, or names what is no argument, no range, no list; all at once.
        """
        content = _yaml(path)
        problems = [
            f"{path}: unknown key {key!r}: there are space and grid" for key in content.keys() - {"space", "grid"}
        ]
        ranges, grid = content.get("space") or {}, content.get("grid") or []
        if bool(ranges) == bool(grid):
            raise ConfigError([*problems, f"{path}: has to hold either a `space` or a `grid` that is not empty"])
        if not isinstance(ranges, dict) or not isinstance(grid, list) or not all(isinstance(p, dict) for p in grid):
            raise ConfigError([*problems, f"{path}: space is a mapping of arguments, grid a list of mappings"])
        problems += [
            f"{path}: {problem}" for name, values in ranges.items() for problem in _range_problems(name, values)
        ]
        names = dict.fromkeys([*ranges, *itertools.chain(*grid)])
        problems += [f"{path}: {problem}" for name in names for problem in _name_problems(str(name))]
        points = [_canonical(point) for point in grid]
        problems += [
            f"{path}: grid: {text} stands there twice" for text in dict.fromkeys(points) if points.count(text) > 1
        ]
        if problems:
            raise ConfigError(problems)
        return cls(ranges, grid)

    @property
    def names(self) -> set[str]:
        """Every argument that trials may differ in."""
        return {*self.ranges, *itertools.chain(*self.grid)}

    def sampled(self, trial: optuna.Trial) -> Settings:
        """The arguments that the sampler draws for a trial; what it has drawn for it before stays."""
        settings: Settings = {}
        for name, values in self.ranges.items():
            if isinstance(values, list):  # as text: Optuna stores numbers and words, no lists
                settings[name] = json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in values]))
            elif all(isinstance(values[end], int) for end in ("low", "high")):
                settings[name] = trial.suggest_int(name, values["low"], values["high"], log=values.get("log", False))
            else:
                settings[name] = trial.suggest_float(name, values["low"], values["high"], log=values.get("log", False))
        return settings


def _canonical(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: has to be one mapping of names to values")
    return content


def _range_problems(name: str, values: Any) -> list[str]:
    if isinstance(values, list):
        return [] if values else [f"space: {name}: an empty list leaves nothing to choose"]
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
        return [f"space: {name}: give a list of choices, or {{low: …, high: …}}, with log: true for a range of ratios"]
    low, high = values["low"], values["high"]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        return [f"space: {name}: low and high have to be numbers (YAML reads 1e-3 as a word: write 1.0e-3)"]
    if not low < high or (values.get("log") and low <= 0):
        return [f"space: {name}: from {low} to {high} is no range" + (" of ratios" if values.get("log") else "")]
    return []


def _name_problems(name: str) -> list[str]:
    from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments

    classes = (DataArguments, ModelArguments, GenRecTrainingArguments)
    known = [entry.name for cls in classes for entry in dataclasses.fields(cls) if entry.init]
    if name in WRITTEN:
        return [f"{name}: the sweep gives each trial its own"]
    if name in known:
        return []
    close = difflib.get_close_matches(name, known, n=1)
    return [f"{name}: no argument of this name" + (f": did you mean {close[0]}?" if close else "")]


# --- what a run says of itself ----------------------------------------------------------------------------------------


def validations(run: Path) -> list[tuple[float, float]]:
    """(NDCG@10, epoch) of each validation of a run, earliest first, as far as it is on disk.

    A finished run has its whole log; before, its newest whole checkpoint has.
    """
    logs = [run / "log_history.json"] if finished(run) else []
    whole = [path for path in run.glob("checkpoint-*") if (path / "manifest.json").is_file()]
    logs += [path / "trainer_state.json" for path in sorted(whole, key=_step, reverse=True)]
    for path in logs:
        with suppress(DataError):  # gone, because a later one has come
            content = read_json(path)
            entries = content["log_history"] if isinstance(content, dict) else content
            return [(entry[OBJECTIVE], entry["epoch"]) for entry in entries if OBJECTIVE in entry]
    return []


def last_step(run: Path) -> int:
    """Steps up to the newest whole checkpoint; 0 without one."""
    return max((_step(path.parent) for path in run.glob("checkpoint-*/manifest.json")), default=0)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A trial whose process runs; `step` is that of the newest checkpoint whose log was looked at."""

    trial: optuna.Trial
    process: subprocess.Popen[bytes]
    lock: IO[bytes]
    since: float
    step: int = -1


class Sweep:
    """Trials of a space, a few at a time.

    Args:
        out: folder of the study and of all trials.
        space: what trials are made of.
        recipe: the program of a trial.
        config: its configuration file.
        flags: command-line arguments of every trial.
        threads: of a trial.
        pruner: median, asha or none.
        seed: of the sampler.

    Raises:
        ConfigError: the folder holds a sweep of another space, configuration or flags.
    """

    def __init__(
        self,
        out: Path,
        space: Space,
        *,
        recipe: Path,
        config: Path,
        flags: list[str],
        threads: int,
        pruner: str,
        seed: int,
    ) -> None:
        self.out, self.space, self.recipe, self.flags, self.threads = out, space, recipe, flags, threads
        self.config, self.deaths, self.running = _yaml(config), {}, []
        self._refuse_double_flags()
        (out / "trials").mkdir(parents=True, exist_ok=True)
        self.study = open_study(out, pruner=pruner, seed=seed)
        _refuse_another(self.study, out, {"config": self.config, "flags": flags, "space": dict(space.ranges)})

    deaths: dict[int, tuple[int, int]]
    """Of each trial: its last step when it died, and how often it has died there."""
    running: list[Running]

    def _refuse_double_flags(self) -> None:
        given = arguments_in(self.flags)
        problems = [f"--{name}: stands in the space too: leave it out behind `--`" for name in given & self.space.names]
        problems += [f"--{name}: the sweep gives each trial its own" for name in given & set(WRITTEN)]
        if problems:
            raise ConfigError(problems)

    def path(self, number: int, end: str = "") -> Path:
        """The run directory of a trial, or the file beside it with another end."""
        return self.out / "trials" / f"{number:04d}{end}"

    def run(self, *, trials: int, jobs: int) -> None:
        """Have `trials` trials in all (of a grid: every point), `jobs` at a time; those of earlier calls count."""
        try:
            while self._fill(trials, jobs) or self.running:
                time.sleep(0.3)
                for each in list(self.running):
                    self._look_after(each)
        finally:
            self._stop()

    def _fill(self, trials: int, jobs: int) -> bool:
        """Start what may be started; whether any trial is left to start."""
        while len(self.running) < jobs:
            trial = self._next(trials)
            if trial is None:
                return False
            self._start(trial)
        return True

    def _next(self, trials: int) -> optuna.Trial | None:
        """A trial that had not ended and does not run, or else a new one; None when all there should be are there."""
        import optuna

        mine = {each.trial.number for each in self.running}
        known = self.study.get_trials(deepcopy=False)
        for frozen in known:
            if frozen.state == optuna.trial.TrialState.RUNNING and frozen.number not in mine:
                # Optuna has no public way back to a trial of a process that is gone; this is how `ask` makes one (5.0).
                trial = optuna.trial.Trial(self.study, frozen._trial_id)
                if finished(self.path(trial.number)):
                    self._report(trial)
                    self._end(trial, 0)
                elif trial.user_attrs.get("pruned"):
                    self._tell(trial, optuna.trial.TrialState.PRUNED)
                elif "settings" in trial.user_attrs or self._choose(trial):
                    return trial
        if self.space.grid:
            trials = len(self.space.grid)
            if not self._open_points():
                return None
        elif len(known) >= trials:
            return None
        trial = self.study.ask()
        return trial if self._choose(trial) else None

    def _open_points(self) -> list[Settings]:
        """Points of the grid that no trial has."""
        attributes = [frozen.user_attrs for frozen in self.study.get_trials(deepcopy=False)]
        taken = {_canonical(each["settings"]) for each in attributes if "settings" in each}
        return [point for point in self.space.grid if _canonical(point) not in taken]

    def _choose(self, trial: optuna.Trial) -> bool:
        """Give a trial its arguments, for good; False (and an end to the trial) where the grid has none left."""
        import optuna

        if not self.space.grid:
            trial.set_user_attr("settings", self.space.sampled(trial))
        elif points := self._open_points():
            trial.set_user_attr("settings", points[0])
        else:
            self._tell(trial, optuna.trial.TrialState.FAIL, "no point of the grid was left")
            return False
        return True

    def _start(self, trial: optuna.Trial) -> None:
        """Start the process of a trial, or start it again."""
        number, settings = trial.number, trial.user_attrs["settings"]
        lock = self.path(number, ".lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"trial {number}: its process of an earlier sweep still runs: waiting for its end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        settings = self.config | settings | {"output_dir": str(self.path(number))}
        with atomic_file(self.path(number, ".yaml")) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        with self.path(number, ".log").open("ab") as log:
            begin(log)
            # The lock goes to the process too, and is held until both are gone: no two processes train in one folder.
            process = subprocess.Popen(
                [sys.executable, str(self.recipe), "--config", str(self.path(number, ".yaml")), *self.flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                pass_fds=[lock.fileno()], preexec_fn=with_parent,
            )  # fmt: skip
        self.running.append(Running(trial, process, lock, time.monotonic()))
        print(f"trial {number}: {_words(trial.user_attrs['settings'])}", flush=True)

    def _look_after(self, each: Running) -> None:
        """Pass on new validations, prune, and take note of an end."""
        ended = each.process.poll() is not None  # before the log is read: nothing comes after it
        step = last_step(self.path(each.trial.number))
        if ended or step != each.step:
            each.step = step
            self._report(each.trial)
            if not ended and not each.trial.user_attrs.get("pruned") and each.trial.should_prune():
                each.trial.set_user_attr("pruned", True)
                each.process.send_signal(signal.SIGTERM)
        if ended:
            self.running.remove(each)
            each.lock.close()
            self._note_seconds(each)
            self._end(each.trial, each.process.returncode)

    def _report(self, trial: optuna.Trial) -> None:
        """Validations that Optuna does not know yet, counted from 1."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for place, (value, epoch) in enumerate(validations(self.path(trial.number)), start=1):
            if place not in known and math.isfinite(value):
                trial.report(value, place)
                trial.set_user_attr("epochs", epoch)
                best = trial.user_attrs.get("best")
                if best is None or value > best:
                    trial.set_user_attr("best", value)
                    trial.set_user_attr("epoch", epoch)

    def _note_seconds(self, each: Running) -> None:
        seconds = each.trial.user_attrs.get("seconds", 0.0) + time.monotonic() - each.since
        each.trial.set_user_attr("seconds", round(seconds, 1))

    def _end(self, trial: optuna.Trial, code: int) -> None:
        """What the end of a process means for its trial."""
        from optuna.trial import TrialState

        run, killed = self.path(trial.number), code < 0 or code > 128
        best = trial.user_attrs.get("best")
        if finished(run) and best is not None:
            self._tell(trial, TrialState.COMPLETE)
        elif finished(run):
            self._tell(trial, TrialState.FAIL, "its log has no validation NDCG@10: leave --eval-strategy on")
        elif trial.user_attrs.get("pruned") and killed:
            self._tell(trial, TrialState.PRUNED)
        elif killed:
            step, deaths = self.deaths.get(trial.number, (-1, 0))
            deaths = deaths + 1 if step == last_step(run) else 1
            self.deaths[trial.number] = (last_step(run), deaths)
            name = f"signal {-code if code < 0 else code - 128}"
            if deaths >= DEATHS:
                self._tell(trial, TrialState.FAIL, f"killed by {name} {deaths} times without a new checkpoint")
            else:
                print(f"trial {trial.number}: killed by {name}; it is started again", flush=True)
        else:
            self._tell(trial, TrialState.FAIL, f"exit {code}: {last_error(self.path(trial.number, '.log'))}")

    def _tell(self, trial: optuna.Trial, state: optuna.trial.TrialState, error: str = "") -> None:
        """Record the end of a trial."""
        from optuna.trial import TrialState

        if error:
            trial.set_user_attr("error", error)
        if state == TrialState.PRUNED:  # it never goes on
            for checkpoint in self.path(trial.number).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        best = trial.user_attrs.get("best")
        self.study.tell(trial, best if state == TrialState.COMPLETE else None, state=state)
        shown = error or f"best validation NDCG@10 {'not measured' if best is None else f'{best:.4f}'}"
        print(f"trial {trial.number}: {state.name.lower()}; {shown}", flush=True)
        write_table(self.study, self.out)

    def _stop(self) -> None:
        """Have every process that still runs save and end; their trials go on with the next call."""
        for each in self.running:
            each.process.send_signal(signal.SIGTERM)
        for each in self.running:
            each.process.wait()
            self._note_seconds(each)


def _words(settings: Settings) -> str:
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in settings.items())  # fmt: skip


# --- the study --------------------------------------------------------------------------------------------------------


def open_study(out: Path, *, pruner: str = "none", seed: int = 0) -> optuna.Study:
    """The study of a folder, made where there is none.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"sweeps need Optuna ({error}): pip install 'genrec-llm[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=3),
        "none": optuna.pruners.NopPruner,
    }
    storage = f"sqlite:///{(out / STUDY).resolve()}"
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", pruner=pruners[pruner](), load_if_exists=True
    )
    # The sampler's own stream starts anew with each process: with one seed it would draw the same first points again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.get_trials(deepcopy=False)))
    return study


def _refuse_another(study: optuna.Study, out: Path, facts: dict[str, Any]) -> None:
    """Trials of one study differ in what the space says, and in nothing else."""
    before = study.user_attrs.get("facts")
    if before is None:
        study.set_user_attr("facts", facts)
        return
    changed = [key for key in facts if _canonical(facts[key]) != _canonical(before[key])]
    if changed:
        raise ConfigError(
            f"{out}: was begun with another {' and '.join(changed)}, so that its trials could not be compared: give the "
            "same again, or choose another --out"
        )


COLUMNS = ("trial", "state", "NDCG@10", "best epoch", "epochs", "seconds", "error")


def rows(study: optuna.Study) -> Iterator[dict[str, Any]]:
    """Every trial, best first: its state, arguments, best validation NDCG@10 with its epoch, epochs, seconds, error."""
    trials = study.get_trials(deepcopy=False)
    for frozen in sorted(trials, key=lambda frozen: (-frozen.user_attrs.get("best", -1.0), frozen.number)):
        told = frozen.user_attrs
        yield {
            "trial": frozen.number,
            "state": "unfinished" if not frozen.state.is_finished() else frozen.state.name.lower(),
            **told.get("settings", {}),
            "NDCG@10": told.get("best"),
            "best epoch": told.get("epoch"),
            "epochs": told.get("epochs"),
            "seconds": told.get("seconds"),
            "error": told.get("error"),
        }


def write_table(study: optuna.Study, out: Path) -> str:
    """Write trials.csv and trials.md; returns the latter."""
    entries = list(rows(study))
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in COLUMNS))
    header = [*COLUMNS[:2], *names, *COLUMNS[2:]]
    with atomic_file(out / "trials.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(entries)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for entry in entries:
        lines.append("| " + " | ".join(_cell(entry.get(name)) for name in header) + " |")
    table = "\n".join(lines) + "\n"
    with atomic_file(out / "trials.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    return table


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


# --- the program ------------------------------------------------------------------------------------------------------


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuse a second sweep in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{out}: a sweep runs here already: wait for it, or choose another --out") from error
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@exits_cleanly
def main() -> None:
    """Run the sweep, or show its table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog=EPILOGUE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the study, its trials and its table")
    parser.add_argument("--space", type=Path, help="YAML file with `space` or `grid`")
    parser.add_argument("--config", type=Path, help="configuration file that every trial starts from")
    parser.add_argument("--trials", type=int, default=20, help="trials in all, of earlier calls too; a grid runs whole")
    parser.add_argument(
        "--jobs", type=int, default=1, help="trials at a time: one a core, or what the GPU has room for"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a trial")
    parser.add_argument(
        "--pruner", choices=("median", "asha", "none"),
        help="what ends trials early: worse than the median at the same validation, or out of the best third at "
        "validations 2, 6, 18 …; median for a space, none for a grid",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (Optuna's TPE)")
    parser.add_argument(
        "--recipe", type=Path, default=REPOSITORY / "recipes" / "finetune.py", help="program of a trial"
    )
    parser.add_argument("--table", action="store_true", help="only show and write the table of all trials")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="arguments of every trial")
    args = parser.parse_args()
    if args.table:
        if not (args.out / STUDY).is_file():
            raise ConfigError(f"{args.out}: no {STUDY}: no sweep was begun here")
        print(write_table(open_study(args.out), args.out), end="")
        return
    problems = [f"--{name}: is missing" for name in ("space", "config") if getattr(args, name) is None]
    problems += [f"--{name}: {value} is not at least 1" for name in ("trials", "jobs", "threads")
                 if (value := getattr(args, name)) < 1]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    signal.signal(signal.SIGTERM, _interrupt)
    with alone(args.out):
        space = Space.read(args.space)
        sweep = Sweep(
            args.out, space, recipe=args.recipe, config=args.config, flags=args.flags, threads=args.threads,
            pruner=args.pruner or ("median" if space.ranges else "none"), seed=args.seed,
        )  # fmt: skip
        try:
            sweep.run(trials=args.trials, jobs=args.jobs)
        except KeyboardInterrupt:
            print("interrupted: trials have saved, and the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        print(write_table(sweep.study, args.out), end="")
    print(f"written to {args.out}: trials.csv, trials.md; each trial's run directory in {args.out / 'trials'}")


if __name__ == "__main__":
    main()
