"""Pictures of a run, from the files in its directory: curves, metrics, ranks, and a map of the item rows.

Each picture is one function that returns a `Figure`; `draw_run` writes those that the run has files for. Colours are
those of Okabe and Ito (2008), which people with any kind of colour vision tell apart.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genrec_llm.card.figures import PLOTS
from genrec_llm.directory import ADAPTER, ROWS_FILE, TRAINED
from genrec_llm.errors import ConfigError, GenRecError
from genrec_llm.evaluation import HEADLINE, HISTORY_ALONE, LAST_ITEMS_TOO, EvalReport, check_comparable
from genrec_llm.files import atomic_file, read_json
from genrec_llm.metrics import hit_rate
from genrec_llm.runs import LOG_FILE, RUN_FILE, load_run_data
from genrec_llm.vocab import ITEMS_FILE, IdVocab

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#882255")
GREY = "#D5D5D5"
DPI = 150


@dataclass(frozen=True)
class Stage:
    """What one stage of training logged.

    Attributes:
        name: "pretrain" or "finetune".
        facts: its run.json.
        losses: training loss by step, float64 [logged, 2].
        validations: step, HR@10 and NDCG@10 of each validation, float64 [validations, 3].
    """

    name: str
    facts: Mapping[str, Any]
    losses: NDArray[np.float64]
    validations: NDArray[np.float64]

    @classmethod
    def read(cls, run: Path) -> Stage:
        """From run.json and the log of a finished run."""
        facts, log = read_json(run / RUN_FILE), read_json(run / LOG_FILE)
        losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        names = ("step", "eval_hit_rate@10", "eval_ndcg@10")
        ranked = [tuple(entry[name] for name in names) for entry in log if names[-1] in entry]
        return cls(
            facts["stage"],
            facts,
            np.array(losses, dtype=np.float64).reshape(-1, 2),
            np.array(ranked, dtype=np.float64).reshape(-1, 3),
        )

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(max([0, *self.losses[:, 0], *self.validations[:, 0]]))


def can_draw() -> bool:
    """Whether matplotlib, the optional extra `plots`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_run(run: Path) -> list[Path]:
    """Write `plots/*.png` of a run directory: `curves`, `metrics_<split>`, `ranks_<split>`, `items`.

    What the run has no files for is left out, and the log says why.

    Returns:
        The pictures written.

    Raises:
        ConfigError: not a run directory, or matplotlib is not installed.
        DataError: a file of the run is broken.
        ExportError: a picture cannot be written.
    """
    if not (run / RUN_FILE).is_file():
        raise ConfigError(f"{run}: no {RUN_FILE}: give the run directory of a pretraining or finetuning")
    figures: dict[str, Figure] = {}
    stages = stages_of(run)
    if any(len(stage.losses) or len(stage.validations) for stage in stages):
        figures["curves"] = curves(stages)
    else:
        logger.info("%s: nothing logged yet: no curves", run)
    evaluated = {path.parent.name: path.parent for path in sorted(run.glob("evaluation/*/report.json"))}
    if not evaluated:
        logger.info("%s: not evaluated yet: no metrics and ranks (genrec evaluate --run %s)", run, run)
    for split, folder in evaluated.items():
        reports = [
            report for report in read_reports(folder) if not report.name.endswith((HISTORY_ALONE, LAST_ITEMS_TOO))
        ]
        figures[f"metrics_{split}"] = metric_bars(reports)
        figures[f"ranks_{split}"] = rank_curves(reports)
    rows = next((path for kind in (ADAPTER, TRAINED) if (path := run / kind / ROWS_FILE).is_file()), None)
    if rows is None:
        logger.info("%s: no finished model yet: no map of the item rows", run)
    elif picture := _map_of_run(run, rows):
        figures["items"] = picture
    written = []
    for name, figure in figures.items():
        written.append(run / PLOTS / f"{name}.png")
        save(figure, written[-1])
    return written


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        ExportError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


# --- what the files say -----------------------------------------------------------------------------------------------


