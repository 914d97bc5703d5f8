"""The pictures of a run: what they show is what its files say, and what the run has no files for is left out."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from genrec_llm.errors import ConfigError
from genrec_llm.evaluation import EvalData, EvalReport, RankedUsers, build_report
from genrec_llm.metrics import Ranks
from genrec_llm.plots import (
    COLOURS,
    Stage,
    curves,
    draw_run,
    flat,
    item_map,
    main_categories,
    metric_bars,
    popularity_map,
    rank_curves,
    read_reports,
    stages_of,
)
from genrec_llm.vocab import IdVocab

pytest.importorskip("matplotlib")

USERS, ITEMS = 60, 40


def save_run(run: Path, stage: str, *, from_run: str | None = None, shift: float = 0.0, data: str = "shop") -> Path:
    """run.json and a log as a training writes them."""
    run.mkdir(parents=True)
    training = {"output_dir": f"runs/{run.name}", "from_run": from_run, "validation_users": 0}
    facts = {"stage": stage, "data": {"name": data, "fingerprint": "0"},
             "arguments": {"training": training, "model": {"backbone": "base"}}}  # fmt: skip
    log: list[dict[str, float]] = []
    for step in (10, 20, 30):
        log.append({"loss": 5 - step / 10 - shift, "step": step, "epoch": step / 10})
        if step > 10:
            log.append({"eval_hit_rate@10": 0.2 + shift + step / 1000, "eval_ndcg@10": 0.1 + shift, "step": step})
    log.append({"train_loss": 4.0, "step": 30})
    (run / "run.json").write_text(json.dumps(facts))
    (run / "log_history.json").write_text(json.dumps(log))
    return run


def report_of(name: str, *, worse: int, tied: int = 0, users: int = USERS) -> EvalReport:
    """User u's target has u % 10 + `worse` items above it."""
    better = np.arange(users) % 10 + worse
    ranks = Ranks(better, np.full(users, tied), ITEMS)
    histories = [np.array([0])] * users
    data = EvalData(
        users=np.arange(users),
        histories=histories,
        seen=histories,
        targets=np.full(users, 3),
        num_items=ITEMS,
        item_counts=np.ones(ITEMS, dtype=np.int64),
        split="validation",
        dataset="shop",
    )
    top = np.tile(np.arange(20), (users, 1))
    return build_report(name, RankedUsers(ranks, top), data, exclude_seen=True)


def save_evaluation(run: Path, split: str, reports: Sequence[EvalReport]) -> None:
    for report in reports:
        report.save(run / "evaluation" / split / report.name.replace(" ", "_"))
    summary = {"reports": [report.to_json() for report in reports]}
    (run / "evaluation" / split / "report.json").write_text(json.dumps(summary))


def save_rows(run: Path, categories: Sequence[str | None] | None) -> None:
    rows = np.random.default_rng(0).normal(size=(ITEMS, 8)).astype(np.float32)
    (run / "adapter").mkdir()
    save_file({"item_out": rows}, run / "adapter" / "id_tokens.safetensors")
    catalogue = pd.DataFrame({"item": [f"i{number}" for number in range(ITEMS)]})
    if categories is not None:
        catalogue["categories"] = [*categories] * (ITEMS // len(categories))
    IdVocab.build(catalogue, [], seed=0, user_mode="none").save_items(run / "adapter" / "items.parquet")


def test_a_whole_run_gets_every_picture(tmp_path: Path) -> None:
    save_run(tmp_path / "pre", "pretrain")
    run = save_run(tmp_path / "fine", "finetune", from_run="runs/pre", shift=0.1)
    reports = [report_of("GenRec", worse=0), report_of("item kNN", worse=4)]
    save_evaluation(run, "validation", reports)
    save_evaluation(run, "test_seen-kept", reports)
    save_rows(run, ["A, B", "B", None, "C"])
    written = draw_run(run)
    names = [path.relative_to(run).as_posix() for path in written]
    splits = ("test_seen-kept", "validation")
    of_splits = [f"plots/{kind}_{split}.png" for split in splits for kind in ("metrics", "ranks")]
    assert names == ["plots/curves.png", *of_splits, "plots/items.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000
        assert str(tmp_path).encode() not in path.read_bytes()
    assert {path.name for path in (run / "plots").iterdir()} == {path.name for path in written}


@pytest.mark.parametrize("categories", [None, [None], [","]], ids=str)
def test_what_a_run_has_no_files_for_is_left_out_and_said(
    categories: list[str | None] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "genrec_llm")
    run = save_run(tmp_path / "run", "finetune", from_run="runs/gone")
    (run / "log_history.json").unlink()
    assert draw_run(run) == [] and not (run / "plots").exists()
    for words in ("no curves", "not evaluated yet", "no map"):
        assert words in caplog.text
    save_evaluation(run, "test", [report_of("GenRec", worse=0)])
    save_rows(run, categories)  # and no data set by which popularity could be told
    (run / "run.json").write_text(
        json.dumps(json.loads((run / "run.json").read_text()) | {"arguments": {"data": {"dataset": "gone.csv"}}})
    )
    assert [path.name for path in draw_run(run)] == ["metrics_test.png", "ranks_test.png"]
    assert "no categories" in caplog.text and "gone.csv" in caplog.text


def test_only_a_run_is_drawn_and_matplotlib_is_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="run directory"):
        draw_run(tmp_path)
    run = save_run(tmp_path / "run", "pretrain")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'genrec-llm\[plots\]'"):
        draw_run(run)


def test_the_pretraining_is_found_where_both_runs_moved_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "genrec_llm")
    save_run(tmp_path / "moved" / "pre", "pretrain")
    run = save_run(tmp_path / "moved" / "fine", "finetune", from_run="runs/pre")
    assert [stage.name for stage in stages_of(run)] == ["pretrain", "finetune"]

    other = save_run(tmp_path / "others" / "fine", "finetune", from_run="runs/pre")
    save_run(tmp_path / "others" / "pre", "pretrain", data="another shop")
    assert [stage.name for stage in stages_of(other)] == ["finetune"]
    assert "no longer there" in caplog.text
    save_run(tmp_path / "runs" / "pre", "pretrain")
    monkeypatch.chdir(tmp_path)  # where training was started
    assert [stage.name for stage in stages_of(other)] == ["pretrain", "finetune"]


