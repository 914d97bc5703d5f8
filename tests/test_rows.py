"""Where the rows of new tokens start."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import KINDS, save_backbone
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from genrec_llm.backbone import load_backbone
from genrec_llm.errors import ConfigError
from genrec_llm.model import GenRecBackbone, IdTokens
from genrec_llm.rows import (
    VECTOR_WEIGHT,
    cooccurrence_and_vectors,
    cooccurrence_rows,
    initial_rows,
    text_rows,
    vector_rows,
)
from genrec_llm.tasks import Sequences
from genrec_llm.tokenizer import prompt_layout
from genrec_llm.vocab import IdVocab

GROUPS, EACH, UNSEEN = 5, 8, 20
SEEN = GROUPS * EACH
ITEMS, WIDTH = SEEN + UNSEEN, 16


def grouped_histories(seed: int = 0) -> Sequences:
    """Users who stay within one of five groups of items; the last twenty items occur in no history."""
    random = np.random.default_rng(seed)
    lists = [random.permutation(EACH)[:5] + EACH * (user % GROUPS) for user in range(60)]
    return Sequences(items=np.concatenate(lists).astype(np.int64), offsets=np.arange(61) * 5, users=np.arange(1, 61))


def vocabulary(**columns: list[str | None]) -> IdVocab:
    texts = {name: pd.Series(values, dtype=object) for name, values in columns.items()}
    names = [f"i{number:03}" for number in range(ITEMS)]
    return IdVocab.build(pd.DataFrame({"item": names, **texts}), [f"u{user}" for user in range(60)], seed=0)


@pytest.fixture(scope="module", params=KINDS)
def backbone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GenRecBackbone, PreTrainedTokenizerBase]:
    return load_backbone(str(save_backbone(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[GenRecBackbone, PreTrainedTokenizerBase]:
    return load_backbone(str(save_backbone("t5-untied", tmp_path_factory.mktemp("t5"))))


def rows_of(
    backbone: tuple[GenRecBackbone, PreTrainedTokenizerBase],
    vocab: IdVocab,
    *,
    train: Sequences | None = None,
    **options: object,
) -> tuple[IdTokens, str]:
    model, tokenizer = backbone
    layout = prompt_layout(tokenizer, vocab, max_history=5)
    return initial_rows(model, tokenizer, vocab, layout, train or grouped_histories(), **options)  # type: ignore[arg-type]


def cosines(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows.detach(), dim=1)
    return unit @ unit.T


# --- co-occurrence ------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 16, 64])
def test_items_of_the_same_histories_start_near_each_other(dim: int) -> None:
    near = cosines(cooccurrence_rows(grouped_histories(), ITEMS, dim, seed=0)[:SEEN])
    group = torch.arange(SEEN) // EACH
    together, apart = group[:, None] == group, group[:, None] != group
    assert near[together].mean() > 0.5
    assert near[apart].abs().max() < 0.05  # groups share no user, so their rows are orthogonal


@pytest.mark.parametrize(("dim", "window"), [(16, 50), (64, 50), (16, 2)])
def test_as_many_directions_as_items_reproduce_the_normalised_cooccurrence(
    dim: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C / sqrt(degree degree) with 0.5 on the diagonal, by loops; its square is the rows' Gram matrix."""
    monkeypatch.setattr("genrec_llm.rows.WINDOW", window)
    lists = [[0, 1, 2, 3], [1, 2, 3], [4, 5], [0, 1, 1]]
    sequences = Sequences(np.concatenate(lists), np.cumsum([0, *map(len, lists)]), np.arange(1, 5))
    counts = np.zeros((6, 6))
    for items in lists:
        for place, one in enumerate(items):
            for distance, other in enumerate(items[place + 1 :], start=1):
                if one != other and distance <= window:
                    counts[one, other] += 1 / distance
                    counts[other, one] += 1 / distance
    degree = counts.sum(axis=1)
    normal = counts / np.sqrt(np.outer(degree, degree)) + 0.5 * np.eye(6)
    rows = cooccurrence_rows(sequences, 6, dim, seed=0).double().numpy()
    assert np.abs(rows @ rows.T - normal @ normal).max() < 1e-5


