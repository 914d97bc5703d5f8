"""`Recommender` on an adapter and on the merged model of the same run: lists, users, candidates, reasons, odd requests."""

from __future__ import annotations

import doctest
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from tiny import ITEMS, recipe, train
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from genrec_llm import decoding
from genrec_llm import recommender as module
from genrec_llm.ask import write_lists
from genrec_llm.decoding import mask_seen_, top_items
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.recommender import Influence, Recommendation, Recommender, UnknownItemsWarning, UnknownUsersWarning
from genrec_llm.runs import load_run_data
from genrec_llm.tokenizer import bare_tokenizer
from genrec_llm.vocab import IdVocab

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
        ("hashed", "t5-untied", ("--users", "hashed", "--user-buckets", "5")),
        ("no-users", "t5-untied", ("--users", "none")),
        ("mixed", "t5-tied", ("--last-items-share", "0.5")),
    ):
        base = tiny.save_backbone(kind, home / kind)
        made[name] = train(base, home, home / "runs" / name, "--max-history", MAX_HISTORY, *arguments)
        recipe("merge", "--run", made[name])
    recipe("merge", "--run", made["t5-untied"], "--without-users", "--output-dir", made["t5-untied"] / "public")
    return made


@pytest.fixture(params=["adapter", "merged"])
def recommender(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Recommender:
    return Recommender.from_pretrained(runs["t5-untied"] / request.param)


@pytest.mark.parametrize("name", [*tiny.KINDS, "full", "mixed"])
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


def test_last_items_that_have_a_share_are_mixed_in_as_the_layout_says(runs: dict[str, Path]) -> None:
    mixed = Recommender.from_pretrained(runs["mixed"] / "merged")
    assert sum(mixed.layout.last_items_weights) == pytest.approx(0.5) and len(mixed.layout.last_items_weights) == 4
    mixed.layout, plain = replace(mixed.layout, last_items_weights=()), mixed.layout
    history = np.array([3, 4, 5])
    contexts = [history, history[2:], history[1:2], history[:1]]
    likely = mixed.score_tensor(contexts, np.zeros(4, dtype=np.int64)).softmax(dim=1)
    mixed.layout = plain
    scores = mixed.score_tensor([history], np.array([0]))[0]
    alone = torch.tensor([1.0, 0.85, 0.85**2])
    expected = (torch.cat([torch.tensor([0.5]), 0.5 * alone / alone.sum()])[:, None] * likely).sum(dim=0).log()
    torch.testing.assert_close(scores, expected, **ROUNDING)


@pytest.mark.parametrize("kind", [*tiny.KINDS, "mixed"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_generated_lists_are_the_one_step_lists(runs: dict[str, Path], kind: str, exclude_seen: bool) -> None:
    recommender = Recommender.from_pretrained(runs[kind] / "merged")
    data = load_run_data(runs[kind]).held_out("validation")
    asked = np.array([0, 3, 4, 17, 39, 8, 21])
    lists, values = recommender.generate_lists(data, asked, k=12, exclude_seen=exclude_seen, batch_size=3)
    scores = recommender.score_tensor([data.histories[user] for user in asked], data.users[asked])
    if exclude_seen:
        scores = mask_seen_(scores, [data.seen[user] for user in asked])
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


# --- many histories -------------------------------------------------------


def ids(found: list[Recommendation]) -> list[str]:
    return [one.item for one in found]


def random_histories(count: int) -> list[list[str]]:
    random = np.random.default_rng(0)
    return [[f"i{item}" for item in random.integers(0, 30, length)] for length in random.integers(0, 10, count)]


def test_many_histories_get_the_lists_that_each_gets_alone(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = random_histories(23)
    alone = [recommender.recommend(history, k=6) for history in histories]
    for most in (256, 5, 1):
        monkeypatch.setattr(module, "MOST_HISTORIES", most)
        together = recommender.recommend(histories, k=6)
        assert [ids(found) for found in together] == [ids(found) for found in alone]
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose([found.score for found in one], [found.score for found in other], **ROUNDING)


def test_histories_are_scored_in_batches_of_like_length_and_bounded_memory(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    plain = Recommender.score_tensor

    def watched(self: Recommender, histories: Any, users: Any) -> Tensor:
        seen.append([min(len(history), MAX_HISTORY) for history in histories])
        return plain(self, histories, users)

    monkeypatch.setattr(Recommender, "score_tensor", watched)
    monkeypatch.setattr(decoding, "MOST_SCORES", 4 * ITEMS)
    recommender.recommend(random_histories(10))
    assert [len(batch) for batch in seen] == [4, 4, 2]
    lengths = [length for batch in seen for length in batch]
    assert lengths == sorted(lengths)


def test_no_histories_are_one_empty_history_and_empty_ones_among_others_are_allowed(recommender: Recommender) -> None:
    assert isinstance(recommender.recommend([])[0], Recommendation)
    assert ids(recommender.recommend([[], ["i1"]])[0]) == ids(recommender.recommend([]))
    assert ids(recommender.recommend((("i3", "i4"),))[0]) == ids(recommender.recommend(np.array(["i3", "i4"])))  # type: ignore[call-overload]


# --- what may be in a list -------------------------------------------------


def test_candidates_are_ranked_as_they_are_in_the_whole_list(recommender: Recommender) -> None:
    everything = recommender.recommend(["i1", "i2"], k=ITEMS, exclude_seen=False)
    chosen = ["i9", "cold", "i2", "i9", "i25", "i9"]
    found = recommender.recommend(["i1", "i2"], candidates=chosen, exclude_seen=False)
    assert found == [one for one in everything if one.item in chosen] and len(found) == 4
    assert ids(recommender.recommend(["i1", "i2"], candidates=chosen)) == [one for one in ids(found) if one != "i2"]
    assert ids(recommender.recommend(["i1", "i2"], candidates=iter(chosen), k=1, exclude_seen=False)) == ids(found)[:1]
    assert recommender.recommend(["i1"], candidates=[]) == []
    assert recommender.recommend(["i1"], candidates=["i1"]) == []


def test_excluded_items_never_come_back_and_the_rest_keeps_its_order(recommender: Recommender) -> None:
    everything = recommender.recommend([["i1"], ["i5"]], k=ITEMS)
    never = [everything[0][0].item, everything[1][0].item, "no such item", "i7", "i7"]
    found = recommender.recommend([["i1"], ["i5"]], k=ITEMS, exclude=never)
    assert found == [[one for one in whole if one.item not in never] for whole in everything]
    assert recommender.recommend(["i1"], candidates=["i7", "i8"], exclude=["i7", "i8"]) == []
    assert ids(recommender.recommend(["i1"], candidates=["i7", "i8"], exclude=["i7"])) == ["i8"]


def test_unknown_items_are_left_out_with_one_warning_that_names_a_few(recommender: Recommender) -> None:
    with pytest.warns(UnknownItemsWarning) as caught:
        found = recommender.recommend([["i1", "tea", "i2"], ["mug", "tea"]], candidates=["i4", "pot", "i3"])
    (warning,) = caught
    assert "history: 2 item ids not among the 31 of the model: 'tea', 'mug'" in str(warning.message)
    assert "candidates: 1 item id not among" in str(warning.message) and "'pot'" in str(warning.message)
    assert warning.filename == __file__
    assert found == recommender.recommend([["i1", "i2"], []], candidates=["i4", "i3"])
    with pytest.warns(UnknownItemsWarning, match=r"'a', 'b', 'c', \.\.\."):
        recommender.recommend(list("abcdef"))


def test_unknown_items_are_refused_by_choice_all_at_once(recommender: Recommender) -> None:
    for ask in (
        lambda: recommender.recommend(["i1", "tea"], candidates=["pot"], unknown="refuse"),
        lambda: recommender.recommend([["i1"], ["tea"]], candidates=["pot"], unknown="refuse"),
    ):
        with pytest.raises(DataError) as caught:
            ask()
        history, candidates = caught.value.problems
        assert history.startswith("history: 1 item id not among the 31 of the model: 'tea'")
        assert candidates.startswith("candidates:") and "'pot'" in candidates
    with pytest.raises(ConfigError, match="unknown: 'drop' is none of warn, refuse"):
        recommender.recommend(["i1"], unknown="drop")  # type: ignore[call-overload]


def test_known_items_warn_of_nothing(recommender: Recommender) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommender.recommend([["i1"], []], candidates=["i2", "i3"], exclude=["unknown"])
        recommender.explain(["i1", "i2"], "i3")
        recommender.similar_items("i3")


def test_a_length_that_is_none_is_refused(recommender: Recommender) -> None:
    for k in (0, 2.5, "3"):
        with pytest.raises(ConfigError, match="a whole number of at least 1"):
            recommender.recommend(["i1"], k=k)
    assert len(recommender.recommend(["i1"], k=np.int64(2))) == 2


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"history": "i1"}, r"history: 'i1' is one id: give a list, \['i1'\]"),
        ({"history": ["i1"], "candidates": "i2"}, r"candidates: 'i2' is one id"),
        ({"history": ["i1"], "exclude": "i2"}, r"exclude: 'i2' is one id"),
        ({"history": [3, 4]}, r"history: 3, 4: an item id or user id is text, such as '3'"),
        ({"history": ["i1", None]}, r"history: None: an item id or user id is text$"),
        ({"history": [["i1"], "i2"]}, r"history: \['i1'\]: an item id"),
        ({"history": [["i1"], [2]]}, r"history: 2: an item id"),
        ({"history": ["i1"], "candidates": [5]}, r"candidates: 5: an item id"),
        ({}, r"history: none was given, .*history=\[\] for somebody new"),
        ({"user": "person1@private.example"}, r"history: none was given"),
        ({"history": ["i1"], "user": ["person1@private.example"]}, "does not go with 1 history"),
        ({"history": [["i1"], ["i2"]], "user": "person1@private.example"}, "does not go with 2 histories"),
        ({"history": [["i1"], ["i2"]], "user": ["person1@private.example"]}, "a list of as many ids"),
        ({"history": [["i1"]], "user": [7]}, "user: 7: an item id or user id is text"),
        ({"history": ["i1"], "user": 7}, "user: 7: an item id or user id is text"),
        ({"history": [["i1"]], "user": 7}, "user: 7 does not go with 1 histories"),
    ],
    ids=str,
)
def test_requests_that_are_no_lists_of_ids_are_refused_with_the_mend(
    recommender: Recommender, request_: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        recommender.recommend(**request_)


# --- users -----------------------------------------------------------------


def test_a_known_user_is_served_with_the_row_that_was_trained(runs: dict[str, Path], recommender: Recommender) -> None:
    """The row is looked up by hand in the files of the run."""
    table = json.loads((runs["t5-untied"] / "adapter" / "genrec.json").read_text())["prompt"]
    assert table["num_user_rows"] == 1 + tiny.USERS
    rows = load_file(runs["t5-untied"] / "adapter" / "id_tokens.safetensors")["user_in"]
    users = IdVocab.load(runs["t5-untied"]).users
    asked = [users[4], users[11], "nobody@else.example", None]
    assert not torch.equal(rows[5], rows[12])
    with pytest.warns(
        UnknownUsersWarning, match="1 id not among the users of the model.*'nobody@else.example'"
    ) as caught:
        found = recommender.recommend([["i3", "i4"]] * 4, user=asked, k=ITEMS)
    assert [warning.filename for warning in caught] == [__file__]
    history = recommender.vocab.encode_items(["i3", "i4"])
    for one, row in zip(found, (5, 12, 0, 0), strict=True):
        scores = recommender.scores([history], np.array([row]))[0]
        assert {each.item: each.score for each in one} == pytest.approx(
            {recommender.vocab.item_id(item): scores[item] for item in range(ITEMS) if item not in history}, **PYTEST
        )
    assert found[0] != found[1] and found[2] == found[3]
    assert ids(recommender.recommend(["i3", "i4"], user=users[4], k=ITEMS)) == ids(found[0])
    assert ids(recommender.recommend(["i3", "i4"], k=ITEMS)) == ids(found[3])


def test_lines_of_unknown_users_are_counted(recommender: Recommender, runs: dict[str, Path], tmp_path: Path) -> None:
    known = IdVocab.load(runs["t5-untied"]).users[4]
    asked = [{"history": ["i3"], "user": user} for user in ("nobody@else.example", known, None, "nobody@else.example")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    files = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = write_lists(recommender, *files, k=3, exclude_seen=True, exclude=[])
    told = "served from the history alone, since the model does not know them: 2 lines ('nobody@else.example')"
    assert done == f"4 lines answered, written to {files[1]}; {told}"


PYTEST = {"rel": 1e-4, "abs": 1e-4}
"""`ROUNDING`, for pytest.approx."""


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_hashed_users_need_no_list_and_share_their_bucket(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    alone = Path(shutil.copytree(runs["hashed"] / kind, tmp_path / kind))  # without the run around it
    recommender = Recommender.from_pretrained(alone)
    trained = IdVocab.load(runs["hashed"])
    history = recommender.vocab.encode_items(["i3"])
    for user in ("person1@private.example", "nobody@else.example"):
        scores = recommender.scores([history], np.array([trained.user_row(user)]))[0]
        best = scores.argsort()[::-1][:5].tolist()
        found = recommender.recommend(["i3"], user=user, k=5, exclude_seen=False)
        assert ids(found) == [recommender.vocab.item_id(item) for item in best]
    assert recommender.recommend(["i3"], user=user) != recommender.recommend(["i3"])


def test_a_model_that_knows_no_users_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    for folder in (runs["t5-untied"] / "public", runs["no-users"] / "adapter", runs["no-users"] / "merged"):
        recommender = Recommender.from_pretrained(folder)
        with pytest.raises(ConfigError, match=r"user: this model has no rows of users.*leave user out"):
            recommender.recommend(["i1"], user="person1@private.example")
        assert len(recommender.recommend([["i1"]], user=[None])[0]) == 10
    alone = Path(shutil.copytree(runs["t5-untied"] / "adapter", tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"users\.parquet, which is not beside this model"):
        Recommender.from_pretrained(alone).explain(["i1"], "i2", user="person1@private.example")


def test_a_list_of_users_of_another_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["t5-untied"], tmp_path / "run"))
    recommender = Recommender.from_pretrained(run / "adapter")
    vocab = IdVocab.load(run)
    IdVocab(vocab.items, vocab.users[::-1], "each", 0, vocab.seed).save_users(run / "users.parquet")
    with pytest.raises(ConfigError, match=r"users\.parquet: its users are not those that .* was trained on"):
        recommender.recommend(["i1"], user="person1@private.example")
    assert len(recommender.recommend(["i1"])) == 10


# --- text, likeness and reasons ------------------------------------------------


def test_items_come_with_all_their_text(recommender: Recommender) -> None:
    found = {one.item: one for one in recommender.recommend([], k=ITEMS)}
    assert found["i3"].text == {"title": 'Item, "3"'} and found["i14"].text == {"title": None}
    assert json.loads(json.dumps(found["i3"].text)) == found["i3"].text
    assert len({*found.values()}) == ITEMS, "recommendations can be members of a set"


@pytest.mark.parametrize("name", [*tiny.KINDS, "full"])
def test_similar_items_are_the_nearest_by_the_cosine_of_the_stored_output_rows(
    runs: dict[str, Path], name: str
) -> None:
    kind = "trained" if name == "full" else "adapter"
    rows = load_file(runs[name] / kind / "id_tokens.safetensors")["item_out"].double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for folder in (kind, "merged"):
        recommender = Recommender.from_pretrained(runs[name] / folder)
        for item in ("i3", "cold"):
            index = int(recommender.vocab.encode_items([item])[0])
            cosines = rows @ rows[index]
            order = [other for other in np.argsort(-cosines).tolist() if other != index]
            found = recommender.similar_items(item, k=5)
            assert ids(found) == [recommender.vocab.item_id(other) for other in order[:5]]
            np.testing.assert_allclose([one.score for one in found], cosines[order[:5]], atol=1e-5)  # fp32 sums
    assert len(recommender.similar_items("i3", k=1000)) == ITEMS - 1
    with pytest.raises(DataError, match="'tea'"):
        recommender.similar_items("tea")
    with pytest.raises(ConfigError, match="k: 0"):
        recommender.similar_items("i3", k=0)


def log_probability(recommender: Recommender, history: list[str], item: str, row: int = 0) -> float:
    scores = recommender.scores([recommender.vocab.encode_items(history)], np.array([row]))[0].astype(np.float64)
    return float(scores[recommender.vocab.encode_items([item])[0]] - np.logaddexp.reduce(scores))


@pytest.mark.parametrize("history", [["i3"], ["i9", "i1", "i9", "i20", "i5"], ["i1", "i2", "i3"]], ids=str)
def test_an_explanation_is_what_leaving_each_item_out_takes_away(recommender: Recommender, history: list[str]) -> None:
    user = IdVocab.load(recommender.folder.parent).users[6]  # type: ignore[union-attr]
    for row, given in ((0, None), (7, user)):
        whole = log_probability(recommender, history, "i6", row)
        wanted = [
            whole - log_probability(recommender, history[:place] + history[place + 1 :], "i6", row)
            for place in range(len(history))
        ]
        found = recommender.explain(history, "i6", user=given)
        assert [one.item for one in found] == [history[one.position] for one in found]
        assert sorted(one.position for one in found) == list(range(len(history)))
        np.testing.assert_allclose([one.effect for one in found], sorted(wanted, reverse=True), atol=1e-4)
        np.testing.assert_allclose([wanted[one.position] for one in found], [one.effect for one in found], atol=1e-4)


def test_only_what_is_read_is_explained_at_its_place_in_the_given_history(recommender: Recommender) -> None:
    long = [f"i{number}" for number in range(10, 22)]
    found = recommender.explain(long, "i6")
    assert sorted(one.position for one in found) == list(range(6, 12))
    read = recommender.explain(long[-MAX_HISTORY:], "i6")
    assert [(one.item, one.effect) for one in found] == [(one.item, one.effect) for one in read]
    with pytest.warns(UnknownItemsWarning, match="'tea'"):
        found = recommender.explain(["i1", "tea", "i3"], "i6")
    assert {one.position: one.item for one in found} == {0: "i1", 2: "i3"}
    assert {one.title for one in found} == {'Item, "1"', 'Item, "3"'}
    assert recommender.explain([], "i6") == []
    for history, item in ((["i1", "tea"], "i6"), (["i1"], "tea")):
        with pytest.raises(DataError, match="'tea'"):
            recommender.explain(history, item, unknown="refuse")


def test_an_explanation_is_one_pass(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = Recommender.score_tensor
    monkeypatch.setattr(
        Recommender, "score_tensor", lambda self, *asked: calls.append(len(asked[0])) or plain(self, *asked)
    )
    assert isinstance(recommender.explain(["i1", "i2", "i3"], "i6")[0], Influence)
    assert calls == [4]


# --- threads --------------------------------------------------------------------


def in_eight_threads(jobs: list[Callable[[Recommender], Any]], shared: Recommender, turns: int) -> list[Any]:
    """Answers of the jobs in turn, all threads on one model."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda turn: jobs[turn % len(jobs)](shared), range(turns)))


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_eight_threads_at_once_get_what_one_gets(runs: dict[str, Path], kind: str) -> None:
    data = load_run_data(runs["t5-untied"]).held_out("validation")
    asked, user = np.array([0, 3, 4, 17, 39]), IdVocab.load(runs["t5-untied"]).users[6]
    one = Recommender.from_pretrained(runs["t5-untied"] / kind)
    shared = Recommender.from_pretrained(runs["t5-untied"] / kind)  # nothing is warmed up before the threads start
    jobs: list[Callable[[Recommender], Any]] = [
        lambda model: model.recommend(["i1", "i2"], k=5),
        lambda model: model.recommend(random_histories(20), k=5, exclude=["i3"]),
        lambda model: model.recommend(["i4"], user=user, candidates=["i1", "i2", "i3"]),
        lambda model: model.explain(["i9", "i1", "i20"], "i6"),
        lambda model: model.similar_items("i9"),
    ]
    if kind == "merged":
        jobs.append(lambda model: [a.tolist() for a in model.generate_lists(data, asked, k=5, exclude_seen=True)])
    expected = [job(one) for job in jobs]
    found = in_eight_threads(jobs, shared, 80)
    assert all(answer == expected[turn % len(jobs)] for turn, answer in enumerate(found))


def test_asking_keeps_no_gradients_and_leaves_the_weights_alone(recommender: Recommender) -> None:
    before = {name: value.clone() for name, value in recommender.model.state_dict().items()}
    assert recommender.score_tensor([np.array([1])], np.array([0])).is_inference()
    recommender.recommend([["i1"], []])
    recommender.explain(["i1"], "i2")
    assert all(torch.equal(value, before[name]) for name, value in recommender.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_call_turns_the_rows_of_the_catalogue_into_another_precision(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    recommender = Recommender.from_pretrained(runs["t5-untied"] / "merged", dtype=dtype)
    shapes = []
    plain = Tensor.float
    monkeypatch.setattr(
        Tensor,
        "float",
        lambda self: (shapes.append(self.shape) if self.dtype != torch.float32 else None) or plain(self),
    )
    recommender.recommend(["i1"])
    recommender.similar_items("i1")
    assert all(shape[0] != ITEMS for shape in shapes)
    if dtype == torch.float32:
        head = recommender.model.get_output_embeddings().weight
        assert recommender._rows.untyped_storage().data_ptr() == head.untyped_storage().data_ptr()


# --- where it runs --------------------------------------------------------------


def test_devices_precisions_and_bases_that_do_not_go_are_refused(runs: dict[str, Path]) -> None:
    adapter, merged = runs["t5-tied"] / "adapter", runs["t5-tied"] / "merged"
    for dtype in (torch.float16, torch.int8):
        with pytest.raises(ConfigError, match=r"fp16 overflows in T5.*choose float32 or bfloat16"):
            Recommender.from_pretrained(adapter, dtype=dtype)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: cuda cannot be used here"):
            Recommender.from_pretrained(adapter, device="cuda")
    with pytest.raises(ConfigError, match="holds a whole merged model: leave backbone out"):
        Recommender.from_pretrained(merged, backbone="google/flan-t5-small")
    with pytest.raises(ConfigError, match="quantization: '2bit' is none of 8bit, 4bit"):
        Recommender.from_pretrained(merged, quantization="2bit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="full tuning's state is not quantised: merge it"):
        Recommender.from_pretrained(runs["full"] / "trained", quantization="8bit")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_gpu_is_taken_where_there_is_one_and_gives_the_same_lists(runs: dict[str, Path], kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    there = Recommender.from_pretrained(runs["t5-untied"] / kind)
    here = Recommender.from_pretrained(runs["t5-untied"] / kind, device="cpu")
    assert there.device.type == "cuda" and here.device.type == "cpu"
    histories = random_histories(20)
    for one, other in zip(there.recommend(histories), here.recommend(histories), strict=True):
        np.testing.assert_allclose([found.score for found in one], [found.score for found in other], rtol=1e-3)
    assert ids(there.similar_items("i3")) == ids(here.similar_items("i3"))
    assert [one.position for one in there.explain(["i1", "i9"], "i3")] == [
        one.position for one in here.explain(["i1", "i9"], "i3")
    ]


def test_the_base_may_be_given_where_it_has_moved_to(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["t5-tied"], tmp_path / "run"))
    base = Path(json.loads((run / "run.json").read_text())["arguments"]["model"]["backbone"])
    moved = shutil.copytree(base, tmp_path / "moved")
    found = Recommender.from_pretrained(run / "adapter", backbone=str(moved)).recommend(["i1"])
    assert found == Recommender.from_pretrained(run / "adapter").recommend(["i1"])
    with pytest.raises(ConfigError, match="is not the one it was trained on"):
        Recommender.from_pretrained(run / "adapter", backbone=str(base.parent / "bart"))


# --- quantised ------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose layers are as wide as a 4-bit kernel's block of 64."""
    home = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    tokenizer = bare_tokenizer("t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=32, num_heads=2, d_ff=128, num_layers=2, num_decoder_layers=1
    )
    T5ForConditionalGeneration(config).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    run = train(home / "base", home, home / "run", "--num-train-epochs", 8)
    recipe("merge", "--run", run)
    return run


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize(("quantization", "bits", "least"), [("8bit", 8, 0.995), ("4bit", 4, 0.95)])
def test_quantised_layers_are_smaller_and_rank_nearly_alike(
    wide_run: Path, kind: str, quantization: Any, bits: int, least: float
) -> None:
    """8 bits round a weight to 1/254 of its row's largest, nf4 to about 1/16 of its block's: ranks agree that well."""
    pytest.importorskip("bitsandbytes")
    plain = Recommender.from_pretrained(wide_run / kind, device="cpu")
    small = Recommender.from_pretrained(wide_run / kind, device="cpu", quantization=quantization)
    weights = dict(plain.model.named_parameters())
    shrunk = {
        name: value.nbytes / weights[name.replace(".base_layer", "") if name not in weights else name].nbytes
        for name, value in small.model.named_parameters()
        if value.dtype in (torch.int8, torch.uint8)
    }
    assert shrunk and set(shrunk.values()) == {bits / 32}
    kept = [name for name in weights if name not in shrunk]
    # Attention (q, k, v, o) and T5's wi, in 2 encoder layers and 1 decoder layer with cross-attention.
    assert len(shrunk) == 2 * 5 + 9
    assert any("shared" in name or "item_in" in name for name in kept)
    assert {value.dtype for name, value in small.model.named_parameters() if name in kept} == {torch.float32}
    histories = [np.random.default_rng(turn).integers(0, ITEMS, 5) for turn in range(20)]
    users = np.arange(20)
    wanted, found = plain.scores(histories, users), small.scores(histories, users)
    assert not np.array_equal(wanted, found)
    agreement = [spearmanr(one, other).statistic for one, other in zip(wanted, found, strict=True)]
    assert np.mean(agreement) > least
    assert len(small.recommend(["i1", "i2"])) == 10 and len(small.explain(["i1", "i2"], "i3")) == 2


def test_eight_threads_at_once_on_a_quantised_model(wide_run: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for quantization in ("8bit", "4bit"):
        one, shared = (
            Recommender.from_pretrained(wide_run / "merged", device="cpu", quantization=quantization)  # type: ignore[arg-type]
            for _ in range(2)
        )
        expected = one.recommend(["i1", "i2"], k=5)
        found = in_eight_threads([lambda model: model.recommend(["i1", "i2"], k=5)], shared, 32)
        assert all(answer == expected for answer in found)


def test_a_base_whose_weights_were_changed_is_found_out_when_it_is_quantised(wide_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    other = T5ForConditionalGeneration.from_pretrained(wide_run.parent / "base")
    with torch.no_grad():
        other.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(wide_run.parent / "base").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not the one it was trained on: its weights are others"):
        Recommender.from_pretrained(wide_run / "adapter", backbone=str(tmp_path), device="cpu", quantization="8bit")


def test_a_device_that_cannot_run_quantised_layers_is_named(wide_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("bitsandbytes").nn

    def no_kernel(*_: object) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(layers.Linear4bit, "forward", no_kernel)
    with pytest.raises(ConfigError, match=r"bitsandbytes cannot do 4bit for this model on cpu \(no kernel\): choose"):
        Recommender.from_pretrained(wide_run / "merged", device="cpu", quantization="4bit")


def test_without_bitsandbytes_quantisation_is_refused_with_what_to_install(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    for kind in ("adapter", "merged"):
        with pytest.raises(ConfigError, match=r"4bit needs bitsandbytes.*pip install 'genrec-llm\[quant\]'"):
            Recommender.from_pretrained(runs["t5-tied"] / kind, quantization="4bit")


# --- the documentation ----------------------------------------------------------


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shop where milk is bought before jam, and tea before a mug before a pot."""
    shop = ("tea", "mug", "pot", "milk", "jam", "bread")
    lines = [f"u{user},{shop[(user + step) % 6]},{step}" for user in range(60) for step in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *lines]))
    (tmp_path / "items.csv").write_text("\n".join(["item,title", *(f"{item},A {item}" for item in shop)]))
    recipe(
        "finetune", "--dataset", tmp_path / "log.csv", "--items-file", tmp_path / "items.csv", "--backbone",
        tiny.save_backbone("t5-untied", tmp_path / "base"), "--output-dir", tmp_path / "runs" / "shop", "--use_cpu",
        "--disable_tqdm", "true", "--num-train-epochs", 6, "--global-batch-size", 32, "--learning-rate", "5e-3",
    )  # fmt: skip
    recipe("merge", "--run", tmp_path / "runs" / "shop")
    monkeypatch.chdir(tmp_path)
    globs = {"recommender": Recommender.from_pretrained("runs/shop/adapter"), "Recommender": Recommender}
    examples = {
        test.name: test for test in doctest.DocTestFinder().find(module, "recommender", globs=globs) if test.examples
    }
    assert {name.split(".")[-1] for name in examples} == {
        "Recommender", "from_pretrained", "recommend", "similar_items", "explain",
    }  # fmt: skip
    told: list[str] = []
    for test in examples.values():
        assert not any(doctest.SKIP in example.options for example in test.examples)
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=told.append)
    assert not told, "".join(told)
