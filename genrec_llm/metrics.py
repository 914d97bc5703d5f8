"""Ranking metrics, one value a user, and intervals over users.

Everything starts from `Ranks`: how many eligible items are scored above each user's target, and how many have
its score. Ties count at their expected value under a random order, so a scorer that gives every item the same
score gets exactly HR@K = K / items, and no metric depends on how an implementation happens to break ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Where the targets stand in a full ranking; entry u belongs to user u.

    Attributes:
        better: int64 [users], eligible items scored strictly above the target. `better == candidates` says
            that the target could not be recommended at all (it was removed as seen): never a hit, whatever K.
        tied: int64 [users], other eligible items with the target's score.
        candidates: number of items in the catalogue.

    Raises:
        ValueError: the two arrays are not one-dimensional and of one length.
    """

    better: Ints
    tied: Ints
    candidates: int

    def __post_init__(self) -> None:
        if self.better.ndim != 1 or self.better.shape != self.tied.shape:
            raise ValueError(f"better {self.better.shape} and tied {self.tied.shape} must both be [users]")

    @property
    def expected(self) -> Floats:
        """Expected rank of the target, float64 [users], 1 is best."""
        return 1 + self.better + self.tied / 2


def list_ranks(lists: Sequence[Sequence[int]], targets: Sequence[int], k: int) -> Ranks:
    """Ranks of the targets within recommended lists, where no scores are at hand.

    Args:
        lists: one list a user, best first, at least `k` long; -1 stands for "nothing".
        targets: the item each user went on to.
        k: how much of each list counts.

    Raises:
        ValueError: lists and targets differ in number, or lists are shorter than `k`.

    >>> list_ranks([[7, 3, 5], [7, 3, 5]], [3, 4], k=3).better.tolist()
    [1, 3]
    """
    if len(lists) != len(targets):
        raise ValueError(f"{len(lists)} lists for {len(targets)} targets: give one of each a user")
    short = sum(len(items) < k for items in lists)
    if short:
        raise ValueError(f"{short} of {len(lists)} lists are shorter than k={k}: lower k or pad with -1")
    better = [
        list(items[:k]).index(target) if target in items[:k] else k
        for items, target in zip(lists, targets, strict=True)
    ]
    return Ranks(np.array(better, dtype=np.int64), np.zeros(len(better), dtype=np.int64), candidates=k)


def _mean_over_ties(ranks: Ranks, gains: Floats) -> Floats:
    """Mean of `gains[position - 1]` over the positions the target may take; later positions gain nothing."""
    total = np.concatenate(([0.0], np.cumsum(gains)))
    first = np.minimum(ranks.better, len(gains))
    last = np.minimum(ranks.better + ranks.tied + 1, len(gains))
    exact = np.append(gains, 0.0)[first]  # without ties no difference of sums, hence no rounding
    return np.where(ranks.tied == 0, exact, (total[last] - total[first]) / (ranks.tied + 1))


def hit_rate(ranks: Ranks, k: int) -> Floats:
    """HR@K, float64 [users]: the probability that the target is among the first `k`.

    With one target a user it equals recall@K.

    >>> hit_rate(Ranks(np.array([0, 9, 10, 8]), np.array([0, 0, 0, 3]), candidates=100), k=10).tolist()
    [1.0, 1.0, 0.0, 0.5]
    """
    cut = min(k, ranks.candidates)  # a target that could not be recommended stays a miss for k > candidates
    return np.clip((cut - ranks.better) / (ranks.tied + 1), 0.0, 1.0)


def ndcg(ranks: Ranks, k: int) -> Floats:
    """NDCG@K, float64 [users]: 1 / log2(1 + rank) for ranks up to `k`, else 0.

    The measure of Järvelin and Kekäläinen (2002). With one target the ideal DCG is 1, so DCG
    is NDCG.

    >>> ndcg(Ranks(np.array([0, 2, 10]), np.array([0, 0, 0]), candidates=100), k=10).tolist()
    [1.0, 0.5, 0.0]
    """
    return _mean_over_ties(ranks, 1 / np.log2(1 + np.arange(1, min(k, ranks.candidates) + 1)))


