"""`Recommender`: what an application loads to ask for items."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genrec_llm.backbone import Quantization
from genrec_llm.batching import as_tensors
from genrec_llm.decoding import (
    NOTHING,
    generate_top_n,
    item_rows,
    mask_seen_,
    mixed_scores,
    one_step_scores,
    top_items,
    users_at_once,
)
from genrec_llm.directory import ADAPTER, MERGED, TRAINED, read_info, vocabulary_with_users
from genrec_llm.errors import ConfigError, DataError, counted, listed
from genrec_llm.evaluation import HISTORY_ALONE, MOST_SCORES_AT_ONCE, WITHOUT_USERS, EvalData, user_batches
from genrec_llm.hub import local_directory
from genrec_llm.kernels import quicken
from genrec_llm.loading import Loaded, load_merged, load_trained, try_quantized
from genrec_llm.model import id_tokens_of
from genrec_llm.processes import ALONE, Processes
from genrec_llm.tasks import Batch
from genrec_llm.vocab import IdVocab

Unknown = Literal["warn", "refuse"]
IntArray = npt.NDArray[np.int64]

MOST_HISTORIES = 256
"""Of one batch."""


class UnknownUsersWarning(UserWarning):
    """Some users are not known to the model, and were served as strangers."""


class UnknownItemsWarning(UserWarning):
    """Items of a request are not in the model's catalogue and were left out."""


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        item: raw id.
        score: higher is better, comparable within one list. Of `recommend` the model's logit, or a log-probability where
            the last items have a share in the ranking; of `similar_items` a cosine.
        text: the item's text columns, such as title and categories; None where the item has none.
    """

    item: str
    score: float
    text: dict[str, str | None] = field(hash=False)

    @property
    def title(self) -> str | None:
        """The item's title, if the model was trained with titles."""
        return self.text.get("title")


@dataclass(frozen=True)
class Influence:
    """How much one item of a history speaks for another item.

    Attributes:
        item: raw id of the history's item.
        position: its place in the history as it was given.
        effect: by how much the log-probability of the explained item falls without it; negative where it rises.
        text: the history item's text columns.
    """

    item: str
    position: int
    effect: float
    text: dict[str, str | None] = field(hash=False)

    @property
    def title(self) -> str | None:
        """The item's title, if the model was trained with titles."""
        return self.text.get("title")


