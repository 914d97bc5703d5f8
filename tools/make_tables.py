"""The tables and pictures of docs/accuracy.md, from docs/results/quality.json and from nothing else.

    python tools/make_tables.py                # write them
    python tools/make_tables.py --check        # write nothing; exit with 1 if the page is not what would be written
    python tools/make_tables.py add --run runs/beauty_t5-micro/finetune --model genrec-t5-micro
    python tools/make_tables.py add --report runs/sasrec-0/test --model SASRec --seed 0 --seconds 1300 \\
        --command "recipes/rivals.py --model sasrec --seed 0"
    python tools/make_tables.py pair OURS RIVAL --models genrec-t5-micro SASRec --seed 0

`add --run` takes every evaluation of a run: the model's reports with the run's seed and seconds of training, and those of
the baselines that stand beside it. `add --report` takes one saved `EvalReport`. A row with the same data set, split, model,
protocol and seed is replaced; what its report says of each user's first places is kept in ranks/ beside quality.json.
`pair` takes the folders of two saved reports and writes the paired difference of their NDCG@10, ours minus rival, with its
bootstrap interval over users into docs/results/quality_pairs.json, in the place of the one between these models, unless
that has other seeds; tools/benchmark.py writes that of several seeds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec_llm.errors import ConfigError, DataError, exits_cleanly
from genrec_llm.files import atomic_file, read_json, write_json

if TYPE_CHECKING:
    from genrec_llm.evaluation import EvalReport

REPOSITORY = Path(__file__).resolve().parent.parent
QUALITY = REPOSITORY / "docs" / "results" / "quality.json"
METRICS = ("hr@5", "ndcg@5", "hr@10", "ndcg@10")
PROTOCOLS = ("seen removed", "seen kept")
SPLITS = ("test", "validation")
OURS = "genrec"
"""The name of every model of ours begins so."""
BEGIN, END = "<!-- made by tools/make_tables.py: begin -->", "<!-- made by tools/make_tables.py: end -->"
ROUNDING = 1e-6
"""Between a pair and the difference of its rows."""
TEXT = ("dataset", "split", "model", "protocol", "command", "hardware")
Row = dict[str, Any]
KEYS = (
    "dataset",
    "split",
    "model",
    "protocol",
    "seed",
    *METRICS,
    "users",
    "candidates",
    "command",
    "commit",
    "trained",
    "hardware",
    "seconds",
)
"""`commit` is that of the ranking, `trained` that of the training, null where nothing was trained or
nobody noted it. `hardware` and `seconds` are those of the training, where there was one."""


@dataclass(frozen=True)
class Pair:
    """Ours minus a rival for the same users: mean, 95 % interval and p-value of the difference of NDCG@10.

    Of several seeds, a user's difference is the mean over them; the interval is over users still, with these seeds.
    """

    dataset: str
    split: str
    protocol: str
    model: str
    rival: str
    seeds: list[int]
    mean: float
    low: float
    high: float
    p_value: float
    users: int


# --- rows -------------------------------------------------------------------------------------------------------------


def checked(rows: Any, path: Path) -> list[Row]:
    """The rows of quality.json, if they are what the tables take.

    Raises:
        DataError: every row that is not, by its number from 1, and rows that do not go together.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: has to be a list of rows with {', '.join(KEYS)}")
    problems = [f"{path}: row {number}: {problem}" for number, row in enumerate(rows, 1) for problem in _problems(row)]
    if problems:
        raise DataError(problems)
    seen: dict[tuple[Any, ...], int] = {}
    ranked: dict[tuple[str, str], tuple[int, int, int]] = {}
    for number, row in enumerate(rows, 1):
        if (first := seen.setdefault(_key(row), number)) != number:
            problems.append(
                f"{path}: row {number}: row {first} has its data set, split, model, protocol and seed: keep one"
            )
        size = (row["users"], row["candidates"])
        *other, first = ranked.setdefault((row["dataset"], row["split"]), (*size, number))
        if tuple(other) != size:
            problems.append(
                f"{path}: row {number}: {size[0]} users and {size[1]} candidates cannot be compared with row {first}, "
                f"which has {other[0]} and {other[1]}"
            )
    if problems:
        raise DataError(problems)
    return rows