def test_a_large_catalogue_gets_fewer_directions_turned_into_the_whole_width(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cooccurrence_rows(grouped_histories(), ITEMS, 16, seed=0)
    monkeypatch.setattr("genrec_llm.rows.MOST_NUMBERS", 3 * ITEMS + 1)
    few = cooccurrence_rows(grouped_histories(), ITEMS, 16, seed=0)
    assert few.shape == whole.shape and torch.linalg.matrix_rank(few, rtol=1e-4) == 3
    kept, strongest = (torch.linalg.svdvals(rows)[:3] for rows in (few, whole))
    torch.testing.assert_close(kept, strongest, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dim", [16, 64])
def test_items_of_no_history_give_rows_of_zeros(dim: int) -> None:
    """As documented; the noise of the decomposition (1e-7) must not be blown up to a row."""
    rows = cooccurrence_rows(grouped_histories(), ITEMS, dim, seed=0)
    assert rows.shape == (ITEMS, dim) and rows.dtype == torch.float32
    assert rows[:SEEN].norm(dim=1).min() > 0.1
    assert rows[SEEN:].norm(dim=1).max() < 1e-8


@pytest.mark.parametrize("method", ["cooccurrence", "random"])
def test_items_that_nothing_is_known_about_start_in_directions_of_their_own(
    method: str, t5: tuple[GenRecBackbone, PreTrainedTokenizerBase]
) -> None:
    rows, _ = rows_of(t5, vocabulary(), method=method)
    near = cosines(rows.item_in.weight)[SEEN:].clone()
    near[:, SEEN:].fill_diagonal_(0)
    assert near.abs().max() < 0.95
    assert abs(near.mean()) < 0.05  # random directions: 1,200 cosines of deviation 1/4


# --- text ---------------------------------------------------------------------

PIECES = ["<extra_id_3>", "<extra_id_14>", "<extra_id_15>", "</s>"]
"""The bare tokenizer's only words."""


def test_a_text_row_is_the_mean_of_the_pieces_of_title_and_categories(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase],
) -> None:
    titles: list[str | None] = [f"{PIECES[n % 4]} {PIECES[n % 3]}" for n in range(ITEMS)]
    categories: list[str | None] = [PIECES[1] if n % 5 else None for n in range(ITEMS)]
    titles[7] = categories[7] = None
    vocab, (model, tokenizer) = vocabulary(title=titles, categories=categories), t5
    found = text_rows(model, tokenizer, vocab)
    table = model.get_input_embeddings().weight.detach()
    for index in range(ITEMS):
        place = int(vocab.item_id(index)[1:])
        words = [*(titles[place] or "").split(), *(categories[place] or "").split()]
        expected = torch.zeros(WIDTH)
        for word in words:
            expected += table[tokenizer.convert_tokens_to_ids(word)] / len(words)
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-6)


