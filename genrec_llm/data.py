"""Interaction logs: read, validate, k-core, split. Every later step starts from an `Interactions`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.tseries.api import guess_datetime_format

from genrec_llm.errors import DataError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TIME_COLUMN = "timestamp"
_KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
_SHOWN = 3  # examples that one problem shows; the count is always given


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
            problems.append(f"{_count(len(repeated), 'repeated item')} in the catalogue: {_some(repeated)}")
        unknown = pd.Index(self.frame["item"].unique()).difference(items)
        if len(unknown):
            problems.append(f"{_count(len(unknown), 'item')} not in the catalogue: {_some(unknown)}")
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
                "%s: %s not in the item file: %s", name, _count(len(extra), "item"), _some(extra["item"])
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
        catalogue = self.catalogue[self.catalogue["item"].isin(frame["item"])].reset_index(drop=True)
        return Interactions(self.name, frame, catalogue)

    def fingerprint(self) -> str:
        """sha256 (hex) over users, items and their order, and the catalogue's ids; not over text or times."""
        log = [self.frame["user"].tolist(), self.frame["item"].tolist()]
        return hashlib.sha256(json.dumps([*log, sorted(self.catalogue["item"])]).encode()).hexdigest()


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
        if _format(path) == ".txt":
            log = _read_sequence_lines(path)
        else:
            log = _read_log(path, user_column, item_column, time_column, drop_duplicates)
        if drop_duplicates and "timestamp" not in log:
            problems.append(
                f"{path}: --drop-duplicates needs times, for without them a duplicate cannot be told from "
                "an item taken again; leave it out"
            )
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


def read_catalogue(
    path: str | os.PathLike[str], *, item_column: str = "item", title_column: str = "title"
) -> pd.DataFrame:
    """Read an item file: columns `item` (str, unique) and, if known, `title`, `categories` (str or None).

    Args:
        item_column: the column of ids; `item` serves as well where the file has no such column.

    Raises:
        DataError: every problem of the file, with its place and mend.
    """
    path = Path(path)
    table, names, problems = _read_table(
        path, [item_column, "item", title_column, "categories", "attributes"]
    )
    if item_column not in names and "item" in names:
        item_column = "item"
    if not len(table):
        problems.append(f"{path}: no items in the file")
    if item_column not in names:
        problems.append(_missing_column(path, item_column, names, "--item-column"))
        raise DataError(problems)
    ids, bad = _ids(path, item_column, table[item_column])
    problems += bad
    repeated = ids[ids.duplicated() & ids.notna()]
    if len(repeated):
        count = _count(len(repeated), "repeated item")
        problems.append(f"{path}: {count} ({_places(repeated)}); keep one row an item")
    if problems:
        raise DataError(problems)
    catalogue = pd.DataFrame({"item": ids.to_list()})
    if title_column in names:
        catalogue["title"] = pd.Series([_text(value) for value in table[title_column]], dtype=object)
    for column in ("categories", "attributes"):
        if column in names and "categories" not in catalogue:
            catalogue["categories"] = pd.Series([_text(value) for value in table[column]], dtype=object)
    return catalogue


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
            f"{interactions.name}: {_count(len(short), 'user')} with fewer than 3 interactions "
            f"({_listed(short)}); train, validation and test need one each. "
            "Drop such users with --k-core 3 (or more)."
        )
    items = pa.array(interactions.frame["item"].to_numpy(dtype=object), type=pa.string())
    from_end = np.repeat(offsets[1:], lengths) - np.arange(len(items))  # 1 at a user's last interaction
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


def read_bytes(path: Path) -> bytes:
    """A file's content, uncompressed if its name ends in `.gz`.

    Raises:
        DataError: the file is absent, unreadable or cut short.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.name.lower().endswith(".gz") else content
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        mend = "it has to be a whole file, gzipped if its name ends in .gz"
        raise DataError(f"{path}: cannot be read ({error}); {mend}") from error


def none_for_missing(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with None, never NaN, where an item has no text."""
    table = table.copy()
    for column in table.columns.difference(["item", "index"]):
        text = table[column].astype(object)
        table[column] = text.where(text.notna(), None)
    return table


