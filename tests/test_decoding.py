"""Scores into ranks and lists; `generate` and the one-step path give the same top N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_backbone
from torch import Tensor

from genrec_llm import decoding
from genrec_llm.backbone import load_backbone
from genrec_llm.batching import as_tensors
from genrec_llm.decoding import (
    NOTHING,
    generate_top_n,
    mask_seen_,
    mixed_scores,
    one_step_scores,
    rank_targets,
    top_items,
    users_at_once,
)
from genrec_llm.export import merge
from genrec_llm.loading import Loaded, load_merged
from genrec_llm.model import IdTokens, add_lora
from genrec_llm.tasks import PromptLayout
from genrec_llm.tokenizer import add_id_words, prompt_layout
from genrec_llm.vocab import IdVocab

ITEMS, USERS, WIDTH = 12, 3, 16
INF = math.inf


# --- ranks and lists ----------------------------------------------------------


def test_ranks_count_what_is_above_and_what_is_equal() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 5.0, 5.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    better, tied = rank_targets(scores, torch.tensor([2, 1, 3]))
    assert (better.tolist(), tied.tolist()) == ([1, 0, 0], [0, 2, 3])
    assert better.dtype == tied.dtype == torch.int64


def test_a_target_that_was_masked_can_never_be_hit() -> None:
    scores = torch.tensor([[-INF, 1.0, -INF], [-INF, -INF, -INF], [-INF, 0.5, -INF]])
    better, tied = rank_targets(scores, torch.tensor([0, 1, 1]))
    assert (better.tolist(), tied.tolist()) == ([3, 3, 0], [0, 0, 0])


def test_scores_that_are_no_numbers_are_not_a_perfect_rank() -> None:
    scores = torch.tensor([[math.nan, math.nan, math.nan], [1.0, math.nan, 0.0]])
    better, tied = rank_targets(scores, torch.tensor([0, 1]))
    assert better.tolist() == [3, 3] and tied.tolist() == [0, 0]


def test_ranks_agree_with_sorting_by_hand_on_scores_full_of_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 30), generator=generator).float()
    scores[torch.rand(200, 30, generator=generator) < 0.2] = -INF
    targets = torch.randint(0, 30, (200,), generator=generator)
    better, tied = rank_targets(scores, targets)
    for row, target, above, equal in zip(
        scores.tolist(), targets.tolist(), better.tolist(), tied.tolist(), strict=True
    ):
        if row[target] == -INF:
            assert (above, equal) == (30, 0)
        else:
            places = [place for place, value in enumerate(sorted(row, reverse=True)) if value == row[target]]
            assert (above, equal) == (places[0], len(places) - 1)


def test_seen_items_are_masked_where_they_are_and_nothing_else() -> None:
    scores = torch.arange(12.0).view(3, 4)
    empty = [np.array([], dtype=np.int64)] * 3
    assert mask_seen_(scores, empty) is scores and torch.equal(scores, torch.arange(12.0).view(3, 4))
    histories = [np.array([0, 3, 3]), np.array([], dtype=np.int64), np.array([1])]
    mask_seen_(scores, histories)
    assert scores.tolist() == [[-INF, 1, 2, -INF], [4, 5, 6, 7], [8, -INF, 10, 11]]


def test_the_top_list_breaks_ties_by_index_and_ends_in_nothing() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0], [-INF, 2.0, -INF, -INF], [-INF, -INF, -INF, -INF]])
    items, values = top_items(scores, 3)
    assert items.tolist() == [[1, 3, 0], [1, NOTHING, NOTHING], [NOTHING] * 3]
    assert values.tolist() == [[3, 3, 1], [2, -INF, -INF], [-INF] * 3]
    longer, values = top_items(scores, 6)  # more than there are items
    assert longer.tolist() == [[1, 3, 0, 2, -1, -1], [1, -1, -1, -1, -1, -1], [-1] * 6]
    assert values.shape == (3, 6) and torch.isneginf(values[:, 4:]).all()


def test_the_top_list_is_the_head_of_a_stable_sort_but_sorts_no_more_than_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (200, 30), generator=generator).float()
    for value, share in ((-INF, 0.3), (math.nan, 0.1), (INF, 0.05), (-0.0, 0.1)):
        scores[torch.rand(200, 30, generator=generator) < share] = value
    scores[:5] = -INF
    clean = scores.nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    values, items = torch.sort(clean, dim=1, descending=True, stable=True)
    items = items.masked_fill(torch.isneginf(values), NOTHING)
    widths = []
    plain = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda self, **how: widths.append(self.shape[1]) or plain(self, **how))
    monkeypatch.setattr(torch, "sort", lambda scores, **how: scores.sort(**how))
    for k in (1, 4, 29, 30):
        found, found_values = top_items(scores, k)
        assert torch.equal(found, items[:, :k]) and torch.equal(found_values, values[:, :k])
    assert sorted(set(widths)) == [1, 4, 29, 30]


def test_only_lists_whose_end_is_tied_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [5, 3, 3, 3, 1], [5, -INF, -INF, -INF, 4], [1, 1, 1, 0, 0]])
    looked, plain = [], decoding._top_of_tied
    monkeypatch.setattr(decoding, "_top_of_tied", lambda rows, k: looked.append(rows.tolist()) or plain(rows, k))
    items, _ = top_items(scores, 3)
    assert items.tolist() == [[0, 1, 2], [0, 1, 2], [0, 4, NOTHING], [0, 1, 2]]
    assert looked == [[[5, 3, 3, 3, 1]]]


@pytest.mark.parametrize(("items", "expected"), [(10, 7), (99, 7), (25, 4), (100, 1), (101, 1)])
def test_fewer_users_are_scored_at_once_where_the_catalogue_is_large(
    items: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "MOST_SCORES", 700 if items == 99 else 100)
    assert users_at_once(items, 7) == expected


# --- generate against the one-step path ---------------------------------------


@dataclass(frozen=True)
class Merged:
    loaded: Loaded
    folder: Path
    parity: dict[str, float]
    trained_scores: Tensor

    @property
    def layout(self) -> PromptLayout:
        return self.loaded.layout


def histories(layout: PromptLayout) -> tuple[list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    found = [random.integers(0, ITEMS, length) for length in (1, 2, 3, 5, 8, 0, 4, 4)]
    return found, random.integers(0, layout.num_user_rows, len(found))


def batch_of(layout: PromptLayout) -> dict[str, Tensor]:
    return as_tensors(layout.encode_histories(*histories(layout)))


@pytest.fixture(scope="module", params=["t5-tied", "t5-untied", "bart"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A tiny model with adapters and rows that say something, merged into a plain checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    base = str(save_backbone(request.param, folder / "base"))
    model, tokenizer = load_backbone(base)
    names = pd.DataFrame({"item": [f"i{number}" for number in range(ITEMS)]})
    vocab = IdVocab.build(names, [f"u{number}" for number in range(USERS)], seed=0)
    layout = prompt_layout(tokenizer, vocab, max_history=8)
    torch.manual_seed(1)
    rows = IdTokens(torch.randn(ITEMS, WIDTH), torch.randn(USERS + 1, WIDTH), torch.randn(ITEMS, WIDTH))
    model.add_id_tokens(rows, layout.base)
    add_id_words(tokenizer, vocab)
    lora: Any = add_lora(model, r=2, alpha=4, dropout=0.0, targets=None, base_name=base, revision=None)
    for name, value in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    lora.eval()
    with torch.no_grad():
        scores = lora(**batch_of(layout)).logits
    info = {
        "base_model": {"name": base, "revision": None, "type": lora.config.model_type},
        "data": {"name": "tiny", "fingerprint": "", "vocabulary": vocab.fingerprint},
        "user_mode": vocab.user_mode,
        "user_buckets": vocab.user_buckets,
        "id_seed": vocab.seed,
    }
    parity = merge(Loaded(lora, tokenizer, vocab, layout, info), folder / "merged", samples=8, n=5)
    return Merged(load_merged(folder / "merged"), folder / "merged", parity, scores)


ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
"""fp32 logits of size 1 to 20 summed in another order."""


def assert_distinct(scores: Tensor) -> None:
    """Items are further apart than two runs of one model on one machine (1e-6), so one order is right."""
    ordered = scores.sort(dim=1).values
    assert (ordered[:, 1:] - ordered[:, :-1]).min() > 2e-5


def test_the_one_step_scores_of_the_merged_model_are_those_of_the_trained_one(merged: Merged) -> None:
    scores = one_step_scores(merged.loaded.model, batch_of(merged.layout), merged.layout)
    assert scores.dtype == torch.float32 and scores.shape == (8, ITEMS)
    torch.testing.assert_close(scores, merged.trained_scores, **ROUNDING)
    assert merged.parity["top_n_agreement"] == 1.0 and merged.parity["max_score_difference"] < 1e-3


@pytest.mark.parametrize("n", [1, 2, 5, ITEMS, ITEMS + 8])
def test_generate_gives_the_one_step_list(merged: Merged, n: int) -> None:
    batch, layout, model = batch_of(merged.layout), merged.layout, merged.loaded.model
    scores = one_step_scores(model, batch, layout)
    assert_distinct(scores)
    items, values = generate_top_n(model, batch, layout, n)
    expected, _ = top_items(scores, n)
    assert items.shape == values.shape == (8, n)
    assert torch.equal(items, expected)
    assert (items[:, ITEMS:] == NOTHING).all() and torch.isneginf(values[:, ITEMS:]).all()
    # Log-probabilities among items, so their differences are those of the scores.
    reached = scores.gather(1, items[:, : min(n, ITEMS)])
    kept = values[:, : min(n, ITEMS)]
    torch.testing.assert_close(kept - kept[:, :1], reached - reached[:, :1], **ROUNDING)


@pytest.mark.parametrize("n", [1, 5, ITEMS, ITEMS + 3])
def test_excluded_items_never_come_back_and_the_rest_keeps_its_order(merged: Merged, n: int) -> None:
    batch, layout, model = batch_of(merged.layout), merged.layout, merged.loaded.model
    exclude = histories(layout)[0]
    exclude[2] = np.arange(ITEMS)  # nothing is left
    exclude[3] = np.delete(np.arange(ITEMS), 7)  # one item is left
    exclude[4] = np.arange(9)  # three items are left
    items, values = generate_top_n(model, batch, layout, n, exclude=exclude)
    expected, _ = top_items(mask_seen_(one_step_scores(model, batch, layout), exclude), n)
    assert torch.equal(items, expected)
    assert torch.equal(torch.isneginf(values), items == NOTHING)
    for row, seen in zip(items.tolist(), exclude, strict=True):
        real = [item for item in row if item != NOTHING]
        assert len(set(real)) == len(real) == min(n, ITEMS - len(set(seen.tolist())))
        assert not set(real) & set(seen.tolist())


def mixing_scores(model: Any, layout: PromptLayout) -> Tensor:
    def score(histories: Sequence[np.ndarray], users: np.ndarray) -> Tensor:
        return one_step_scores(model, as_tensors(layout.encode_histories(histories, users)), layout)

    return mixed_scores(score, layout, *histories(layout))


def test_mixed_scores_are_the_mean_of_what_the_model_says_of_history_and_last_items(merged: Merged) -> None:
    layout, model = replace(merged.layout, last_items_weights=(1 / 3, 1 / 6)), merged.loaded.model
    found = mixing_scores(model, layout)
    for history, user, likely in zip(*histories(layout), found.exp(), strict=True):
        asked = [(history, 0.5 if len(history) else 1.0)]
        if len(history):
            asked += [(history[-1:], 1 / 3 if len(history) > 1 else 0.5)]
        if len(history) > 1:
            asked += [(history[-2:-1], 1 / 6)]
        expected = torch.zeros(ITEMS)
        for context, weight in asked:
            batch = as_tensors(layout.encode_histories([context], np.array([user])))
            expected += weight * one_step_scores(model, batch, layout)[0].softmax(dim=0)
        torch.testing.assert_close(likely, expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(top_items(found, 5)[0], top_items(mixing_scores(model, merged.layout), 5)[0])


@pytest.mark.parametrize("n", [1, 5, ITEMS, ITEMS + 3])
@pytest.mark.parametrize("excluded", [False, True])
def test_generate_gives_the_list_of_the_mixture(merged: Merged, n: int, excluded: bool) -> None:
    layout, model = replace(merged.layout, last_items_weights=(0.25, 0.125, 0.0625)), merged.loaded.model
    scores = mixing_scores(model, layout)
    assert_distinct(scores)
    exclude = histories(layout)[0] if excluded else None
    batch, weights = layout.encode_contexts(*histories(layout))
    items, values = generate_top_n(model, as_tensors(batch), layout, n, exclude, weights=torch.from_numpy(weights))
    expected, likely = top_items(scores if exclude is None else mask_seen_(scores, exclude), n)
    assert torch.equal(items, expected)
    if n > 1 or not excluded:  # greedy search knows the probability among the items that are left
        torch.testing.assert_close(values, likely, **ROUNDING)


def test_a_bare_generate_gives_the_list_too(merged: Merged) -> None:
    batch, layout, model = batch_of(merged.layout), merged.layout, merged.loaded.model
    found = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
        num_beams=6,
        num_return_sequences=6,
    )
    expected, _ = top_items(one_step_scores(model, batch, layout), 6)
    assert torch.equal(found[:, -1].view(8, 6) - layout.base, expected)


def test_in_bf16_only_items_within_the_rounding_of_their_scores_change_places(merged: Merged) -> None:
    layout, batch = merged.layout, batch_of(merged.layout)
    model = load_merged(merged.folder, dtype=torch.bfloat16).model
    scores = one_step_scores(model, batch, layout)
    # `generate` rounds each logit to bf16, half a unit in its last place of 8 bits; two logits are compared,
    # and its hidden state went through bf16 sums of another shape.
    error = 4 * 2.0**-9 * scores.abs().max(dim=1, keepdim=True).values
    spread = scores.max(dim=1).values - scores.min(dim=1).values
    assert (error[:, 0] < spread / 20).all()  # a list in any other order would fail
    items, _ = generate_top_n(model, batch, layout, ITEMS)
    wanted, values = top_items(scores, ITEMS)
    assert torch.equal(items.sort(dim=1).values, wanted.sort(dim=1).values)
    assert ((scores.gather(1, items) - values).abs() <= error).all()
