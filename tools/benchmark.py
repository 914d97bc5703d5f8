"""A row of docs/accuracy.md again, or all of a data set: train ours and rivals, rank them side by side, add the rows.

    python tools/benchmark.py --configs recipes/configs/beauty_t5-mini --model genrec-t5-mini \\
        --rivals sasrec-softmax --seeds 0 1 2 3 4 --jobs 2 --out runs/benchmark/beauty --split test
    python tools/make_tables.py

`--configs` is a folder with finetune.yaml, and pretrain.yaml where that names a `from_run`; `--rivals` are entries of
tools/rivals.yaml, trained on its data. Ours and the rivals of a seed are ranked by one `recipes/evaluate.py`, and what it
measured goes to docs/results/quality.json, each row with the command of this tool that makes its seed again. In ranks/
beside it stay the first places of each user; paired differences are over all seeds of both models that are there, also
those of earlier calls, whose runs may be gone. What stands behind `--` goes to each stage of ours, which is another model
then, with another name and another --out (without the text: `-- --item-vectors ""`).
Killed at any time, the same command goes on; what has been trained or ranked is not done again, but for a rival whose folder
was removed. Without `--split test` the validation split is ranked; test is opened, and the opening recorded in each run,
only with it. `--keep-seen` ranks the same models, each chosen by validation with seen items removed, with the items of the
history kept.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from ablation import BASE, Trial
from commands import arguments_in, each, last_error, run, script, with_parent
from make_tables import (
    OURS,
    QUALITY,
    SPLITS,
    Pair,
    Row,
    kept_report,
    pair_of,
    put_pairs,
    put_reports,
    rows_of_run,
)
from rivals import NOT_READ, tuned

from genrec_llm.args import DataArguments
from genrec_llm.baselines.neural import FACTS
from genrec_llm.errors import ConfigError, counted, exits_cleanly
from genrec_llm.evaluation import HISTORY_ALONE, LAST_ITEMS_TOO, EvalReport
from genrec_llm.files import read_json, write_json
from genrec_llm.privacy import redacted

OF_DATA = [field.name for field in fields(DataArguments)]
GENERATED = 500
"""Users whose lists are also made by `generate`; its beams take many times as long as the ranking of all."""


@dataclass(frozen=True)
class Benchmark:
    """One configuration and its rivals on one data set."""

    configs: Path
    model: str
    rivals: Sequence[str]
    out: Path
    split: str
    keep_seen: bool
    flags: Sequence[str]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What finetune.yaml says."""
        config: dict[str, Any] = yaml.safe_load((self.configs / "finetune.yaml").read_text(encoding="utf-8"))
        return config

    def keep_name(self) -> None:
        """Note in the folder of the runs whose they are.

        Raises:
            ConfigError: another model's.
        """
        path, here = self.out / "benchmark.json", {"model": self.model}
        if path.is_file() and (found := read_json(path)) != here:
            raise ConfigError(f"--model {self.model}: {self.out} has runs of {found['model']}: choose another --out")
        write_json(path, here)

    def run(self, seed: int) -> Path:
        """Our run directory."""
        return self.out / f"seed-{seed}" / "finetune"

    def rival(self, name: str, seed: int) -> Path:
        """The folder of a rival's run, as tools/rivals.py names it."""
        return self.out / "rivals" / f"{name}_seed={seed}"

    def train(self, name: str | None, seed: int) -> None:
        """Train a rival, or ours where no name is given.

        Raises:
            ConfigError: it failed.
        """
        print(f"seed {seed}: {name or self.model}: training, or trained already", flush=True)
        if name is None:
            Trial(BASE, seed, self.out / f"seed-{seed}").run(self.configs, self.flags)
            return
        source = [name for name in OF_DATA if name in self.config and name not in NOT_READ]
        flags = [word for key in source for word in (f"--{key}", str(self.config[key]))]
        if self.config.get("item_vectors"):
            flags += ["--item-vectors", self.config["item_vectors"]]
        log = self.out / "rivals" / f"{name}_seed={seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        where = ["--rival", name, "--seed", str(seed), "--out", str(log.parent)]
        if run([script("tools/rivals.py"), *flags, *where], log):
            raise ConfigError(f"{log}: {last_error(log).removeprefix('error: ')}")

    def report(self, seed: int) -> Path:
        """Where recipes/evaluate.py writes."""
        return self.run(seed) / "evaluation" / (self.split + ("_seen-kept" if self.keep_seen else ""))

    def ranked(self, seed: int) -> dict[str, dict[str, Any]]:
        """Trained rivals that the report has, and what made each."""
        made: dict[str, dict[str, Any]] = read_json(self.report(seed) / "report.json")["rivals"]
        return made

    def rank(self, seed: int) -> None:
        """Merge and rank, unless that is done; what the report has of rivals that are still there stays in it."""
        done = (self.report(seed) / "report.json").is_file()
        ranked = self.ranked(seed) if done else {}
        rivals = {name: self.rival(name, seed) for name in dict.fromkeys([*self.rivals, *ranked])}
        facts = {name: read_json(folder / FACTS) for name, folder in rivals.items() if (folder / FACTS).is_file()}
        if done and all(name in ranked and of_same_training(ranked[name], facts[name]) for name in facts):
            return
        beside = ["--rivals", *(rivals[name] for name in facts)] if facts else []
        call("merge", "--run", self.run(seed))
        call(
            "evaluate", "--run", self.run(seed), "--split", self.split, "--generate-users", GENERATED,
            *(["--keep-seen"] if self.keep_seen else []), *beside,
        )  # fmt: skip

    def command(self, name: str | None, seed: int) -> str:
        """What makes a row again."""
        words = ["tools/benchmark.py", "--configs", self.configs, "--model", self.model, "--seeds", seed]
        words += ["--rivals", name] if name else []
        words += ["--keep-seen"] if self.keep_seen else []
        words += ["--split", self.split, "--out", self.out, *(["--", *self.flags] if self.flags else [])]
        return redacted([*map(str, words)])

    def add(self, seed: int, quality: Path) -> Row:
        """Put the rows of this split and protocol into quality.json, and keep the report of each beside it.

        Returns:
            Our row.
        """
        ranked, found = self.ranked(seed), []
        for row, report in rows_of_run(self.run(seed), self.model, self.report(seed).name):
            name = row["model"].removesuffix(LAST_ITEMS_TOO)
            found.append((row | {"command": self.command(name if name in ranked else None, seed)}, report))
        put_reports(quality, found)
        return found[0][0]

    def pairs(self, quality: Path, own: Row) -> list[Pair]:
        """Ours minus each recommender of its row's table, over the seeds that have a kept report of both; and ours, by
        the history alone, minus each trained rival, ranked so too.
        """
        table = {key: own[key] for key in ("dataset", "split", "protocol")}
        kept: dict[str, dict[int | None, EvalReport]] = {}
        for row in read_json(quality):
            if table.items() <= row.items() and (folder := kept_report(quality, row)).is_dir():
                kept.setdefault(row["model"], {})[row["seed"]] = EvalReport.load(folder)
        rivals = [name for name, of_seeds in kept.items() if None not in of_seeds and not name.startswith(OURS)]
        alone = self.model + HISTORY_ALONE
        named = [(self.model, name) for name in kept if name != self.model]
        named += [(alone, name) for name in rivals if alone in kept and not name.endswith(LAST_ITEMS_TOO)]
        pairs = []
        for models in named:
            ours, rival = (kept[name] for name in models)
            seeds = sorted(seed for seed in ours if seed is not None and (seed in rival or None in rival))
            if seeds:
                of_rival = [rival[seed] if seed in rival else rival[None] for seed in seeds]
                pairs.append(pair_of([ours[seed] for seed in seeds], of_rival, models, seeds))
        return pairs


