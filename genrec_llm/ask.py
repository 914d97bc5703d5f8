"""What `genrec recommend` understands: ids or parts of titles, and json lines with many histories."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pandas as pd
from tqdm import tqdm

from genrec_llm.errors import DataError, counted, listed
from genrec_llm.files import atomic_file
from genrec_llm.recommender import Recommendation, Recommender, UnknownItemsWarning, UnknownUsersWarning

STANDARD = "-"
"""As a file name: standard input or output."""
_LINES = 1024
"""Lines that are in memory at a time."""
_SHOWN = 20
"""Bad lines that are named; their number is always given."""
_CANDIDATES = 10


def find_items(words: Sequence[str], items: pd.DataFrame) -> list[str]:
    """Raw ids of what was typed: an id as it is; else the item whose title is that or, alone among all, contains it.

    Case is ignored in titles. An id comes first: "50" is the item 50, also where a title contains "50".

    Args:
        items: columns `item` and, if titles are known, `title`.

    Raises:
        DataError: nothing has this id or title, or several items have it in their title (they are listed); all at once.
    """
    ids = items["item"].tolist()
    known = set(ids)
    titles = (
        [str(title).casefold() if title else "" for title in items["title"]] if "title" in items else [""] * len(ids)
    )
    found, problems = [], []
    for word in words:
        wanted = word.strip().casefold()
        if word in known:
            found.append(word)
            continue
        inside = [place for place, title in enumerate(titles) if wanted and wanted in title]
        matches = [place for place in inside if titles[place] == wanted] or inside
        if len(matches) == 1:
            found.append(ids[matches[0]])
        elif matches:
            first = sorted(matches, key=lambda place: titles[place])[:_CANDIDATES]
            lines = [f"    {ids[place]}  {items['title'].iloc[place]}" for place in first]
            more = [f"    and {len(matches) - len(first):,} more"] if len(matches) > len(first) else []
            head = f"{word!r}: {len(matches):,} items have this in their title: give more of it, or one of the ids"
            problems.append("\n".join([head, *lines, *more]))
        else:
            where = "id, or this in its title" if any(titles) else "id (the model knows no titles)"
            problems.append(f"{word!r}: no item of the model has this {where}")
    if problems:
        raise DataError(problems)
    return found


@dataclass(frozen=True)
class Request:
    """One line: a history of raw ids, a user if one is named, and the whole line but its history, to hand on."""

    history: list[str]
    user: str | None
    others: dict[str, Any]

    @classmethod
    def parse(cls, line: bytes) -> Request:
        """Read `{"history": [...], "user": ..., ...}`.

        Raises:
            ValueError: the line is something else; the reason.
        """
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not json ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get("history"), list):
            raise ValueError('needs the form {"history": ["id", ...]}')
        others = {name: field for name, field in value.items() if name != "history"}
        if "items" in others:
            raise ValueError('has a field "items", which the answer needs for itself')
        return cls([_raw_id(one) for one in value["history"]], _raw_id(value.get("user"), optional=True), others)


def _raw_id(value: Any, *, optional: bool = False) -> Any:
    """An id as text; whole numbers are read as it, as in an interaction log."""
    if isinstance(value, str) or (value is None and optional):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{json.dumps(value)} is no id: ids are text or whole numbers")


def write_lists(
    recommender: Recommender,
    source: str,
    target: str,
    *,
    k: int,
    exclude_seen: bool,
    exclude: Sequence[str],
) -> str:
    """Answer every line of a json-lines file: its fields but the history, and `items`, a list of item, score and title.

    All lines are looked at before the first is answered, and a file is whole or not there. Blank lines are skipped. Items
    that the model does not know are left out of a history and counted.

    Args:
        source, target: file names, `STANDARD` for standard input or output.
        k, exclude_seen, exclude: as of `Recommender.recommend`.

    Returns:
        What was done, in words.

    Raises:
        DataError: `source` is absent, or lines are no requests; they are named by number.
        ExportError: `target` cannot be written.
    """
    if (
        STANDARD not in (source, target)
        and os.path.exists(source)
        and os.path.exists(target)
        and os.path.samefile(source, target)
    ):
        raise DataError(
            f"{target}: is the file of histories, which no answer holds: choose another one for the answers"
        )
    with ExitStack() as stack:
        lines = stack.enter_context(_opened(source))
        count, unknown = _checked(source, lines, recommender)
        lines.seek(0)
        out = sys.stdout.buffer
        if target != STANDARD:
            out = stack.enter_context(stack.enter_context(atomic_file(target)).open("wb"))
        stack.enter_context(warnings.catch_warnings())
        for told_below in (UnknownItemsWarning, UnknownUsersWarning):
            warnings.simplefilter("ignore", told_below)
        bar = stack.enter_context(tqdm(total=count, unit="line", disable=None))
        stream = (Request.parse(line) for line in lines if line.strip())
        while requests := list(islice(stream, _LINES)):
            users = [request.user for request in requests]
            lists = recommender.recommend(
                [request.history for request in requests],
                user=users if any(user is not None for user in users) else None,
                k=k,
                exclude_seen=exclude_seen,
                exclude=exclude,
            )
            for request, found in zip(requests, lists, strict=True):
                out.write(_answer(request, found))
            bar.update(len(requests))
        out.flush()
    done = f"{counted(count, 'line')} answered" + ("" if target == STANDARD else f", written to {target}")
    return done + unknown


def _answer(request: Request, found: Sequence[Recommendation]) -> bytes:
    items = [{"item": one.item, "score": one.score, "title": one.title} for one in found]
    # A half surrogate of the input, which no encoding has, goes out as the escape that it came in as.
    return (
        json.dumps({**request.others, "items": items}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    )


def _opened(source: str) -> IO[bytes]:
    """The lines of a file, or of standard input by way of a temporary one, since they are read twice."""
    if source != STANDARD:
        try:
            return Path(source).open("rb")
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    copy = tempfile.TemporaryFile()  # noqa: SIM115  # whoever asked closes it
    shutil.copyfileobj(sys.stdin.buffer, copy)
    copy.seek(0)
    return copy


def _checked(source: str, lines: Iterator[bytes], recommender: Recommender) -> tuple[int, str]:
    """How many requests there are, and in words the items and users that the model does not know."""
    name = "standard input" if source == STANDARD else source
    count, bad = 0, 0
    problems: list[str] = []
    unknown: Counter[str] = Counter()
    strangers: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        count += 1
        try:
            request = Request.parse(line)
        except ValueError as error:
            bad += 1
            if bad <= _SHOWN:
                problems.append(f"{name}, line {number}: {error}")
            continue
        missing = (recommender.vocab.find_items(request.history) < 0).nonzero()[0]
        unknown.update(request.history[place] for place in missing)
        strangers.update(recommender.strangers([request.user]))
    if bad > _SHOWN:
        problems.append(f"{name}: and {counted(bad - _SHOWN, 'more line')} like these")
    if not count:
        problems.append(f'{name}: holds no line; give one {{"history": ["id", ...]}} a line')
    if problems:
        raise DataError(problems)
    return count, "".join(
        f"; {what}, since the model does not know them: {counted(ids.total(), noun)} ({listed(map(repr, ids))})"
        for what, noun, ids in (
            ("left out of histories", "item", unknown),
            ("served from the history alone", "line", strangers),
        )
        if ids
    )
