"""Train the neural rivals on a data set, tuned on validation; the test split is not opened here.

    python tools/rivals.py --dataset amazon-beauty --data-dir ../shared/data --rival sasrec-softmax --seed 0 1 2 3 4 \\
        --out runs/rivals
    python tools/rivals.py … --rival sasrec-softmax --set dropout=0.5,0.6,0.7 learning_rate=5e-4,1e-3 --jobs 2
    python tools/rivals.py --table --out runs/rivals

`--rival` names an entry of tools/rivals.yaml: what it is trained with, by data set where they differ. `--set` replaces
some of it; several values, or several seeds, make a run of each combination. A run is a folder of its own, named after the
rival and what was replaced. Killed at any time, the same command goes on; runs that have ended are not run again, and a
folder of other settings or data is refused. `--table` lists all runs of a folder, with their best validation. The flags of
data are those of the recipes, but for what belongs to a model: rivals have a history of their own (`--set max_history=…`).

`recipes/evaluate.py --rivals FOLDER …` ranks them beside a model of ours.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from commands import arguments_in, each, last_error
from commands import run as run_program

from genrec_llm.args import DataArguments, parse_args
from genrec_llm.baselines.neural import FACTS, NeuralRecommender, RivalSettings, finish, identity, train, user_order
from genrec_llm.encoded import load_data
from genrec_llm.errors import ConfigError, exits_cleanly
from genrec_llm.evaluation import build_report, rank_recommender
from genrec_llm.files import read_json, sha256_file
from genrec_llm.metrics import ndcg
from genrec_llm.provenance import provenance
from genrec_llm.rows import cooccurrence_and_vectors, cooccurrence_rows
from genrec_llm.vectors import read_item_vectors

TUNED = Path(__file__).with_suffix(".yaml")
NOT_READ = ("max_history", "users", "user_buckets")
"""Flags of data that are a model's; rivals have their own history, and know no user by a token."""


def tuned(dataset: str, rival: str) -> RivalSettings:
    """The entry of rivals.yaml: what all data sets share, and what this one has of its own.

    Raises:
        ConfigError: there is none of that name.
    """
    entries = yaml.safe_load(TUNED.read_text(encoding="utf-8"))
    if rival not in entries:
        raise ConfigError(f"--rival {rival}: {TUNED.name} has {', '.join(entries)}")
    entry = entries[rival]
    return RivalSettings(**(entry["all"] | entry.get(dataset, {})))


