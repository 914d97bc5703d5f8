"""`genrec`: from interactions to a shared model, one verb a step.

    genrec data info shop.csv
    genrec audit shop.csv
    genrec vectors shop.csv --items-file items.csv --encoder sentence-transformers/all-MiniLM-L6-v2 --out vectors.parquet
    genrec estimate --dataset shop.csv --backbone google/flan-t5-small
    genrec finetune --dataset shop.csv --backbone google/flan-t5-small --output-dir runs/shop
    genrec merge --run runs/shop
    genrec evaluate --run runs/shop
    genrec recommend runs/shop/merged tea mug
    genrec push runs/shop/adapter org/name

A verb is one function, and imports what it needs itself, so that `genrec --help` answers at once. The flags of a recipe are
the recipe's: `pretrain`, `finetune`, `merge` and `evaluate` hand them on as they are.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from genrec_llm import __version__
from genrec_llm.errors import ConfigError, counted, exits_cleanly
from genrec_llm.launch import did_you_mean, recipe_command, run, several_gpus, training_command

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
    "shuffle_ties": None,
    "without_last": 0,
}


@exits_cleanly
def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("genrec_llm").setLevel(logging.INFO)
    args, rest = _parser().parse_known_args()
    if args.recipe:
        args.rest = rest
    elif rest:
        flags = [word for word in rest if word.startswith("-")]
        if flags or "items" not in args:
            raise ConfigError([f"{word}: unknown flag{did_you_mean(word, args.flags)}" for word in flags or rest])
        args.items += rest  # argparse takes a list that may be empty for ended at the first flag
    try:
        args.verb(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + 2)
    except BrokenPipeError:  # of `genrec … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


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
    flags = ["--dataset", args.dataset, *_data_flags(args), "--output-dir", f"runs/{data.name}/pretrain"]
    print("Training reads the log itself; this folder is for other programs.")
    print(f"Next: genrec pretrain {shlex.join(flags)}")
    print("Without network or a checkpoint, add: --backbone t5-micro --backbone-init random --tuning full")


def audit(args: argparse.Namespace) -> None:
    """Measure what id order, repeats, ties and popularity alone achieve on a data set, and warn of what inflates scores.

    Nothing is trained and nothing is chosen: the rules are ranked on the test targets, over the full catalogue.
    """
    from genrec_llm.audit import audit as audit_data
    from genrec_llm.files import write_json

    found = audit_data(_load(args))
    print(
        f"{found.dataset}: {found.users:,} users, {found.items:,} items, {found.interactions:,} interactions; test targets, "
        f"full ranking; HR@10 by chance {found.chance:.4f}"
    )
    for title, rows in found.tables():
        print(f"\n{title}\n")
        _print_table([tuple(f"  {cell}" for cell in row) for row in rows if any(row)])
    if found.ties is None:
        print(
            "\nTies: the data set has no times, so they cannot be seen; the order of rows is taken as the order in time."
        )
    print()
    for warning in found.warnings:
        print(f"warning: {warning}")
    if not found.warnings:
        print("No warning: none of these rules reaches what is said to inflate scores.")
    if args.out:
        write_json(args.out, found.to_json())
        print(f"\nwritten to {args.out}, with intervals")


def vectors(args: argparse.Namespace) -> None:
    """Make a vector of each item's title and categories with a pretrained sentence encoder, for --item-vectors."""
    from genrec_llm.vectors import embed_texts, item_texts, write_item_vectors

    catalogue = _load(args).catalogue
    columns = [name for name in ("title", "categories") if name in catalogue]
    texts = item_texts(catalogue[columns].itertuples(index=False))
    described = [place for place, text in enumerate(texts) if text]
    if not described:
        raise ConfigError(f"{args.dataset}: no item has a title or categories: give --items-file with them")
    found = embed_texts([texts[place] for place in described], args.encoder, revision=args.revision)
    made_by = f"{Path(args.encoder).name} {args.revision or ''}".strip()
    write_item_vectors(args.out, catalogue["item"].iloc[described].tolist(), found, made_by)
    print(f"{args.out}: {found.shape[1]} numbers for each of {len(described):,} of {counted(len(texts), 'item')}")
    flags = ["--dataset", args.dataset, *_data_flags(args), "--item-vectors", str(args.out)]
    print(f"Next: genrec finetune {shlex.join(flags)}")


def launched(args: argparse.Namespace) -> None:
    """Run a recipe under `accelerate launch`, on this machine."""
    if {"-h", "--help"} & {*args.rest}:
        args.parser.print_help()
        sys.exit(run(recipe_command(args.recipe, ["--help"])))
    misspelt = [word for word in args.rest if difflib.get_close_matches(word.split("=")[0], args.flags, cutoff=0.85)]
    if misspelt:  # else the recipe would refuse it, with the nearest of its own flags
        raise ConfigError([f"{word}: unknown flag{did_you_mean(word, args.flags)}" for word in misspelt])
    if args.recipe == "evaluate" and not (args.strategy or args.processes or several_gpus(args.rest)):
        one_process(args)
    sys.exit(run(training_command(args.recipe, args.rest, strategy=args.strategy, processes=args.processes)))


