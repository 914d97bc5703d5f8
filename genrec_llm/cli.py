"""`genrec`: look at data, prepare it, ask a model for items.

    genrec data info movielens-100k
    genrec data prepare shop.csv --k-core 5 --output-dir prepared/shop
    genrec recommend runs/movielens/finetune/merged 50 181

A verb is one function, and imports what it needs itself, so that `genrec --help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genrec_llm import __version__
from genrec_llm.errors import ConfigError, exits_cleanly

if TYPE_CHECKING:
    from genrec_llm.data import Interactions

_DATA_DEFAULTS = {
    "data_dir": None,
    "items_file": None,
    "user_column": "user",
    "item_column": "item",
    "time_column": "timestamp",
    "k_core": 0,
    "drop_duplicates": False,
}


@exits_cleanly
def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("genrec_llm").setLevel(logging.INFO)
    args = _parser().parse_args()
    args.verb(args)


def data_info(args: argparse.Namespace) -> None:
    """Print what a data set holds, and what its leave-last-two-out split will ask of a model."""
    import numpy as np

    data = _load(args)
    frame, catalogue = data.frame, data.catalogue
    lengths = np.diff(data.offsets)
    short = int((lengths < 3).sum())
    cold_catalogue = len(catalogue) - frame["item"].nunique()

    place = np.where(np.repeat(lengths >= 3, lengths), data.from_end, 0)  # 1 test, 2 validation, above: training
    cold = ~frame["item"].isin(frame["item"][place > 2])
    repeated = frame.duplicated(["user", "item"])  # rows stand in order of time
    times = "none: the order of rows is taken as the order in time"
    if "timestamp" in frame:
        seconds = np.array([frame["timestamp"].min(), frame["timestamp"].max()])
        times = " to ".join(str(time).replace("T", " ") for time in seconds.astype("datetime64[s]")) + " UTC"
    middle = f"median {np.median(lengths):g}, mean {lengths.mean():.1f}"
    spread = f"min {lengths.min()}, {middle}, max {lengths.max()}"
    rows = [
        ("users", f"{len(lengths):,}"),
        (
            "items",
            f"{len(catalogue):,}" + (f", {cold_catalogue:,} without interactions" if cold_catalogue else ""),
        ),
        ("interactions", f"{len(frame):,}"),
        ("interactions a user", spread),
        ("sparsity", f"{1 - len(frame) / len(lengths) / len(catalogue):.2%}"),
        ("time range", times),
        ("items with a title", _share(catalogue["title"].notna() if "title" in catalogue else [])),
        ("cold validation targets", _share(cold[place == 2])),
        ("cold test targets", _share(cold[place == 1])),
        ("repeats in test targets", _share(repeated[place == 1])),
    ]
    if short:
        rows.append(
            (
                "users not counted in targets",
                f"{short:,} with fewer than 3 interactions; --k-core 3 drops them",
            )
        )
    print(f"{data.name}\n")
    _print_table(rows)
    print("\nCold: not in the training part of any user. Repeats: in the user's own history.")
    if short:
        args.k_core = max(args.k_core, 3)
    flags = [args.dataset, *_data_flags(args), "--output-dir", f"prepared/{data.name}"]
    print(f"Next: genrec data prepare {shlex.join(flags)}")


def data_prepare(args: argparse.Namespace) -> None:
    """Write the leave-last-two-out split as a `datasets.DatasetDict`, and the items beside it."""
    out = Path(args.output_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--output-dir {out}: already there; name a new folder, or delete this one first")
    data = _load(args)

    from genrec_llm.data import leave_last_two_out
    from genrec_llm.files import atomic_directory

    splits = leave_last_two_out(data)
    with atomic_directory(out.resolve()) as folder:
        splits.save_to_disk(folder)
        data.catalogue.astype("str").to_parquet(folder / "items.parquet", index=False)
    print(f"Written to {out}, to be read with datasets.load_from_disk({str(out)!r}):\n")
    _print_table(
        [
            *((f"{name}/", f"{len(split):,} users", ", ".join(split.column_names)) for name, split in splits.items()),
            ("items.parquet", f"{len(data.catalogue):,} items", ", ".join(data.catalogue)),
        ]
    )
    print("\nThe splits hold raw user ids: think twice before you share them.")
    launch = "accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py"
    flags = ["--dataset", args.dataset, *_data_flags(args), "--output-dir", f"runs/{data.name}/pretrain"]
    print("Training reads the log itself; this folder is for other programs.")
    print(f"Next, from the repository: {launch} {shlex.join(flags)}")
    print("Without network or a checkpoint, add: --backbone t5-micro --backbone-init random --tuning full")


def recommend(args: argparse.Namespace) -> None:
    """Print a model's best next items after a history."""
    from genrec_llm.recommender import Recommender

    recommender = Recommender.from_pretrained(args.model)
    found = recommender.recommend(args.items, k=args.k, exclude_seen=not args.keep_seen)
    rows = [(str(rank), one.item, one.title or "", f"{one.score:.4f}") for rank, one in enumerate(found, start=1)]
    _print_table([("rank", "item", "title", "score"), *rows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="genrec",
        description="Turn a pretrained language model into a generative sequential recommender.",
    )
    parser.add_argument("--version", action="version", version=f"genrec {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    data = verbs.add_parser("data", help="look at a data set, or split it and write it down")
    data_verbs = data.add_subparsers(title="verbs", metavar="VERB", required=True)
    info = data_verbs.add_parser("info", help="print what a data set holds", description=data_info.__doc__)
    _add_data_flags(info)
    info.set_defaults(verb=data_info)
    prepare = data_verbs.add_parser("prepare", help="write the split to disk", description=data_prepare.__doc__)
    _add_data_flags(prepare)
    prepare.add_argument("--output-dir", required=True, help="new folder for the splits and items.parquet")
    prepare.set_defaults(verb=data_prepare)

    ask = verbs.add_parser("recommend", help="ask a trained model for items", description=recommend.__doc__)
    ask.add_argument("model", help="adapter/ or merged/ directory of a run")
    ask.add_argument("items", nargs="+", metavar="ITEM", help="raw ids of the history, oldest first")
    ask.add_argument("-k", type=_positive, default=10, help="how many items (default: %(default)s)")
    ask.add_argument("--keep-seen", action="store_true", help="let items of the history be recommended again")
    ask.set_defaults(verb=recommend)
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    names = "movielens-100k, amazon-beauty, amazon-sports, yelp"
    parser.add_argument("dataset", help=f"{names}, or a csv, tsv, jsonl, parquet or txt file")
    parser.add_argument("--data-dir", help="folder of a named data set that cannot be downloaded")
    parser.add_argument("--items-file", help="items of a file of your own: `item`, optional `title`, `categories`")
    parser.add_argument("--user-column", help="column of the user id (default: %(default)s)")
    parser.add_argument("--item-column", help="column of the item id (default: %(default)s)")
    parser.add_argument(
        "--time-column", help="column of the time (default: %(default)s); without one rows are in order"
    )
    parser.add_argument("--k-core", type=int, help="drop users and items with fewer interactions; 0 keeps all")
    parser.add_argument("--drop-duplicates", action="store_true", help="drop rows that repeat user, item and time")
    parser.set_defaults(**_DATA_DEFAULTS)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _load(args: argparse.Namespace) -> Interactions:
    from genrec_llm.sources import load_interactions

    options = {name: getattr(args, name) for name in _DATA_DEFAULTS}
    return load_interactions(args.dataset, items_path=options.pop("items_file"), **options)


def _data_flags(args: argparse.Namespace) -> list[str]:
    """The data flags that were given, as a recipe or another verb takes them."""
    given = {name: value for name, default in _DATA_DEFAULTS.items() if (value := getattr(args, name)) != default}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [part for flag, value in flags for part in ((flag,) if value == "True" else (flag, value))]


def _share(marks: Sequence[bool]) -> str:
    return f"{sum(marks):,} of {len(marks):,} ({sum(marks) / len(marks):.1%})" if len(marks) else "none"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
