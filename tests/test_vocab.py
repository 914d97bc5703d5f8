"""Numbering of items and users, its files, and that ids say nothing about the next item."""

from __future__ import annotations

import doctest
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genrec_llm import vocab as vocab_module
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.sources import load_interactions
from genrec_llm.vocab import IdVocab

STRANGE_IDS = [
    "with space",
    ' "quoted", it\'s ',
    "emoji 🛒🧴",
    "007",
    "NA",
    "null",
    "x" * 300,
    "a,b\tc|d",
    "\n",
]


def catalogue_of(count: int) -> pd.DataFrame:
    ids = [str(number) for number in range(1, count + 1)]
    titles = [None if number % 5 == 0 else f"title {number}" for number in range(1, count + 1)]
    return pd.DataFrame({"item": ids, "title": pd.Series(titles, dtype=object)})


def assert_equal(one: IdVocab, other: IdVocab) -> None:
    pd.testing.assert_frame_equal(one.items, other.items)
    assert (one.users, one.user_mode, one.user_buckets, one.seed) == (
        other.users,
        other.user_mode,
        other.user_buckets,
        other.seed,
    )
    assert one.fingerprint == other.fingerprint


# --- numbering ----------------------------------------------------------------------------------------------


def test_the_numbering_does_not_depend_on_the_order_of_files() -> None:
    catalogue, users = catalogue_of(500), [f"u{number}" for number in range(200)]
    built = IdVocab.build(catalogue, users, seed=3)
    shuffled = catalogue.sample(frac=1, random_state=1).reset_index(drop=True)
    assert_equal(built, IdVocab.build(shuffled, users[::-1] + users, seed=3))
    titles = dict(zip(catalogue["item"], catalogue["title"], strict=True))
    assert [titles[item] for item in built.items["item"]] == built.items["title"].tolist()


def test_the_numbering_depends_on_the_seed_and_is_no_sorted_order() -> None:
    catalogue = catalogue_of(500)
    one, other = (IdVocab.build(catalogue, ["a", "b"], seed=seed) for seed in (0, 1))
    assert one.fingerprint != other.fingerprint
    order = one.items["item"].tolist()
    assert order != sorted(order) and order != catalogue["item"].tolist()
    rank_correlation = np.corrcoef(np.arange(500), one.items["item"].astype(int))[0, 1]
    assert abs(rank_correlation) < 0.15  # 3.4 standard deviations of a random permutation


def test_items_go_there_and_back() -> None:
    vocab = IdVocab.build(pd.DataFrame({"item": STRANGE_IDS}), [], seed=0)
    indices = vocab.encode_items(STRANGE_IDS)
    assert indices.dtype == np.int64
    assert sorted(indices) == list(range(len(STRANGE_IDS)))
    assert [vocab.item_id(index) for index in indices] == STRANGE_IDS
    assert vocab.encode_items([]).shape == (0,)
    assert vocab.num_items == len(STRANGE_IDS)
    assert vocab.item_tokens[:2] == ["<item_0>", "<item_1>"]


def test_unknown_items_and_indices_are_named() -> None:
    vocab = IdVocab.build(catalogue_of(3), [], seed=0)
    with pytest.raises(DataError, match=r"4 item id\(s\) not among the 3 .*: 'a', 'b', 'c', \.\.\."):
        vocab.encode_items(["1", "a", "b", "a", "c", "d"])
    for index in (-1, 3):
        with pytest.raises(DataError, match=f"no item has index {index}"):
            vocab.item_id(index)


def test_a_repeated_item_is_refused() -> None:
    with pytest.raises(DataError, match=r"repeated item.*'a'"):
        IdVocab.build(pd.DataFrame({"item": ["a", "b", "a"]}), [], seed=0)


# --- users --------------------------------------------------------------------------------------------------


def test_each_user_has_a_row_and_strangers_have_the_first() -> None:
    vocab = IdVocab.build(catalogue_of(2), STRANGE_IDS, seed=0)
    assert vocab.num_user_rows == 1 + len(STRANGE_IDS) == len(vocab.user_tokens)
    assert sorted(vocab.user_row(user) for user in STRANGE_IDS) == list(range(1, 1 + len(STRANGE_IDS)))
    assert vocab.users[vocab.user_row("007") - 1] == "007"
    assert vocab.user_row("stranger") == vocab.user_row(None) == 0
    assert vocab.user_tokens[:3] == ["<user_unknown>", "<user_0>", "<user_1>"]