def reciprocal_rank(ranks: Ranks) -> Floats:
    """1 / rank over the whole catalogue, float64 [users]; its mean is the MRR.

    >>> reciprocal_rank(Ranks(np.array([0, 3]), np.array([1, 0]), candidates=100)).tolist()
    [0.75, 0.25]
    """
    return _mean_over_ties(ranks, 1 / np.arange(1, ranks.candidates + 1))


def coverage(top: Ints, num_items: int) -> float:
    """Share of the catalogue that is recommended to anyone.

    Args:
        top: int64 [users, k] item indices, -1 for nothing.
        num_items: size of the catalogue.

    >>> coverage(np.array([[0, 1], [1, -1]]), num_items=4)
    0.5
    """
    return len(np.unique(top[top >= 0])) / num_items


def novelty(top: Ints, item_counts: Ints) -> Floats:
    """Mean self-information of the recommended items in bits, float64 [users] (Zhou et al., 2010).

    That is -log2 of an item's share of all training interactions. An item never interacted with counts as if
    it had one interaction; an empty list has novelty 0.

    Args:
        top: int64 [users, k] item indices, -1 for nothing.
        item_counts: int64 [items], training interactions of each item.

    >>> novelty(np.array([[0, 1], [1, -1]]), np.array([2, 1, 1])).tolist()
    [1.5, 2.0]
    """
    bits = -np.log2(np.maximum(item_counts, 1) / max(item_counts.sum(), 1))
    listed = top >= 0
    return np.where(listed, bits[top], 0.0).sum(axis=1) / np.maximum(listed.sum(axis=1), 1)


@dataclass(frozen=True)
class Interval:
    """A mean over users and its confidence interval; `low` and `high` are NaN where there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Mean of a - b over the same users, its interval, and the two-sided p-value of "no difference"."""

    p_value: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] ({p_words(self.p_value)})"


def p_words(p_value: float) -> str:
    """As it is printed: 2,000 resamples tell little of what lies below 0.001."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def bootstrap_intervals(
    columns: Mapping[str, Floats], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
    """Percentile bootstrap over users (Efron, 1979) of several metrics at once, on the same resamples.

    Args:
        columns: metric name to float [users], all of one length.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many times as many users are drawn with replacement.
        level: share of the resampled means inside the interval.

    Raises:
        ValueError: there is no user, or the columns differ in length.
    """
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()])
    users = values.shape[1]
    if users == 0:
        raise ValueError("no users: a mean over nobody has no interval")
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(columns)))
    for row in means:
        counts = np.bincount(generator.integers(users, size=users), minlength=users).astype(np.float64)
        row[:] = np.einsum("mu,u->m", values, counts) / users  # `@` is summed in another order by more threads
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        name: Interval(float(column.mean()), float(low[i]), float(high[i]))
        for i, (name, column) in enumerate(zip(columns, values, strict=True))
    }


def bootstrap_interval(values: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Mean of per-user values [users] with its bootstrap interval; see `bootstrap_intervals`.

    >>> bootstrap_interval([0.5, 0.5, 0.5])
    Interval(mean=0.5, low=0.5, high=0.5)
    """
    column = np.asarray(values, dtype=np.float64)
    return bootstrap_intervals({"": column}, seed=seed, resamples=resamples, level=level)[""]


def paired_difference(
    a: Floats, b: Floats, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> PairedDifference:
    """How much better `a` is than `b` for the same users, both [users] in the same order.

    The interval is a bootstrap over users. The p-value is Fisher's randomisation test (Smucker et al., 2007):
    how often random signs give a mean difference at least this large; it is never below 1 / (resamples + 1).

    Raises:
        ValueError: `a` and `b` differ in length.
    """
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same users: {a.shape} against {b.shape}")
    difference = np.asarray(a, dtype=np.float64) - b
    interval = bootstrap_interval(difference, seed=seed, resamples=resamples, level=level)
    moved = difference[difference != 0]
    observed = abs(moved.sum()) * (1 - 1e-12)  # the same signs must not fall short of it by rounding
    generator = np.random.default_rng(seed)
    as_large = 0
    for _ in range(resamples):
        signs = generator.integers(2, size=len(moved), dtype=np.int8) * 2 - 1
        as_large += bool(abs(np.einsum("u,u->", moved, signs)) >= observed)
    return PairedDifference(interval.mean, interval.low, interval.high, (1 + as_large) / (1 + resamples))