def test_a_text_row_is_made_on_the_cpu_wherever_the_table_is(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = t5
    table = model.get_input_embeddings()

    def elsewhere(ids: Tensor) -> Tensor:
        raise RuntimeError("ids on the CPU, table on a GPU; and a vector for each piece of text")

    monkeypatch.setattr(table, "forward", elsewhere)
    found = text_rows(model, tokenizer, vocabulary(title=[PIECES[0]] * ITEMS))
    first = table.weight.detach()[tokenizer.convert_tokens_to_ids(PIECES[0])]
    torch.testing.assert_close(found, first.expand(ITEMS, -1))
    assert not text_rows(model, tokenizer, vocabulary(title=[None] * ITEMS)).any()


def test_rows_from_text_are_alike_where_texts_are(t5: tuple[GenRecBackbone, PreTrainedTokenizerBase]) -> None:
    vocab = vocabulary(title=[PIECES[number % 2] for number in range(ITEMS)])
    rows, method = rows_of(t5, vocab, method="text")
    assert method == "text"
    same = torch.tensor([int(vocab.item_id(index)[1:]) % 2 for index in range(ITEMS)])
    near = cosines(rows.item_in.weight)
    assert near[same[:, None] == same].min() > 0.999
    assert near[same[:, None] != same].max() < -0.9  # the mean, which all share, is taken out


def test_items_without_a_text_do_not_all_start_in_the_same_row(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase],
) -> None:
    vocab = vocabulary(title=[PIECES[number % 4] if number % 3 else None for number in range(ITEMS)])
    rows, _ = rows_of(t5, vocab, method="text")
    silent = torch.tensor([int(vocab.item_id(index)[1:]) % 3 == 0 for index in range(ITEMS)])
    near = cosines(rows.item_in.weight[silent])
    assert near.fill_diagonal_(0).max() < 0.95


# --- vectors ------------------------------------------------------------------


def test_rows_from_vectors_keep_their_angles_and_items_without_one_get_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(ITEMS, 6, generator=generator)
    vectors[SEEN:] = 0.0
    rows = vector_rows(vectors, 16, seed=0)
    assert rows.shape == (ITEMS, 16) and not rows[SEEN:].any()
    expected = cosines(vectors[:SEEN] - vectors[:SEEN].mean(dim=0))
    torch.testing.assert_close(cosines(rows[:SEEN]), expected, rtol=1e-3, atol=1e-3)
    narrow = vector_rows(vectors, 3, seed=0)
    assert narrow.shape == (ITEMS, 3)
    assert torch.corrcoef(torch.stack([cosines(narrow[:SEEN]).flatten(), expected.flatten()]))[0, 1] > 0.7


@pytest.mark.parametrize("dim", [16, 64])
def test_cooccurrence_and_vectors_stand_beside_each_other(dim: int) -> None:
    """The product of two rows is that of their co-occurrence and a fixed share of that of their vectors."""
    vectors = torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(0))
    vectors[:3] = 0.0
    rows = cooccurrence_and_vectors(grouped_histories(), vectors, dim, seed=0)
    assert rows.shape == (ITEMS, dim)
    of_histories = cooccurrence_rows(grouped_histories(), ITEMS, dim - 4, seed=0)
    both = torch.nn.functional.normalize(of_histories, dim=1)
    expected = both @ both.T + VECTOR_WEIGHT**2 * (of := vector_rows(vectors, 4, seed=0)) @ of.T
    torch.testing.assert_close(rows @ rows.T, expected, rtol=1e-3, atol=1e-3)


def test_wide_vectors_get_their_share_of_a_row_and_no_more() -> None:
    vectors = torch.randn(ITEMS, 40, generator=torch.Generator().manual_seed(0))
    rows = cooccurrence_and_vectors(grouped_histories(), vectors, 16, seed=0)
    torch.testing.assert_close(rows[:, :10].norm(dim=1), torch.ones(ITEMS) * (torch.arange(ITEMS) < SEEN))
    torch.testing.assert_close(rows[:, 10:].norm(dim=1), torch.full((ITEMS,), VECTOR_WEIGHT))


def test_auto_puts_vectors_beside_cooccurrence_or_in_its_place(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase],
) -> None:
    vectors = torch.randn(ITEMS, 4)
    few = Sequences(np.arange(10), np.array([0, 5, 10]), np.array([1, 2]))
    assert rows_of(t5, vocabulary(), vectors=vectors)[1] == "cooccurrence+vectors"
    assert rows_of(t5, vocabulary(), vectors=vectors, train=few)[1] == "vectors"
    assert rows_of(t5, vocabulary(), vectors=vectors, pretrained=False)[1] == "cooccurrence+vectors"
    with pytest.raises(ConfigError, match=r"item_vectors: rows that start from cooccurrence do not read them"):
        rows_of(t5, vocabulary(), vectors=vectors, method="cooccurrence")
    with pytest.raises(ConfigError, match=r"row_init: vectors needs --item-vectors"):
        rows_of(t5, vocabulary(), method="vectors")