def test_the_curves_of_both_stages_follow_each_other(tmp_path: Path) -> None:
    save_run(tmp_path / "pre", "pretrain")
    run = save_run(tmp_path / "fine", "finetune", from_run="runs/pre", shift=0.1)
    loss, validation = curves(stages_of(run)).axes
    first, second = [line for line in loss.get_lines() if len(line.get_xdata()) == 3]
    assert first.get_xdata().tolist() == [10, 20, 30] and second.get_xdata().tolist() == [40, 50, 60]
    np.testing.assert_allclose(second.get_ydata(), [3.9, 2.9, 1.9])
    ndcg = [line for line in validation.get_lines() if line.get_color() == COLOURS[0]]
    assert [line.get_xdata().tolist() for line in ndcg] == [[20, 30], [50, 60]]
    np.testing.assert_allclose(np.concatenate([line.get_ydata() for line in ndcg]), [0.1, 0.1, 0.2, 0.2])
    written = {text.get_text() for text in (*loss.texts, *validation.texts)}
    assert {"pretrain", "finetune", "0.2300", "0.3300"} <= written  # the best HR@10 of each stage
    assert [text.get_text() for text in validation.get_legend().get_texts()] == ["HR@10", "NDCG@10"]


def test_a_run_too_short_for_a_logged_loss_has_its_validation_alone() -> None:
    facts = {"data": {"name": "shop"}, "arguments": {"training": {"validation_users": 2_000}}}
    only = Stage("finetune", facts, np.empty((0, 2)), np.array([[6, 0.85, 0.65]]))
    figure = curves([only])
    (axes,) = figure.axes
    assert axes.get_ylabel() == "mean over users" and axes.get_xlim()[0] == 0
    assert "validation items of 2,000 users" in figure.get_suptitle()


