"""`Recommender` on an adapter and on the merged model of the same run: lists, seen items, titles, odd requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import ITEMS, recipe, train

from genrec_llm.decoding import mask_seen, top_items
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.recommender import Recommender
from genrec_llm.runs import load_run_data

HISTORIES = [["i3"], ["i1", "i2"], ["i9", "i1", "i9", "i20", "i5"], [], ["cold"]]
MAX_HISTORY = 6
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
"""Adapters beside the weights or added to them, in fp32."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished and merged runs by backbone, and one of full tuning."""
    home = tmp_path_factory.mktemp("recommender")
    made = {}
    for name, kind, arguments in (
        *((kind, kind, ()) for kind in tiny.KINDS),
        ("full", "t5-tied", ("--tuning", "full")),
    ):
        base = tiny.save_backbone(kind, home / kind)
        made[name] = train(base, home, home / "runs" / name, "--max-history", MAX_HISTORY, *arguments)
        recipe("merge", "--run", made[name])
    return made


@pytest.fixture(params=["adapter", "merged"])
def recommender(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Recommender:
    return Recommender.from_pretrained(runs["t5-untied"] / request.param)


@pytest.mark.parametrize("name", [*tiny.KINDS, "full"])
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_the_adapter_and_the_merged_model_give_the_same_list(
    runs: dict[str, Path], name: str, history: list[str], exclude_seen: bool
) -> None:
    kinds = ("trained" if name == "full" else "adapter", "merged")
    first, second = (
        Recommender.from_pretrained(runs[name] / kind).recommend(history, k=20, exclude_seen=exclude_seen)
        for kind in kinds
    )
    assert [found.item for found in first] == [found.item for found in second] and len(first) == 20
    assert [found.title for found in first] == [found.title for found in second]
    np.testing.assert_allclose([found.score for found in first], [found.score for found in second], **ROUNDING)


def test_a_list_is_the_best_scored_items_best_first(recommender: Recommender) -> None:
    history = HISTORIES[2]
    indices = recommender.vocab.encode_items(history)
    scores = recommender.score_tensor([indices], np.array([0]))[0]
    assert scores.shape == (ITEMS,) and scores.dtype == torch.float32
    found = recommender.recommend(history, k=7, exclude_seen=False)
    best = scores.argsort(descending=True)[:7].tolist()
    assert [one.item for one in found] == [recommender.vocab.item_id(index) for index in best]
    assert [one.score for one in found] == scores[best].tolist()


def test_seen_items_are_left_out_and_the_others_keep_their_order(recommender: Recommender) -> None:
    for history in HISTORIES:
        everything = recommender.recommend(history, k=ITEMS, exclude_seen=False)
        unseen = recommender.recommend(history, k=ITEMS)
        assert unseen == [found for found in everything if found.item not in history]
        assert len(everything) == ITEMS and len(unseen) == ITEMS - len(set(history))


def test_a_longer_history_is_read_from_its_end_but_all_of_it_counts_as_seen(recommender: Recommender) -> None:
    long = [f"i{number}" for number in range(20)]
    read = recommender.recommend(long[-MAX_HISTORY:], k=ITEMS, exclude_seen=False)
    assert recommender.recommend(long, k=ITEMS, exclude_seen=False) == read
    assert recommender.recommend(long, k=ITEMS) == [found for found in read if found.item not in long]


def test_a_new_user_without_history_gets_a_full_list(recommender: Recommender) -> None:
    found = recommender.recommend([], k=10)
    assert len({one.item for one in found}) == 10
    assert np.isfinite([one.score for one in found]).all()


def test_more_items_than_there_are_gives_those_there_are(recommender: Recommender) -> None:
    assert len(recommender.recommend(["i1"], k=10_000, exclude_seen=False)) == ITEMS
    assert len(recommender.recommend(["i1", "i1", "i2"], k=10_000)) == ITEMS - 2
    assert recommender.recommend([f"i{number}" for number in range(30)] + ["cold"], k=5) == []


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_item_is_refused(recommender: Recommender, k: int) -> None:
    with pytest.raises(ConfigError, match=f"k: {k} items cannot be recommended"):
        recommender.recommend(["i1"], k=k)


def test_items_that_the_model_does_not_know_are_named(recommender: Recommender) -> None:
    with pytest.raises(DataError) as caught:
        recommender.recommend(["i1", "tea", "i2", "mug", "tea"])
    (problem,) = caught.value.problems
    assert "2 item id(s)" in problem and "'tea', 'mug'" in problem and f"the {ITEMS} of the vocabulary" in problem
    with pytest.raises(DataError, match="item id"):
        recommender.recommend([3, 4])  # type: ignore[list-item]  # numbers are no raw ids


def test_titles_are_those_of_the_item_file_and_none_where_it_has_none(recommender: Recommender) -> None:
    titles = {found.item: found.title for found in recommender.recommend([], k=ITEMS)}
    assert titles["i3"] == 'Item, "3"' and titles["cold"] == "Never seen" and titles["i14"] is None


def test_without_an_item_file_there_are_no_titles(tmp_path: Path) -> None:
    base, log = tiny.save_backbone("t5-tied", tmp_path / "base"), tiny.save_log(tmp_path / "log.csv")
    recipe(
        "finetune", "--dataset", log, "--backbone", base, "--output-dir", tmp_path / "run", "--use_cpu",
        "--disable_tqdm", "true", "--max-steps", 1, "--global-batch-size", 32,
    )  # fmt: skip
    assert {found.title for found in Recommender.from_pretrained(tmp_path / "run" / "adapter").recommend([])} == {None}


def test_user_rows_change_the_scores_and_unknown_ones_count_as_the_unknown_user(recommender: Recommender) -> None:
    history = [np.array([3, 4])]
    unknown, known = (recommender.scores(history, np.array([user])) for user in (0, 5))
    assert np.array_equal(recommender.scores(history, np.array([10_000])), unknown)
    assert np.abs(known - unknown).max() > 1e-4


def test_scores_do_not_depend_on_who_else_is_asked_about(recommender: Recommender) -> None:
    histories = [np.arange(length) for length in (0, 1, 5, 2)]
    users = np.array([0, 4, 0, 2])
    together = recommender.scores(histories, users)
    alone = [recommender.scores([history], users[place : place + 1])[0] for place, history in enumerate(histories)]
    np.testing.assert_allclose(together, np.stack(alone), **ROUNDING)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_generated_lists_are_the_one_step_lists(runs: dict[str, Path], kind: str, exclude_seen: bool) -> None:
    recommender = Recommender.from_pretrained(runs[kind] / "merged")
    data = load_run_data(runs[kind]).held_out("validation")
    asked = np.array([0, 3, 4, 17, 39, 8, 21])
    lists, values = recommender.generate_lists(data, asked, k=12, exclude_seen=exclude_seen, batch_size=3)
    scores = recommender.score_tensor([data.histories[user] for user in asked], data.users[asked])
    if exclude_seen:
        scores = mask_seen(scores, [data.seen[user] for user in asked])
    expected, expected_values = top_items(scores, 12)
    assert lists.tolist() == expected.tolist()
    np.testing.assert_allclose(values, expected_values.numpy(), **ROUNDING)


def test_bf16_weights_still_rank_in_fp32(runs: dict[str, Path]) -> None:
    for kind in ("adapter", "merged"):
        scores = Recommender.from_pretrained(runs["t5-untied"] / kind, dtype=torch.bfloat16).score_tensor(
            [np.array([1, 2])], np.array([0])
        )
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.to(torch.bfloat16).float()), "scores that went through bf16 have ties"


def test_a_directory_that_is_no_model_is_refused_with_what_to_give(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory: give an adapter/ or merged/"):
        Recommender.from_pretrained(tmp_path / "absent")
    for folder in (tmp_path, runs["t5-tied"]):
        with pytest.raises(ConfigError, match=r"no genrec\.json: not a directory that genrec_llm exported"):
            Recommender.from_pretrained(folder)


def test_one_id_instead_of_a_list_is_refused(recommender: Recommender) -> None:
    with pytest.raises(DataError, match=r"history: 'i1' is one id: give a list, \['i1'\]"):
        recommender.recommend("i1")