def one_process(args: argparse.Namespace) -> NoReturn:
    """Run a recipe that needs no launcher."""
    sys.exit(run(recipe_command(args.recipe, args.rest)))


def demo(args: argparse.Namespace) -> None:
    """The whole way on MovieLens-100K, on a CPU: pretrain, finetune, merge, evaluate, recommend."""
    from genrec_llm.demo import run_demo

    run_demo(args.output_dir, seed=args.seed)


def recommend(args: argparse.Namespace) -> None:
    """Print a model's best next items after a history, or answer a file of histories."""
    if args.input is None and not args.items and args.user is None:
        raise ConfigError(
            "recommend: nothing to go by: name items that somebody had (ids, or parts of their titles), or give --input"
        )
    if args.input is None and args.output is not None:
        raise ConfigError("--output: goes with --input; a single list is printed")
    if args.input is not None and (args.items or args.user is not None):
        raise ConfigError("--input: its lines name items and users: leave them out of the command")

    from genrec_llm.ask import STANDARD, find_items, write_lists
    from genrec_llm.recommender import Recommender

    recommender = Recommender.from_pretrained(args.model, revision=args.revision, backbone=args.backbone)
    items = recommender.vocab.items
    words = find_items([*args.items, *args.exclude], items)
    history, exclude = words[: len(args.items)], words[len(args.items) :]
    options: dict[str, Any] = {"k": args.k, "exclude_seen": not args.keep_seen, "exclude": exclude}
    if args.input is not None:
        done = write_lists(recommender, args.input, args.output or STANDARD, **options)
        print(done, file=sys.stderr)
        return

    found = recommender.recommend(history, user=args.user, **options)
    titles = dict(zip(items["item"], items["title"], strict=True)) if "title" in items else {}
    who = f" of user {args.user}" if args.user is not None else ""
    print(f"History{who}, oldest first:" if history else f"History{who}: none is given")
    _print_table([("  " + item, titles.get(item) or "") for item in history])
    print()
    if not found:
        print(
            f"Nothing is left to recommend: of the model's {counted(len(items), 'item')} all are in the history or excluded."
            + ("" if args.keep_seen else " --keep-seen recommends items of the history again.")
        )
        return
    rows = [(str(rank), one.item, one.title or "", f"{one.score:.4f}") for rank, one in enumerate(found, start=1)]
    _print_table([("rank", "item", "title", "score"), *rows])


def push(args: argparse.Namespace) -> None:
    """Share an adapter/ or merged/ directory on the Hugging Face Hub, in one commit, with its card."""
    from genrec_llm.hub import push as push_folder

    pushed = push_folder(
        Path(args.folder),
        args.repo_id,
        revision=args.revision,
        private=args.private,
        with_users=args.with_users,
        base_model=args.base_model,
        dry_run=args.dry_run,
    )
    _print_sizes(pushed.files)
    if pushed.commit is None:
        print(f"\nDry run: nothing was sent. It would go to {pushed.url}")
    else:
        print(f"\nPushed to {pushed.url}, commit {pushed.commit}")
        print(f"Next: genrec recommend {args.repo_id} ITEM ...")


def pull(args: argparse.Namespace) -> None:
    """Fetch a model from the Hugging Face Hub, and compare its files with what was pushed."""
    from genrec_llm.hub import pull as pull_model

    pulled = pull_model(args.repo_id, revision=args.revision, output_dir=args.output_dir)
    files = sorted(path for path in pulled.folder.rglob("*") if path.is_file())
    _print_sizes({str(path.relative_to(pulled.folder)): path.stat().st_size for path in files})
    print(f"\n{args.repo_id} at commit {pulled.commit} lies in {pulled.folder}")
    print(f"Next: genrec recommend {shlex.quote(str(pulled.folder))} ITEM ...")


def plot(args: argparse.Namespace) -> None:
    """Draw a run's learning curves, metrics, ranks and item rows into its plots/ folder."""
    from genrec_llm.card.page import refresh_cards
    from genrec_llm.plots import draw_run

    written = draw_run(Path(args.run))
    if not written:
        raise ConfigError(f"{args.run}: has no files to draw from yet: finish its training first")
    if any((Path(args.run) / kind).is_dir() for kind in ("adapter", "trained")):
        refresh_cards(Path(args.run))
    for path in written:
        print(path)