def test_hashed_users_share_rows_by_the_documented_rule() -> None:
    vocab = IdVocab.build(catalogue_of(2), ["ignored"], seed=0, user_mode="hashed", user_buckets=7)
    assert (vocab.users, vocab.num_user_rows, len(vocab.user_tokens)) == ((), 8, 8)
    for user in STRANGE_IDS:
        assert vocab.user_row(user) == 1 + int(hashlib.sha256(user.encode()).hexdigest(), 16) % 7
    assert vocab.user_row(None) == 0
    assert {vocab.user_row(str(number)) for number in range(200)} == set(range(1, 8))


def test_without_users_only_the_unknown_row_is_left() -> None:
    vocab = IdVocab.build(catalogue_of(2), ["a", "b"], seed=0)
    for bare in (vocab.without_users(), IdVocab.build(catalogue_of(2), ["a", "b"], seed=0, user_mode="none")):
        assert (bare.num_user_rows, bare.user_tokens, bare.users) == (1, ["<user_unknown>"], ())
        assert bare.user_row("a") == 0
        pd.testing.assert_frame_equal(bare.items, vocab.items)
        assert bare.fingerprint != vocab.fingerprint


@pytest.mark.parametrize(("mode", "buckets"), [("hashed", 0), ("each", 5), ("none", 5), ("some", 0)])
def test_modes_and_buckets_that_do_not_go_together_are_refused(mode: str, buckets: int) -> None:
    with pytest.raises(ConfigError, match="user mode"):
        IdVocab.build(catalogue_of(2), [], seed=0, user_mode=mode, user_buckets=buckets)  # type: ignore[arg-type]


def test_the_fingerprint_follows_users_in_row_order() -> None:
    prints = {
        IdVocab.build(catalogue_of(3), users, seed=0, user_mode=mode, user_buckets=buckets).fingerprint
        for users, mode, buckets in [
            (["a", "b"], "each", 0),
            (["a", "c"], "each", 0),
            ([], "none", 0),
            ([], "hashed", 3),
            ([], "hashed", 4),
        ]
    }
    assert len(prints) == 5


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "buckets"), [("each", 0), ("hashed", 9), ("none", 0)])
def test_a_vocabulary_survives_its_files(tmp_path: Path, mode: str, buckets: int) -> None:
    catalogue = pd.DataFrame({"item": STRANGE_IDS, "title": [None, *STRANGE_IDS[1:]], "categories": [None] * 9})
    vocab = IdVocab.build(catalogue, STRANGE_IDS, seed=5, user_mode=mode, user_buckets=buckets)  # type: ignore[arg-type]
    vocab.save_items(tmp_path / "items.parquet")
    vocab.save_users(tmp_path / "users.parquet")
    loaded = IdVocab.load(tmp_path)
    assert_equal(vocab, loaded)
    assert loaded.items["categories"].tolist() == [None] * 9
    assert pd.read_parquet(tmp_path / "items.parquet").columns.tolist() == [
        "index",
        "item",
        "title",
        "categories",
    ]
    users = pd.read_parquet(tmp_path / "users.parquet")
    assert users["row"].tolist() == [vocab.user_row(user) for user in users["user"]]


def test_raw_users_are_not_in_the_item_file(tmp_path: Path) -> None:
    vocab = IdVocab.build(catalogue_of(3), ["a-raw-user-id"], seed=0)
    vocab.save_items(tmp_path / "items.parquet")
    assert b"a-raw-user-id" not in (tmp_path / "items.parquet").read_bytes()
    with pytest.raises(DataError, match=r"users\.parquet: no such file; it stays in the run directory"):
        IdVocab.load(tmp_path)
    vocab.without_users().save_items(tmp_path / "items.parquet")
    assert_equal(vocab.without_users(), IdVocab.load(tmp_path))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def without_metadata(path: Path) -> None:
    pd.read_parquet(path).to_parquet(path)


