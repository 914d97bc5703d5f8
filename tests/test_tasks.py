"""Prompts, masked-item and next-item examples, and the draws behind them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from genrec_llm.data import Interactions, leave_last_two_out
from genrec_llm.errors import ConfigError
from genrec_llm.tasks import (
    IGNORED,
    LAST_ITEMS,
    Batch,
    MaskedItem,
    NextItem,
    PromptLayout,
    Sequences,
    Task,
    last_items_weights,
    uniform,
)
from genrec_llm.tokenizer import prompt_layout
from genrec_llm.vocab import IdVocab

PAD, EOS = 0, 1
ITEM, USER = 100, 200
"""Ids that are read off at sight: item 5 is 105, user row 2 is 202."""


def layout(**changes: object) -> PromptLayout:
    values: dict[str, object] = {
        "base": ITEM,
        "num_items": USER - ITEM,
        "num_user_rows": 50,
        "mask_ids": (99, 97, 98),
        "eos_id": EOS,
        "pad_id": PAD,
        "max_history": 6,
    }
    return PromptLayout(**(values | changes))


def sequences_of(*lists: list[int]) -> Sequences:
    """User rows are 1, 2, … in the order of the lists."""
    return Sequences(
        items=np.array([item for items in lists for item in items], dtype=np.int64),
        offsets=np.cumsum([0, *map(len, lists)]),
        users=np.arange(1, len(lists) + 1),
    )


def random_sequences(users: int = 40, longest: int = 15, seed: int = 0) -> Sequences:
    random = np.random.default_rng(seed)
    return sequences_of(*[random.permutation(100)[: random.integers(1, longest + 1)].tolist() for _ in range(users)])


def rows_of(batch: Batch) -> list[tuple[list[int], list[tuple[list[int], int]]]]:
    """Each row as (its tokens without padding, its (decoder prompt, label) pairs)."""
    tokens = [
        ids[: int(mask.sum())].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    labels = batch["labels"].reshape(len(tokens), -1)
    prompts = batch["decoder_input_ids"].reshape(*labels.shape, -1)
    targets = [
        [(prompt.tolist(), int(label)) for prompt, label in zip(*row, strict=True) if label != IGNORED]
        for row in zip(prompts, labels, strict=True)
    ]
    return list(zip(tokens, targets, strict=True))


def restored(tokens: list[int], labels: list[int]) -> list[int]:
    """The item indices of a masked-item row, its masks filled in; asserts that nothing else is hidden."""
    user, *body, end = tokens
    assert user >= USER and end == EOS
    left = iter(labels)
    items = [next(left) if token in layout().mask_ids else token - ITEM for token in body]
    assert list(left) == [] and all(0 <= item < 100 for item in items)
    return items


# --- the prompt ---------------------------------------------------------------------


def test_a_history_is_laid_out_as_written_by_hand() -> None:
    batch = layout().encode_histories([np.array([5, 6]), np.array([7]), np.array([], dtype=int)], np.array([1, 0, 2]))
    assert batch["input_ids"].tolist() == [
        [201, 105, 106, 99, EOS],
        [200, 107, 99, EOS, PAD],
        [202, 99, EOS, PAD, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    # The left neighbour of the mask; where there is no item, the user.
    assert batch["decoder_input_ids"].tolist() == [[99, 106], [99, 107], [99, 202]]
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_without_a_user_token_only_the_decoder_of_an_empty_history_sees_the_user() -> None:
    plain = layout(user_token=False)
    batch = plain.encode_histories([np.array([5, 6]), np.array([], dtype=int)], np.array([0, 0]))
    assert batch["input_ids"].tolist() == [[105, 106, 99, EOS], [99, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[99, 106], [99, 200]]


def test_the_bare_mask_prompt_has_the_same_input_and_one_decoder_token() -> None:
    histories, users = [np.array([5, 6]), np.array([], dtype=int)], np.array([1, 2])
    bare = layout(decoder_prompt="mask").encode_histories(histories, users)
    assert bare["decoder_input_ids"].tolist() == [[99], [99]]
    assert np.array_equal(bare["input_ids"], layout().encode_histories(histories, users)["input_ids"])


def test_only_the_most_recent_items_are_read() -> None:
    batch = layout(max_history=2).encode_histories([np.array([3, 4, 5, 6]), np.array([7, 8])], np.array([1, 2]))
    assert batch["input_ids"].tolist() == [[201, 105, 106, 99, EOS], [202, 107, 108, 99, EOS]]


def test_histories_that_are_all_empty_are_laid_out() -> None:
    batch = layout().encode_histories([np.array([], dtype=int)] * 2, np.array([0, 3]))
    assert batch["input_ids"].tolist() == [[200, 99, EOS], [203, 99, EOS]]
    assert batch["decoder_input_ids"].tolist() == [[99, 200], [99, 203]]


def test_several_masks_are_told_apart_and_look_at_the_nearest_visible_item_on_their_left() -> None:
    items = np.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
    masked = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=bool)  # beyond a row's length nothing counts
    batch = layout().encode(items, np.array([5, 2]), np.array([4, 0]), masked, targets=3)
    assert batch["input_ids"].tolist() == [
        [204, 99, 102, 97, 98, 105, EOS],
        [200, 106, 99, EOS, PAD, PAD, PAD],
    ]
    assert batch["attention_mask"].sum(axis=1).tolist() == [7, 4]
    assert batch["labels"].tolist() == [[1, 3, 4], [7, IGNORED, IGNORED]]
    # No item to the left of the first: the user. The third's neighbour is hidden itself, so it looks past it.
    assert batch["decoder_input_ids"].tolist() == [
        [[99, 204], [97, 102], [98, 102]],
        [[99, 106], [PAD, PAD], [PAD, PAD]],
    ]


def test_a_row_without_a_hidden_item_has_no_label() -> None:
    masked = np.array([[0, 0, 0], [1, 1, 0]], dtype=bool)
    batch = layout().encode(np.array([[1, 2, 3], [4, 5, 6]]), np.array([3, 3]), np.array([1, 2]), masked, targets=2)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED], [4, 5]]


def test_the_mask_tokens_are_looked_up_not_computed(shared_data: Path) -> None:
    vocab = IdVocab.build(pd.DataFrame({"item": ["a", "b"]}), ["u"], seed=0)
    real = AutoTokenizer.from_pretrained(shared_data / "t5-tokenizer")
    assert prompt_layout(real, vocab, max_history=3).mask_ids[:3] == (32099, 32098, 32097)

    places = {
        "<pad>": 0,
        "</s>": 1,
        "<unk>": 2,
        "<extra_id_1>": 3,
        "<extra_id_2>": 7,
        "<extra_id_0>": 5,
        "x": 4,
        "y": 6,
    }
    shuffled = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(places, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    found = prompt_layout(shuffled, vocab, max_history=3)
    assert found.mask_ids == (5, 3, 7)
    assert (found.base, found.first_user_id, found.vocab_size) == (8, 10, 12)


def test_a_layout_survives_json() -> None:
    more: dict[str, object] = {"decoder_prompt": "mask", "user_token": False, "last_items_weights": (0.4, 0.2)}
    original = layout(**more)
    assert PromptLayout.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    assert original.without_users() == layout(**more, num_user_rows=1)
    earlier = {name: value for name, value in layout().to_dict().items() if name != "last_items_weights"}
    assert PromptLayout.from_dict(earlier) == layout()


def test_the_contexts_of_a_ranking_are_the_history_and_its_last_items() -> None:
    mixing = layout(max_history=3, last_items_weights=(0.25, 0.125, 0.0625, 0.0625))
    histories = [np.array([5, 6, 7, 8]), np.array([3, 4]), np.array([9]), np.array([], dtype=int)]
    asked, weights = zip(*mixing.contexts(histories), strict=True)
    assert [[context.tolist() for context in of] for of in zip(*asked, strict=True)] == [
        [[5, 6, 7, 8], [8], [7], [6], [5]],
        [[3, 4], [4], [3], [3, 4], [3, 4]],
        [[9], [9], [9], [9], [9]],
        [[], [], [], [], []],
    ]
    # What is not there, or too long ago to be read, weighs nothing, and the others share what it had.
    np.testing.assert_allclose(
        np.stack(weights, axis=1),
        [
            [0.5, 2 / 7, 1 / 7, 1 / 14, 0],
            [0.5, 1 / 3, 1 / 6, 0, 0],
            [0.5, 0.5, 0, 0, 0],
            [1, 0, 0, 0, 0],
        ],
    )


def test_a_layout_without_last_items_asks_with_the_histories_alone() -> None:
    histories, users = [np.array([5, 6]), np.array([], dtype=int)], np.array([1, 2])
    batch, weights = layout().encode_contexts(histories, users)
    assert weights.tolist() == [[1.0], [1.0]]
    assert {name: values.tolist() for name, values in batch.items()} == {
        name: values.tolist() for name, values in layout().encode_histories(histories, users).items()
    }


def test_the_contexts_of_one_user_stand_together() -> None:
    mixing = layout(last_items_weights=(0.25, 0.125))
    batch, weights = mixing.encode_contexts([np.array([5, 6]), np.array([7])], np.array([1, 2]))
    tokens = [row[row != PAD].tolist() for row in batch["input_ids"]]
    assert tokens == [
        [USER + 1, ITEM + 5, ITEM + 6, 99, EOS], [USER + 1, ITEM + 6, 99, EOS], [USER + 1, ITEM + 5, 99, EOS],
        *[[USER + 2, ITEM + 7, 99, EOS]] * 3,
    ]  # fmt: skip
    assert weights.shape == (2, 3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_each_last_item_weighs_a_little_less_than_the_one_after_it(share: float) -> None:
    weights = last_items_weights(share)
    assert sum(weights) == pytest.approx(share) and len(weights) == (LAST_ITEMS if share else 0)
    assert [early / late for late, early in pairwise(weights)] == pytest.approx([0.85] * max(0, len(weights) - 1))


# --- sequences and leakage ---------------------------------------------------------------------


def small_log() -> Interactions:
    """Every user has items of their own, numbered by place, so that each token tells where it came from."""
    lengths = {"ann": 3, "bob": 4, "cyd": 7, "dan": 12, "eve": 5}
    rows = [(user, f"{user}-{place}", place) for user, length in lengths.items() for place in range(length)]
    return Interactions.from_log("small", pd.DataFrame(rows, columns=["user", "item", "timestamp"]))


def test_sequences_hold_a_split_in_order_also_after_rows_were_selected() -> None:
    log = small_log()
    vocab = IdVocab.build(log.catalogue, log.users, seed=1)
    split = leave_last_two_out(log)["validation"]
    for part in (split, split.select([4, 1]), split.shuffle(seed=0).select(range(1, 4))):
        encoded = Sequences.encode(part, vocab, "history")
        assert len(encoded) == len(part)
        for row, example in enumerate(part):
            assert [vocab.item_id(int(item)) for item in encoded[row]] == example["history"]
            assert encoded.users[row] == vocab.user_row(example["user"])
        assert encoded.lengths().tolist() == [len(example["history"]) for example in part]


@pytest.mark.parametrize("max_history", [3, 50])
def test_validation_and_test_items_are_never_in_a_training_example(max_history: int) -> None:
    log = small_log()
    vocab = IdVocab.build(log.catalogue, log.users, seed=0)
    splits = leave_last_two_out(log)
    held = {target for name in ("validation", "test") for target in splits[name]["target"]}
    assert len(held) == 10
    forbidden = set(ITEM + vocab.encode_items(sorted(held)))
    allowed = set(ITEM + np.arange(vocab.num_items)) - forbidden

    prompts = layout(num_items=vocab.num_items, num_user_rows=vocab.num_user_rows, max_history=max_history)
    train = Sequences.encode(splits["train"], vocab, "items")
    tasks: list[Task] = [
        MaskedItem(train, prompts, seed=0, masks_per_sequence=2, last_item_probability=0.5),
        NextItem(train, prompts, seed=0),
        NextItem(train, prompts, seed=0, targets="last"),
    ]
    seen_anywhere = set()
    for task in tasks:
        for epoch in range(20):
            batch = task.batch(epoch, np.arange(len(task.lengths)))
            seen = {
                *batch["input_ids"].ravel(),
                *batch["decoder_input_ids"].ravel(),
                *(ITEM + batch["labels"][batch["labels"] != IGNORED]),
            }
            assert not seen & forbidden
            seen_anywhere |= seen
    # ann has one training item, and so no example; everything else is seen.
    assert allowed - seen_anywhere == set(ITEM + vocab.encode_items(["ann-0"]))


# --- masked item ---------------------------------------------------------------------


@pytest.mark.parametrize("masks", [1, 2, 3])
def test_a_masked_row_is_a_window_of_its_users_sequence_with_the_right_number_of_masks(masks: int) -> None:
    train = random_sequences()
    task = MaskedItem(train, layout(), seed=4, masks_per_sequence=masks)
    assert task.owners.tolist() == np.flatnonzero(train.lengths() >= 2).tolist()
    examples = np.arange(len(task.lengths))
    for epoch in range(5):
        for example, (tokens, targets) in zip(examples, rows_of(task.batch(epoch, examples)), strict=True):
            sequence = train[task.owners[example]].tolist()
            length = min(len(sequence), 6)
            assert task.lengths[example] == length + 2 == len(tokens)  # user and end
            assert len(targets) == min(masks, length - 1)  # one item at least stays visible
            assert tokens[0] in (USER, USER + train.users[task.owners[example]])
            window = restored(tokens, [label for _, label in targets])
            assert any(window == sequence[start : start + length] for start in range(len(sequence) - length + 1))


def test_every_place_and_every_window_is_drawn_about_equally_often() -> None:
    sequence = list(range(10, 18))  # 8 items in windows of 6: three windows
    task = MaskedItem(sequences_of(sequence), layout(), seed=0, user_dropout=0.3)
    starts, places, unknown, epochs = np.zeros(3), np.zeros(6), 0, 3000
    for epoch in range(epochs):
        ((tokens, ((_, label),)),) = rows_of(task.batch(epoch, np.array([0])))
        window = restored(tokens, [label])
        starts[window[0] - 10] += 1
        places[window.index(label)] += 1
        unknown += tokens[0] == USER
    # Five standard deviations of a binomial count; the draws are fixed by the seed, so this never flickers.
    assert np.abs(starts - epochs / 3).max() < 5 * (epochs * 2 / 9) ** 0.5
    assert np.abs(places - epochs / 6).max() < 5 * (epochs * 5 / 36) ** 0.5
    assert abs(unknown - 0.3 * epochs) < 5 * (epochs * 0.21) ** 0.5


@pytest.mark.parametrize("masks", [1, 3])
def test_the_last_item_is_always_masked_if_its_probability_is_one(masks: int) -> None:
    train = random_sequences()
    task = MaskedItem(train, layout(), seed=0, masks_per_sequence=masks, last_item_probability=1.0)
    for epoch in range(10):
        for tokens, targets in rows_of(task.batch(epoch, np.arange(len(task.lengths)))):
            assert tokens[-2] in layout().mask_ids
            assert targets[-1][1] == restored(tokens, [label for _, label in targets])[-1]


def test_a_user_is_never_dropped_or_always_dropped_at_the_ends_of_the_range() -> None:
    train = random_sequences()
    for dropout, expected in ((0.0, False), (1.0, True)):
        for task in (
            MaskedItem(train, layout(), seed=0, user_dropout=dropout),
            NextItem(train, layout(), seed=0, user_dropout=dropout),
        ):
            unknown = task.batch(0, np.arange(len(task.lengths)))["input_ids"][:, 0] == USER
            assert (unknown == expected).all()


@pytest.mark.parametrize("masks", [0, 4])
def test_more_masks_than_the_backbone_has_are_refused(masks: int) -> None:
    with pytest.raises(ConfigError, match=f"masks_per_sequence: {masks} is not between 1 and 3"):
        MaskedItem(random_sequences(), layout(), seed=0, masks_per_sequence=masks)


def test_a_history_of_one_item_leaves_nothing_to_see_beside_the_mask() -> None:
    with pytest.raises(ConfigError, match=r"max_history: of 1 item .* at least 2"):
        MaskedItem(random_sequences(), layout(max_history=1), seed=0)


def test_a_training_part_without_a_pair_of_items_is_refused() -> None:
    lonely = sequences_of([1], [2], [])
    with pytest.raises(ConfigError, match="no user has two items"):
        MaskedItem(lonely, layout(), seed=0)
    with pytest.raises(ConfigError, match="no user has two items"):
        NextItem(lonely, layout(), seed=0)


# --- next item ---------------------------------------------------------------------


def written_out(sequences: Sequences, only_last: bool, max_history: int) -> list[tuple[int, list[int], int]]:
    """(user row, history, target) of every prefix, by plain loops."""
    examples = []
    for user in range(len(sequences)):
        items = sequences[user].tolist()
        for end in range(len(items) - 1 if only_last else 1, len(items)):
            if end > 0:
                examples.append((int(sequences.users[user]), items[max(0, end - max_history) : end], items[end]))
    return examples


@pytest.mark.parametrize("targets", ["all", "last"])
def test_every_prefix_is_an_example_exactly_once(targets: str) -> None:
    train = random_sequences()
    task = NextItem(train, layout(), seed=0, targets=targets, user_dropout=0.0)  # type: ignore[arg-type]
    found = []
    for tokens, ((prompt, label),) in rows_of(task.batch(0, np.arange(len(task.lengths)))):
        user, *body, mask, end = tokens
        assert (mask, end) == (99, EOS)
        assert prompt == [99, body[-1]]
        found.append((user - USER, [token - ITEM for token in body], label))
    assert task.lengths.tolist() == [len(history) + 3 for _, history, _ in found]  # user, mask and end
    assert sorted(found) == sorted(written_out(train, targets == "last", 6))


# --- draws ---------------------------------------------------------------------


def both_tasks(seed: int) -> list[Task]:
    train = random_sequences()
    return [
        MaskedItem(train, layout(), seed=seed, masks_per_sequence=2, last_item_probability=0.3, user_dropout=0.5),
        NextItem(train, layout(), seed=seed, user_dropout=0.5),
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["masked", "next"])
def test_an_example_is_the_same_in_whatever_batch_and_order_it_is_asked_for(kind: int) -> None:
    task = both_tasks(seed=7)[kind]
    examples = np.arange(len(task.lengths))
    whole = rows_of(task.batch(3, examples))
    backwards = rows_of(task.batch(3, examples[::-1].copy()))[::-1]
    alone = [rows_of(task.batch(3, examples[place : place + 1]))[0] for place in examples]
    other_object = rows_of(both_tasks(seed=7)[kind].batch(3, examples))
    assert whole == backwards == alone == other_object


@pytest.mark.parametrize("kind", [0, 1], ids=["masked", "next"])
def test_the_draws_differ_between_epochs_and_between_seeds(kind: int) -> None:
    task, other = both_tasks(seed=7)[kind], both_tasks(seed=8)[kind]
    examples = np.arange(len(task.lengths))
    first = rows_of(task.batch(0, examples))
    for changed in (task.batch(1, examples), other.batch(0, examples)):
        same = sum(one == two for one, two in zip(first, rows_of(changed), strict=True))
        assert same < 0.75 * len(examples)


def by_whole_numbers(*words: int) -> float:
    """`uniform` in Python's unbounded integers: the published constants of SplitMix64."""
    state, ring = 0, 2**64
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) % ring
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % ring
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % ring
        state ^= state >> 31
    return (state >> 11) / 2**53


