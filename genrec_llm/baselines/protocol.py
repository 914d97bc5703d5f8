"""What evaluation asks of a recommender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SequenceRecommender(Protocol):
    """Scores every item of the catalogue as the next one of a history."""

    @property
    def name(self) -> str:
        """What tables and plots call it."""

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores float32 [len(histories), items], higher is better, seen items included.

        An evaluation may call it from several threads at once.

        Args:
            histories: item indices of each user, oldest first.
            users: user rows (0 for an unknown user), int64 [len(histories)].
        """
