"""Two baselines that learn next to nothing: what is popular, and what the user had before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Popularity:
    """The items with most training interactions, the same for everyone.

    Attributes:
        counts: training interactions of each item, int64 [items].
    """

    counts: NDArray[np.int64]
    name: str = "popularity"

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.tile(self.counts.astype(np.float32), (len(histories), 1))


@dataclass(frozen=True)
class RecentRepeat:
    """What the user had before, most recent first; all other items share the score 0.

    The honest floor where users come back to the same items (Yelp, music); useless where
    seen items are removed.
    """

    num_items: int
    name: str = "recent repeat"

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        scores = np.zeros((len(histories), self.num_items), dtype=np.float32)
        for row, history in zip(scores, histories, strict=True):
            row[history] = 1 / np.arange(len(history), 0, -1)  # a repeated item keeps its last, highest score
        return scores
