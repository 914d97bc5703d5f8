"""Named public data sets, and the one door to all data: `load_interactions` of a name or a file.

MovieLens-100K (Harper and Konstan, 2015) is for research and may not be redistributed, so this package does
not carry it: it is fetched on first use.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import io
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from genrec_llm.data import Interactions, read_interactions
from genrec_llm.errors import DataError
from genrec_llm.files import atomic_directory
from genrec_llm.tables import TIME_COLUMN, read_bytes, read_catalogue

logger = logging.getLogger(__name__)

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
RECBOLE = "recbole==1.2.1"
FETCH_SECONDS = 10
PIP_SECONDS = 120


@dataclass(frozen=True)
class _Benchmark:
    """A file preprocessed for S3-Rec (Zhou et al., CIKM 2020), which the P5 family and GenRec use as well."""

    stem: str
    sha256: str
    """Of the uncompressed sequences: other files of the same name circulate, with the last items cut off."""


_BENCHMARKS = {
    "amazon-beauty": _Benchmark("Beauty", "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8"),
    "amazon-sports": _Benchmark(
        "Sports_and_Outdoors", "2a095e0648872beb9982408958290f5d655db5be2911c3756b5446de9f0b8de2"
    ),
    "yelp": _Benchmark("Yelp", "724b219106b81dd2349027da997334ddb6da9fe2f152ad6e0d97a93170f7caed"),
}
SOURCES: tuple[str, ...] = ("movielens-100k", *_BENCHMARKS)

# MovieLens-100K as GroupLens publishes it and as RecBole repackages it: ratings and items, with their sha256.
# The ratings are the same bytes but for RecBole's header line: the same rows in the same order.
_GROUPLENS_FORM = {
    "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
    "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
}
_RECBOLE_FORM = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

_FETCH_ERRORS = (
    OSError,  # urllib's URLError, time-outs and pip's failures are of this kind
    http.client.HTTPException,
    subprocess.SubprocessError,
    zipfile.BadZipFile,
    zlib.error,
    KeyError,  # the archive lacks the file
    DataError,  # it is there and is another
)


def load_interactions(
    dataset: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    user_column: str = "user",
    item_column: str = "item",
    time_column: str | None = TIME_COLUMN,
    items_path: str | os.PathLike[str] | None = None,
    k_core: int = 0,
    drop_duplicates: bool = False,
    shuffle_ties: int | None = None,
    without_last: int = 0,
) -> Interactions:
    """Load a named public data set or a file of one's own.

    Args:
        dataset: a name of `SOURCES`, or the path of a file; `read_interactions` says what the file and its
            columns may be. Every interaction counts, whatever its rating.
        data_dir: where the files of a named data set lie. The Amazon and Yelp sets need it, with
            `sequences/Beauty.txt.gz` and `items/Beauty.items.jsonl.gz` (and alike) inside; MovieLens is taken
            from `ml-100k/` in it if that is there, else from the cache (`$GENREC_CACHE`, default
            `~/.cache/genrec_llm`), else downloaded into the cache.
        k_core: drop users and items with fewer interactions, again and again until none is left; 0 keeps all.
        shuffle_ties: seed of `Interactions.shuffled_ties`; None keeps the order of the file.
        without_last: interactions at each user's end that `Interactions.without_last` leaves out, after all else.

    Raises:
        DataError: no such name or file, a file that is not the one meant, a failed download, a faulty log.

    Example:
        >>> load_interactions("movielens-100k", k_core=5)  # doctest: +SKIP
    """
    if dataset in SOURCES and items_path is not None:
        raise DataError(f"{dataset} comes with its own items; the item file {items_path} goes with a file of your own")
    if dataset == "movielens-100k":
        interactions = _movielens(data_dir)
    elif dataset in _BENCHMARKS:
        interactions = _benchmark(dataset, data_dir)
    elif Path(dataset).exists():
        interactions = read_interactions(
            dataset,
            user_column=user_column,
            item_column=item_column,
            time_column=time_column,
            items_path=items_path,
            drop_duplicates=drop_duplicates,
        )
    else:
        near = difflib.get_close_matches(dataset.lower(), SOURCES, n=1, cutoff=0.5)
        nearest = f"; the nearest name is {near[0]!r}" if near else ""
        raise DataError(f"{dataset!r} is neither a file nor a named data set{nearest} (there are {', '.join(SOURCES)})")
    interactions = interactions.k_core(k_core) if k_core else interactions
    interactions = interactions if shuffle_ties is None else interactions.shuffled_ties(shuffle_ties)
    return interactions.without_last(without_last) if without_last else interactions


def _benchmark(name: str, data_dir: str | os.PathLike[str] | None) -> Interactions:
    source = _BENCHMARKS[name]
    wanted = (f"sequences/{source.stem}.txt", f"items/{source.stem}.items.jsonl")
    layout = " and ".join(f"{file}.gz" for file in wanted)
    if data_dir is None:
        raise DataError(f"{name} is not downloaded: name the folder that holds {layout} with --data-dir")
    files = {file: _plain_or_gz(Path(data_dir) / file) for file in wanted}
    sequences, items = files.values()
    if sequences is None or items is None:
        missing = [file for file, path in files.items() if path is None]
        raise DataError([f"{data_dir}: no file {file}.gz; {name} needs {layout} there" for file in missing])
    mend = "put the right file there, or load this one by its path"
    _check(str(sequences), read_bytes(sequences), source.sha256, mend)
    catalogue = read_catalogue(items, item_column="id")
    if "title" not in catalogue or catalogue["title"].isna().all():
        # No source of titles for Sports was found: short keywords are the only text of that kind.
        catalogue = read_catalogue(items, item_column="id", title_column="text_id")
    return Interactions.from_log(name, read_interactions(sequences).frame, catalogue)


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def _check(place: str, content: bytes, expected: str, mend: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{place}: not the file that published numbers are about: its sha256 (uncompressed) is {found}, "
            f"expected {expected}; {mend}"
        )


def _movielens(data_dir: str | os.PathLike[str] | None) -> Interactions:
    files = None if data_dir is None else _movielens_files(Path(data_dir) / "ml-100k")
    if files is None:
        caches = os.environ.get("GENREC_CACHE") or Path.home() / ".cache" / "genrec_llm"
        cache = Path(caches) / "movielens-100k"
        files = _movielens_files(cache)
        if files is None:
            files = _download_movielens()
            with atomic_directory(cache) as folder:
                for name, content in files.items():
                    (folder / name).write_bytes(content)
            logger.info("MovieLens-100K kept at %s", cache)
    log, catalogue = _parse_grouplens(files) if "u.data" in files else _parse_recbole(files)
    return Interactions.from_log("movielens-100k", log, catalogue)


def _movielens_files(folder: Path) -> dict[str, bytes] | None:
    """Checked contents of the ratings and item files in `folder`, in either form; None if not there."""
    for form in (_RECBOLE_FORM, _GROUPLENS_FORM):
        paths = {name: _plain_or_gz(folder / name) for name in form}
        files = {name: read_bytes(path) for name, path in paths.items() if path is not None}
        if len(files) == len(form):
            for name, content in files.items():
                _check(str(paths[name]), content, form[name], "delete it to have it fetched anew")
            return files
    return None


def _download_movielens() -> dict[str, bytes]:
    in_wheel = "recbole/dataset_example/ml-100k/"
    attempts: list[tuple[str, Callable[[], bytes], str, dict[str, str]]] = [
        (f"download of {GROUPLENS_URL}", _fetch_grouplens_zip, "ml-100k/", _GROUPLENS_FORM),
        (f"pip download of {RECBOLE}", _fetch_recbole_wheel, in_wheel, _RECBOLE_FORM),
    ]
    failures = []
    for attempt, fetch, folder, form in attempts:
        try:
            with zipfile.ZipFile(io.BytesIO(fetch())) as archive:
                files = {name: archive.read(folder + name) for name in form}
            for name, content in files.items():
                _check(f"{folder}{name}", content, form[name], "something else answered")
            return files
        except _FETCH_ERRORS as error:
            failures.append(f"movielens-100k: {attempt} failed: {error}")
            logger.info(failures[-1])
    mend = "connect to a network, or put its u.data and u.item in the folder ml-100k/ of --data-dir"
    raise DataError([*failures, f"movielens-100k could not be had; {mend}"])


def _fetch_grouplens_zip() -> bytes:
    with urllib.request.urlopen(GROUPLENS_URL, timeout=FETCH_SECONDS) as response:
        return response.read()


def _fetch_recbole_wheel() -> bytes:
    """RecBole's wheel carries MovieLens-100K as an example: for where only a package index is reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += [RECBOLE, "--dest", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PIP_SECONDS)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(done.stderr.strip().rpartition("\n")[2] or f"pip ended with status {done.returncode}")
        return wheels[0].read_bytes()