def _format(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from error


def _read_sequence_lines(path: Path) -> pd.DataFrame:
    users, lengths, items, problems = [], [], [], []
    alone: dict[int, str] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        fields = line.split()
        if len(fields) == 1:
            alone[number] = fields[0]
        elif fields:
            users.append(fields[0])
            lengths.append(len(fields) - 1)
            items += fields[1:]
    if alone:
        count, places = _count(len(alone), "line"), _places(pd.Series(alone).rename_axis("line"))
        mend = "a line is `user item item ...`, separated by white space"
        problems.append(f"{path}: {count} with a user and no item ({places}); {mend}")
    if not items:
        problems.append(f"{path}: no interactions in the file")
    if problems:
        raise DataError(problems)
    rows = {"user": np.repeat(np.array(users, dtype=object), lengths), "item": items}
    return pd.DataFrame(rows).astype("str")


def _read_log(
    path: Path, user_column: str, item_column: str, time_column: str | None, drop_duplicates: bool
) -> pd.DataFrame:
    wanted = [user_column, item_column] + ([time_column] if time_column else [])
    table, names, problems = _read_table(path, wanted)
    if not len(table):
        problems.append(f"{path}: no interactions in the file")
    log = pd.DataFrame(index=table.index)
    for column, target in ((user_column, "user"), (item_column, "item")):
        if column in names:
            log[target], bad = _ids(path, column, table[column])
            problems += bad
        else:
            problems.append(_missing_column(path, column, names, f"--{target}-column"))
    if time_column in names:
        log["timestamp"] = _seconds(table[time_column])
        bad_times = table[time_column][log["timestamp"].isna()]
        if len(bad_times):
            problems.append(
                f"{path}: column {time_column!r}: {_count(len(bad_times), 'value')} cannot be read as a time "
                f"({_places(bad_times)}); write seconds, or dates such as 2024-01-31T18:00:00 throughout"
            )
    elif time_column not in (None, TIME_COLUMN):
        problems.append(_missing_column(path, time_column, names, "--time-column"))
    else:
        logger.info("%s: no times, so the order of rows is taken as the order in time", path)
    if {"user", "item", "timestamp"} <= set(log):
        repeated = log[log.duplicated() & log.notna().all(axis=1)]
        if len(repeated) and drop_duplicates:
            logger.info("%s: %s dropped", path, _count(len(repeated), "repeated row"))
            log = log.drop(repeated.index)
        elif len(repeated):
            examples = "user " + repeated["user"].map(repr) + " item " + repeated["item"].map(repr)
            problems.append(
                f"{path}: {_count(len(repeated), 'row')} equal to an earlier one in user, item and time "
                f"({_places(examples, str)}); keep the first of each with --drop-duplicates"
            )
    if problems:
        raise DataError(problems)
    return log.astype({"user": "str", "item": "str"})


def _read_table(path: Path, wanted: list[str]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The wanted columns that the file has, all its column names, and problems of single lines.

    The index holds places in the file, counted from 1, and is named for what it counts: `line` or `row`.
    """
    kind = _format(path)
    if kind == ".parquet":
        return _read_parquet(path, wanted)
    if kind == ".jsonl":
        return _read_jsonl(path, wanted)
    if kind in (".csv", ".tsv"):
        return _read_csv(path, wanted, "," if kind == ".csv" else "\t")
    raise DataError(f"{path}: unknown kind of file; a name ends in {', '.join(_KINDS)}, plain or with .gz")


def _read_csv(path: Path, wanted: list[str], separator: str) -> tuple[pd.DataFrame, list[str], list[str]]:
    text = _read_text(path)
    if not text.strip():
        return pd.DataFrame(index=pd.RangeIndex(0, name="line")), [], []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header lose fields
            options = {"keep_default_na": False, "skip_blank_lines": False, "index_col": False}
            table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, **options)
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        detail = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        mend = "a line has as many fields as the header, and fields with commas or quotes are quoted"
        raise DataError(f"{path}: cannot be read as a table: {detail}; {mend}") from error
    table.index = pd.RangeIndex(2, len(table) + 2, name="line")
    blank = (table == "").all(axis=1)
    return table.loc[~blank, [column for column in table if column in wanted]], list(table), []


def _read_jsonl(path: Path, wanted: list[str]) -> tuple[pd.DataFrame, list[str], list[str]]:
    names: dict[str, None] = {}
    cells: dict[str, list[Any]] = {column: [] for column in wanted}  # `wanted` may name a column twice
    lines: list[int] = []
    broken: dict[int, str] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            broken[number] = line[:40]
            continue
        names.update(dict.fromkeys(record))
        lines.append(number)
        for column, values in cells.items():
            values.append(record.get(column))
    problems = []
    if broken:
        count, places = _count(len(broken), "line"), _places(pd.Series(broken).rename_axis("line"))
        problems.append(f"{path}: {count} without a whole json object ({places}); write one a line")
    columns = {column: pd.Series(values, dtype=object) for column, values in cells.items() if column in names}
    table = pd.DataFrame(columns, index=pd.RangeIndex(len(lines)))
    return table.set_index(pd.Index(lines, name="line", dtype="int64")), list(names), problems


def _read_parquet(path: Path, wanted: list[str]) -> tuple[pd.DataFrame, list[str], list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(path)))
        names = file.schema_arrow.names
        table = file.read([column for column in names if column in wanted]).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error}); it may have been cut short") from error
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table, names, []


def _ids(path: Path, column: str, values: pd.Series) -> tuple[pd.Series, list[str]]:
    """Ids as text (None where there is none) and the problems among them."""
    text = [_id(value) for value in values.tolist()]
    if text and all(value is None or (value.endswith(".0") and value[:-2].isdigit()) for value in text):
        text = [value and value[:-2] for value in text]  # whole numbers that went through a float column
    ids = pd.Series(text, index=values.index, dtype=object)
    bad = values[ids.isna()]
    if not len(bad):
        return ids, []
    count = _count(len(bad), "value")
    return ids, [f"{path}: column {column!r}: {count} empty, or neither text nor number ({_places(bad)})"]


def _id(value: Any) -> str | None:
    if isinstance(value, str):
        whole = (
            value == value.encode(errors="ignore").decode()
        )  # json can hold half a surrogate pair: no text
        return value if whole and value.strip() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else str(value)


def _text(value: Any) -> str | None:
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(str(part) for part in value) or None
    return None if pd.isna(value) or not str(value).strip() else str(value)


def _seconds(values: pd.Series) -> pd.Series:
    """Times as float64 seconds since 1970, NaN where a value is none; one reading for the whole column."""
    if pd.api.types.is_datetime64_any_dtype(values):
        return _since_1970(pd.to_datetime(values, utc=True))
    text = pd.Series([str(value) for value in values.tolist()], index=values.index, dtype=object)
    numbers = pd.to_numeric(text, errors="coerce").astype("float64")
    readings = [numbers.where(np.isfinite(numbers))]
    if readings[0].isna().any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a day-first guess: the count below settles it
            guesses = {guess_datetime_format(value) for value in text.head(100)} - {None}
        dates = text.where(text.str.contains(r"\d"), "")  # pandas reads "now" and "today" as times
        for form in ("ISO8601", *sorted(guesses)):
            readings.append(_since_1970(pd.to_datetime(dates, format=form, utc=True, errors="coerce")))
    return max(readings, key=lambda reading: reading.notna().sum())


def _since_1970(times: pd.Series) -> pd.Series:
    return (times - pd.Timestamp(0, tz="UTC")).dt.total_seconds()


def _missing_column(path: Path, column: str, names: list[str], option: str) -> str:
    has = f"the columns are {', '.join(map(repr, names))}" if names else "there is no header"
    return f"{path}: no column {column!r}; {has}. Name the right one with {option}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(values: Iterable[Any]) -> str:
    return _listed([repr(value) for value in values])


def _places(values: pd.Series, show: Callable[[Any], str] = repr) -> str:
    """`line 3: 'x', line 9: 'y', ...` for a series whose index holds places."""
    place = values.index.name
    return _listed([f"{place} {number}: {show(value)}" for number, value in values.head(_SHOWN + 1).items()])


def _listed(examples: list[str]) -> str:
    return ", ".join([*examples[:_SHOWN], *(["..."] if len(examples) > _SHOWN else [])])
