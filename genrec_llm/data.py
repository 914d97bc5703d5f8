"""Interaction logs: validate, k-core, split. Every later step starts from an `Interactions`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from genrec_llm.errors import DataError, counted, listed
from genrec_llm.tables import TIME_COLUMN, none_for_missing, read_catalogue, read_log

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
_VARIANT = re.compile(r"(?:-ties-shuffled-(?P<seed>\d+))?(?:-without-last-(?P<last>\d+))?$")
"""What `Interactions.shuffled_ties` and `Interactions.without_last` write behind the name of a data set."""


@dataclass(frozen=True, eq=False)
class Interactions:
    """A validated interaction log and the catalogue it draws from.

    Example:
        >>> log = pd.DataFrame(
        ...     {"user": ["ann", "bob", "ann"], "item": ["tea", "mug", "pot"], "timestamp": [9.0, 5.0, 1.0]}
        ... )
        >>> Interactions.from_log("shop", log).sequences()
        {'ann': ['pot', 'tea'], 'bob': ['mug']}
    """

    name: str
    """What reports call the data set."""
    frame: pd.DataFrame
    """One interaction a row: `user` (str), `item` (str) and, if the log has times, `timestamp` (float64
    seconds). A user's rows stand together, oldest first; users in order of first appearance in the file."""
    catalogue: pd.DataFrame
    """One item a row, cold ones included: `item` (str, unique) and, if known, `title`, `categories` (text
    or None)."""

    def __post_init__(self) -> None:
        absent = {"user", "item"}.difference(self.frame) or {"item"}.difference(self.catalogue)
        if absent:
            raise DataError(f"{self.name}: no column {', '.join(sorted(absent))}")
        problems = []
        items = self.catalogue["item"]
        repeated = items[items.duplicated()]
        if len(repeated):
            problems.append(
                f"{counted(len(repeated), 'repeated item')} in the catalogue: {listed(map(repr, repeated))}"
            )
        unknown = pd.Index(self.frame["item"].unique()).difference(items)
        if len(unknown):
            problems.append(f"{counted(len(unknown), 'item')} not in the catalogue: {listed(map(repr, unknown))}")
        if self.frame[["user", "item"]].isna().any(axis=None):
            problems.append("rows without a user or an item")
        if (np.diff(self._user_codes) < 0).any():
            problems.append("the rows of a user do not stand together; use Interactions.from_log")
        if problems:
            raise DataError([f"{self.name}: {problem}" for problem in problems])

    @classmethod
    def from_log(cls, name: str, log: pd.DataFrame, catalogue: pd.DataFrame | None = None) -> Interactions:
        """Order a log by user and time. Rows with the same time keep the order they have in `log`.

        Args:
            log: columns `user`, `item` and, unless the order of rows is the order in time, `timestamp`.
            catalogue: columns `item` and text; items of the log that it lacks are added without text.
        """
        users = pd.factorize(log["user"])[0]
        times = log["timestamp"] if "timestamp" in log else np.zeros(len(log))
        frame = log.iloc[np.lexsort((times, users))].reset_index(drop=True)
        items = pd.DataFrame({"item": log["item"].unique()})
        if catalogue is None:
            return cls(name, frame, items)
        extra = items[~items["item"].isin(catalogue["item"])]
        if len(extra):
            logger.warning(
                "%s: %s not in the item file: %s",
                name,
                counted(len(extra), "item"),
                listed(map(repr, extra["item"])),
            )
            catalogue = pd.concat([catalogue, extra], ignore_index=True)
        return cls(name, frame, none_for_missing(catalogue))

    @cached_property
    def _user_codes(self) -> np.ndarray:
        return pd.factorize(self.frame["user"])[0]

    @property
    def users(self) -> list[str]:
        """Raw user ids in the order of `frame`."""
        return self.frame["user"].unique().tolist()

    @property
    def offsets(self) -> np.ndarray:
        """int64 [users + 1]: the rows of user number u in `frame` are `offsets[u]:offsets[u + 1]`."""
        return np.concatenate([[0], np.cumsum(np.bincount(self._user_codes))])

    @property
    def from_end(self) -> np.ndarray:
        """int64 [interactions]: 1 at a user's last interaction, 2 at the one before it, and so on."""
        offsets = self.offsets
        return np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(self.frame))

    def sequences(self) -> dict[str, list[str]]:
        """Each user's items, oldest first."""
        items, offsets = self.frame["item"].tolist(), self.offsets.tolist()
        return {user: items[offsets[row] : offsets[row + 1]] for row, user in enumerate(self.users)}

    def k_core(self, k: int) -> Interactions:
        """Drop users and items with fewer than `k` interactions until none is left; the catalogue follows.

        Raises:
            DataError: `k` is below 1, or nothing remains.
        """
        if k < 1:
            raise DataError(f"--k-core {k}: the smallest number of interactions to keep is 1 or more")
        users, items = self._user_codes, pd.factorize(self.frame["item"])[0]
        keep = np.ones(len(users), dtype=bool)
        kept_before = -1
        while kept_before != (kept := int(keep.sum())):
            kept_before = kept
            for codes in (users, items):
                keep &= np.bincount(codes[keep], minlength=len(users))[codes] >= k
        if not kept:
            raise DataError(f"{self.name}: --k-core {k} leaves none of {len(users):,} interactions; lower it")
        frame = self.frame[keep].reset_index(drop=True)
        if unseen := int((~self.catalogue["item"].isin(self.frame["item"])).sum()):
            logger.warning("--k-core %d: %s without interactions left out of the catalogue", k, counted(unseen, "item"))
        catalogue = self.catalogue[self.catalogue["item"].isin(frame["item"])].reset_index(drop=True)
        return Interactions(self.name, frame, catalogue)

    def shuffled_ties(self, seed: int) -> Interactions:
        """The same log, under another name, with each user's interactions of one time in a random order.

        The order of a file within equal times may be that of its ids, which a model could learn.

        Raises:
            DataError: there are no times, or the seed is below 0.
        """
        if seed < 0:
            raise DataError(f"--shuffle-ties {seed}: a seed is 0 or more")
        if "timestamp" not in self.frame:
            raise DataError(f"{self.name}: --shuffle-ties {seed}: it has no times, so nothing ties; leave it out")
        random = np.random.default_rng(seed).random(len(self.frame))
        order = np.lexsort((random, self.frame["timestamp"], self._user_codes))
        name = f"{self.name}-ties-shuffled-{seed}"
        return Interactions(name, self.frame.iloc[order].reset_index(drop=True), self.catalogue)

    def without_last(self, count: int) -> Interactions:
        """The log as it was before each user's last interactions, under another name; the catalogue stays.

        With one left out, what the split calls the test target is the validation target of the whole log, so a recipe can be
        chosen by how well it does on items later than those that its training stopped at, with the test split closed.

        Raises:
            DataError: `count` is below 1.
        """
        if count < 1:
            raise DataError(f"--without-last {count}: the number of interactions to leave out is 1 or more")
        frame = self.frame[self.from_end > count].reset_index(drop=True)
        return Interactions(f"{self.name}-without-last-{count}", frame, self.catalogue)

    def fingerprint(self) -> str:
        """sha256 (hex) over users, items and their order, and the catalogue's ids; not over text or times."""
        log = [self.frame["user"].tolist(), self.frame["item"].tolist()]
        return hashlib.sha256(json.dumps([*log, sorted(self.catalogue["item"])]).encode()).hexdigest()


