"""Named public data sets: the real counts, and where MovieLens comes from."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genrec_llm import sources
from genrec_llm.data import Interactions, leave_last_two_out
from genrec_llm.errors import DataError
from genrec_llm.sources import SOURCES, load_interactions

WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"


# --- the real files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "longest", "repeats", "cold_test", "cold_validation"),
    [
        ("amazon-beauty", 22_363, 12_101, 198_502, 204, 0, 138, 51),
        ("amazon-sports", 35_598, 18_357, 296_337, 296, 0, 317, 118),
        ("yelp", 30_431, 20_033, 316_354, 350, 2_027, 73, 27),
    ],
)
def test_the_benchmark_files_have_the_published_counts(
    shared_data: Path,
    name: str,
    users: int,
    items: int,
    interactions: int,
    longest: int,
    repeats: int,
    cold_test: int,
    cold_validation: int,
) -> None:
    loaded = load_interactions(name, data_dir=shared_data)
    lengths = np.diff(loaded.offsets)
    assert (loaded.name, len(loaded.users), len(loaded.frame)) == (name, users, interactions)
    assert len(loaded.catalogue) == loaded.frame["item"].nunique() == items
    assert (lengths.min(), lengths.max()) == (5, longest)
    assert len(loaded.k_core(5).frame) == interactions

    splits = leave_last_two_out(loaded)
    assert {split: len(table) for split, table in splits.items()} == dict.fromkeys(splits, users)
    known = {item for row in splits["train"]["items"] for item in row}
    targets, histories = splits["test"]["target"], splits["test"]["history"]
    assert sum(target in history for target, history in zip(targets, histories, strict=True)) == repeats
    assert sum(target not in known for target in targets) == cold_test
    assert sum(target not in known for target in splits["validation"]["target"]) == cold_validation


def test_the_benchmark_catalogues_have_text(shared_data: Path) -> None:
    beauty = load_interactions("amazon-beauty", data_dir=shared_data).catalogue.set_index("item")
    assert beauty.loc["1"].tolist() == [
        "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce",
        "OPI, Makeup, Nails, Nail Polish",
    ]
    assert [title for title in beauty["title"] if not isinstance(title, str)] == [None] * 7
    sports = load_interactions("amazon-sports", data_dir=shared_data).catalogue  # no titles: keywords instead
    assert sports["title"].notna().all()
    assert sports["title"][0] == "ghost armorers tool 332 punch hunting fishing"


def test_movielens_from_a_folder_has_the_published_counts(shared_data: Path) -> None:
    loaded = load_interactions("movielens-100k", data_dir=shared_data)
    lengths = np.diff(loaded.offsets)
    assert (len(loaded.users), len(loaded.catalogue), len(loaded.frame)) == (943, 1_682, 100_000)
    assert (lengths.min(), lengths.max()) == (20, 737)
    times = loaded.frame["timestamp"]
    assert (times.min(), times.max()) == (874724710, 893286638)
    assert (times.diff()[loaded.frame["user"].eq(loaded.frame["user"].shift())] >= 0).all()
    catalogue = loaded.catalogue.set_index("item")
    assert catalogue.loc["1"].tolist() == ["Toy Story (1995)", "Animation, Children's, Comedy"]
    assert catalogue.loc["267", "title"] == "unknown"
    assert catalogue.loc["543", "title"] == "Misérables, Les (1995)"


# --- where the benchmark files may lie ----------------------------------------------------------------------


@pytest.fixture
def small_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small file in place of Beauty, uncompressed sequences and compressed items."""
    (tmp_path / "sequences").mkdir()
    (tmp_path / "items").mkdir()
    content = b"1 1 2 3\n2 3 1 4\n"
    (tmp_path / "sequences" / "Beauty.txt").write_bytes(content)
    rows = [
        f'{{"id": {number}, "item": "B{number}", "title": null, "text_id": "t {number}"}}' for number in range(1, 6)
    ]
    (tmp_path / "items" / "Beauty.items.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    known = sources._Benchmark("Beauty", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sources._BENCHMARKS, "amazon-beauty", known)
    return tmp_path


def test_plain_and_gzipped_files_will_both_do(small_benchmark: Path) -> None:
    loaded = load_interactions("amazon-beauty", data_dir=str(small_benchmark))
    assert loaded.sequences() == {"1": ["1", "2", "3"], "2": ["3", "1", "4"]}
    assert loaded.catalogue["title"].tolist() == ["t 1", "t 2", "t 3", "t 4", "t 5"]  # "5" is cold
    assert load_interactions("amazon-beauty", data_dir=small_benchmark, k_core=2).sequences() == {
        "1": ["1", "3"],
        "2": ["3", "1"],
    }


def test_another_file_of_the_same_name_is_refused_with_both_hashes(small_benchmark: Path) -> None:
    other = b"1 1 2\n2 3 1\n"
    (small_benchmark / "sequences" / "Beauty.txt").write_bytes(other)
    with pytest.raises(DataError) as caught:
        load_interactions("amazon-beauty", data_dir=small_benchmark)
    assert hashlib.sha256(other).hexdigest() in str(caught.value)
    assert sources._BENCHMARKS["amazon-beauty"].sha256 in str(caught.value)


def test_a_folder_without_the_files_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_interactions("yelp", data_dir=tmp_path)
    first, second = caught.value.problems
    assert "sequences/Yelp.txt.gz" in first and "items/Yelp.items.jsonl.gz" in second
    with pytest.raises(DataError, match="--data-dir"):
        load_interactions("yelp")


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the nearest name is 'movielens-100k'"):
        load_interactions("MovieLens100k")
    with pytest.raises(DataError, match="the nearest name is 'amazon-beauty'"):
        load_interactions("beauty")
    with pytest.raises(DataError, match="neither a file nor a named data set"):
        load_interactions(str(tmp_path / "absent.csv"))


def test_a_path_is_read_with_the_options_given(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who,what,when\nu,b,2\nu,a,1\nu,b,2\nv,b,1\n")
    columns = {"user_column": "who", "item_column": "what", "time_column": "when"}
    loaded = load_interactions(str(path), **columns, drop_duplicates=True)
    assert loaded.sequences() == {"u": ["a", "b"], "v": ["b"]}


def test_an_item_file_beside_a_named_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="comes with its own items"):
        load_interactions("movielens-100k", items_path=tmp_path / "items.csv")


# --- MovieLens: two forms, one data set ---------------------------------------------------------------------

SMALL_ITEMS = [
    ("1", "Toy Story", "1995", "Animation Children's Comedy"),
    ("2", "Misérables, Les", "1995", "Drama Musical"),
    ("3", "unkonwn", "unkonwn", "unknown"),
    ("4", "Land Before Time III (1995)", "V", "Animation Children's"),
]
SMALL_RATINGS = b"9\t2\t3\t20\n8\t4\t5\t7\n9\t1\t1\t10\n9\t4\t5\t10\n8\t2\t1\t7\n"


def grouplens_zip(ratings: bytes, items: list[tuple[str, str, str, str]]) -> bytes:
    lines = []
    for number, title, year, genres in items:
        known = title != "unkonwn"
        flags = ["1" if genre in genres.split() else "0" for genre in sources._GENRES]
        # The real u.item ends some titles with a blank.
        fields = [
            number,
            f"{title} ({year}) " if known else "unknown",
            f"01-Jan-{year}" if known else "",
            "",
            "url",
        ]
        lines.append("|".join([*fields, *flags]) + "\n")
    return archive({"ml-100k/u.data": ratings, "ml-100k/u.item": "".join(lines).encode("latin-1")})


def recbole_wheel(ratings: bytes, items: list[tuple[str, str, str, str]]) -> bytes:
    header = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    lines = [
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        *map("\t".join, items),
    ]
    return archive(
        {
            f"{WHEEL_FOLDER}ml-100k.inter": header + ratings,
            f"{WHEEL_FOLDER}ml-100k.item": "".join(f"{line}\n" for line in lines).encode(),
        }
    )


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


class Network:
    """What the two places answer: bytes, or an error to raise. Counts the requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.answers: dict[str, bytes | Exception] = {}
        self.requests: list[str] = []
        monkeypatch.setenv("GENREC_CACHE", str(cache))
        monkeypatch.setattr(sources, "_fetch_grouplens_zip", lambda: self.answer("grouplens"))
        monkeypatch.setattr(sources, "_fetch_recbole_wheel", lambda: self.answer("wheel"))
        self.patch = monkeypatch

    def answer(self, place: str) -> bytes:
        self.requests.append(place)
        answer = self.answers.get(place, urllib.error.URLError(f"no way to {place}"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def serve(self, place: str, content: bytes) -> None:
        """Serve an archive, whose files are then the right ones."""
        form = {"grouplens": sources._GROUPLENS_FORM, "wheel": sources._RECBOLE_FORM}[place]
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            for name in packed.namelist():
                digest = hashlib.sha256(packed.read(name)).hexdigest()
                self.patch.setitem(form, name.rpartition("/")[2], digest)
        self.answers[place] = content


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Network:
    return Network(monkeypatch, tmp_path / "cache")


def assert_identical(one: Interactions, other: Interactions) -> None:
    assert one.name == other.name
    pd.testing.assert_frame_equal(one.frame, other.frame)
    pd.testing.assert_frame_equal(one.catalogue, other.catalogue)
    assert one.fingerprint() == other.fingerprint()


def fetched_in_both_forms(network: Network, cache: Path, grouplens: bytes, wheel: bytes) -> list[Interactions]:
    loaded = []
    for place, content in (("grouplens", grouplens), ("wheel", wheel)):
        network.answers = {}
        network.serve(place, content)
        shutil.rmtree(cache, ignore_errors=True)
        loaded.append(load_interactions("movielens-100k"))
    return loaded


def test_both_forms_of_movielens_are_identical(network: Network, tmp_path: Path) -> None:
    forms = grouplens_zip(SMALL_RATINGS, SMALL_ITEMS), recbole_wheel(SMALL_RATINGS, SMALL_ITEMS)
    from_grouplens, from_wheel = fetched_in_both_forms(network, tmp_path / "cache", *forms)
    assert_identical(from_grouplens, from_wheel)
    assert from_wheel.sequences() == {
        "9": ["1", "4", "2"],
        "8": ["4", "2"],
    }  # ties in file order; "3" is cold
    assert from_wheel.catalogue.to_dict("list") == {
        "item": ["1", "2", "3", "4"],
        "title": ["Toy Story (1995)", "Misérables, Les (1995)", "unknown", "Land Before Time III (1995) (V)"],
        "categories": ["Animation, Children's, Comedy", "Drama, Musical", "unknown", "Animation, Children's"],
    }
    assert network.requests == ["grouplens", "grouplens", "wheel"]


def test_both_forms_of_the_real_movielens_are_identical(network: Network, shared_data: Path, tmp_path: Path) -> None:
    ratings = gzip.decompress((shared_data / "ml-100k" / "ml-100k.inter.gz").read_bytes()).partition(b"\n")[2]
    assert hashlib.sha256(ratings).hexdigest() == sources._GROUPLENS_FORM["u.data"]  # the real u.data, byte for byte
    lines = gzip.decompress((shared_data / "ml-100k" / "ml-100k.item.gz").read_bytes()).decode().splitlines()[1:]
    items = [(number, title, year, genres) for number, title, year, genres in (line.split("\t") for line in lines)]
    forms = grouplens_zip(ratings, items), recbole_wheel(ratings, items)
    from_grouplens, from_wheel = fetched_in_both_forms(network, tmp_path / "cache", *forms)
    assert_identical(from_grouplens, from_wheel)
    assert_identical(from_wheel, load_interactions("movielens-100k", data_dir=shared_data))


def test_a_download_is_kept_and_used_again(network: Network, tmp_path: Path) -> None:
    network.serve("wheel", recbole_wheel(SMALL_RATINGS, SMALL_ITEMS))
    first = load_interactions("movielens-100k")
    again = load_interactions("movielens-100k", data_dir=tmp_path / "has no ml-100k")
    assert network.requests == ["grouplens", "wheel"]
    assert_identical(first, again)
    (tmp_path / "cache" / "movielens-100k" / "ml-100k.item").write_bytes(b"changed")
    with pytest.raises(DataError, match="delete it to have it fetched anew"):
        load_interactions("movielens-100k")


def test_a_wrong_answer_is_not_taken_for_the_data(network: Network) -> None:
    network.serve("wheel", recbole_wheel(SMALL_RATINGS, SMALL_ITEMS))
    for answer in (
        b"<html>please sign in</html>",
        archive({"ml-100k/README": b""}),
        grouplens_zip(SMALL_RATINGS, SMALL_ITEMS),  # complete, but not the published bytes
        TimeoutError("timed out"),
    ):
        network.answers["grouplens"] = answer
        files = sources._download_movielens()
        assert set(files) == set(sources._RECBOLE_FORM)


def test_when_neither_place_answers_both_reasons_and_the_mend_are_given(network: Network, tmp_path: Path) -> None:
    network.answers["wheel"] = subprocess.TimeoutExpired("pip", 120)
    with pytest.raises(DataError) as caught:
        load_interactions("movielens-100k")
    grouplens, wheel, mend = caught.value.problems
    assert "no way to grouplens" in grouplens
    assert "recbole==1.2.1" in wheel and "timed out" in wheel
    assert "--data-dir" in mend
    assert not (tmp_path / "cache").exists()


def test_the_wheel_is_taken_from_pip_and_its_last_word_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "recbole==1.2.1" in command and "--no-deps" in command
        if not works:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
        (Path(command[-1]) / "recbole-1.2.1-py3-none-any.whl").write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", pip)
    works = True
    assert sources._fetch_recbole_wheel() == b"wheel"
    works = False
    with pytest.raises(OSError, match=r"^ERROR: No matching distribution$"):
        sources._fetch_recbole_wheel()


def test_the_names_are_those_documented() -> None:
    assert SOURCES == ("movielens-100k", "amazon-beauty", "amazon-sports", "yelp")


@pytest.mark.hub
def test_movielens_can_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path))
    assert len(load_interactions("movielens-100k").frame) == 100_000