def of_same_training(made: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether what a report says of a rival is of the training that a rival.json is of."""
    return all(made[key] == facts[key] for key in made.keys() & facts.keys())


def call(name: str, *arguments: object) -> None:
    """Run a recipe; what it says goes to the terminal."""
    command = [sys.executable, script(f"recipes/{name}.py"), *map(str, arguments)]
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False, preexec_fn=with_parent).returncode:
        raise ConfigError(f"failed: {shlex.join(command)}")


@exits_cleanly
def main() -> None:
    """Train, rank, add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="folder of finetune.yaml")
    parser.add_argument("--model", required=True, help=f"our model's name in the tables; it begins with {OURS}")
    parser.add_argument("--rivals", nargs="+", default=[], help="entries of tools/rivals.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=SPLITS, default="validation", help="test opens the test split")
    parser.add_argument("--keep-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time, one thread each")
    parser.add_argument("--quality", type=Path, default=QUALITY, help="the file of rows")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="arguments of each of our stages")
    args = parser.parse_args()
    there = (args.configs / "finetune.yaml").is_file()
    problems = [] if there else [f"--configs: {args.configs}: finetune.yaml has to be in it"]
    if not args.model.startswith(OURS):
        problems.append(f"--model {args.model}: the name of a model of ours begins with {OURS}")
    if args.rivals and (of_data := sorted(arguments_in(args.flags) & {*OF_DATA} - {*NOT_READ})):
        problems.append(f"-- {', '.join(of_data)}: the rivals would train on other data: write it into finetune.yaml")
    if problems:
        raise ConfigError(problems)
    benchmark = Benchmark(args.configs, args.model, args.rivals, args.out, args.split, args.keep_seen, args.flags)
    for name in args.rivals:
        tuned(benchmark.config["dataset"], name)
    benchmark.keep_name()
    wanted = [(name, seed) for seed in args.seeds for name in (None, *args.rivals)]
    each(lambda job: benchmark.train(*job), wanted, args.jobs)
    for seed in args.seeds:
        benchmark.rank(seed)
        own = benchmark.add(seed, args.quality)
    put_pairs(args.quality, benchmark.pairs(args.quality, own))
    print(f"{counted(len(args.seeds), 'seed')} in {args.quality}")
    other = (
        "" if args.quality == QUALITY else f" --quality {args.quality} --page {args.quality.with_name('accuracy.md')}"
    )
    print(f"Next: python tools/make_tables.py{other}")


if __name__ == "__main__":
    main()