def named_variant(name: str) -> tuple[str, str]:
    """Name of a data set without what a variant added to it, and in words what that says.

    Example:
        >>> named_variant("yelp-ties-shuffled-7-without-last-1")
        ('yelp', ', ties shuffled (seed 7), without the last of each history')
    """
    found = _VARIANT.search(name)
    assert found is not None  # the pattern fits nothing too
    words = f", ties shuffled (seed {found['seed']})" if found["seed"] else ""
    if found["last"]:
        words += f", without the last {'' if found['last'] == '1' else found['last'] + ' '}of each history"
    return name[: found.start()], words


def read_interactions(
    path: str | os.PathLike[str],
    *,
    user_column: str = "user",
    item_column: str = "item",
    time_column: str | None = TIME_COLUMN,
    items_path: str | os.PathLike[str] | None = None,
    drop_duplicates: bool = False,
    name: str | None = None,
) -> Interactions:
    """Read an interaction log and, if given, the item file that goes with it.

    Args:
        path: csv, tsv, jsonl or parquet with a header, or `.txt` with a user's whole sequence a line
            (`user item item ...`, oldest first); each may end in `.gz`. Ids are any text or whole numbers.
        time_column: seconds (numbers) or dates (ISO 8601, or one other format throughout; UTC where they name
            no zone). With None, or the default where the file has no such column, rows are in order of time.
        items_path: csv, tsv, jsonl or parquet with the item column and, if known, `title` and `categories`
            (or `attributes`), text or a list of names; other columns are ignored.
        drop_duplicates: keep the first of rows with equal user, item and time instead of refusing the file.
        name: what to call the data; default: the file's stem.

    Raises:
        DataError: every problem of both files, with its place and mend.
    """
    path = Path(path)
    problems: list[str] = []
    catalogue = None
    try:
        log = read_log(path, user_column, item_column, time_column, drop_duplicates=drop_duplicates)
    except DataError as error:
        problems += error.problems
    try:
        if items_path is not None:
            catalogue = read_catalogue(items_path, item_column=item_column)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)
    return Interactions.from_log(name or Path(path.name.removesuffix(".gz")).stem, log, catalogue)


