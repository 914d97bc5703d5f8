"""Reading interaction logs and item files into validated columns, with every problem of a file at once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.api import guess_datetime_format

from genrec_llm.errors import DataError, counted, listed

logger = logging.getLogger(__name__)

TIME_COLUMN = "timestamp"


def read_log(
    path: Path, user_column: str, item_column: str, time_column: str | None, *, drop_duplicates: bool = False
) -> pd.DataFrame:
    """Read interactions: `user`, `item` (str) and, if the file has times, `timestamp` (float64 seconds).

    `data.read_interactions` says what the file and its columns may be.

    Raises:
        DataError: every problem of the file, with its place and mend.
    """
    if _kind(path) == ".txt":
        log, problems = _sequence_lines(path)
    else:
        log, problems = _log_columns(path, user_column, item_column, time_column)
        if {"user", "item", "timestamp"} <= set(log):
            repeated = log[log.duplicated() & log.notna().all(axis=1)]
            if len(repeated) and drop_duplicates:
                logger.info("%s: %s dropped", path, counted(len(repeated), "repeated row"))
                log = log.drop(repeated.index)
            else:
                examples = "user " + repeated["user"].map(repr) + " item " + repeated["item"].map(repr)
                wrong = "equal to an earlier one in user, item and time"
                mend = "keep the first of each with --drop-duplicates"
                problems += _faults(examples, "row", wrong, mend, show=str)
    if drop_duplicates and not problems and "timestamp" not in log:
        why = "without them a duplicate cannot be told from an item taken again"
        problems.append(f"--drop-duplicates needs times, for {why}; leave it out")
    _raise(path, problems)
    return log.astype({"user": "str", "item": "str"})


def _log_columns(
    path: Path, user_column: str, item_column: str, time_column: str | None
) -> tuple[pd.DataFrame, list[str]]:
    table = _read_table(path, [user_column, item_column, *([time_column] if time_column else [])])
    log, problems = pd.DataFrame(index=table.cells.index), table.problems or _if_empty(table.cells)
    for column, target in ((user_column, "user"), (item_column, "item")):
        if fault := table.fault(column, f"--{target}-column"):
            problems.append(fault)
        else:
            log[target], bad = _ids(table.cells[column])
            problems += bad
    if time_column is None:
        return log, problems
    if time_column == TIME_COLUMN and time_column not in table.names:
        logger.warning(
            "%s: no column %r, so the order of rows is taken as the order in time; the columns are %s. "
            "If one of them is the time, name it with --time-column",
            path,
            TIME_COLUMN,
            ", ".join(map(repr, table.names)),
        )
    elif fault := table.fault(time_column, "--time-column"):
        problems.append(fault)
    else:
        log["timestamp"], doubt = _seconds(table.cells[time_column])
        if doubt:
            logger.warning("%s: column %r: %s", path, time_column, doubt)
        timeless = table.cells[time_column][log["timestamp"].isna()]
        mend = "write seconds, or dates such as 2024-01-31T18:00:00 throughout"
        bad = _faults(timeless, "value", "cannot be read as a time", mend)
        problems += [f"column {time_column!r}: {problem}" for problem in bad]
    return log, problems


def _sequence_lines(path: Path) -> tuple[pd.DataFrame, list[str]]:
    lines = {number: line.split() for number, line in enumerate(_read_text(path).split("\n"), start=1)}
    rows = [(user, item) for user, *items in filter(None, lines.values()) for item in items]
    log = pd.DataFrame(rows, columns=["user", "item"], dtype="str")
    alone = pd.Series({number: fields[0] for number, fields in lines.items() if len(fields) == 1})
    mend = "a line is `user item item ...`, separated by white space"
    return log, _faults(alone.rename_axis("line"), "line", "with a user and no item", mend) or _if_empty(log)


def _if_empty(log: pd.DataFrame) -> list[str]:
    return [] if len(log) else ["no interactions in the file"]


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
    table = _read_table(path, [item_column, "item", title_column, "categories", "attributes"])
    cells, problems = table.cells, table.problems
    if not len(cells) and not problems:
        problems.append("no items in the file")
    column = "item" if item_column not in table.names and "item" in table.names else item_column
    texts = next((name for name in ("categories", "attributes") if name in table.names), None)
    used = [column, *(name for name in (title_column, texts) if name in table.names)]
    if faults := [fault for name in used if (fault := table.fault(name, "--item-column"))]:
        _raise(path, [*problems, *faults])
    ids, bad = _ids(cells[column])
    problems += bad + _faults(ids[ids.duplicated() & ids.notna()], "repeated item", "", "keep one row an item")
    _raise(path, problems)
    catalogue = {"item": ids}
    if title_column in cells:
        catalogue["title"] = cells[title_column].astype(object).map(_text)
    if texts:
        catalogue["categories"] = cells[texts].astype(object).map(_text)
    return none_for_missing(pd.DataFrame(catalogue).reset_index(drop=True))


def none_for_missing(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with None, never NaN, where an item has no text."""
    table = table.copy()
    for column in table.columns.difference(["item", "index"]):
        text = table[column].astype(object)
        table[column] = text.where(text.notna(), None)
    return table