def _problems(row: Row) -> list[str]:
    problems = [f"no {key}" for key in KEYS if key not in row] + [
        f"unknown key {key!r}" for key in row.keys() - set(KEYS)
    ]
    if problems:
        return problems
    problems = [f"{key}: {row[key]!r} is no text" for key in TEXT if not isinstance(row[key], str) or not row[key]]
    for key, known in (("split", SPLITS), ("protocol", PROTOCOLS)):
        if row[key] not in known:
            problems.append(f"{key}: {row[key]!r} is not one of {', '.join(known)}")
    problems += [f"{key}: {row[key]!r} is no number from 0 to 1" for key in METRICS
                 if not _number(row[key]) or not 0 <= row[key] <= 1]  # fmt: skip
    problems += [f"{key}: {row[key]!r} is no whole number above 0" for key in ("users", "candidates")
                 if type(row[key]) is not int or row[key] < 1]  # fmt: skip
    if row["seed"] is not None and type(row["seed"]) is not int:
        problems.append(f"seed: {row['seed']!r} is neither a whole number nor null (a model without one)")
    problems += [f"{key}: {row[key]!r} is neither text nor null" for key in ("commit", "trained")
                 if row[key] is not None and not isinstance(row[key], str)]  # fmt: skip
    if row["seconds"] is not None and not (_number(row["seconds"]) and row["seconds"] >= 0):
        problems.append(f"seconds: {row['seconds']!r} is neither a number nor null (nothing was trained)")
    if not problems:
        problems = [f"{low} is above {high}" for low, high in
                    (("hr@5", "hr@10"), ("ndcg@5", "ndcg@10"), ("ndcg@5", "hr@5"), ("ndcg@10", "hr@10"))
                    if row[low] > row[high]]  # fmt: skip
    return problems


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("dataset", "split", "model", "protocol", "seed"))


def row_of(report: EvalReport, model: str, made: Mapping[str, Any], training: Mapping[str, Any]) -> Row:
    """A row of quality.json from a report.

    Args:
        made: command, commit and hardware, as an evaluation notes them.
        training: seed, seconds, commit and hardware of it, those that there are.
    """
    protocol = report.protocol
    return {
        "dataset": protocol.dataset,
        "split": protocol.split,
        "model": model,
        "protocol": PROTOCOLS[not protocol.exclude_seen],
        "seed": training.get("seed"),
        **{metric: report.metrics[metric.upper()].mean for metric in METRICS},
        "users": protocol.users,
        "candidates": protocol.candidates,
        **{key: made[key] for key in ("command", "commit")},
        "trained": training.get("commit"),
        "hardware": training.get("hardware", made["hardware"]),
        "seconds": training.get("seconds"),
    }


def rows_of_run(run: Path, model: str, evaluation: str = "*") -> list[tuple[Row, EvalReport]]:
    """Rows of a run's evaluations, each with its report: the model's, and those of the recommenders beside it.

    Args:
        evaluation: which of them, as its folder is named (`test`, `validation_seen-kept`, …); all by default.

    Raises:
        ConfigError: it has not finished, or is not evaluated.
    """
    from publish_run import stages_of

    from genrec_llm.evaluation import HISTORY_ALONE, LAST_ITEMS_TOO, WITHOUT_USERS
    from genrec_llm.plots import read_reports

    stages = stages_of(run)
    folders = sorted(path.parent for path in run.glob(f"evaluation/{evaluation}/report.json"))
    if not folders:
        raise ConfigError(f"{run}: not evaluated yet: recipes/evaluate.py --run {run}")
    last = stages[-1][1]
    training = {
        "seed": last["arguments"]["training"]["seed"],
        "seconds": round(sum(facts["finished"]["seconds"] for _, facts in stages), 1),
        "commit": last["commit"],
        "hardware": last["hardware"],
    }
    rows = []
    for folder in folders:
        made = read_json(folder / "report.json")
        ours, *rivals = read_reports(folder)
        rows.append((row_of(ours, model, made, training), ours))
        trained = {ours.name: training} | made.get("rivals", {})
        for report in rivals:
            if report.name.endswith(WITHOUT_USERS):
                continue  # our model, asked as if it knew no user: that goes by its run
            name = report.name  # ours, ranked otherwise, is among them
            name = model + name.removeprefix(ours.name) if name.startswith(ours.name) else name
            of_rival = trained.get(report.name.removesuffix(LAST_ITEMS_TOO).removesuffix(HISTORY_ALONE), {})
            rows.append((row_of(report, name, made, of_rival), report))
    return rows


