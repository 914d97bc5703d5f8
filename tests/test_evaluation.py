"""Ranking every user once, reports, comparisons and files."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny

from genrec_llm import decoding
from genrec_llm.errors import ConfigError, DataError, ExportError
from genrec_llm.evaluation import (
    EvalData,
    EvalReport,
    GeneratedLists,
    RankedUsers,
    build_report,
    markdown,
    rank_recommender,
)
from genrec_llm.metrics import hit_rate, ndcg

USERS, ITEMS = 103, 30


class Noisy:
    """Knows the target to a degree: a stand-in whose quality is the weight of the truth."""

    def __init__(self, name: str, data: EvalData, weight: float) -> None:
        self.name = name
        self.truth = dict(zip(data.users.tolist(), data.targets.tolist(), strict=True))
        self.weight = weight
        self.calls: list[int] = []

    def scores(self, histories, users: np.ndarray) -> np.ndarray:
        self.calls += users.tolist()
        assert len(histories) == len(users)
        noise = np.stack([np.random.default_rng(user).normal(size=ITEMS) for user in users])
        noise[np.arange(len(users)), [self.truth[user] for user in users.tolist()]] += self.weight
        return noise.astype(np.float32)


class Constant:
    name = "constant"

    def scores(self, histories, users: np.ndarray) -> np.ndarray:
        return np.zeros((len(users), ITEMS), dtype=np.float32)


@pytest.fixture
def data() -> EvalData:
    return tiny.eval_data(users=USERS, items=ITEMS, longest=8, split="test")


def report_of(recommender: Noisy | Constant, data: EvalData, *, exclude_seen: bool = False) -> EvalReport:
    ranked = rank_recommender(recommender, data, exclude_seen=exclude_seen)
    return build_report(recommender.name, ranked, data, exclude_seen=exclude_seen)


@pytest.mark.parametrize("batch_size", [1, 10, 103, 512])
def test_every_user_is_ranked_exactly_once_whatever_the_batch(data: EvalData, batch_size: int) -> None:
    recommender = Noisy("noisy", data, 1.0)
    ranked = rank_recommender(recommender, data, exclude_seen=True, batch_size=batch_size)
    assert sorted(recommender.calls) == sorted(data.users.tolist())
    whole = rank_recommender(Noisy("noisy", data, 1.0), data, exclude_seen=True, batch_size=USERS)
    np.testing.assert_array_equal(ranked.ranks.better, whole.ranks.better)
    np.testing.assert_array_equal(ranked.top, whole.top)


def test_a_large_catalogue_is_ranked_for_fewer_users_at_a_time_and_what_was_scored_stays_as_it_was(
    data: EvalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[np.ndarray] = []

    class Remembered(Noisy):
        def scores(self, histories, users: np.ndarray) -> np.ndarray:
            given.append(super().scores(histories, users))
            return given[-1]

    whole = rank_recommender(Noisy("noisy", data, 1.0), data, exclude_seen=True)
    monkeypatch.setattr(decoding, "MOST_SCORES", 10 * ITEMS + 5)
    ranked = rank_recommender(Remembered("noisy", data, 1.0), data, exclude_seen=True)
    assert max(len(scores) for scores in given) == 10
    assert all(np.isfinite(scores).all() for scores in given)
    np.testing.assert_array_equal(ranked.ranks.better, whole.ranks.better)
    np.testing.assert_array_equal(ranked.top, whole.top)


def test_lists_hold_no_seen_item_and_a_seen_target_is_never_hit(data: EvalData) -> None:
    ranked = rank_recommender(Noisy("noisy", data, 9.0), data, exclude_seen=True)
    for items, seen in zip(ranked.top, data.seen, strict=True):
        assert not set(items.tolist()) & set(seen.tolist())
    repeated = np.array([target in seen for target, seen in zip(data.targets, data.seen, strict=True)])
    assert repeated.any()
    assert (ranked.ranks.better[repeated] == ITEMS).all()
    assert (hit_rate(ranked.ranks, ITEMS)[repeated] == 0).all()


def test_the_list_and_the_rank_tell_the_same_story(data: EvalData) -> None:
    ranked = rank_recommender(Noisy("noisy", data, 1.0), data, exclude_seen=True)
    in_list = (ranked.top[:, :10] == data.targets[:, None]).any(axis=1)
    np.testing.assert_array_equal(hit_rate(ranked.ranks, 10), in_list)


def test_chance_and_an_oracle_in_a_report(data: EvalData) -> None:
    chance = report_of(Constant(), data).metrics
    for k in (1, 5, 10, 20):
        assert chance[f"HR@{k}"].mean == pytest.approx(k / ITEMS, abs=1e-15)
    oracle = report_of(Noisy("oracle", data, 99.0), data).metrics
    assert all(oracle[name].mean == 1 for name in oracle if name[:2] in ("HR", "ND", "MR"))
    assert oracle["HR@1"] == oracle["NDCG@1"]
    assert math.isnan(oracle["coverage@10"].low)


def test_a_broken_recommender_is_refused(data: EvalData) -> None:
    class Broken(Constant):
        def scores(self, histories, users: np.ndarray) -> np.ndarray:
            return np.full((len(users), ITEMS), np.nan, dtype=np.float32)

    with pytest.raises(ValueError, match="NaN"):
        rank_recommender(Broken(), data, exclude_seen=False)


def test_data_that_does_not_belong_together_is_refused_with_every_reason(data: EvalData) -> None:
    with pytest.raises(ValueError) as error:
        replace(data, targets=data.targets[:-1] + ITEMS, item_counts=data.item_counts[1:])
    for reason in ("one entry a user", "below num_items=30", "29 entries for 30 items"):
        assert reason in str(error.value)


def test_compare_is_paired_and_signed(data: EvalData) -> None:
    good, bad = (report_of(Noisy(name, data, weight), data) for name, weight in (("good", 3.0), ("bad", 0.0)))
    difference = good.compare(bad)["NDCG@10"]
    assert difference.mean == pytest.approx(good.metrics["NDCG@10"].mean - bad.metrics["NDCG@10"].mean, abs=1e-12)
    assert difference.low > 0
    assert difference.p_value < 0.01
    assert bad.compare(good)["HR@10"].mean < 0


def test_reports_of_different_protocols_are_not_compared(data: EvalData) -> None:
    mine = report_of(Constant(), data)
    other = report_of(Constant(), replace(data, split="validation"), exclude_seen=True)
    with pytest.raises(ConfigError) as error:
        mine.compare(other)
    assert [word in str(error.value) for word in ("split", "exclude_seen", "'validation'")] == [True] * 3
    others = replace(data, users=data.users[::-1])
    mine.compare(report_of(Constant(), others))  # other tokens, of the users that the fingerprint tells
    for part in (data.users + 1, data.users * 0 + 1, data.users * 0):
        report = report_of(Constant(), replace(data, users=part))
        if part.max() > USERS:  # one token each, and not those of the same users
            with pytest.raises(ConfigError, match="their users differ"):
                mine.compare(report)
        else:  # hashed, or no user known
            mine.compare(report)
    with pytest.raises(ConfigError, match="another order"):
        markdown([report_of(Constant(), replace(each, fingerprint="")) for each in (data, others)])
    mine.compare(report_of(Constant(), replace(data, max_history=None)))  # a recommender's own affair


def test_a_saved_report_comes_back_whole_and_holds_rows_only(data: EvalData, tmp_path: Path) -> None:
    report = report_of(Noisy("noisy", data, 1.0), data)
    report.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ranks.parquet", "report.json"]
    table = pyarrow.parquet.read_table(tmp_path / "run" / "ranks.parquet")
    assert table.column_names == ["user_row", "better", "tied"]
    text = (tmp_path / "run" / "report.json").read_text()
    assert "NaN" not in text  # no json
    assert json.loads(text)["protocol"]["users"] == USERS
    loaded = EvalReport.load(tmp_path / "run")
    assert loaded.to_json() == report.to_json()
    assert loaded.compare(report)["HR@10"].p_value == 1
    with pytest.raises(DataError, match="no such file"):
        EvalReport.load(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_old_report_as_it_was(
    data: EvalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_of(Constant(), data).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_written(table: object, path: Path, **how: object) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", half_written)
    with pytest.raises(ExportError, match="No space left"):
        report_of(Noisy("new", data, 1.0), data).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_first_places_tell_what_they_tell_and_no_more(data: EvalData, tmp_path: Path) -> None:
    whole = report_of(Noisy("new", data, 0.5), data)
    first = whole.first_places(10)
    assert {*first.metrics} == {*whole.metrics} - {"MRR", "HR@20", "NDCG@20"}
    first.save(tmp_path)
    kept = EvalReport.load(tmp_path)
    for k in (1, 5, 10):
        assert np.array_equal(hit_rate(kept.ranks, k), hit_rate(whole.ranks, k))
        assert np.array_equal(ndcg(kept.ranks, k), ndcg(whole.ranks, k))
    for measure in (hit_rate, ndcg):  # what is behind these places is never hit, however far one looks
        assert np.array_equal(measure(kept.ranks, ITEMS + 1), measure(whole.ranks, 10))
    assert (whole.ranks.better >= 10).any() and kept.metrics == first.metrics
    assert kept.compare(whole)["NDCG@10"].mean == 0
    table = markdown([whole, kept])
    assert "| NDCG@10 |" in table and "MRR" not in table and "@20" not in table


def test_rivals_are_ranked_in_batches_of_the_size_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.train(tiny.save_backbone("t5-untied", tmp_path / "base"), tmp_path, tmp_path / "run")
    tiny.recipe("merge", "--run", run)
    sizes = []

    def spied(recommender, data: EvalData, **how) -> RankedUsers:
        sizes.append((recommender.name, how["batch_size"]))
        return rank_recommender(recommender, data, **how)

    monkeypatch.setattr("genrec_llm.evaluation.rank_recommender", spied)
    tiny.recipe("evaluate", "--run", run, "--batch-size", 7)
    assert len(sizes) == 4 and {size for _, size in sizes} == {7}


def test_lists_that_end_early_agree_with_themselves_and_with_no_other_order() -> None:
    items = np.array([[4, 2, *[-1] * 8]] * 2)
    scores = np.array([[2.0, 1.0, *[-math.inf] * 8], [1.0, 2.0, *[-math.inf] * 8]], dtype=np.float32)
    assert GeneratedLists.compare(items, items, scores, np.array([4, 4])).agreement == 0.5


def test_the_table_shows_every_report(data: EvalData) -> None:
    reports = [report_of(Noisy(f"weight {w}", data, w), data) for w in (0.0, 1.0, 2.0)]
    table = markdown(reports)
    interval = reports[1].metrics["NDCG@10"]
    assert f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]" in table
    assert "nan" not in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}