def stages_of(run: Path) -> list[Stage]:
    """The stages that led to a run, earliest first: the pretraining is there if it lies where the run went on from it."""
    if not (run / LOG_FILE).is_file():
        return []
    stage = Stage.read(run)
    training = stage.facts["arguments"]["training"]
    if not training["from_run"]:
        return [stage]
    # Both names are relative to where training was started: from each other they hold when the runs moved together.
    beside = run / os.path.relpath(training["from_run"], training["output_dir"])
    for folder in (beside, Path(training["from_run"])):
        if (folder / RUN_FILE).is_file() and folder.resolve() != run.resolve():
            before = stages_of(folder)
            if before and before[-1].facts["data"] == stage.facts["data"]:
                return [*before, stage]
    logger.info("%s: %s is no longer there: its curves are left out", run, training["from_run"])
    return [stage]


def read_reports(folder: Path) -> list[EvalReport]:
    """The reports of one evaluation, ours first: `report.json` has their order, a folder each has the ranks."""
    names = [report["name"] for report in read_json(folder / "report.json")["reports"]]
    return [EvalReport.load(folder / name.replace(" ", "_")) for name in names]


def main_categories(categories: Sequence[str | None]) -> list[str | None]:
    """One category an item: of the comma-separated ones that it has, the one that most items have.

    Example:
        >>> main_categories(["Makeup, Lips", "Makeup, Eyes", "Eyes", None])
        ['Makeup', 'Makeup', 'Eyes', None]
    """
    split = [[word.strip() for word in (text or "").split(",") if word.strip()] for text in categories]
    counts = pd.Series([word for words in split for word in words], dtype="str").value_counts()
    return [max(words, key=lambda word: (counts[word], word)) if words else None for words in split]


