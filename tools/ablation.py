"""What each part of a recipe is worth: its stages, trained again with one thing changed at a time.

    python tools/ablation.py --configs recipes/configs/beauty_t5-micro --out runs/ablation/beauty --seeds 0 1 2 --jobs 2
    python tools/ablation.py --configs recipes/configs/beauty_t5-mini --out runs/ablation/mini --jobs 2 \\
        --variants "as configured" "masked pretraining" "rows: random" -- --without-last 1
    python tools/ablation.py --out runs/ablation/beauty --table

`--configs` is a folder with finetune.yaml, and pretrain.yaml where that names a `from_run`; each variant trains them with
its changes, from the seeds that are named, in run directories of its own; "masked pretraining" of a recipe that has none
takes finetune.yaml's settings. Killed at any time, the same command goes on. The figures are those of the best validation of
finetuning; the test split is not opened. A variant that the configuration cannot have (rows from text with a backbone that
reads none, adapters on random weights), or is already, stands in the table with the reason. What stands behind `--` goes to
each stage.
Written to --out: ablation.md, ablation.json, ablation.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from commands import arguments_in, each, last_error, run, script

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.errors import EXIT_CODE, ConfigError, DataError, GenRecError, exits_cleanly
from genrec_llm.files import atomic_file, read_json, write_json
from genrec_llm.privacy import redacted

METRICS = ("hit_rate@5", "ndcg@5", "hit_rate@10", "ndcg@10")
LABELS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
BASE, ALONE = "as configured", "no pretraining"


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Args:
        changes: arguments of each stage.
        pretraining: arguments of the masked stage alone.
        pretrained: whether finetuning starts from that stage; None: as it says.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    pretrained: bool | None = None


VARIANTS = {
    BASE: Variant(),
    ALONE: Variant(pretrained=False),
    "masked pretraining": Variant(pretraining={"masks_per_sequence": 3, "last_item_probability": 0.3}, pretrained=True),
    "user token": Variant({"users": "each"}),
    "no user token": Variant({"users": "none"}),
    "LoRA": Variant({"tuning": "lora"}),
    "full tuning": Variant({"tuning": "full"}),
    "rows: text": Variant({"row_init": "text", "item_vectors": None}),
    "rows: co-occurrence": Variant({"row_init": "cooccurrence", "item_vectors": None}),
    "rows: random": Variant({"row_init": "random", "item_vectors": None}),
    "one learning rate": Variant({"rows_learning_rate": None}),
    "no label smoothing": Variant({"label_smoothing_factor": 0.0}),
    "history of 50": Variant({"max_history": 50}),
    "decoder prompt: mask alone": Variant({"decoder_prompt": "mask"}),
    "one mask a sequence": Variant(pretraining={"masks_per_sequence": 1}),
    "ranked by the history alone": Variant({"last_items_share": 0.0, "choose_last_items_share": False}),
}
DEFAULTS = {
    each.name: each.default for cls in (DataArguments, ModelArguments, GenRecTrainingArguments) for each in fields(cls)
}


@dataclass(frozen=True)
class Outcome:
    """What became of a variant with a seed: the best validation, or why there is none; commits and hardware of training."""

    variant: str
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    commits: list[str] = field(default_factory=list)
    hardware: str = ""


@dataclass(frozen=True)
class Trial:
    """A variant with a seed, and where its stages are."""

    variant: str
    seed: int
    folder: Path

    def plan(self, configs: Path, flags: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What each stage is trained with, in order; nothing where that is what is configured anyway.

        Raises:
            ConfigError: a configuration is missing, a flag undoes the variant, or its folder has a run of other settings.
        """
        files = {stage: configs / f"{stage}.yaml" for stage in ("pretrain", "finetune")}
        config = {
            stage: yaml.safe_load(file.read_text(encoding="utf-8")) for stage, file in files.items() if file.is_file()
        }
        two_stages = bool(config["finetune"].get("from_run"))
        if two_stages and "pretrain" not in config:
            raise ConfigError(f"{configs}: finetune.yaml names a from_run, and there is no pretrain.yaml")
        given, variant = arguments_in(flags), VARIANTS[self.variant]
        if both := sorted((variant.changes | variant.pretraining).keys() & given):
            raise ConfigError(f"-- {', '.join(both)}: {self.variant!r} changes it: leave it to one of them")
        if own := sorted({"seed", "output_dir", "from_run", "config"} & given):
            raise ConfigError(f"-- {', '.join(own)}: each stage gets its own: leave it out")
        stages, as_configured = (self._stages(config, two_stages, VARIANTS[name]) for name in (self.variant, BASE))
        if self.variant != BASE and _filled(stages) == _filled(as_configured):
            return {}
        for stage, settings in stages.items():
            path = self.folder / f"{stage}.yaml"
            if (self.folder / stage / "run.json").is_file() and self._before(stage) != (settings, [*flags]):
                raise ConfigError(f"{path}: this run has other settings: choose another --out, or remove {self.folder}")
        return stages

    def run(self, configs: Path, flags: Sequence[str]) -> Outcome:
        """Train what is not trained yet.

        Raises:
            ConfigError: see `plan`; or a stage failed, other than by refusing a variant.
        """
        stages = self.plan(configs, flags)
        if not stages:
            return Outcome(self.variant, self.seed, reason=f"the same as {BASE!r}")
        for stage, settings in stages.items():
            path = self.folder / f"{stage}.yaml"
            with atomic_file(path) as temporary:
                temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
            write_json(path.with_suffix(".flags.json"), [*flags])
            if not finished(self.folder / stage) and (reason := self._train(stage, flags)):
                return Outcome(self.variant, self.seed, reason=reason)
        return self.outcome([*stages])

    def _before(self, stage: str) -> tuple[dict[str, Any], list[str]]:
        """Settings and flags that a stage was begun with."""
        path = self.folder / f"{stage}.yaml"
        with_flags = path.with_suffix(".flags.json")
        return yaml.safe_load(path.read_text(encoding="utf-8")), read_json(with_flags) if with_flags.is_file() else []

    def _stages(
        self, config: dict[str, dict[str, Any]], two_stages: bool, variant: Variant
    ) -> dict[str, dict[str, Any]]:
        """What each stage of a variant is trained with, in order."""
        pretrained = two_stages if variant.pretrained is None else variant.pretrained
        stages = {}
        for stage in ("pretrain", "finetune") if pretrained else ("finetune",):
            own = variant.pretraining if stage == "pretrain" else {}
            where = {"seed": self.seed, "output_dir": str(self.folder / stage), "from_run": None}
            if pretrained and stage == "finetune":
                where["from_run"] = str(self.folder / "pretrain")
            stages[stage] = config.get(stage, config["finetune"]) | variant.changes | own | where
        return stages

    def _train(self, stage: str, flags: Sequence[str]) -> str:
        """Why the recipe refused a stage; empty if it did not.

        Raises:
            ConfigError: it failed, or refused what is configured or was begun.
        """
        log = self.folder / f"{stage}.log"
        code = run([script(f"recipes/{stage}.py"), "--config", str(self.folder / f"{stage}.yaml"), *flags], log)
        said = last_error(log).removeprefix("error: ") if code else ""
        accepted = self.variant == BASE or (self.folder / stage / "run.json").is_file()
        if said and (accepted or code != EXIT_CODE):
            raise ConfigError(f"{log}: {said}")
        return said

    def outcome(self, stages: Sequence[str]) -> Outcome:
        """The best validation of finetuning, and the seconds of all."""
        runs = [read_json(self.folder / stage / "run.json") for stage in stages]
        log = [entry for entry in read_json(self.folder / "finetune" / "log_history.json") if "eval_ndcg@10" in entry]
        best = max(log, key=lambda entry: entry["eval_ndcg@10"])
        return Outcome(
            self.variant, self.seed, {name: best[f"eval_{name}"] for name in METRICS},
            round(sum(run["finished"]["seconds"] for run in runs), 1), "",
            sorted({run["commit"] for run in runs if run["commit"]}), runs[-1]["hardware"],
        )  # fmt: skip


