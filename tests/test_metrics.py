"""Metrics against formulas by hand, chance, and `ranx`; intervals against simulation."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import genrec_llm.metrics
from genrec_llm.decoding import mask_seen_, rank_targets, top_items
from genrec_llm.metrics import (
    Ranks,
    bootstrap_interval,
    bootstrap_intervals,
    coverage,
    hit_rate,
    list_ranks,
    ndcg,
    novelty,
    paired_difference,
    reciprocal_rank,
)

MODULES = Path(genrec_llm.metrics.__file__).parent / "evaluate_modules"


def ranks_of(scores: np.ndarray, targets: np.ndarray) -> Ranks:
    better, tied = rank_targets(torch.from_numpy(scores), torch.from_numpy(targets))
    return Ranks(better.numpy(), tied.numpy(), scores.shape[1])


def test_doc_examples_run() -> None:
    results = doctest.testmod(genrec_llm.metrics)
    assert results.attempted > 5
    assert results.failed == 0


@pytest.mark.parametrize("k", [1, 5, 10, 20, 50, 60])
def test_a_constant_scorer_gets_exactly_chance(k: int) -> None:
    items = 50
    ranks = ranks_of(np.zeros((7, items), dtype=np.float32), np.arange(7))
    cut = min(k, items)
    np.testing.assert_array_equal(hit_rate(ranks, k), cut / items)
    dcg = sum(1 / math.log2(1 + position) for position in range(1, cut + 1))
    np.testing.assert_allclose(ndcg(ranks, k), dcg / items, rtol=1e-12)  # sums of 50 float64 terms
    harmonic = sum(1 / position for position in range(1, items + 1))
    np.testing.assert_allclose(reciprocal_rank(ranks), harmonic / items, rtol=1e-12)
    np.testing.assert_array_equal(ranks.expected, (items + 1) / 2)


def test_shuffled_labels_get_chance() -> None:
    generator = np.random.default_rng(0)
    users, items = 4000, 100
    scores = generator.normal(size=(users, items)).astype(np.float32)
    values = hit_rate(ranks_of(scores, generator.integers(items, size=users)), 10)
    assert abs(values.mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / users)  # four standard errors


def test_an_oracle_gets_one_everywhere() -> None:
    targets = np.array([3, 0, 9])
    scores = np.eye(10, dtype=np.float32)[targets]
    ranks = ranks_of(scores, targets)
    for values in (hit_rate(ranks, 1), ndcg(ranks, 1), ndcg(ranks, 20), reciprocal_rank(ranks)):
        np.testing.assert_array_equal(values, 1.0)


def test_ties_equal_the_average_over_every_order_of_the_tied_items() -> None:
    better, tied, items = 3, 4, 12
    ranks = Ranks(np.array([better]), np.array([tied]), items)
    possible = Ranks(np.arange(better, better + tied + 1), np.zeros(tied + 1, dtype=np.int64), items)
    for k in (1, 4, 5, 10, 20):
        assert hit_rate(ranks, k)[0] == pytest.approx(hit_rate(possible, k).mean(), abs=1e-15)
        assert ndcg(ranks, k)[0] == pytest.approx(ndcg(possible, k).mean(), abs=1e-15)
    assert reciprocal_rank(ranks)[0] == pytest.approx(reciprocal_rank(possible).mean(), abs=1e-15)


def test_metrics_agree_with_ranx_on_random_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)  # compiling takes 20 times as long as the sums
    ranx = pytest.importorskip("ranx")
    generator = np.random.default_rng(1)
    users, items = 60, 40
    scores = np.stack([generator.permutation(items) for _ in range(users)]).astype(np.float32)  # no ties
    targets = generator.integers(items, size=users)
    relevant = ranx.Qrels({f"u{u}": {f"i{target}": 1} for u, target in enumerate(targets)})
    run = ranx.Run({f"u{u}": {f"i{i}": float(s) for i, s in enumerate(row)} for u, row in enumerate(scores)})
    names = [f"{metric}@{k}" for metric in ("hit_rate", "ndcg") for k in (1, 5, 10, 20)] + ["mrr"]
    expected = ranx.evaluate(relevant, run, names)
    ranks = ranks_of(scores, targets)
    for k in (1, 5, 10, 20):
        assert hit_rate(ranks, k).mean() == pytest.approx(expected[f"hit_rate@{k}"], abs=1e-9)
        assert ndcg(ranks, k).mean() == pytest.approx(expected[f"ndcg@{k}"], abs=1e-9)
    assert reciprocal_rank(ranks).mean() == pytest.approx(expected["mrr"], abs=1e-9)


def test_a_target_removed_as_seen_is_never_hit_even_beyond_the_catalogue() -> None:
    scores = mask_seen_(torch.zeros(2, 5), [np.array([1, 2]), np.array([], dtype=np.int64)])
    better, tied = rank_targets(scores, torch.tensor([2, 2]))
    assert better.tolist() == [5, 0]
    assert tied.tolist() == [0, 4]
    ranks = Ranks(better.numpy(), tied.numpy(), 5)
    assert hit_rate(ranks, 100).tolist() == [0.0, 1.0]
    assert ndcg(ranks, 100)[0] == 0
    assert reciprocal_rank(ranks)[0] == 0


def test_masked_items_are_no_rivals_of_the_target() -> None:
    scores = mask_seen_(torch.tensor([[5.0, 4.0, 3.0, 3.0]]), [np.array([0, 1, 0])])
    assert [value.item() for value in rank_targets(scores, torch.tensor([2]))] == [0, 1]


def test_top_items_break_ties_by_index_and_leave_out_what_is_not_eligible() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -torch.inf, 3.0, -torch.inf, -torch.inf]])
    items, values = top_items(scores, 4)
    assert items.tolist() == [[1, 2, 4, 0], [2, 0, -1, -1]]
    assert values[1].tolist() == [3.0, 0.0, -math.inf, -math.inf]
    assert top_items(scores, 7)[0].tolist() == [[1, 2, 4, 0, 3, -1, -1], [2, 0, -1, -1, -1, -1, -1]]


def test_top_items_equal_a_stable_sort_on_scores_full_of_ties() -> None:
    scores = np.random.default_rng(2).integers(0, 6, size=(50, 200)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(top_items(torch.from_numpy(scores), 20)[0].numpy(), expected)


def test_coverage_and_novelty_ignore_empty_places() -> None:
    top = np.array([[0, 3], [3, -1], [-1, -1]])
    assert coverage(top, 8) == 0.25
    # item 3 was never interacted with and counts as seen once: log2(8) bits; item 0 has half of all: one bit
    assert novelty(top, np.array([4, 2, 2, 0])).tolist() == [2.0, 3.0, 0.0]


def test_bootstrap_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    samples = generator.random((300, 200)) < 0.3
    intervals = [bootstrap_interval(sample, seed=i, resamples=300) for i, sample in enumerate(samples)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert (
        0.90 < covered < 0.985
    )  # 0.95 give or take four standard errors of 300 trials, and the bootstrap's small bias


def test_the_interval_agrees_with_the_normal_one_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(4).normal(2.0, 1.0, size=5000)
    interval = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)  # noise of 2,000 resamples
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)
    assert interval == bootstrap_interval(values, seed=1)
    assert interval == bootstrap_intervals({"other": -values, "it": values}, seed=1)["it"]


def test_paired_differences_see_what_separate_intervals_do_not() -> None:
    generator = np.random.default_rng(5)
    baseline = generator.random(500)
    better = baseline + 0.01 + 0.02 * generator.normal(size=500)
    difference = paired_difference(better, baseline)
    assert difference.low > 0
    assert difference.p_value < 0.001
    same = paired_difference(baseline, baseline)
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    generator = np.random.default_rng(6)
    values = [
        paired_difference(*generator.normal(size=(2, 60)), seed=trial, resamples=200).p_value for trial in range(200)
    ]
    assert np.mean(np.array(values) < 0.1) < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 200)  # four standard errors
    assert 0.4 < np.mean(values) < 0.6


@pytest.mark.parametrize(
    "call",
    [
        lambda: Ranks(np.zeros(2, dtype=np.int64), np.zeros(3, dtype=np.int64), 5),
        lambda: bootstrap_interval([]),
        lambda: paired_difference(np.zeros(3), np.zeros(1)),
        lambda: list_ranks([[1, 2]], [1], k=3),
        lambda: list_ranks([[1, 2]], [1, 2], k=1),
    ],
)
def test_what_does_not_fit_together_is_refused(call) -> None:
    with pytest.raises(ValueError):
        call()


def test_evaluate_modules_load_offline_and_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    top = np.array([[4, 2, 7], [1, 5, -1], [8, 3, 6]])
    targets = np.array([2, 9, 8])
    for name, expected in (("hit_rate", 2 / 3), ("ndcg", (1 / math.log2(3) + 1) / 3)):
        module = evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path))
        assert module.compute(predictions=top, references=targets, k=3)[name] == pytest.approx(expected, abs=1e-12)