def flat(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Principal components: rows `[items, width]`, each brought to length 1, as points `[items, 2]`.

    Returns:
        The points, and the share of the variance along each axis.
    """
    directions = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centred = (directions - directions.mean(axis=0)).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    return centred @ vectors[:, :-3:-1], values[:-3:-1] / max(values.sum(), 1e-12)


# --- the pictures -----------------------------------------------------------------------------------------------------


def curves(stages: Sequence[Stage]) -> Figure:
    """Training loss above, HR@10 and NDCG@10 of validation below, over the steps of all stages one after the other.

    A panel for which nothing was logged is left out.
    """
    panels = {
        "loss": any(len(stage.losses) for stage in stages),
        "validation": any(len(stage.validations) for stage in stages),
    }
    drawn = [name for name, any_logged in panels.items() if any_logged]
    figure = _figure(7.5, 1.4 + 1.9 * len(drawn))
    axes_of = dict(zip(drawn, figure.subplots(len(drawn), 1, sharex=True, squeeze=False).ravel(), strict=True))
    begin = 0
    for stage in stages:
        if "loss" in axes_of:
            axes_of["loss"].plot(begin + stage.losses[:, 0], stage.losses[:, 1], color=COLOURS[4], linewidth=1)
        if "validation" in axes_of:
            _validation_curves(axes_of["validation"], stage, begin, named=begin == 0)
        for axes in axes_of.values():
            if begin:
                axes.axvline(begin, color="#666666", linestyle=":", linewidth=1, zorder=0)
        axes_of[drawn[0]].annotate(
            stage.name, (begin, 1.0), (4, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="bottom", fontsize=9, color="#444444",
        )  # fmt: skip
        begin += stage.steps
    for axes in axes_of.values():
        _tidy(axes)
    if "loss" in axes_of:
        axes_of["loss"].set_ylabel("training loss (nats)")
    if "validation" in axes_of:
        axes_of["validation"].set_ylabel("mean over users")
        axes_of["validation"].set_ylim(0, 1.15 * axes_of["validation"].dataLim.y1 or 1)
        axes_of["validation"].legend(frameon=False, loc="lower right")
    last = axes_of[drawn[-1]]
    last.set_xlim(left=0)
    last.set_xlabel("step")
    last.xaxis.set_major_formatter("{x:,.0f}")
    sampled = stages[-1].facts["arguments"]["training"].get("validation_users")
    users = f" of {sampled:,} users" if sampled else ""
    figure.suptitle(
        f"{stages[-1].facts['data']['name']}: training, and full ranking of the validation items{users}, "
        "seen items removed\n(the best value of each stage is written out)",
        fontsize=9,
    )
    return figure


def _validation_curves(axes: Axes, stage: Stage, begin: int, *, named: bool) -> None:
    steps, *measured = stage.validations.T
    styles = (("HR@10", COLOURS[1], "s"), ("NDCG@10", COLOURS[0], "o"))
    for values, (name, colour, marker) in zip(measured, styles, strict=True):
        axes.plot(
            begin + steps, values, color=colour, marker=marker, markersize=3.5, linewidth=1.2,
            label=name if named else None,
        )  # fmt: skip
        if len(values):
            best = int(values.argmax())
            axes.annotate(
                f"{values[best]:.4f}", (begin + steps[best], values[best]), (0, 5), ha="center", fontsize=8,
                textcoords="offset points", color=colour, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
            )  # fmt: skip


def metric_bars(reports: Sequence[EvalReport]) -> Figure:
    """Bars of the main metrics that all have, with their 95 % intervals, one colour a report.

    Raises:
        ConfigError: the reports were not made under the same protocol.
    """
    check_comparable(reports)
    names = [name for name in HEADLINE if all(name in report.metrics for report in reports)]
    figure = _figure(max(7.0, 1.5 + 0.36 * len(names) * (len(reports) + 1)), 4.2)
    axes = figure.add_subplot()
    width = 0.8 / len(reports)
    for position, report in enumerate(reports):
        intervals = [report.metrics[name] for name in names]
        means = np.array([interval.mean for interval in intervals])
        below = means - [interval.low for interval in intervals]
        above = [interval.high for interval in intervals] - means
        centres = np.arange(len(names)) + (position - (len(reports) - 1) / 2) * width
        axes.bar(centres, means, width * 0.9, label=report.name, color=_colour(position))
        axes.errorbar(centres, means, yerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        for centre, interval in zip(centres, intervals, strict=True):
            text = f"{interval.mean:.3f}".removeprefix("0")
            axes.annotate(text, (centre, interval.high), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("mean over users, 95 % interval")
    axes.set_title(str(reports[0].protocol), fontsize=9)
    _tidy(axes)
    _legend(figure, axes, -0.08)
    return figure


def rank_curves(reports: Sequence[EvalReport]) -> Figure:
    """Share of users whose next item is among the first n, for every n, beside a random order.

    The bands are pointwise 95 % intervals over users (normal approximation).

    Raises:
        ConfigError: the reports were not made under the same protocol.
    """
    check_comparable(reports)
    candidates = reports[0].protocol.candidates
    places = np.unique(np.geomspace(1, candidates, 80).round().astype(np.int64))
    figure = _figure(7.0, 4.4)
    axes = figure.add_subplot()
    for position, report in enumerate(reports):
        hits = [hit_rate(report.ranks, int(place)) for place in places]
        shares = np.array([values.mean() for values in hits])
        spread = 1.96 * np.array([values.std() for values in hits]) / np.sqrt(len(report.user_rows))
        colour = _colour(position)
        axes.fill_between(places, shares - spread, shares + spread, color=colour, alpha=0.25, linewidth=0)
        axes.plot(places, shares, color=colour, label=report.name, linewidth=1.8 if position == 0 else 1.2)
    axes.plot(places, places / candidates, color="#777777", linestyle="--", linewidth=1, label="random order")
    axes.set_xscale("log")
    axes.set_xlim(1, candidates)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("n: items from the top of the list (log scale)")
    axes.set_ylabel("users whose next item is among them\n(shaded: 95 % interval)")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_title(str(reports[0].protocol), fontsize=9)
    _tidy(axes)
    _legend(figure, axes, -0.15)
    return figure


def item_map(
    points: NDArray[np.float64], variance: NDArray[np.float64], groups: Sequence[str | None], title: str
) -> Figure:
    """Items as dots, one small map for each of the largest categories: its items in colour before all others in grey.

    In one map the dots of thousands of items hide each other, and the last category drawn looks like the largest.

    Args:
        points: of the items, `[items, 2]`.
        variance: share along each axis, as `flat` gives it.
        groups: category of each item; None where it has none.
    """
    names = pd.Series(groups, dtype="str")
    largest = names.value_counts().iloc[: len(COLOURS)]
    columns = min(4, len(largest))
    rows = -(-len(largest) // columns)
    figure = _figure(2.4 * columns + 0.4, 2.4 * rows + 0.9)
    size = _dot_size(len(points))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, colour, (name, count) in zip(panels, COLOURS, largest.items(), strict=False):
        inside = (names == name).to_numpy(dtype=bool)
        axes.scatter(*points[~inside].T, s=size, color=GREY, linewidths=0)
        axes.scatter(*points[inside].T, s=size * 1.5, color=colour, linewidths=0)
        axes.set_title(f"{_short(str(name))} ({count:,})", fontsize=9, color=colour)
    for axes in panels[len(largest) :]:
        axes.set_visible(False)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#bbbbbb")
    across, up = _component_labels(variance)
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(up, fontsize=9)
    figure.suptitle(f"{title}\n(an item stands under the most common of its categories; grey: all others)", fontsize=9)
    return figure


def popularity_map(
    points: NDArray[np.float64], variance: NDArray[np.float64], counts: NDArray[np.int64], title: str
) -> Figure:
    """Items as dots, coloured by how often they stand in the training part (log scale): for a catalogue without categories.

    Args:
        points: of the items, `[items, 2]`.
        variance: share along each axis, as `flat` gives it.
        counts: training interactions, int64 [items].
    """
    figure = _figure(7.0, 5.6)
    axes = figure.add_subplot()
    order = np.argsort(counts, kind="stable")
    from matplotlib.colors import LogNorm

    shown = np.maximum(counts, 1)
    norm = LogNorm(1, max(2, shown.max()))
    across, up = points[order].T
    size = _dot_size(len(points))
    dots = axes.scatter(across, up, s=size, c=shown[order], norm=norm, cmap="viridis_r", linewidths=0)
    bar = figure.colorbar(dots, ax=axes, shrink=0.8, label="interactions in training (none counts as 1)")
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(**dict(zip(("xlabel", "ylabel"), _component_labels(variance), strict=True)))
    axes.set_xticks([])
    axes.set_yticks([])
    figure.suptitle(title, fontsize=9)
    return figure


def _map_of_run(run: Path, rows_file: Path) -> Figure | None:
    from safetensors.numpy import load_file

    points, variance = flat(load_file(rows_file)["item_out"])
    items = IdVocab.load(rows_file.parent).items
    name = read_json(run / RUN_FILE)["data"]["name"]
    title = f"{name}: the output rows of {len(items):,} items, as learned: principal components of their directions"
    if "categories" in items:
        groups = main_categories([None if pd.isna(text) else text for text in items["categories"]])
        if any(groups):
            return item_map(points, variance, groups, title)
    try:
        data = load_run_data(run)
    except GenRecError as error:
        logger.info(
            "%s has no categories, and popularity cannot be read (%s): no map", rows_file.parent / ITEMS_FILE, error
        )
        return None
    return popularity_map(points, variance, np.bincount(data.train.items, minlength=len(items)), title)


def _component_labels(variance: NDArray[np.float64]) -> list[str]:
    return [f"component {number} ({share:.0%} of the variance)" for number, share in enumerate(variance, start=1)]


def _figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches; drawn without a display and without pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'genrec-llm[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#dddddd")
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes, below: float) -> None:
    """Under the axes, in as many columns as the names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    names = [_short(name, 60) for name in names]
    letters = 11 * figure.get_figwidth()  # about those that fit beside each other
    columns = int(np.clip(letters // (6 + max(map(len, names))), 1, 4))
    axes.legend(handles, names, frameon=False, ncols=columns, loc="upper left", bbox_to_anchor=(0, below))


def _colour(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def _dot_size(dots: int) -> float:
    """Points squared: many items get small dots, few items large ones."""
    return float(np.clip(20_000 / max(dots, 1), 3, 30))


def _short(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"