def _filled(stages: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With the defaults of what is not named."""
    return {stage: DEFAULTS | settings for stage, settings in stages.items()}


def finished(run: Path) -> bool:
    """Whether a run has ended by itself."""
    try:
        return "finished" in read_json(run / "run.json")
    except DataError:
        return False


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a variant, in the order of the trials; mean and standard deviation over seeds."""
    text = [f"| variant | {' | '.join(LABELS)} | seeds | seconds |", "|---|" + "---|" * (len(LABELS) + 2)]
    for variant, of_variant in grouped(outcomes).items():
        done = [one for one in of_variant if one.metrics]
        if not done:
            text.append(f"| {variant} | {' | '.join(['–'] * len(LABELS))} | 0 | {of_variant[0].reason} |")
            continue
        cells = []
        for name in METRICS:
            values = [one.metrics[name] for one in done]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        seconds = statistics.fmean(one.seconds for one in done)
        text.append(f"| {variant} | {' | '.join(cells)} | {len(done)} | {seconds:.0f} |")
    return "\n".join(text) + "\n"


def grouped(outcomes: Sequence[Outcome]) -> Mapping[str, list[Outcome]]:
    """Outcomes by variant."""
    return {name: [one for one in outcomes if one.variant == name]
            for name in dict.fromkeys(one.variant for one in outcomes)}  # fmt: skip


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Validation NDCG@10 of each variant: mean, and each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from genrec_llm.plots import COLOURS, GREY, save

    done = {name: [one.metrics["ndcg@10"] for one in of_variant if one.metrics]
            for name, of_variant in grouped(outcomes).items()}  # fmt: skip
    done = {name: values for name, values in done.items() if values}
    figure = Figure(figsize=(6.0, 0.9 + 0.34 * len(done)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(
        list(done), [statistics.fmean(values) for values in done.values()],
        color=[COLOURS[0] if name == BASE else GREY for name in done],
    )  # fmt: skip
    for place, values in enumerate(done.values()):
        axes.plot(values, [place] * len(values), "k|", markersize=8)
    axes.invert_yaxis()
    axes.set_xlabel("validation NDCG@10: mean (bar), seeds (lines)")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def write(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Table, figures and picture."""
    from genrec_llm.plots import can_draw

    write_json(out / "ablation.json", [asdict(one) for one in outcomes])
    commits = sorted({commit[:10] + commit[40:] for one in outcomes for commit in one.commits})  # "+changes" stays
    hardware = sorted({one.hardware for one in outcomes if one.metrics})
    at = f"at commit {', '.join(commits)} " if commits else ""
    trained = f"Trained {at}on {'; '.join(hardware)}. " if hardware else ""
    made = f"{trained}Made by\n\n```bash\npython {redacted(sys.argv)}\n```\n"
    with atomic_file(out / "ablation.md") as temporary:
        temporary.write_text(f"{table(outcomes)}\n{made}", encoding="utf-8")
    if can_draw() and any(one.metrics for one in outcomes):
        draw(outcomes, out / "ablation.png")


@exits_cleanly
def main() -> None:
    """Train all trials, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trials and of what is written")
    parser.add_argument("--configs", type=Path, help="folder with finetune.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help=f"some of: {', '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="trials at the same time, one thread each")
    parser.add_argument("--table", action="store_true", help="only show the table of --out")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="arguments of each stage")
    args = parser.parse_args()
    if args.table:
        print(table([Outcome(**row) for row in read_json(args.out / "ablation.json")]), end="")
        return
    if not args.configs or not (args.configs / "finetune.yaml").is_file():
        raise ConfigError(f"--configs: {args.configs or 'is missing'}: finetune.yaml has to be in it")
    trials = [
        Trial(variant, seed, args.out / f"{variant.replace(': ', '-').replace(' ', '-')}_seed-{seed}")
        for seed in args.seeds
        for variant in args.variants
    ]
    problems = []
    for trial in trials:
        try:
            trial.plan(args.configs, args.flags)
        except GenRecError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    outcomes: list[Outcome] = []
    writing = Lock()

    def work(trial: Trial) -> None:
        outcome = trial.run(args.configs, args.flags)
        print(
            f"{trial.variant}, seed {trial.seed}: {outcome.reason or format(outcome.metrics['ndcg@10'], '.4f')}",
            flush=True,
        )
        order = {(one.variant, one.seed): place for place, one in enumerate(trials)}
        with writing:
            outcomes.append(outcome)
            outcomes.sort(key=lambda one: order[one.variant, one.seed])
            write(args.out, outcomes)

    each(work, trials, args.jobs)
    print(table(outcomes), end="")
    print(f"written to {args.out}: ablation.md, ablation.json, ablation.png")


if __name__ == "__main__":
    main()