# --- which method -------------------------------------------------------------


def test_auto_takes_cooccurrence_unless_most_items_are_cold_and_have_a_text(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase],
) -> None:
    few = Sequences(np.arange(10), np.array([0, 5, 10]), np.array([1, 2]))  # 10 of 60 items
    half = Sequences(np.arange(30), np.array([0, 15, 30]), np.array([1, 2]))
    with_text, without = vocabulary(title=[PIECES[number % 4] for number in range(ITEMS)]), vocabulary()
    assert rows_of(t5, with_text, train=few)[1] == "text"
    assert rows_of(t5, with_text, train=half)[1] == "cooccurrence"
    assert rows_of(t5, without, train=few)[1] == "cooccurrence"
    assert rows_of(t5, with_text, train=few, pretrained=False)[1] == "cooccurrence"


def test_rows_from_text_are_refused_where_there_is_nothing_to_read(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase],
) -> None:
    with pytest.raises(ConfigError, match=r"row_init: .*no title.*choose cooccurrence or random"):
        rows_of(t5, vocabulary(), method="text")
    with pytest.raises(ConfigError, match=r"row_init: .*random weights"):
        rows_of(t5, vocabulary(title=[PIECES[0]] * ITEMS), method="text", pretrained=False)


# --- lengths ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cooccurrence", "random"])
def test_rows_are_as_long_as_what_the_backbone_reads_and_scores_with(
    method: str, backbone: tuple[GenRecBackbone, PreTrainedTokenizerBase]
) -> None:
    model = backbone[0]
    ids = torch.arange(model.config.vocab_size)
    norm_in = float(model.get_input_embeddings()(ids).detach().norm(dim=1).mean())  # BART's scale included
    factor = WIDTH**-0.5 if model.config.model_type == "t5" and model.config.scale_decoder_outputs else 1.0
    norm_out = float(model.get_output_embeddings().weight.detach().norm(dim=1).mean()) * factor
    for tie in (True, False):
        rows, _ = rows_of(backbone, vocabulary(), method=method, tie=tie)
        assert rows.tied == tie
        assert rows.item_in.weight.norm(dim=1).detach().numpy() == pytest.approx(norm_in, rel=1e-4)
        assert rows.item_out.rows().norm(dim=1).detach().numpy() == pytest.approx(norm_out, rel=1e-4)
        users = rows.user_in.weight.norm(dim=1).mean()
        assert rows.user_in.num_embeddings == 61
        assert 0.07 * norm_in < users < 0.13 * norm_in


def test_rows_have_length_one_where_the_backbone_has_none_to_match(
    t5: tuple[GenRecBackbone, PreTrainedTokenizerBase],
) -> None:
    rows, _ = rows_of(t5, vocabulary(), pretrained=False)
    assert rows.item_in.weight.norm(dim=1).detach().numpy() == pytest.approx(1.0, rel=1e-5)
    assert rows.item_out.scale is not None and rows.item_out.scale.item() == pytest.approx(1.0)


# --- seeds --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cooccurrence", "random", "text"])
def test_rows_depend_on_their_seed_alone_and_leave_the_global_generator_as_it_was(
    method: str, t5: tuple[GenRecBackbone, PreTrainedTokenizerBase]
) -> None:
    vocab = vocabulary(title=[PIECES[number % 4] for number in range(ITEMS)])
    states = []
    found = []
    for state, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.get_rng_state()
        rows, _ = rows_of(t5, vocab, method=method, seed=seed)
        states.append(torch.equal(before, torch.get_rng_state()))
        found.append(rows.state_dict())
    assert all(states)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not torch.equal(found[0]["user_in.weight"], found[2]["user_in.weight"])
    if method == "random":
        assert not torch.equal(found[0]["item_in.weight"], found[2]["item_in.weight"])
