"""`Recommender`: what an application loads to ask for items."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from genrec_llm.batching import as_tensors
from genrec_llm.decoding import generate_top_n, mask_seen, one_step_scores, top_items
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.evaluation import EvalData
from genrec_llm.loading import ADAPTER, MERGED, TRAINED, Loaded, load_merged, load_trained, read_info


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: raw id, score (higher is better, comparable within one list), and its title if known."""

    item: str
    score: float
    title: str | None


class Recommender:
    """Recommends items from a history, with an adapter directory or a merged one.

    Example:
        >>> recommender = Recommender.from_pretrained("runs/movielens/finetune/merged")  # doctest: +SKIP
        >>> [found.title for found in recommender.recommend(["50", "181"], k=2)]  # doctest: +SKIP
        ['Empire Strikes Back, The (1980)', 'Raiders of the Lost Ark (1981)']
    """

    def __init__(self, loaded: Loaded, *, device: str | torch.device = "cpu", name: str = "GenRec") -> None:
        self.name, self.loaded = name, loaded
        self.vocab, self.layout = loaded.vocab, loaded.layout
        self.device = torch.device(device)
        loaded.model.to(self.device).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Recommender:
        """Load an adapter directory (on its base checkpoint) or a merged directory.

        Raises:
            ConfigError: no such directory, or files that do not fit together.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such directory: give an adapter/ or merged/ directory of a run")
        merged = read_info(folder, ADAPTER, TRAINED, MERGED)["kind"] == MERGED
        return cls(load_merged(folder, dtype=dtype) if merged else load_trained(folder, dtype=dtype), device=device)

    def recommend(self, history: Sequence[str], k: int = 10, *, exclude_seen: bool = True) -> list[Recommendation]:
        """The `k` best next items after a history of raw item ids, oldest first; fewer where fewer are eligible.

        Raises:
            ConfigError: `k` is less than 1.
            DataError: the history has items that the model does not know.
        """
        if k < 1:
            raise ConfigError(f"k: {k} items cannot be recommended: ask for at least 1")
        if isinstance(history, str):
            raise DataError(f"history: {history!r} is one id: give a list, [{history!r}]")
        indices = self.vocab.encode_items(history)
        scores = self.score_tensor([indices], np.zeros(1, dtype=np.int64))
        if exclude_seen:
            scores = mask_seen(scores, [indices])
        items, values = top_items(scores, k)
        titles = self.vocab.items.get("title")
        return [
            Recommendation(self.vocab.item_id(item), value, None if titles is None else titles.iloc[item])
            for item, value in zip(items[0].tolist(), values[0].tolist(), strict=True)
            if item >= 0
        ]

    def score_tensor(self, histories: Sequence[npt.NDArray[np.int64]], users: npt.NDArray[np.int64]) -> Tensor:
        """Scores of all items after each history (item indices), fp32 `[batch, items]`, by the one-step path."""
        batch = self._batch(histories, users)
        if self.loaded.info["kind"] == MERGED:
            return one_step_scores(self.loaded.model, batch, self.layout)
        with torch.no_grad():
            return self.loaded.model(**batch).logits

    def scores(
        self, histories: Sequence[npt.NDArray[np.int64]], users: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """As `score_tensor`, for the evaluator; user rows beyond those of the model count as unknown."""
        return self.score_tensor(histories, users).cpu().numpy()

    def generate_lists(
        self,
        data: EvalData,
        asked: npt.NDArray[np.int64],
        *,
        k: int,
        exclude_seen: bool,
        batch_size: int = 256,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Top items of users `asked` by `generate`, and the one-step scores of those items; `[asked, k]` each.

        Merged models only. -1 at -inf stands where fewer items are eligible.
        """
        lists, values = [], []
        for start in tqdm(range(0, len(asked), batch_size), desc="generate", unit="batch", disable=None):
            users = asked[start : start + batch_size]
            histories = [data.histories[user] for user in users]
            seen = [data.seen[user] for user in users] if exclude_seen else None
            batch = self._batch(histories, data.users[users])
            items, _ = generate_top_n(self.loaded.model, batch, self.layout, k, seen)
            scores = one_step_scores(self.loaded.model, batch, self.layout).gather(1, items.clamp(min=0))
            lists.append(items.cpu().numpy())
            values.append(scores.masked_fill(items < 0, -torch.inf).cpu().numpy())
        return np.concatenate(lists), np.concatenate(values)

    def _batch(self, histories: Sequence[npt.NDArray[np.int64]], users: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        known = np.where(users < self.layout.num_user_rows, users, 0)
        batch = as_tensors(self.layout.encode_histories(histories, known))
        return {name: values.to(self.device) for name, values in batch.items()}