def test_the_draws_are_those_of_splitmix64_and_stay_the_same_between_versions() -> None:
    assert uniform(0, 0, np.array([0]), 0)[0] == pytest.approx(by_whole_numbers(0, 0, 0, 0), abs=0)
    for seed, epoch, example, draw in [(42, 3, 17, 2), (2**31, 199, 10**7, 53)]:
        expected = by_whole_numbers(seed, epoch, example, draw)
        assert uniform(seed, epoch, np.array([example]), draw).tolist() == [expected]


def test_the_draws_are_uniform_distinct_and_unrelated_to_their_neighbours() -> None:
    count = 40_000
    examples = np.arange(count)
    draws = uniform(0, 0, examples, 0)
    assert draws.min() >= 0 and draws.max() < 1
    assert len(np.unique(draws)) == count  # of 2^53 values; a repeat among 40,000 has probability 1e-7
    assert abs(draws.mean() - 0.5) < 5 / (12 * count) ** 0.5
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert ((counts - count / 100) ** 2 / (count / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5
    neighbours = {
        "next example": draws[1:],
        "next draw": uniform(0, 0, examples, 1)[:-1],
        "next epoch": uniform(0, 1, examples, 0)[:-1],
        "next seed": uniform(1, 0, examples, 0)[:-1],
        "epoch and draw exchanged": uniform(0, 5, examples, 0)[:-1],
    }
    for name, other in neighbours.items():
        assert abs(np.corrcoef(draws[:-1], other)[0, 1]) < 5 / count**0.5, name
    assert not np.array_equal(uniform(0, 5, examples, 0), uniform(0, 0, examples, 5))