def leave_last_two_out(interactions: Interactions) -> datasets.DatasetDict:
    """Split each user's sequence: the last item is the test target, the one before it the validation target.

    Example:
        For a user with items a b c d e:

            train       items   [a, b, c]
            validation  history [a, b, c]      target d
            test        history [a, b, c, d]   target e

    Returns:
        Splits `train` (user: string, items: list of strings), `validation` and `test` (user, history: list of
        strings, target: string), with the same users in the same order. Nothing is truncated.

    Raises:
        DataError: users have fewer than 3 interactions.
    """
    import datasets
    import pyarrow as pa

    offsets = interactions.offsets
    lengths = np.diff(offsets)
    users = interactions.users
    short = [f"{users[row]!r} has {lengths[row]}" for row in np.flatnonzero(lengths < 3)]
    if short:
        raise DataError(
            f"{interactions.name}: {counted(len(short), 'user')} with fewer than 3 interactions "
            f"({listed(short)}); train, validation and test need one each. "
            "Drop such users with --k-core 3 (or more)."
        )
    items = pa.array(interactions.frame["item"].to_numpy(dtype=object), type=pa.string())
    from_end = interactions.from_end
    user = pa.array(users, type=pa.string())

    def without_last(count: int) -> pa.ListArray:
        starts = pa.array(offsets - count * np.arange(len(offsets)), type=pa.int32())
        return pa.ListArray.from_arrays(starts, items.filter(pa.array(from_end > count)))

    def targets(place: int) -> pa.Array:
        return items.filter(pa.array(from_end == place))

    train_items = without_last(2)
    columns = {
        "train": {"user": user, "items": train_items},
        "validation": {"user": user, "history": train_items, "target": targets(2)},
        "test": {"user": user, "history": without_last(1), "target": targets(1)},
    }
    splits = datasets.DatasetDict()
    for split, table in columns.items():
        in_memory = datasets.table.InMemoryTable(pa.table(table))
        splits[split] = datasets.Dataset(in_memory, split=datasets.NamedSplit(split))
    return splits
