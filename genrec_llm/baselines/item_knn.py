"""A sequential item-kNN: strong on sparse logs, fitted in seconds, no training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

WINDOW = 50  # pairs further apart than this weigh less than 0.15 each and cost the most
DISTANCE_POWER = -0.5
LAST_ITEMS = 20
DECAY = 0.8
_PARTS = ("data", "indices", "indptr")  # of scipy's compressed rows


@dataclass(frozen=True)
class ItemKNN:
    """Items that stand near the user's last items in other users' histories.

    The similarity of item a (in the history) to candidate b, counted over the training sequences alone, is

        sum over pairs of positions holding a and b, in either order, of distance^-0.5   (distances up to 50)
        + number of times b directly follows a
        ----------------------------------------------------------------------------------
        sqrt(interactions of a · interactions of b)

    and a candidate's score is the sum of its similarities to the last 20 items, the last one weighing 1, the
    one before 0.8, then 0.8², and so on. Candidates without any evidence share the score 0.

    Attributes:
        similarity: sparse float64 [items, items], rows are history items, columns candidates.
    """

    similarity: sparse.csr_array
    name: str = "item-kNN"

    @classmethod
    def fit(cls, train: Iterable[NDArray[np.int64]], num_items: int) -> Self:
        sequences = list(train)
        lengths = [len(sequence) for sequence in sequences]
        items = np.concatenate(sequences)
        users = np.repeat(np.arange(len(lengths)), lengths)

        def pairs(distance: int) -> sparse.csr_array:
            """How often b stands `distance` after a, [a, b]."""
            same_user = users[distance:] == users[:-distance]
            earlier, later = items[:-distance][same_user], items[distance:][same_user]
            return sparse.csr_array((np.ones(len(earlier)), (earlier, later)), shape=(num_items, num_items))

        near = sparse.csr_array((num_items, num_items), dtype=np.float64)
        for distance in range(1, min(WINDOW, max(lengths) - 1) + 1):
            near += pairs(distance) * float(distance) ** DISTANCE_POWER
        scale = sparse.diags_array(1 / np.sqrt(np.maximum(np.bincount(items, minlength=num_items), 1)))
        return cls((scale @ (near + near.T + pairs(1)) @ scale).tocsr())

    def save(self, folder: Path) -> None:
        """Write the similarities into an existing folder, for `open`."""
        for part in _PARTS:
            np.save(folder / f"{part}.npy", getattr(self.similarity, part))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read what `save` wrote where it lies: all processes of a machine that do so hold one copy in memory."""
        data, indices, indptr = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS)
        return cls(sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, len(indptr) - 1)))

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        last = [history[: -LAST_ITEMS - 1 : -1] for history in histories]  # newest first
        lengths = [len(items) for items in last]
        weights = np.concatenate([DECAY ** np.arange(length) for length in lengths])
        rows = np.repeat(np.arange(len(last)), lengths)
        shape = (len(last), self.similarity.shape[0])
        profile = sparse.csr_array((weights, (rows, np.concatenate(last))), shape=shape)
        return (profile @ self.similarity).toarray().astype(np.float32)