def put(path: Path, new: Iterable[Row]) -> list[Row]:
    """Add rows to quality.json, in the place of those with the same key.

    Returns:
        The rows that were there and had other figures.

    Raises:
        DataError: a row is not what it has to be; the file is as it was.
    """
    rows = {_key(row): row for row in (checked(read_json(path), path) if path.is_file() else [])}
    own = {_key(row): row for row in new}
    others = [row for key, row in rows.items() if key in own and any(row[name] != own[key][name] for name in METRICS)]
    rows |= own
    write_json(path, checked(list(rows.values()), path))
    return others


def pair_of(ours: Sequence[EvalReport], rivals: Sequence[EvalReport], models: Sequence[str], seeds: list[int]) -> Pair:
    """The paired difference of NDCG@10 between two models, one report of each for a seed.

    Raises:
        ConfigError: the reports were not made under the same protocol, for the same users.
    """
    import numpy as np

    from genrec_llm.evaluation import check_comparable
    from genrec_llm.metrics import ndcg, paired_difference

    check_comparable([*ours, *rivals])
    means = (np.mean([ndcg(report.ranks, 10) for report in of_model], axis=0) for of_model in (ours, rivals))
    difference, protocol = paired_difference(*means), ours[0].protocol
    return Pair(
        protocol.dataset, protocol.split, PROTOCOLS[not protocol.exclude_seen], models[0], models[1], seeds,
        difference.mean, difference.low, difference.high, difference.p_value, protocol.users,
    )  # fmt: skip


def read_pairs(path: Path) -> list[Pair]:
    """The rows of quality_pairs.json; none without the file.

    Raises:
        DataError: a row has other keys than a `Pair`.
    """
    rows = read_json(path) if path.is_file() else []
    names = {entry.name for entry in fields(Pair)}
    wrong = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict) or row.keys() != names]
    if wrong:
        raise DataError([f"{path}: row {number}: has to have {', '.join(sorted(names))}" for number in wrong])
    return [Pair(**row) for row in rows]


def put_pairs(quality: Path, new: Iterable[Pair]) -> None:
    """Add pairs to the file beside quality.json, in the place of those with the same key; what is written is said.

    One with seeds that the new one has not stays.
    """
    path = pairs_beside(quality)
    pairs = {_identity(pair): pair for pair in read_pairs(path)}
    for pair in new:
        there = pairs.get(_identity(pair))
        said = f"{pair.model} - {pair.rival}, NDCG@10: {_interval(pair)}"
        if there is None or set(there.seeds) <= set(pair.seeds):
            pairs[_identity(pair)] = pair
            print(f"{said}; in {path}")
        else:
            print(
                f"{said}; not written: {path} has it of seeds {there.seeds}, which are not all here: remove that first"
            )
    write_json(path, [asdict(pair) for pair in pairs.values()])


def check_pairs(rows: Sequence[Row], pairs: Sequence[Pair], path: Path) -> None:
    """Raise where a pair is not the difference of its rows.

    Raises:
        DataError: all of them; a row is missing, or has been made again since.
    """
    figures = {_key(row): row["ndcg@10"] for row in rows}
    problems = []
    for pair in pairs:

        def of(model: str, pair: Pair = pair) -> float | None:
            where = pair.dataset, pair.split, model, pair.protocol
            found = [figures.get((*where, seed), figures.get((*where, None))) for seed in pair.seeds or [None]]
            return None if None in found else statistics.fmean(found)

        ours, rival = of(pair.model), of(pair.rival)
        if ours is None or rival is None or abs(ours - rival - pair.mean) > ROUNDING:
            gives = "miss" if ours is None or rival is None else f"give {ours - rival:+.4f} for"
            problems.append(
                f"{path}: {pair.model} - {pair.rival} on {pair.dataset}, {pair.split}, {pair.protocol}: the rows {gives} "
                f"this pair ({pair.mean:+.4f}, seeds {pair.seeds}): rank these seeds with tools/benchmark.py again"
            )
    if problems:
        raise DataError(problems)


def _identity(pair: Pair) -> tuple[Any, ...]:
    return pair.dataset, pair.split, pair.protocol, pair.model, pair.rival