class Recommender:
    """Recommends items from a history, with an adapter or a merged model. Any number of threads may share one.

    Args:
        loaded: from `load_trained` or `load_merged`; it stays on the device where it is.
        name: in reports.
        folder: where it was loaded from, to find the users' rows.

    Example:
        >>> recommender = Recommender.from_pretrained("runs/shop/merged")
        >>> [found.title for found in recommender.recommend(["tea", "mug"], k=1)]
        ['A pot']
    """

    def __init__(self, loaded: Loaded, *, name: str = "GenRec", folder: Path | None = None) -> None:
        self.name, self.loaded, self.folder = name, loaded, folder
        self.vocab, self.layout = loaded.vocab, loaded.layout
        self.model: Any = loaded.model.eval()
        quicken(self.model)
        self.device = torch.device(self.model.device)
        self._merged = loaded.info["kind"] == MERGED
        # Rows that score items: made fp32 once, not in each call.
        self._rows = item_rows(self.model, self.layout) if self._merged else id_tokens_of(self.model).item_out.weight
        self._rows = self._rows.detach().float()
        self._norms = self._rows.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        columns = [str(name) for name in self.vocab.items if name not in ("index", "item")]
        self._text = {name: self.vocab.items[name].tolist() for name in columns}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        backbone: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        quantization: Quantization | None = None,
    ) -> Recommender:
        """Load an adapter (on its base checkpoint) or a merged model, after comparing every file with what was exported.

        Args:
            source: adapter/ or merged/ directory of a run, or `org/name` on the Hub.
            revision: branch, tag or commit on the Hub.
            backbone: of an adapter, where its base is now, when it is not where the adapter says.
            dtype: of the backbone: float32, or bfloat16 for half the memory. Items are scored in float32 with both.
            device: a GPU if there is one, else the CPU.
            quantization: "8bit" or "4bit" (nf4) linear layers by bitsandbytes. Rows of items and users, head and norms
                stay as they are, and of T5 the `wo` layers too, which `transformers` keeps in fp32.

        Raises:
            ConfigError: there is no such model, it is not as it was exported, its base is another one, or the device
                cannot do what is asked for.

        Example:
            >>> Recommender.from_pretrained("runs/shop/adapter", device="cpu").vocab.num_items
            6
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype: {dtype} is not offered (fp16 overflows in T5): choose float32 or bfloat16")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device: {device} cannot be used here ({error}): choose another, such as cpu") from error
        if isinstance(source, Path) and not source.is_dir():
            mend = f"genrec merge --run {source.parent}" if source.name == MERGED and source.parent.is_dir() else ""
            raise ConfigError(
                f"{source}: no such directory: give an adapter/ or merged/ directory of a run"
                + (f", or make this one: {mend}" if mend else "")
            )
        folder = local_directory(source, revision=revision)
        if read_info(folder, ADAPTER, TRAINED, MERGED)["kind"] != MERGED:
            loaded = load_trained(folder, backbone=backbone, dtype=dtype, device=device, quantization=quantization)
        elif backbone is None:
            loaded = load_merged(folder, dtype=dtype, device=device, quantization=quantization)
        else:
            raise ConfigError(f"backbone: {folder} holds a whole merged model: leave backbone out")
        if quantization:
            try_quantized(loaded, quantization)
        return cls(loaded, folder=folder)

    @overload
    def recommend(  # type: ignore[overload-overlap]  # a str is a sequence of str, too; the first one is meant
        self,
        history: Sequence[str],
        *,
        user: str | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        unknown: Unknown = "warn",
    ) -> list[Recommendation]: ...

    @overload
    def recommend(
        self,
        history: Sequence[Sequence[str]],
        *,
        user: Sequence[str | None] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        unknown: Unknown = "warn",
    ) -> list[list[Recommendation]]: ...

    def recommend(
        self,
        history: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        user: str | Sequence[str | None] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        unknown: Unknown = "warn",
    ) -> list[Recommendation] | list[list[Recommendation]]:
        """The `k` best next items after a history, best first; for a list of histories, a list for each.

        Histories are asked about in batches, sorted by length. In float32 a list does not depend on what else is asked, but
        for the last digits of its scores.

        Args:
            history: raw item ids, oldest first; the most recent `layout.max_history` are read. An empty one is allowed:
                it gives what the model says of somebody about whom nothing is known.
            user: raw user id (or one a history, None where there is none), whose row is read beside the history. It
                does not stand in for the history, which no exported model holds. A user whom the model does not know
                is served from the history alone, with an `UnknownUsersWarning`.
            k: length of a list; lists are shorter where fewer items are eligible.
            exclude_seen: leave out items of the history, those beyond the most recent ones too.
            candidates: raw item ids to choose from, for all histories; without them the whole catalogue.
            exclude: raw item ids that are never returned; unknown ones do no harm.
            unknown: what becomes of histories and candidates with items that the model does not know: "warn" leaves
                these items out with one `UnknownItemsWarning`, "refuse" raises.

        Raises:
            ConfigError: `k` is less than 1, or this model knows no users.
            DataError: unknown items with `unknown="refuse"`; no history; something else than ids.

        Example:
            >>> best = recommender.recommend(["tea", "mug"], k=3)[0]
            >>> best.item, best.title
            ('pot', 'A pot')
            >>> for items in recommender.recommend([["tea", "mug"], ["mug", "pot"]], k=1):
            ...     print([found.item for found in items])
            ['pot']
            ['milk']
            >>> [found.item for found in recommender.recommend(["tea", "mug"], candidates=["jam", "tea"])]
            ['jam']
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k: {k!r} items cannot be recommended: ask for a whole number of at least 1")
        given, many = _histories(history)
        users = self._user_rows(user, len(given), many)
        chosen = None if candidates is None else _ids("candidates", candidates)
        self._tell_unknown({"history": [item for one in given for item in one], "candidates": chosen or []}, unknown)
        allowed = None if chosen is None else self._known(chosen)
        never = self._known([] if exclude is None else _ids("exclude", exclude))
        histories = [self._known(one) for one in given]

        lists: list[list[Recommendation]] = [[] for _ in histories]
        for places in self._batches(histories):
            batch = [histories[place] for place in places]
            scores = self.score_tensor(batch, users[places])
            if allowed is not None:
                scores = _only(scores, allowed)
            mask_seen_(scores, [np.concatenate([never, one]) if exclude_seen else never for one in batch])
            items, values = top_items(scores, min(k, self.vocab.num_items))
            for place, row, row_values in zip(places, items.tolist(), values.tolist(), strict=True):
                lists[place] = self._found(row, row_values)
        return lists if many else lists[0]

    def similar_items(self, item: str, k: int = 10) -> list[Recommendation]:
        """The `k` items that the model offers in the same places as `item`, most similar first, without itself.

        Similar is the cosine of two items' output rows, the rows that the decoder's last state is compared with: where
        they point the same way, both items score alike after any history. (Input rows say instead what an item means
        as a part of a history.)

        Raises:
            ConfigError: `k` is less than 1.
            DataError: the model does not know the item.

        Example:
            >>> found = recommender.similar_items("pot", k=2)
            >>> len(found), found[0].score >= found[1].score, "pot" in [one.item for one in found]
            (2, True, False)
        """
        if k < 1:
            raise ConfigError(f"k: {k} items cannot be recommended: ask for at least 1")
        (index,) = self.vocab.encode_items(_ids("item", [item]))
        with torch.inference_mode():
            cosines = (self._rows @ (self._rows[index] / self._norms[index]) / self._norms)[None]
            items, values = top_items(mask_seen_(cosines, [np.array([index])]), min(k, self.vocab.num_items))
        return self._found(items[0].tolist(), values[0].tolist())

    def explain(
        self, history: Sequence[str], item: str, *, user: str | None = None, unknown: Unknown = "warn"
    ) -> list[Influence]:
        """What each item of a history does for `item`: how much its log-probability falls when that one is left out.

        The log-probability is over the whole catalogue, items of the history included. Only the most recent
        `layout.max_history` items are read, so that only these can have an effect; no earlier one moves up for the one
        that is left out. (Where last items have a share in the ranking, the one before them does: it becomes one of
        them.) Effects do not add up: items can stand in for each other.

        Args:
            history, user, unknown: as in `recommend`, for one history.
            item: raw id of the item to be explained.

        Returns:
            One `Influence` for each item read, the strongest support first. An item that stands in the history twice
            has two.

        Raises:
            ConfigError: this model knows no users.
            DataError: the model does not know `item`; the history is not a list of ids, or not known and refused.

        Example:
            >>> why = recommender.explain(["milk", "tea", "mug"], "pot")
            >>> why[0].item, why[0].position, why[0].effect > 0
            ('mug', 2, True)
        """
        given, (index,) = _ids("history", history), self.vocab.encode_items(_ids("item", [item]))
        row = self._user_rows(user, 1, many=False)
        self._tell_unknown({"history": given}, unknown)
        indices = self.vocab.find_items(given)
        places = np.flatnonzero(indices >= 0)[-self.layout.max_history :]
        read = indices[places]
        variants = [read, *(np.delete(read, place) for place in range(len(read)))]
        likely = np.empty(len(variants))
        for batch in self._batches(variants):
            scores = self.score_tensor([variants[place] for place in batch], row.repeat(len(batch)))
            likely[batch] = scores.log_softmax(dim=1)[:, index].cpu().numpy()
        effects = likely[0] - likely[1:]
        return [
            Influence(given[places[one]], int(places[one]), float(effects[one]), self._text_of(int(read[one])))
            for one in np.argsort(-effects, kind="stable")
        ]

    @torch.inference_mode()
    def score_tensor(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """Scores of all items after each history (item indices), fp32 `[batch, items]`, by the one-step path.

        They are logits or, where the last items have a share in the ranking, log-probabilities; see `mixed_scores`.
        """
        return mixed_scores(self.logits, self.layout, histories, users)

    @torch.inference_mode()
    def logits(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """What the model says of all items after each whole history, fp32 `[batch, items]`."""
        batch = self._on_device(self.layout.encode_histories(histories, self._served(users)))
        if self._merged:
            return one_step_scores(self.model, batch, self.layout, self._rows)
        return self.model(**batch).logits

    def scores(self, histories: Sequence[IntArray], users: IntArray) -> npt.NDArray[np.float32]:
        """As `score_tensor`, for the evaluator; user rows beyond those of the model count as unknown."""
        return self.score_tensor(histories, users).cpu().numpy()

    def generate_lists(
        self,
        data: EvalData,
        asked: IntArray,
        *,
        k: int,
        exclude_seen: bool,
        batch_size: int = 256,
        processes: Processes = ALONE,
    ) -> tuple[IntArray, npt.NDArray[np.float32]]:
        """Top items of users `asked` by `generate`, and the one-step scores of those items; `[asked, k]` each.

        Merged models only. -1 at -inf stands where fewer items are eligible. `processes` share the batches; each gets all
        lists, and they are those of one process.
        """

        def ask(places: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
            users = asked[places]
            histories = [data.histories[user] for user in users]
            seen = [data.seen[user] for user in users] if exclude_seen else None
            encoded, weights = self.layout.encode_contexts(histories, self._served(data.users[users]))
            batch = self._on_device(encoded)
            items, _ = generate_top_n(self.model, batch, self.layout, k, seen, weights=torch.from_numpy(weights))
            scores = self.score_tensor(histories, data.users[users]).gather(1, items.clamp(min=0))
            return items.cpu().numpy(), scores.masked_fill(items < 0, -torch.inf).cpu().numpy()

        beams = k * (1 + len(self.layout.last_items_weights))
        scores_of_user = beams * self.model.config.vocab_size  # `generate` keeps several copies
        batch_size = max(1, min(batch_size, MOST_SCORES_AT_ONCE // (6 * scores_of_user)))
        batches = user_batches(data, asked, batch_size)
        at_once = max(1, MOST_SCORES_AT_ONCE // (batch_size * scores_of_user))
        found = processes.map(ask, batches, name="generate", at_once=at_once)
        order = np.argsort(np.concatenate(batches))
        lists, values = (np.concatenate(parts)[order] for parts in zip(*found, strict=True))
        return lists, values

    # --- requests -----------------------------------------------------------------------------------------------------

    def _served(self, users: IntArray) -> IntArray:
        """The rows that these users have in this model."""
        return np.where(users < self.layout.num_user_rows, users, 0)

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {name: values.to(self.device) for name, values in as_tensors(batch).items()}

    def _batches(self, histories: Sequence[IntArray]) -> Iterator[IntArray]:
        """Places of histories that are scored together: of like length, no more than memory is meant for."""
        order = np.argsort([min(len(one), self.layout.max_history) for one in histories], kind="stable")
        size = users_at_once(self.vocab.num_items, MOST_HISTORIES)
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _known(self, raw: Sequence[str]) -> IntArray:
        """Item indices of those raw ids that the model knows."""
        indices = self.vocab.find_items(raw)
        return indices[indices >= 0]

    def _tell_unknown(self, asked: dict[str, list[str]], unknown: Unknown) -> None:
        """Warn of items that the model does not know, or refuse them; `asked` is raw ids by argument."""
        if unknown not in get_args(Unknown):
            raise ConfigError(f"unknown: {unknown!r} is none of {', '.join(get_args(Unknown))}")
        problems = []
        for argument, raw in asked.items():
            missing = np.flatnonzero(self.vocab.find_items(raw) < 0)
            names = list(dict.fromkeys(raw[place] for place in missing))
            if names:
                problems.append(
                    f"{argument}: {counted(len(names), 'item id')} not among the {self.vocab.num_items:,} of the model: "
                    f"{listed(map(repr, names))}"
                )
        if problems and unknown == "refuse":
            raise DataError([f"{problem}; leave them out, or train a model that has them" for problem in problems])
        if problems:
            warnings.warn("left out of " + "; ".join(problems), UnknownItemsWarning, stacklevel=3)

    @cached_property
    def _users(self) -> IdVocab | None:
        return None if self.folder is None else vocabulary_with_users(self.folder, self.loaded.info, self.vocab)

    def _user_rows(self, user: str | Sequence[str | None] | None, count: int, many: bool) -> IntArray:
        """Rows of raw users, `[count]`; 0 for None and for users who are new to the model."""
        several = isinstance(user, Iterable) and not isinstance(user, str)
        raw: list[Any] = list(user) if several else [user]  # type: ignore[arg-type]  # `several` says that it can
        if user is not None and (several != many or len(raw) != count):
            raise DataError(
                f"user: {user!r} does not go with {counted(count, 'history') if not many else f'{count} histories'}: "
                "give one id for one history, and a list of as many ids (None where there is none) for a list"
            )
        if not _ids("user", [one for one in raw if one is not None]):
            return np.zeros(count, dtype=np.int64)
        if self.layout.num_user_rows == 1:
            raise ConfigError(
                "user: this model has no rows of users (they were left out, or never trained): leave user out, it "
                "serves everybody from the history alone"
            )
        if self._users is None:
            raise ConfigError(
                "user: whose row is which stands in users.parquet, which is not beside this model: load it where it lies "
                "in its run directory, or leave user out"
            )
        if strangers := self.strangers(raw):
            warnings.warn(
                f"user: {counted(len(strangers), 'id')} not among the users of the model, served from the history alone: "
                f"{listed(map(repr, strangers))}",
                UnknownUsersWarning,
                stacklevel=3,
            )
        return np.array([self._users.user_row(one) for one in raw], dtype=np.int64)

    def strangers(self, users: Iterable[str | None]) -> list[str]:
        """The raw ids among `users`, each once, whom the model has no row for."""
        if (known := self._users) is None:
            return []
        return [one for one in dict.fromkeys(users) if one is not None and not known.user_row(one)]

    def _found(self, items: list[int], values: list[float]) -> list[Recommendation]:
        return [
            Recommendation(self.vocab.item_id(item), value, self._text_of(item))
            for item, value in zip(items, values, strict=True)
            if item != NOTHING
        ]

    def _text_of(self, item: int) -> dict[str, str | None]:
        return {name: values[item] for name, values in self._text.items()}


@dataclass(frozen=True)
class _AskedOtherwise:
    """A recommender that stands beside itself in a report."""

    recommender: Recommender
    ending: ClassVar[str]

    @property
    def name(self) -> str:
        """In reports."""
        return f"{self.recommender.name}{self.ending}"


class WithoutUsers(_AskedOtherwise):
    """It knows no user: everybody is `<user_unknown>`, as in a copy that was pushed without users."""

    ending = WITHOUT_USERS

    def scores(self, histories: Sequence[IntArray], users: IntArray) -> npt.NDArray[np.float32]:
        """As `Recommender.scores`, for row 0 alone."""
        return self.recommender.scores(histories, np.zeros_like(users))


class HistoryAlone(_AskedOtherwise):
    """It ranks by the whole history, whatever share the last items have."""

    ending = HISTORY_ALONE

    def scores(self, histories: Sequence[IntArray], users: IntArray) -> npt.NDArray[np.float32]:
        """As `Recommender.scores`."""
        return self.recommender.logits(histories, users).cpu().numpy()


def _ids(argument: str, values: Iterable[str]) -> list[str]:
    """Raw ids as a list; anything else is refused, since it would be told to be unknown."""
    if isinstance(values, str):
        raise DataError(f"{argument}: {values!r} is one id: give a list, [{values!r}]")
    ids = list(values)
    others = [one for one in ids if not isinstance(one, str)]
    if others:
        number = next((f", such as '{one}'" for one in others if isinstance(one, int | float | np.number)), "")
        raise DataError(f"{argument}: {listed(map(repr, others))}: an item id or user id is text{number}")
    return ids


def _histories(history: Sequence[str] | Sequence[Sequence[str]] | None) -> tuple[list[list[str]], bool]:
    """Histories of raw ids, and whether several were asked for."""
    if history is None:
        raise DataError(
            "history: none was given, and a model holds none of its users': give history=[...], oldest first, "
            "or history=[] for somebody new"
        )
    values: list[Any] = history if isinstance(history, str) else list(history)  # type: ignore[assignment]
    many = bool(values) and all(isinstance(one, Iterable) and not isinstance(one, str) for one in values)
    return ([_ids("history", one) for one in values], True) if many else ([_ids("history", values)], False)


def _only(scores: Tensor, items: IntArray) -> Tensor:
    """Scores `[batch, items]` with -inf at all but the given items."""
    outside = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    outside[torch.from_numpy(items).to(scores.device)] = False
    return scores.masked_fill(outside, -torch.inf)