def estimate(args: argparse.Namespace) -> None:
    """Say what a training will take before it is started: memory by part, the largest batch that fits, communication, time,
    and which strategy to choose."""
    if {"-h", "--help"} & {*args.rest}:
        args.parser.print_help()
        sys.exit(0)
    from genrec_llm.estimate import print_estimate

    print_estimate(args)


def _help(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, indent_increment=1)  # with 2, the longest verb would not fit beside its text


class _Parser(argparse.ArgumentParser):
    """Takes flags by their full name alone; says what is wrong in one line, with the nearest name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_help, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help shows how")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise ConfigError(f"{self.prog}: no verb {value!r}{did_you_mean(value, action.choices)}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="genrec",
        description="Turn a pretrained language model into a generative sequential recommender.",
    )
    parser.add_argument("--version", action="version", version=f"genrec {__version__}")
    parser.set_defaults(recipe=None)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    shown = verbs.add_parser("demo", help="the whole way on MovieLens-100K, on a CPU", description=demo.__doc__)
    shown.add_argument("--seed", type=int, default=0, help="of weights, draws and dropout (default: %(default)s)")
    shown.add_argument(
        "--output-dir", type=Path, default=Path("runs/demo"), help="where the runs go (default: %(default)s)"
    )
    _finish(shown, demo)

    data = verbs.add_parser("data", help="look at a data set, or split it and write it down")
    data_verbs = data.add_subparsers(title="verbs", metavar="VERB", required=True)
    info = data_verbs.add_parser("info", help="print what a data set holds", description=data_info.__doc__)
    _add_data_flags(info)
    _finish(info, data_info)
    prepare = data_verbs.add_parser("prepare", help="write the split to disk", description=data_prepare.__doc__)
    _add_data_flags(prepare)
    prepare.add_argument("--output-dir", required=True, help="new folder for the splits and items.parquet")
    _finish(prepare, data_prepare)

    audited = verbs.add_parser("audit", help="what id order, repeats and ties alone achieve", description=audit.__doc__)
    _add_data_flags(audited)
    audited.add_argument("--out", type=Path, help="json file for everything that was found")
    _finish(audited, audit)

    embedded = verbs.add_parser("vectors", help="sentence vectors of the items", description=vectors.__doc__)
    _add_data_flags(embedded)
    embedded.add_argument(
        "--encoder", required=True, help="folder or Hub name, such as sentence-transformers/all-MiniLM-L6-v2"
    )
    embedded.add_argument("--revision", help="branch, tag or commit on the Hub")
    embedded.add_argument("--out", type=Path, required=True, help="parquet file to write")
    _finish(embedded, vectors)

    for name, does in (
        ("pretrain", "stage 1: learn to fill in masked items"),
        ("finetune", "stage 2: learn the next item"),
    ):
        _add_launched(
            verbs, name, does, flags="--config, --dataset, --output-dir",
            strategy="cpu, single_gpu, ddp, zero2, ... (default: cpu without a GPU, single_gpu with one, ddp with several)",
        )  # fmt: skip
    merging = verbs.add_parser("merge", add_help=False, help="make a plain transformers checkpoint of a run")
    _finish(merging, one_process, recipe="merge")
    _add_launched(
        verbs, "evaluate", "rank all users of a split, beside baselines", flags="--run, --split",
        strategy="ddp shares the users over several processes (default: ddp with several GPUs, else one process)",
    )  # fmt: skip

    ask = verbs.add_parser("recommend", help="ask a trained model for items", description=recommend.__doc__)
    ask.add_argument("model", help="adapter/ or merged/ directory of a run, or org/name on the Hub")
    ask.add_argument(
        "items", nargs="*", metavar="ITEM", help="what somebody had, oldest first: an id, or a part of a title"
    )
    ask.add_argument("--revision", help="branch, tag or commit on the Hub")
    ask.add_argument(
        "--backbone", help="of an adapter: its base checkpoint, when it is no longer where the adapter says"
    )
    ask.add_argument("--user", help="raw user id, whose row is read beside the items; needs the run's users.parquet")
    ask.add_argument("-k", type=_positive, default=10, help="how many items (default: %(default)s)")
    ask.add_argument("--keep-seen", action="store_true", help="let items of the history be recommended again")
    ask.add_argument(
        "--exclude", action="append", default=[], metavar="ITEM", help="never this one; may be given several times"
    )
    ask.add_argument(
        "--input",
        metavar="FILE",
        help='many histories of ids, a line {"history": ["id", ...], "user": "id"} each; - is stdin',
    )
    ask.add_argument(
        "--output", metavar="FILE", help="where the lists go, a json line each (default: -, which is stdout)"
    )
    _finish(ask, recommend)

    guess = verbs.add_parser(
        "estimate", add_help=False, help="what a training will take: memory, time, which strategy",
        description=estimate.__doc__,
    )  # fmt: skip
    _add_estimate_flags(guess)
    guess.epilog = (
        "All other flags are those of the recipes, such as --config, --dataset, --backbone, --global-batch-size."
    )
    _finish(guess, estimate, recipe="estimate")

    share = verbs.add_parser("push", help="share a model on the Hugging Face Hub", description=push.__doc__)
    share.add_argument("folder", help="adapter/ or merged/ directory of a run")
    share.add_argument("repo_id", metavar="org/name", help="the model's name on the Hub")
    share.add_argument("--revision", help="branch that it goes to (default: main)")
    share.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    share.add_argument("--with-users", action="store_true", help="send the rows of known users, too; their ids never")
    share.add_argument(
        "--base-model", metavar="org/name", help="Hub name of the base, where it was a folder in training"
    )
    share.add_argument("--dry-run", action="store_true", help="do all but send: check, and list every file")
    _finish(share, push)

    fetch = verbs.add_parser("pull", help="fetch a model from the Hugging Face Hub", description=pull.__doc__)
    fetch.add_argument("repo_id", metavar="org/name", help="the model's name on the Hub")
    fetch.add_argument("--revision", help="branch, tag or commit (default: main, pinned to the commit that it is at)")
    fetch.add_argument("--output-dir", help="new folder for a copy (default: the Hub's cache alone)")
    _finish(fetch, pull)

    draw = verbs.add_parser("plot", help="draw the pictures of a run", description=plot.__doc__)
    draw.add_argument("run", help="run directory of a pretraining or finetuning")
    _finish(draw, plot)
    return parser


def _finish(parser: argparse.ArgumentParser, verb: Callable[[argparse.Namespace], None], **settings: Any) -> None:
    """Tie a verb's function to its parser, with the flags that a misspelt one may have meant."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    parser.set_defaults(verb=verb, parser=parser, flags=flags, **settings)