def without_items(path: Path) -> None:
    pd.DataFrame({"index": [0]}).to_parquet(path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Path.unlink, "no such file"),
        (cut_short, "not a parquet file"),
        (without_metadata, "not written by genrec"),
        (without_items, "no column item"),
    ],
)
def test_a_harmed_file_is_named(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "items.parquet"
    IdVocab.build(catalogue_of(3), [], seed=0, user_mode="none").save_items(path)
    harm(path)
    with pytest.raises(DataError, match=rf"items\.parquet: .*{words}"):
        IdVocab.load(tmp_path)


def test_rows_out_of_order_are_refused() -> None:
    vocab = IdVocab.build(catalogue_of(3), [], seed=0, user_mode="none")
    with pytest.raises(DataError, match="item indices"):
        IdVocab(vocab.items[::-1], (), "none", 0, 0)


# --- new items ----------------------------------------------------------------------------------------------


def test_new_items_go_to_the_end_and_move_nothing(tmp_path: Path) -> None:
    vocab = IdVocab.build(catalogue_of(20), ["a"], seed=0)
    larger = catalogue_of(30)
    larger["title"] = "changed"
    larger["categories"] = "new column"
    grown = vocab.with_new_items(larger.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(grown.items.iloc[:20][["index", "item", "title"]], vocab.items)
    assert grown.items["categories"].tolist() == [None] * 20 + ["new column"] * 10
    assert sorted(map(int, grown.items["item"][20:])) == list(range(21, 31))
    assert list(map(int, grown.items["item"][20:])) != list(range(21, 31))
    assert grown.users == vocab.users
    assert_equal(grown, vocab.with_new_items(larger))
    assert grown.with_new_items(larger) is grown
    grown.save_items(tmp_path / "items.parquet")
    grown.save_users(tmp_path / "users.parquet")
    assert_equal(grown, IdVocab.load(tmp_path))


# --- the leak -----------------------------------------------------------------------------------------------

# Rules that learn nothing and guess five items from the ids of a history; `last`, `largest`: int64 [users].
ID_RULES: dict[str, Callable[[np.ndarray, np.ndarray], list[np.ndarray]]] = {
    "largest so far + 1..5": lambda last, largest: [largest + step for step in range(1, 6)],
    "last + 1..5": lambda last, largest: [last + step for step in range(1, 6)],
    "last - 1..5": lambda last, largest: [last - step for step in range(1, 6)],
    "all of them": lambda last, largest: [largest + 1, last + 1, last - 1, last + 2, last - 2],
}
SEEDS = range(5)


def hit_rates(ids: np.ndarray, offsets: np.ndarray, targets_from_end: int) -> dict[str, float]:
    """HR@5 of each rule for the target that is the last (1) or second to last (2) item of each user."""
    from_end = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(ids))
    history = np.where(from_end > targets_from_end, ids, -1)
    largest = np.maximum.reduceat(history, offsets[:-1])
    target, last = ids[offsets[1:] - targets_from_end], ids[offsets[1:] - targets_from_end - 1]
    return {
        name: float(np.mean(np.any([guess == target for guess in rule(last, largest)], axis=0)))
        for name, rule in ID_RULES.items()
    }


@pytest.mark.parametrize("targets_from_end", [2, 1], ids=["validation", "test"])
@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-sports", "yelp"])
def test_indices_do_not_give_the_next_item_away(shared_data: Path, name: str, targets_from_end: int) -> None:
    """The ids of the files do: they were given by first appearance, with the targets in place."""
    interactions = load_interactions(name, data_dir=shared_data)
    raw, offsets = interactions.frame["item"].tolist(), interactions.offsets
    chance = 5 / len(interactions.catalogue)

    in_files = hit_rates(np.array(raw, dtype=np.int64), offsets, targets_from_end)
    assert min(in_files.values()) > 5 * chance
    assert in_files["all of them"] > 100 * chance

    # One numbering can be lucky: where one popular item comes right after another, many users are hits
    # (3.2 times chance has been seen). Luck does not last for five numberings; a leak does.
    vocabs = [IdVocab.build(interactions.catalogue, [], seed=seed, user_mode="none") for seed in SEEDS]
    rates = [hit_rates(vocab.encode_items(raw), offsets, targets_from_end) for vocab in vocabs]
    for rule in ID_RULES:
        assert np.mean([rate[rule] for rate in rates]) < 2 * chance, rule
        assert max(rate[rule] for rate in rates) < 5 * chance, rule


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(vocab_module).failed == 0