def _parse_grouplens(files: dict[str, bytes]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabs in u.data; u.item is Latin-1: `id|title (year)|date|video date|url|` and 19 genre flags."""
    rows = [line.split("|") for line in files["u.item"].decode("latin-1").split("\n") if line]
    genres = [", ".join(genre for genre, flag in zip(_GENRES, row[5:], strict=True) if flag == "1") for row in rows]
    titles = [row[1].strip() for row in rows]
    return _ratings(files["u.data"], header=None), _movies([row[0] for row in rows], titles, genres)


def _parse_recbole(files: dict[str, bytes]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tab-separated with a header: `user item rating time`; `id title year genre genre ...` (UTF-8)."""
    rows = [line.split("\t") for line in files["ml-100k.item"].decode("utf-8").split("\n")[1:] if line]
    # Film 267 has no title at GroupLens either ("unknown"); RecBole spells that "unkonwn", and so its year.
    titles = ["unknown" if row[1] == row[2] == "unkonwn" else f"{row[1]} ({row[2]})" for row in rows]
    genres = [row[3].replace(" ", ", ") for row in rows]
    return _ratings(files["ml-100k.inter"], header=0), _movies([row[0] for row in rows], titles, genres)


def _ratings(content: bytes, header: int | None) -> pd.DataFrame:
    columns = ["user", "item", "rating", "timestamp"]
    types = {"user": "str", "item": "str", "timestamp": "float64"}
    log = pd.read_csv(io.BytesIO(content), sep="\t", header=header, names=columns, dtype=types)
    return log.drop(columns="rating")


def _movies(ids: list[str], titles: list[str], genres: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"item": ids, "title": titles, "categories": genres})