def run(args: argparse.Namespace, source: DataArguments, settings: RivalSettings, folder: Path) -> None:
    """Train one rival in this process and write its report on the validation split.

    In reports it has the name of its folder without the seed, so that what was replaced in it can be told.

    Raises:
        ConfigError: the folder has a rival of other settings or data.
    """
    made_by = provenance()
    torch.set_num_threads(args.threads)
    data = load_data(replace(source, users="none"))
    of = {
        "dataset": data.name, "fingerprint": data.fingerprint, "vocabulary": data.vocabulary, "keep_seen": args.keep_seen,
        "item_vectors": sha256_file(Path(args.item_vectors)) if "vectors" in settings.first_rows else None,
    }  # fmt: skip
    if (folder / FACTS).is_file():
        found = read_json(folder / FACTS)
        if other := [name for name, value in identity(settings, of).items() if found.get(name) != value]:
            raise ConfigError(f"{folder}: trained with another {', '.join(other)}: choose another --out, or remove it")
        return
    users = user_order(len(data.train))
    sequences, held_out = replace(data.train, users=users), replace(data.held_out("validation"), users=users)
    network = settings.network(data.vocab.num_items, len(users) + 1)
    if settings.first_rows != "random":
        if settings.first_rows == "cooccurrence":
            rows = cooccurrence_rows(data.train, data.vocab.num_items, settings.dim, seed=settings.seed)
        else:
            vectors = read_item_vectors(args.item_vectors, data.vocab)
            rows = cooccurrence_and_vectors(data.train, vectors, settings.dim, seed=settings.seed)
        with torch.no_grad():
            network.items.weight[: data.vocab.num_items] = torch.nn.functional.normalize(rows) / network.scale

    def validate(recommender: NeuralRecommender) -> float:
        ranks = rank_recommender(recommender, held_out, exclude_seen=not args.keep_seen).ranks
        return float(ndcg(ranks, 10).mean())

    def report(epoch: int, loss: float, figure: float) -> None:
        print(f"epoch {epoch}: loss {loss:.4f}, validation NDCG@10 {figure:.4f}", flush=True)

    name = folder.name.removesuffix(f"_seed={settings.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    curve = train(network, settings, sequences, folder, of, validate, report)
    ranked = rank_recommender(NeuralRecommender(network, name), held_out, exclude_seen=not args.keep_seen)
    build_report(name, ranked, held_out, exclude_seen=not args.keep_seen).save(folder / "validation")
    finish(folder, settings, of, network, {"name": name, "users": len(users) + 1} | curve | made_by)
    print(f"{folder}: validation NDCG@10 {max(figure for *_, figure in curve['curve']):.4f}")


def points(args: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
    """Name and replaced values of every run that the command asks for."""
    names = [setting.split("=")[0] for setting in args.set]
    problems = [f"--set {setting}: not NAME=VALUE[,VALUE…]" for setting in args.set if "=" not in setting]
    problems += ["--set seed: give --seed"] if "seed" in names else []
    problems += [f"--set {name}: all its values in one, with commas" for name in set(names) if names.count(name) > 1]
    if problems:
        raise ConfigError(problems)
    replaced = dict(setting.split("=", 1) for setting in args.set)
    values = {name: text.split(",") for name, text in replaced.items()} | {"seed": list(map(str, args.seed))}
    combinations = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    return [
        ("_".join([args.rival, *(f"{name}={text}" for name, text in point.items())]), point) for point in combinations
    ]


def queue(args: argparse.Namespace, names: Sequence[str]) -> None:
    """A process a run, `--jobs` at a time."""

    def start(name: str) -> None:
        log = args.out / f"{name}.log"
        if run_program([*sys.argv, "--only", name], log):
            raise ConfigError(f"{log}: {last_error(log).removeprefix('error: ')}")

    args.out.mkdir(parents=True, exist_ok=True)
    each(start, names, args.jobs)


def table(folder: Path) -> str:
    """All finished runs below a folder, the best first, as markdown."""
    runs = [(path.parent, read_json(path)) for path in sorted(folder.rglob(FACTS))]
    lines = [(max(figure for *_, figure in facts["curve"]), path, facts) for path, facts in runs]
    text = ["| data set | run | validation NDCG@10 | best epoch | seconds |", "|---|---|---|---|---|"]
    for figure, path, facts in sorted(lines, key=lambda line: (line[2]["dataset"], -line[0])):
        text.append(
            f"| {facts['dataset']} | {path.name} | {figure:.4f} | {facts['best_epoch']} | {facts['seconds']:.0f} |"
        )
    return "\n".join(text)


@exits_cleanly
def main() -> None:
    """Train what is asked for, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="print the runs of --out and end")
    parser.add_argument("--rival", help=f"an entry of tools/{TUNED.name}")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE[,VALUE…]", help="settings to replace")
    parser.add_argument("--item-vectors", help="of `genrec vectors`, for first_rows: cooccurrence+vectors")
    parser.add_argument("--keep-seen", action="store_true", help="validate with the items of the history kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each run")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args, of_data = parser.parse_known_args()
    if args.table:
        if not args.out.is_dir():
            raise ConfigError(f"--out: {args.out}: no such folder")
        print(table(args.out))
        return
    if not args.rival:
        raise ConfigError("--rival: name one, or ask for --table")
    if given := sorted(arguments_in(of_data) & {*NOT_READ}):
        raise ConfigError([f"--{name}: rivals have no such thing, but for --set max_history=…" for name in given])
    (source,) = parse_args(DataArguments, argv=of_data)
    settings = {name: tuned(source.dataset, args.rival).with_values(point) for name, point in points(args)}
    if not args.item_vectors and any("vectors" in each.first_rows for each in settings.values()):
        raise ConfigError("--item-vectors: first_rows asks for a file of them, as genrec vectors makes it")
    if args.only or len(settings) == 1:
        name = args.only or next(iter(settings))
        run(args, source, settings[name], args.out / name)
    else:
        queue(args, list(settings))
    print(table(args.out))


if __name__ == "__main__":
    main()