def pairs_beside(quality: Path) -> Path:
    """The file of pairs that belongs to a file of rows."""
    return quality.with_name("quality_pairs.json")


def kept_report(quality: Path, row: Row) -> Path:
    """The folder beside quality.json where the report of a row is kept, if it is: `EvalReport.load` reads it."""
    model = row["model"] if row["seed"] is None else f"{row['model']} seed {row['seed']}"
    parts = row["dataset"], f"{row['split']} {row['protocol']}", model
    return quality.with_name("ranks").joinpath(*(re.sub(r"[^A-Za-z0-9-]+", "_", part) for part in parts))


def put_reports(quality: Path, new: Sequence[tuple[Row, EvalReport]]) -> list[Row]:
    """As `put`, and keep what the first places of the report of each say (`EvalReport.first_places`)."""
    others = put(quality, [row for row, _ in new])
    for row, report in new:
        report.first_places().save(kept_report(quality, row))
    return others


def check_kept(rows: Sequence[Row], quality: Path) -> None:
    """Raise where a kept report does not give its row, or has none.

    Raises:
        DataError: all of them, by their folders.
    """
    from genrec_llm.evaluation import EvalReport
    from genrec_llm.metrics import hit_rate, ndcg

    measures, problems = {"hr": hit_rate, "ndcg": ndcg}, []
    for row in rows:
        if not (folder := kept_report(quality, row)).is_dir():
            continue
        ranks = EvalReport.load(folder).ranks
        for metric in METRICS:
            name, k = metric.split("@")
            found = float(measures[name](ranks, int(k)).mean())
            if abs(found - row[metric]) > ROUNDING:
                problems.append(f"{folder}: {metric} is {found:.6f} for its ranks and {row[metric]:.6f} in {quality}")
    problems = [f"{problem}: rank this seed with tools/benchmark.py again" for problem in problems]
    found = {path.parent for path in quality.with_name("ranks").rglob("report.json")}
    of_rows = {kept_report(quality, row) for row in rows}
    problems += [f"{folder}: {quality.name} has no row of it: remove it" for folder in sorted(found - of_rows)]
    if problems:
        raise DataError(problems)


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A model in a table: the values of its seeds by metric."""

    model: str
    values: dict[str, list[float]]
    seconds: list[float]

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values[metric])

    def spread(self, metric: str) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 else None


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Models of one table, ours first, each group by NDCG@10."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        seconds = [row["seconds"] for row in of_model if row["seconds"] is not None]
        lines.append(Line(model, {metric: [row[metric] for row in of_model] for metric in METRICS}, seconds))
    return sorted(lines, key=lambda line: (not line.model.startswith(OURS), -line.mean("ndcg@10"), line.model))


def tables(rows: Sequence[Row], pairs: Sequence[Pair], pictures: Mapping[str, str]) -> str:
    """The markdown between the markers.

    Args:
        pictures: link of each data set's picture; those without one have none.
    """
    parts = _summary(rows, pairs)
    for dataset in sorted({row["dataset"] for row in rows}):
        parts += [f"## {dataset}", ""]
        if dataset in pictures:
            parts += [f"![{dataset}: NDCG@10 of each model]({pictures[dataset]})", ""]
        for split in SPLITS:
            for protocol in PROTOCOLS:
                where = {"dataset": dataset, "split": split, "protocol": protocol}
                chosen = [row for row in rows if where.items() <= row.items()]
                if chosen:
                    parts += [*_table(chosen, f"{split} split, {protocol}"), ""]
                    parts += _pair_lines([pair for pair in pairs if where.items() <= asdict(pair).items()])
    return "\n".join(parts).rstrip() + "\n"


def _summary(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    """Of each table of the test split: the best of ours beside the best rival, by its own ranking and by ours."""
    from genrec_llm.evaluation import LAST_ITEMS_TOO

    text = []
    for dataset, protocol in product(sorted({row["dataset"] for row in rows}), PROTOCOLS):
        where = {"dataset": dataset, "split": "test", "protocol": protocol}
        lines = lines_of([row for row in rows if where.items() <= row.items()])
        rivals = [line for line in lines if not line.model.startswith(OURS)]
        if len(rivals) in (0, len(lines)):
            continue
        ours, cells = lines[0], [f"{dataset}, {protocol}", _of(lines[0])]
        for alike in (False, True):
            best = next((line for line in rivals if line.model.endswith(LAST_ITEMS_TOO) == alike), None)
            name = best.model if best else ""
            pair = next((p for p in pairs if _identity(p) == (dataset, "test", protocol, ours.model, name)), None)
            cells.append(f"{name.removesuffix(LAST_ITEMS_TOO)} {_of(best)}" if best else "–")
            cells.append(_interval(pair) + _seeds(pair) if pair else "–")
        text.append(f"| {' | '.join(cells)} |")
    if not text:
        return []
    return [
        "## In short",
        "",
        "Test split, NDCG@10, mean over seeds (their number). Of all rivals the best, by its own ranking and by its last",
        "items too, and ours minus it, paired over users, with the 95 % interval (the seeds that both were ranked in).",
        "",
        "| | ours | best rival | ours minus it | best by last items too | ours minus it |",
        "|---|---|---|---|---|---|",
        *text,
        "",
    ]


def _of(line: Line) -> str:
    return f"{_digits(line.mean('ndcg@10'))} ({len(line.values['ndcg@10'])})"


def _seeds(pair: Pair) -> str:
    return f", {'seed' if len(pair.seeds) == 1 else 'seeds'} {' '.join(map(str, pair.seeds))}" if pair.seeds else ""


def _interval(pair: Pair) -> str:
    return f"{pair.mean:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"


def _table(rows: Sequence[Row], title: str) -> list[str]:
    lines = lines_of(rows)
    best = {metric: max(round(line.mean(metric), 4) for line in lines) for metric in METRICS}
    text = [f"### {rows[0]['dataset']}: {title}", "",
            f"{rows[0]['users']:,} users, full ranking of {rows[0]['candidates']:,} items; mean ± sd over seeds.",
            "", "| model | HR@5 | NDCG@5 | HR@10 | NDCG@10 | seeds | seconds of training |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        cells = []
        for metric in METRICS:
            spread = line.spread(metric)
            cell = _digits(line.mean(metric)) + ("" if spread is None else f" ± {_digits(spread)}")
            cells.append(f"**{cell}**" if round(line.mean(metric), 4) == best[metric] else cell)
        seconds = f"{statistics.fmean(line.seconds):,.0f}" if line.seconds else "–"
        text.append(f"| {line.model} | {' | '.join(cells)} | {len(line.values['hr@5'])} | {seconds} |")
    return text


def _digits(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _pair_lines(pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    text = ["Paired over users, NDCG@10, with 95 % bootstrap intervals; of several seeds, a user's mean over them:", ""]
    for pair in pairs:
        text.append(f"- {pair.model} - {pair.rival}{_seeds(pair)}: {_interval(pair)}")
    return [*text, ""]


def with_tables(page: str, text: str, path: Path) -> str:
    """A page with the text between its markers.

    Raises:
        ConfigError: it has not exactly one pair of markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ConfigError(f"{path}: the tables go between one line {BEGIN} and one line {END}: put them in")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"