def test_the_bars_are_the_means_and_their_whiskers_the_intervals() -> None:
    reports = [report_of("GenRec", worse=0), report_of("popularity", worse=6)]
    (axes,) = metric_bars(reports).axes
    heights = [bar.get_height() for bar in axes.patches]
    names = ("HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR")
    assert heights == [report.metrics[name].mean for report in reports for name in names]
    assert heights[0] == pytest.approx(0.5)  # targets at places 1 to 10 alike
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]
    expected = [(report.metrics[name].low, report.metrics[name].high) for report in reports for name in names]
    np.testing.assert_allclose([segment[:, 1] for segment in segments], expected)
    assert "shop, validation: 60 users" in axes.get_title()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["GenRec", "popularity"]
    (axes,) = metric_bars([reports[0], reports[1].first_places()]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["HR@5", "NDCG@5", "HR@10", "NDCG@10"]


def test_the_rank_curve_is_the_share_of_users_at_every_length() -> None:
    (axes,) = rank_curves([report_of("GenRec", worse=0), report_of("ties", worse=0, tied=3)]).axes
    ours, ties, chance = axes.get_lines()
    places = ours.get_xdata()
    assert places[0] == 1 and places[-1] == ITEMS
    np.testing.assert_allclose(ours.get_ydata(), np.minimum(places / 10, 1))
    # By hand: user with b above and 3 beside is among n with probability (n - b) / 4, between 0 and 1.
    expected = [np.mean([min(max((n - b) / 4, 0), 1) for b in range(10)]) for n in places]
    np.testing.assert_allclose(ties.get_ydata(), expected)
    np.testing.assert_allclose(chance.get_ydata(), places / ITEMS)
    # The band: 1.96 standard errors of a share among 60 users.
    band = axes.collections[0].get_paths()[0].vertices
    at_five = band[np.isclose(band[:, 0], 5)][:, 1]
    half = 1.96 * np.sqrt(0.25 / USERS)
    assert at_five.min() == pytest.approx(0.5 - half) and at_five.max() == pytest.approx(0.5 + half)


@pytest.mark.parametrize("draw", [metric_bars, rank_curves])
def test_long_names_leave_the_axes_their_width(draw: Callable[[Sequence[EvalReport]], Any]) -> None:
    long = "sasrec-softmax_dropout=0.5_learning_rate=5e-4_max_history=200_layers=3_heads=2"
    figure = draw([report_of("GenRec", worse=0), *(report_of(f"{number}_{long}", worse=1) for number in range(5))])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None and legend.get_window_extent().x1 < figure.bbox.width < 1.3 * axes.bbox.width


def test_reports_of_other_protocols_are_not_drawn_together() -> None:
    for draw in (metric_bars, rank_curves):
        with pytest.raises(ConfigError, match="cannot be compared"):
            draw([report_of("GenRec", worse=0), report_of("popularity", worse=0, users=50)])


def test_reports_come_back_in_their_order(tmp_path: Path) -> None:
    save_evaluation(tmp_path, "test", [report_of("GenRec", worse=0), report_of("a rival", worse=2)])
    assert [report.name for report in read_reports(tmp_path / "evaluation" / "test")] == ["GenRec", "a rival"]


def test_the_map_is_the_principal_plane_of_the_directions() -> None:
    rows = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32) * np.linspace(
        3, 0.1, 16, dtype=np.float32
    )
    points, share = flat(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)  # another algorithm than flat's
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-5)
    np.testing.assert_allclose(share, (s**2 / (s**2).sum())[:2], rtol=1e-5)
    longer, _ = flat(rows * np.random.default_rng(2).uniform(0.5, 9, size=(200, 1)).astype(np.float32))
    np.testing.assert_allclose(np.abs(longer), np.abs(points), atol=1e-5)  # lengths do not count
    assert np.isfinite(flat(np.zeros((4, 3), dtype=np.float32))[0]).all()


def test_an_item_stands_under_the_most_common_of_its_categories() -> None:
    assert main_categories(["Lips, Makeup", "Makeup", "Makeup, Eyes", "Eyes", None, ""]) == [
        "Makeup", "Makeup", "Makeup", "Eyes", None, None,
    ]  # fmt: skip


def test_each_of_the_largest_categories_has_a_panel_with_its_items_in_colour() -> None:
    groups = [name for name, count in (("A", 30), ("B", 20), ("C", 10)) for _ in range(count)] + [None] * 5
    points = np.random.default_rng(0).normal(size=(65, 2))
    figure = item_map(points, np.array([0.3, 0.2]), groups, "shop")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["A (30)", "B (20)", "C (10)"]
    for axes, group in zip(panels, "ABC", strict=True):
        grey, coloured = axes.collections
        inside = np.array([name == group for name in groups])
        np.testing.assert_allclose(coloured.get_offsets(), points[inside])
        np.testing.assert_allclose(grey.get_offsets(), points[~inside])
    many = item_map(points, np.array([0.3, 0.2]), [f"group {number % 13}" for number in range(65)], "shop")
    assert sum(axes.get_visible() for axes in many.axes) == len(COLOURS)


def test_without_categories_popularity_colours_the_items() -> None:
    points, counts = np.random.default_rng(0).normal(size=(4, 2)), np.array([0, 100, 1, 10])
    dots = popularity_map(points, np.array([0.3, 0.2]), counts, "shop").axes[0].collections[0]
    np.testing.assert_allclose(dots.get_offsets(), points[[0, 2, 3, 1]])  # the popular ones on top
    assert dots.get_array().tolist() == [1, 1, 10, 100]