@dataclass(frozen=True)
class _Table:
    """What a file holds, before its cells are read as ids, times or text."""

    cells: pd.DataFrame
    """The wanted columns that the file has. The index holds places in the file, counted from 1, and is named
    for what it counts: `line` or `row`."""
    names: list[str]
    """All its columns."""
    problems: list[str]
    """Of single lines."""

    def fault(self, column: str, option: str) -> str:
        """The problem that a column is absent, or there twice; empty where it is there once."""
        if (count := self.names.count(column)) == 1:
            return ""
        if count:
            return f"{count} columns {column!r}: rename those that are not meant"
        has = f"the columns are {', '.join(map(repr, self.names))}" if self.names else "there is no header"
        mend = _other_separator(self.names[0]) if len(self.names) == 1 else ""
        return f"no column {column!r}; {has}. {mend or f'Name the right one with {option}.'}"


def _other_separator(header: str) -> str:
    """The mend where the fields of a table are not separated by what its name says; empty if they seem to be."""
    found = [name for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")) if separator in header]
    return f"Its fields seem to be separated by {found[0]}: a .csv has commas, a .tsv tabs." if found else ""


def _read_table(path: Path, wanted: list[str]) -> _Table:
    kind = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path, wanted)
    if kind == ".jsonl":
        return _read_jsonl(path, wanted)
    if kind in (".csv", ".tsv"):
        return _read_csv(path, wanted, "," if kind == ".csv" else "\t")
    kinds = ".csv, .tsv, .jsonl or .parquet (sequences of items: .txt), plain or with .gz"
    raise DataError(f"{path}: unknown kind of file; a name ends in {kinds}")


def _read_csv(path: Path, wanted: list[str], separator: str) -> _Table:
    text = _read_text(path)
    if not text.strip():
        return _Table(pd.DataFrame(index=pd.RangeIndex(0, name="line")), [], [])
    body = text.lstrip("\r\n")
    before = len(text[: len(text) - len(body)].splitlines())
    try:
        # Without a header of its own: pandas would rename twins, and lose fields of rows that are longer.
        options = {"header": None, "keep_default_na": False, "skip_blank_lines": False}
        table = pd.read_csv(io.StringIO(body), sep=separator, dtype=str, **options)
    except pd.errors.ParserError as error:
        header = body.split("\n", 1)[0]
        mend = "" if separator in header else _other_separator(header)
        mend = mend or "a row has as many fields as the header, and fields with commas or quotes are quoted"
        try:
            return _without_long_rows(body, wanted, separator, before, mend)
        except csv.Error:
            # Rows are counted as if each were a line: "in line" from 1, "at row" from 0, the header first.
            detail = str(error).strip().removeprefix("Error tokenizing data. C error: ")
            detail = re.sub(r"in line (\d+)", r"in row \1 (the header is row 1)", detail)
            detail = re.sub(r"at row (\d+)", lambda row: f"at row {int(row[1]) + 1} (the header is row 1)", detail)
            raise DataError(f"{path}: cannot be read as a table: {detail}; {mend}") from error
    table.index = _first_lines(table) + before
    names, rows = [str(name) for name in table.iloc[0]], table.iloc[1:]
    filled = (rows != "").any(axis=1)
    places = {name: place for place, name in enumerate(names) if name in wanted}
    return _Table(rows.loc[filled, [*places.values()]].set_axis([*places], axis=1), names, [])


def _without_long_rows(text: str, wanted: list[str], separator: str, before: int, mend: str) -> _Table:
    """A table but for its rows with more fields than the header, which are a problem of it.

    Args:
        before: lines of the file before the text.

    Raises:
        csv.Error: a quote that does not end, and the like.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names = next(reader)
    places = {name: place for place, name in enumerate(names) if name in wanted}
    long, lines, cells, first = {}, [], [], reader.line_num + 1
    for row in reader:
        if len(row) > len(names):
            long[before + first] = separator.join(row)[:40]
        elif any(row):
            lines.append(before + first)
            cells.append([row[place] if place < len(row) else "" for place in places.values()])
        first = reader.line_num + 1
    table = pd.DataFrame(cells, pd.Index(lines, name="line", dtype="int64"), list(places), dtype=str)
    wrong = f"with more than {counted(len(names), 'field')}"
    return _Table(table, names, _faults(pd.Series(long, dtype=str).rename_axis("line"), "row", wrong, mend))


def _first_lines(table: pd.DataFrame) -> pd.Index:
    """The line that each row of a csv begins on, the header's among them: a quoted field may hold line breaks."""
    lines = sum((table[column].str.count(r"\r\n|\r|\n") for column in table), start=1)
    return pd.Index(1 + lines.cumsum() - lines, name="line", dtype="int64")


