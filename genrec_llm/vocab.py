"""`IdVocab`: raw ids, row numbers and tokens of items and users."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from genrec_llm.errors import ConfigError, DataError
from genrec_llm.files import atomic_file
from genrec_llm.tables import none_for_missing

ITEMS_FILE = "items.parquet"
USERS_FILE = "users.parquet"
UNKNOWN_USER_TOKEN = "<user_unknown>"
_METADATA_KEY = b"genrec"

UserMode = Literal["each", "hashed", "none"]


@dataclass(frozen=True, eq=False)
class IdVocab:
    """Which row stands for which item and user.

    Rows are numbered by a seeded permutation of the sorted raw ids, so that a number says nothing about when
    an item first appeared: on the usual benchmark files the raw ids themselves give away the next item.

    Example:
        >>> vocab = IdVocab.build(pd.DataFrame({"item": ["tea", "mug", "pot"]}), ["ann", "bob"], seed=0)
        >>> vocab.encode_items(["mug", "tea"])
        array([1, 0])
        >>> vocab.item_id(1), vocab.user_row("bob"), vocab.user_row("eve")
        ('mug', 2, 0)
    """

    items: pd.DataFrame
    """`index` (0..N-1, in row order), `item` (raw id) and the catalogue's text columns (str or None)."""
    users: tuple[str, ...]
    """Raw user ids by position; the user at position p has row p + 1. Empty unless `user_mode` is "each"."""
    user_mode: UserMode
    """"each": a row a user; "hashed": `user_buckets` rows that users share; "none": only the unknown user."""
    user_buckets: int
    """Rows that users share with "hashed", else 0."""
    seed: int
    """Of the permutation."""

    def __post_init__(self) -> None:
        if self.user_mode not in ("each", "hashed", "none"):
            raise ConfigError(f"user mode {self.user_mode!r}: choose each, hashed or none")
        if (self.user_mode == "hashed") != (self.user_buckets > 0):
            raise ConfigError(
                f"user mode {self.user_mode!r} with {self.user_buckets} buckets: hashed needs 1 or more, the others 0"
            )
        problems = []
        if not np.array_equal(self.items["index"], np.arange(len(self.items))):
            problems.append("vocabulary: the item indices are not 0, 1, 2, ... in row order")
        repeated = self.items["item"][self.items["item"].duplicated()]
        if len(repeated):
            problems.append(f"vocabulary: repeated items, such as {repeated.iloc[0]!r}")
        if len(set(self.users)) != len(self.users):
            problems.append("vocabulary: repeated users")
        if self.users and self.user_mode != "each":
            problems.append(f"vocabulary: a list of users with user mode {self.user_mode!r}")
        if problems:
            raise DataError(problems)

    @classmethod
    def build(
        cls,
        catalogue: pd.DataFrame,
        users: Iterable[str],
        *,
        seed: int,
        user_mode: UserMode = "each",
        user_buckets: int = 0,
    ) -> IdVocab:
        """Number the items of a catalogue (`item` and text columns) and the users; their order is irrelevant.

        Raises:
            ConfigError: `user_buckets` does not go with `user_mode`.
            DataError: an item stands in the catalogue twice.
        """
        raw_users = _permuted(set(users), [seed, 1]) if user_mode == "each" else []
        return cls(_numbered(catalogue, 0, seed), tuple(raw_users), user_mode, user_buckets, seed)

    @property
    def num_items(self) -> int:
        """Rows of the item table."""
        return len(self.items)

    @property
    def num_user_rows(self) -> int:
        """Rows of the user table; row 0 is the unknown user."""
        return 1 + (self.user_buckets if self.user_mode == "hashed" else len(self.users))

    @property
    def item_tokens(self) -> list[str]:
        """`<item_0>`, `<item_1>`, ... by index."""
        return [f"<item_{index}>" for index in range(self.num_items)]

    @property
    def user_tokens(self) -> list[str]:
        """`<user_unknown>`, `<user_0>`, ... by user row: row r > 0 is `<user_{r - 1}>`."""
        return [UNKNOWN_USER_TOKEN, *(f"<user_{position}>" for position in range(self.num_user_rows - 1))]

    def encode_items(self, raw: Sequence[str]) -> np.ndarray:
        """Indices (int64 [len(raw)]) of raw item ids.

        Raises:
            DataError: some are not in the vocabulary.
        """
        indices = self.find_items(raw)
        if (indices < 0).any():
            unknown = list(dict.fromkeys(raw[int(place)] for place in np.flatnonzero(indices < 0)))
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            raise DataError(
                f"{len(unknown):,} item id(s) not among the {self.num_items:,} of the vocabulary: {shown}; "
                "leave them out, or add them to the catalogue"
            )
        return indices

    def find_items(self, raw: Sequence[str]) -> np.ndarray:
        """Indices (int64 [len(raw)]) of raw item ids, -1 for those that are not in the vocabulary."""
        return np.fromiter((self._item_index.get(item, -1) for item in raw), dtype=np.int64, count=len(raw))

    def item_id(self, index: int) -> str:
        """Raw id of an item index.

        Raises:
            DataError: there is no such index.
        """
        if not 0 <= index < self.num_items:
            raise DataError(f"no item has index {index}; they run from 0 to {self.num_items - 1}")
        return self._raw_items[index]

    def user_row(self, raw: str | None) -> int:
        """Row of a user; 0 where it is None or was never seen. "hashed": 1 + sha256(raw) mod buckets."""
        if raw is None or self.user_mode == "none":
            return 0
        if self.user_mode == "hashed":
            return 1 + int.from_bytes(hashlib.sha256(raw.encode()).digest()) % self.user_buckets
        return self._user_row.get(raw, 0)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over item ids in index order, user mode and buckets, and users in row order."""
        content = (self._raw_items, self.user_mode, self.user_buckets, self.users)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def without_users(self) -> IdVocab:
        """The same items with the unknown user alone: what leaves the house."""
        return replace(self, users=(), user_mode="none", user_buckets=0)

    def with_new_items(self, catalogue: pd.DataFrame) -> IdVocab:
        """Add the items of `catalogue` that are not known yet, at the end; no known item moves or changes."""
        new = catalogue[~catalogue["item"].isin(self.items["item"])]
        if new.empty:
            return self
        items = pd.concat([self.items, _numbered(new, self.num_items, self.seed)], ignore_index=True)
        return replace(self, items=none_for_missing(items))

    def save_items(self, path: str | os.PathLike[str]) -> None:
        """Write the items as parquet; seed, user mode and buckets go into its metadata.

        Raises:
            ExportError: the file cannot be written.
        """
        settings = {"user_mode": self.user_mode, "user_buckets": self.user_buckets, "seed": self.seed}
        _write_parquet(path, self.items, {_METADATA_KEY: json.dumps(settings).encode()})

    def save_users(self, path: str | os.PathLike[str]) -> None:
        """Write `row` and raw `user` as parquet: a file that stays in the run directory.

        Raises:
            ExportError: the file cannot be written.
        """
        rows = np.arange(1, len(self.users) + 1)
        _write_parquet(path, pd.DataFrame({"row": rows, "user": np.array(self.users, dtype=object)}), {})

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> IdVocab:
        """Read `items.parquet` and, where each user has a row, `users.parquet` from a directory.

        Raises:
            DataError: a file is absent or is not what `save_items` and `save_users` write.
        """
        path = Path(directory) / ITEMS_FILE
        items, metadata = _read_parquet(path, {"index", "item"})
        try:
            settings = json.loads(metadata[_METADATA_KEY])
            mode, buckets, seed = settings["user_mode"], settings["user_buckets"], settings["seed"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not written by genrec: seed and user mode are not in its metadata") from error
        users: tuple[str, ...] = ()
        if mode == "each":
            users = read_users(Path(directory) / USERS_FILE)
        return cls(none_for_missing(items), users, mode, buckets, seed)

    @cached_property
    def _raw_items(self) -> list[str]:
        return self.items["item"].tolist()

    @cached_property
    def _item_index(self) -> dict[str, int]:
        return {item: index for index, item in enumerate(self._raw_items)}

    @cached_property
    def _user_row(self) -> dict[str, int]:
        return {user: row for row, user in enumerate(self.users, start=1)}


def read_users(path: Path) -> tuple[str, ...]:
    """Raw user ids in the order of their rows, from what `save_users` wrote.

    Raises:
        DataError: the file is absent or is something else.
    """
    table, _ = _read_parquet(path, {"row", "user"})
    return tuple(table.sort_values("row")["user"].tolist())


def _permuted(raw: Iterable[str], seed: int | list[int]) -> list[str]:
    ids = sorted(raw)
    return [ids[place] for place in np.random.Generator(np.random.PCG64(seed)).permutation(len(ids))]


def _numbered(catalogue: pd.DataFrame, first: int, seed: int) -> pd.DataFrame:
    """The catalogue's rows in permuted order, numbered from `first`."""
    order = pd.Series(_permuted(catalogue["item"].tolist(), seed), dtype=catalogue["item"].dtype)
    repeated = order[order.duplicated()]
    if len(repeated):
        raise DataError(f"catalogue: {len(repeated):,} repeated item(s), such as {repeated.iloc[0]!r}")
    items = catalogue.drop(columns="index", errors="ignore").set_index("item").loc[order].reset_index()
    items.insert(0, "index", np.arange(first, first + len(items)))
    return none_for_missing(items)


def _write_parquet(path: str | os.PathLike[str], table: pd.DataFrame, metadata: dict[bytes, bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        str(name): pa.array(table[name].to_numpy(), type=pa.int64() if name in ("index", "row") else pa.string())
        for name in table
    }
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), temporary)


def _read_parquet(path: Path, columns: set[str]) -> tuple[pd.DataFrame, dict[bytes, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        mend = "; it stays in the run directory, and without_users() makes a vocabulary that does without it"
        mend = mend if path.name == USERS_FILE else ""
        raise DataError(f"{path}: no such file{mend}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error}); it may have been cut short") from error
    missing = columns.difference(table.column_names)
    if missing:
        raise DataError(f"{path}: no column {', '.join(sorted(missing))}; it is not a vocabulary file")
    return table.to_pandas(), table.schema.metadata or {}
