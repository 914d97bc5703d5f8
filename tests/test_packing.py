"""Rows that hold several examples: nothing lost, next to nothing wasted, and the same loss and gradients as row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_backbone

from genrec_llm.backbone import load_backbone
from genrec_llm.batching import as_tensors
from genrec_llm.model import GenRecBackbone, IdTokens, add_lora
from genrec_llm.packing import MULTIPLE, Packing, best_fit
from genrec_llm.tasks import IGNORED, IntArray, MaskedItem, NextItem, PromptLayout, Sequences, Task

ITEMS, USERS, WIDTH = 30, 25, 16


def lengths_of(examples: int, seed: int = 0) -> IntArray:
    return np.minimum(3 + np.random.default_rng(seed).geometric(0.12, examples), 53)


# --- what goes where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_length", [53, 56, 64, 200])
def test_every_example_has_a_row_and_no_row_is_overfull(row_length: int) -> None:
    lengths = lengths_of(700)
    rows, count = best_fit(lengths, row_length)
    filled = np.bincount(rows, weights=lengths, minlength=count)
    assert filled.max() <= row_length and len(filled) == count
    assert count >= -(-lengths.sum() // row_length)
    assert filled.sum() == lengths.sum()


def test_real_like_lengths_leave_next_to_no_padding() -> None:
    lengths = lengths_of(1024)
    shapes = Packing.fitting([lengths])
    assert shapes.rows * shapes.row_length < 1.02 * lengths.sum()
    assert shapes.row_length % MULTIPLE == 0 and shapes.row_length >= lengths.max() == shapes.classes[0][1]
    few = Packing.fitting(
        [lengths_of(64, seed) for seed in range(8)]
    )  # where a row more or less is much, any length goes
    assert few.rows * few.row_length < 1.03 * max(lengths_of(64, seed).sum() for seed in range(8))


def test_examples_of_one_length_get_rows_that_they_fill() -> None:
    shapes = Packing.fitting([np.full(64, 53)])
    assert shapes.rows * shapes.row_length <= 1.06 * 64 * 53  # 53 of 56; a row of 64 would have a fifth of padding


def test_the_fullest_row_with_room_is_taken_and_rows_that_are_there_stay() -> None:
    rows, count = best_fit(np.array([5, 9, 4, 1, 6]), 10)
    assert count == 3
    assert rows.tolist() == [2, 0, 1, 0, 1]  # 9 | 6 4 | 5, and the 1 beside the 9
    assert best_fit(np.array([5, 9, 4, 1, 6]), 10, 7)[1] == 7
    assert best_fit(np.array([8, 9, 7]), 10, 2)[1] == 3  # more where two do not hold them


def test_classes_of_length_leave_fewer_places_and_hold_every_batch() -> None:
    batches = [lengths_of(64, seed) for seed in range(8)]
    one, three = (Packing.fitting(batches, most_classes=most).classes for most in (1, 3))
    assert one == ((64, max(int(lengths.max()) for lengths in batches)),)
    assert len(three) == 3 and sum(examples for examples, _ in three) == 64
    assert sum(examples * longest for examples, longest in three) < 0.5 * 64 * one[0][1]
    for lengths in batches:
        begin, ordered = 0, np.sort(lengths)[::-1]
        for examples, longest in three:
            assert ordered[begin] <= longest
            begin += examples
    assert Packing.fitting([np.full(9, 5)], most_classes=3).classes == ((9, 5),)  # nothing to tell apart


def test_packed_rows_are_taken_apart_into_what_went_in() -> None:
    task = sampled_tasks(layout_of(user_token=True))[0]
    batch = task.batch(0, np.arange(len(task.lengths)))
    examples = len(task.lengths)
    shapes = Packing(row_length=24, rows=70, classes=((7, 12), (examples - 4, 9)))
    packed = shapes.pack(batch)
    order = np.argsort(-task.lengths, kind="stable")
    batch = {name: values[order] for name, values in batch.items()}
    assert task.lengths[order[7]] == 11  # longer than the second class is by itself
    assert packed["input_ids"].shape == packed["attention_mask"].shape == (70, 24)
    assert [segment.shape for segment in packed["segments"]] == [(7, 12), (examples - 4, 11)]
    flat, owner = packed["input_ids"].ravel(), packed["attention_mask"].ravel()
    for example, places in enumerate([places for segment in packed["segments"] for places in segment]):
        places = places[places >= 0]
        if example >= len(task.lengths):
            assert not len(places) and packed["labels"][example] == IGNORED
            continue
        assert np.array_equal(places, np.arange(places[0], places[0] + len(places)))  # in one piece
        assert places[0] // 24 == places[-1] // 24  # in one row
        assert np.array_equal(flat[places], batch["input_ids"][example][batch["attention_mask"][example] > 0])
        assert np.array_equal(np.flatnonzero(owner == example + 1), places)
    assert (owner > 0).sum() == task.lengths.sum()
    assert np.array_equal(packed["labels"][: len(task.lengths)], batch["labels"])
    assert np.array_equal(packed["decoder_input_ids"][: len(task.lengths)], batch["decoder_input_ids"])


# --- exact ------------------------------------------------------------------------------------------------------------


def sequences() -> Sequences:
    random = np.random.default_rng(1)
    lengths = random.integers(2, 14, USERS)
    return Sequences(
        items=random.integers(0, ITEMS, lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        users=np.arange(1, USERS + 1),
    )


def layout_of(*, user_token: bool) -> PromptLayout:
    return PromptLayout(
        base=103, num_items=ITEMS, num_user_rows=USERS + 1, mask_ids=tuple(range(3, 103)), eos_id=1, pad_id=0,
        user_token=user_token, max_history=8,
    )  # fmt: skip


def sampled_tasks(layout: PromptLayout) -> list[Task]:
    return [
        NextItem(sequences(), layout, seed=0),
        MaskedItem(sequences(), layout, seed=0),
        MaskedItem(sequences(), layout, seed=0, masks_per_sequence=4),
    ]


def model_of(kind: str, folder: Path) -> GenRecBackbone:
    model, tokenizer = load_backbone(str(save_backbone(kind, folder)))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, WIDTH, generator=generator) for count in (ITEMS, USERS + 1, ITEMS)]
    model.add_id_tokens(IdTokens(*rows), layout_of(user_token=True).base)
    assert len(tokenizer) == 103
    return model


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: value.grad.to_dense() for name, value in model.named_parameters() if value.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse users"])
@pytest.mark.parametrize("user_token", [True, False], ids=["user", "no user"])
@pytest.mark.parametrize("kind", ["t5-tied", "t5-untied"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(
    kind: str, user_token: bool, sparse: bool, tmp_path: Path
) -> None:
    if sparse and not user_token:
        pytest.skip("sparse user rows are refused without users")
    model = model_of(kind, tmp_path).eval()
    model.id_tokens.user_in.sparse = sparse
    for task in sampled_tasks(layout_of(user_token=user_token)):
        batch = task.batch(0, np.arange(len(task.lengths)))
        expected = loss_and_gradients(model, as_tensors(batch))
        for shapes in (
            Packing.fitting([task.lengths]),
            Packing(11, 40, ((len(task.lengths) + 2, 11),)),
            Packing(96, 1, ((1, 1),)),
        ):
            found = loss_and_gradients(model, as_tensors(shapes.pack(batch)))
            assert found.keys() == expected.keys() and len(found) > 20
            for name, value in expected.items():
                # fp32 sums in another order; relative to the tensor's largest value.
                assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_an_example_does_not_notice_what_else_is_in_its_row(tmp_path: Path) -> None:
    model = add_lora(
        model_of("t5-untied", tmp_path), r=2, alpha=4, dropout=0.0, targets=None, base_name="tiny", revision=None
    ).eval()
    layout = layout_of(user_token=True)
    ours, others = [np.array([1, 2, 3]), np.array([4])], [np.array([9, 8, 7, 6]), np.array([5, 5])]
    scores = []
    for beside in (others, others[::-1], [np.array([20, 21])] * 2):
        batch = layout.encode_histories([*ours, *beside], np.array([1, 2, 3, 4]))
        with torch.no_grad():
            packed = as_tensors(Packing(32, 1, ((4, 8),)).pack(batch))
            assert len(packed["input_ids"]) == 1  # all four in one row
            order = np.argsort(-batch["attention_mask"].sum(axis=1), kind="stable")
            scores.append(model(**packed).logits[[int(np.flatnonzero(order == example)[0]) for example in (0, 1)]])
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