def _read_jsonl(path: Path, wanted: list[str]) -> _Table:
    names: dict[str, None] = {}
    records: dict[int, dict[str, Any]] = {}
    broken: dict[int, str] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            names.update(dict.fromkeys(record))
            records[number] = {column: record.get(column) for column in wanted}
        else:
            broken[number] = line[:40]
    lines = pd.Index(list(records), name="line", dtype="int64")
    columns = [column for column in names if column in wanted]
    cells = pd.DataFrame(list(records.values()), lines, columns, dtype=object)
    faulty = pd.Series(broken).rename_axis("line")
    wrong, mend = "without a whole json object", "write one a line"
    return _Table(cells, list(names), _faults(faulty, "line", wrong, mend))


def _read_parquet(path: Path, wanted: list[str]) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(path)))
        names = file.schema_arrow.names
        once = [column for column in names if column in wanted and names.count(column) == 1]
        cells = file.read(once).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error}); it may have been cut short") from error
    cells.index = pd.RangeIndex(1, len(cells) + 1, name="row")
    return _Table(cells, names, [])


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from error


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


def _ids(cells: pd.Series) -> tuple[pd.Series, list[str]]:
    """Ids as text (None where there is none) and the problem of those."""
    text = [_id(value) for value in cells.tolist()]
    if text and all(value is None or (value.endswith(".0") and value[:-2].isdigit()) for value in text):
        text = [value and value[:-2] for value in text]  # whole numbers that went through a float column
    ids = pd.Series(text, index=cells.index, dtype=object)
    bad = _faults(cells[ids.isna()], "value", "empty, or neither text nor number")
    return ids, [f"column {cells.name!r}: {problem}" for problem in bad]


def _id(value: Any) -> str | None:
    if isinstance(value, str):
        return value if value.strip() and value == _whole(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else str(value)


def _text(value: Any) -> str | None:
    if isinstance(value, (list, tuple, np.ndarray)):
        return _whole(", ".join(map(str, value))) or None
    return None if pd.isna(value) or not str(value).strip() else _whole(str(value))


def _whole(text: str) -> str:
    """The text with "?" for each half of a surrogate pair, which json can hold and UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def _seconds(values: pd.Series) -> tuple[pd.Series, str]:
    """Times as float64 seconds since 1970, NaN where a value is none; one reading for the whole column.

    And what is doubtful about it, if anything is.
    """
    if pd.api.types.is_datetime64_any_dtype(values):
        return _since_1970(pd.to_datetime(values, utc=True)), ""
    text = pd.Series([str(value) for value in values.tolist()], index=values.index, dtype=object)
    numbers = pd.to_numeric(text, errors="coerce").astype("float64")
    seconds = numbers.where(np.isfinite(numbers))
    readings = {"seconds": seconds}
    if seconds.isna().any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a day-first guess: the count below settles it
            guesses = {guess_datetime_format(value) for value in text.head(100)} - {None}
        dates = text.where(text.str.contains(r"^[^-].*\d"), "")  # pandas reads "now" as a time, and "-5" as a year
        for form in ("ISO8601", *sorted(guesses)):
            readings[form] = _read_as(dates, form)
    form, found = max(readings.items(), key=lambda reading: reading[1].notna().sum())
    if form == "seconds":
        doubt = "no seconds, but milliseconds or digits of dates? Read as seconds: their order is right, their dates are not"
        return found, doubt if found.median() > _FAR else ""
    if "%m" in form and "%d" in form and not form.startswith("%Y"):
        swapped = _read_as(dates, re.sub("%[md]", lambda part: {"%m": "%d", "%d": "%m"}[part[0]], form))
        if swapped.notna().all() and not swapped.equals(found):
            first = "month" if form.index("%m") < form.index("%d") else "day"
            shown = (
                f"dates such as {text[swapped != found].iloc[0]!r} can be read in two ways, and are read {first} first"
            )
            return found, f"{shown}: write 2024-01-31"
    return found, ""


_FAR = 1e11
"""Seconds; a log whose middle is in the year 5138 has none."""


def _read_as(dates: pd.Series, form: str) -> pd.Series:
    return _since_1970(pd.to_datetime(dates, format=form, utc=True, errors="coerce"))


def _since_1970(times: pd.Series) -> pd.Series:
    return (times - pd.Timestamp(0, tz="UTC").as_unit("s")).dt.total_seconds()  # nanoseconds end in 2262


def _faults(
    values: pd.Series, noun: str, wrong: str, mend: str = "", *, show: Callable[[Any], str] = repr
) -> list[str]:
    """The one problem of some values, whose index holds their places: count, examples, mend; none of none."""
    if not len(values):
        return []
    places = listed(f"{values.index.name} {number}: {show(value)}" for number, value in values.items())
    return [f"{counted(len(values), noun)} {wrong}".rstrip() + f" ({places})" + (mend and f"; {mend}")]


def _raise(path: Path, problems: list[str]) -> None:
    if problems:
        raise DataError([f"{path}: {problem}" for problem in problems])