def _add_launched(verbs: Any, name: str, does: str, *, flags: str, strategy: str) -> None:
    """A verb that runs a recipe, on several processes where there are GPUs for them or the user says so."""
    parser = verbs.add_parser(name, add_help=False, help=does, description=f"{does.capitalize()}. {launched.__doc__}")
    parser.add_argument("--strategy", help=f"a file of accelerate_configs/: {strategy}")
    parser.add_argument("--processes", type=_positive, help="how many (default: one a GPU; ddp and zero on a CPU: two)")
    parser.epilog = f"All other flags are those of recipes/{name}.py, such as {flags}:"
    _finish(parser, launched, recipe=name)


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
    parser.add_argument("--shuffle-ties", type=int, metavar="SEED", help="random order within equal times of a user")
    parser.add_argument("--without-last", type=int, metavar="N", help="leave out the last interactions of each user")
    parser.set_defaults(**_DATA_DEFAULTS)


def _add_estimate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", metavar="pretrain|finetune", default="finetune", help="(default: %(default)s)")
    parser.add_argument(
        "--strategy", help="cpu, single_gpu, ddp, zero1, zero2, zero3, zero3_offload, fsdp2 (default: chosen)"
    )
    parser.add_argument("--processes", type=_positive, default=1, help="devices (default: %(default)s)")
    data = parser.add_argument_group("in place of --dataset")
    data.add_argument("--items", type=_positive, help="items of the catalogue")
    data.add_argument("--users", type=_positive, help="users with a row of their own (default: none)")
    data.add_argument("--interactions", type=_positive, help="of the whole log; for the time of an epoch")
    data.add_argument(
        "--mean-length", type=_above_zero, help="tokens of an input row on average (default: the longest)"
    )
    machine = parser.add_argument_group("hardware; all times are predictions from it")
    machine.add_argument("--hardware", default="h100", help="a100, h100 or h200 (default: %(default)s)")
    machine.add_argument("--gpu-memory", type=_above_zero, metavar="GIB", help="memory of a GPU")
    machine.add_argument("--tflops", type=_above_zero, help="speed that training reaches, if measured")
    machine.add_argument("--bandwidth", type=_above_zero, metavar="GB/S", help="between the GPUs of a node, a GPU")
    machine.add_argument("--network", type=_above_zero, metavar="GB/S", help="between nodes, all adapters of a node")
    machine.add_argument(
        "--step-seconds", type=_above_zero, help="measured step of one GPU: predicts the scaling to 8 and 64"
    )
    parser.add_argument("--json", action="store_true", help="print json")


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


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


def _print_sizes(files: Mapping[str, int]) -> None:
    digits = len(f"{sum(files.values()):,}")
    _print_table(
        [*((name, f"{size:{digits},} bytes") for name, size in files.items()), ("", f"{sum(files.values()):,} bytes")]
    )


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