NEW_PAGE = f"# Accuracy\n\n{BEGIN}\n{END}\n"


def draw(rows: Sequence[Row], dataset: str, path: Path) -> None:
    """NDCG@10 of each model on the test split (or validation, where test has no row), a panel a protocol."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'genrec-llm[plots]'") from error
    from genrec_llm.plots import COLOURS, GREY, save

    of_set = [row for row in rows if row["dataset"] == dataset]
    split = next(split for split in SPLITS if any(row["split"] == split for row in of_set))
    panels = {p: lines_of([r for r in of_set if r["split"] == split and r["protocol"] == p]) for p in PROTOCOLS}
    panels = {protocol: lines for protocol, lines in panels.items() if lines}
    size = (6.5 * len(panels), 0.9 + 0.32 * max(map(len, panels.values())))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (protocol, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.barh(
            [line.model for line in lines],
            [line.mean("ndcg@10") for line in lines],
            xerr=[line.spread("ndcg@10") or 0.0 for line in lines],
            color=[COLOURS[0] if line.model.startswith(OURS) else GREY for line in lines],
        )
        axes.invert_yaxis()
        axes.set_title(f"{dataset}, {split}, {protocol}", fontsize="medium")
        axes.set_xlabel("NDCG@10, mean over seeds (lines: sd)")
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


# --- the program ------------------------------------------------------------------------------------------------------


def write(page: Path, quality: Path, *, check: bool) -> None:
    """Write the page and its pictures, or exit with 1 if the page would change."""
    if not quality.is_file():
        raise ConfigError(f"{quality}: no such file: add rows with `tools/make_tables.py add`")
    rows = checked(read_json(quality), quality)
    pairs = read_pairs(pairs_beside(quality))
    check_kept(rows, quality)
    check_pairs(rows, pairs, pairs_beside(quality))
    sets = sorted({row["dataset"] for row in rows})
    pictures = {name: quality.with_name(f"quality_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}.png") for name in sets}
    links = {name: os.path.relpath(path, page.parent) for name, path in pictures.items()}
    before = page.read_text(encoding="utf-8") if page.is_file() else NEW_PAGE
    after = with_tables(before, tables(rows, pairs, links), page)
    if check:
        if after != before or not page.is_file():
            sys.exit(f"{page} is not what {quality} gives: python tools/make_tables.py")
        return
    for name, path in pictures.items():
        draw(rows, name, path)
    with atomic_file(page) as temporary:
        temporary.write_text(after, encoding="utf-8")
    print(f"written to {page} and {len(pictures)} pictures beside {quality}")


def _made(report: Path, command: str | None) -> dict[str, Any]:
    """Command, commit and hardware of a saved report, from the evaluation that it is part of."""
    from genrec_llm.provenance import git_commit, hardware

    summary = report.parent / "report.json"
    noted = read_json(summary) if summary.is_file() else {}
    made = {key: noted.get(key) for key in ("command", "commit", "hardware")}
    if command is not None:
        made["command"] = command
    if made["command"] is None:
        raise ConfigError(f"{report}: nothing beside it says what made it: give --command")
    return made if noted else made | {"commit": git_commit(), "hardware": hardware()}


@exits_cleanly
def main() -> None:
    """Write the tables, add rows, or add a paired difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, default=QUALITY)
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "accuracy.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page would change")
    verbs = parser.add_subparsers(dest="verb")
    adding = verbs.add_parser("add", help="rows from a run, or from one saved report")
    source = adding.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a finished, merged and evaluated run directory")
    source.add_argument("--report", type=Path, help="folder of a saved EvalReport (report.json, ranks.parquet)")
    adding.add_argument("--model", required=True, help=f"name in the tables; ours begins with {OURS}")
    adding.add_argument("--seed", type=int, help="with --report: its seed, if it has one")
    adding.add_argument("--seconds", type=float, help="with --report: of training, if there was any")
    adding.add_argument("--command", help="with --report: what made it, where no evaluation beside it says so")
    pairing = verbs.add_parser("pair", help="ours minus a rival, NDCG@10, paired over users")
    pairing.add_argument("ours", type=Path, help="folder of our saved EvalReport")
    pairing.add_argument("rival", type=Path, help="folder of the rival's")
    pairing.add_argument(
        "--models", nargs=2, required=True, metavar=("OURS", "RIVAL"), help="their names in the tables"
    )
    pairing.add_argument("--seed", type=int, help="of the two runs")
    args = parser.parse_args()
    if args.verb is None:
        write(args.page, args.quality, check=args.check)
        return

    from genrec_llm.evaluation import EvalReport

    if args.verb == "add":
        if args.run:
            if not args.model.startswith(OURS):
                raise ConfigError(f"--model {args.model}: the name of a model of ours begins with {OURS}")
            rows = rows_of_run(args.run, args.model)
        else:
            made, report = _made(args.report, args.command), EvalReport.load(args.report)
            training = {"seed": args.seed, "seconds": args.seconds}
            rows = [(row_of(report, args.model, made, training), report)]
        others = put_reports(args.quality, rows)
        print(f"{len(rows)} rows written to {args.quality}")
        for row in others:
            seed = "" if row["seed"] is None else f", seed {row['seed']}"
            print(f"in the place of another {row['model']}{seed} ({row['dataset']}, {row['split']}, {row['protocol']}): "
                  f"NDCG@10 was {row['ndcg@10']:.4f}")  # fmt: skip
    else:
        seeds = [] if args.seed is None else [args.seed]
        pair = pair_of([EvalReport.load(args.ours)], [EvalReport.load(args.rival)], args.models, seeds)
        put_pairs(args.quality, [pair])


if __name__ == "__main__":
    main()
