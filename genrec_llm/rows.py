"""Where the new rows start: from what occurs together, from vectors of the items, from their texts, or at random."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from genrec_llm.errors import ConfigError
from genrec_llm.model import GenRecBackbone, IdTokens, gathered
from genrec_llm.tasks import PromptLayout, Sequences
from genrec_llm.vocab import IdVocab

logger = logging.getLogger(__name__)
RowInit = Literal["auto", "cooccurrence", "cooccurrence+vectors", "vectors", "text", "random"]

WINDOW = 50
"""Positions within which two items of a history count as co-occurring."""
MAX_RANK = 256
"""Directions kept of the co-occurrence; wider backbones get them turned into their space by a random rotation."""
MOST_NUMBERS = 2**26
"""Of a matrix of the co-occurrence's decomposition, which has about six of 256 MiB in fp32 then. Catalogues of more than
262,144 items get fewer directions, a million 67."""
VECTOR_SHARE, VECTOR_WEIGHT = 3 / 8, 0.7
"""Of a row's width, and against a length of one, what vectors of the items get beside co-occurrence."""
RANDOM_NORM = 1.0
"""Row norm for a backbone without pretrained rows: the residual stream starts small, so blocks are soon heard."""
USER_NORM = 0.1
"""Norm of a fresh user row, as a share of an item row's: users start nearly silent."""


def text_rows(model: GenRecBackbone, tokenizer: PreTrainedTokenizerBase, vocab: IdVocab) -> Tensor:
    """Mean of each item's text pieces in the backbone's own embedding, fp32 `[items, d_model]`; no text gives zeros."""
    columns = [column for column in ("title", "categories") if column in vocab.items]
    texts = vocab.items[columns].fillna("").agg(" ".join, axis=1).tolist()
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    starts = torch.from_numpy(np.cumsum([0, *map(len, pieces)])[:-1])
    flat = torch.tensor([piece for ids in pieces for piece in ids], dtype=torch.long)
    weight = model.get_input_embeddings().weight
    with gathered(weight):  # on a GPU under ZeRO-3
        return F.embedding_bag(flat, weight.detach().float().cpu(), starts, mode="mean")


def cooccurrence_rows(sequences: Sequences, num_items: int, dim: int, *, seed: int) -> Tensor:
    """Truncated SVD of the item-item co-occurrence of the training parts, fp32 `[items, dim]`; unseen items give zeros.

    `C[i, j]` adds 1 / distance for every time i and j stand in one history at most `WINDOW` positions apart, normalised
    as `C / sqrt(degree_i degree_j)` with 0.5 on the diagonal; a row is the item's left singular vector times the singular
    values. Rows of items that follow one another are near each other: ranking by the last item's row alone comes
    within a tenth of item-kNN on Beauty before any training (`tools/initial_rows.py`).
    """
    owner = np.repeat(np.arange(len(sequences)), sequences.lengths())
    near = sp.csr_array((num_items, num_items), dtype=np.float64)
    for distance in range(1, min(WINDOW, int(sequences.lengths().max()) - 1) + 1):
        same = owner[distance:] == owner[:-distance]
        pair = (sequences.items[:-distance][same], sequences.items[distance:][same])
        near += sp.csr_array((np.full(int(same.sum()), 1 / distance), pair), shape=near.shape)
    near = near + near.T
    near.setdiag(0)
    degree = near.sum(axis=1)
    scale = sp.diags_array(1 / np.sqrt(np.maximum(degree, 1e-12)))
    normal = (scale @ near @ scale + sp.diags_array((degree > 0) * 0.5)).tocoo()
    place = torch.from_numpy(np.stack([normal.row, normal.col]).astype(np.int64))
    matrix = torch.sparse_coo_tensor(place, torch.from_numpy(normal.data).float(), normal.shape, check_invariants=True)
    rank = min(dim, MAX_RANK, num_items, max(1, MOST_NUMBERS // num_items))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, _ = torch.svd_lowrank(matrix.coalesce(), q=min(rank + 16, num_items), niter=6)
        rows = _widened(left[:, :rank] * values[:rank], dim)
    rows[torch.from_numpy(degree == 0)] = 0.0  # where the decomposition leaves rounding noise
    return rows


def vector_rows(vectors: Tensor, dim: int, *, seed: int) -> Tensor:
    """The strongest directions of the items' vectors around their mean, each row at length one, fp32 `[items, dim]`.

    Args:
        vectors: `[items, width]`; items with a row of zeros have none, and get zeros.
    """
    there = vectors.any(dim=1)
    centred = (vectors - vectors[there].mean(dim=0)) * there.unsqueeze(1)
    centred = F.normalize(centred, dim=1)
    rank = min(dim, *vectors.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, _ = torch.svd_lowrank(centred, q=min(rank + 16, *vectors.shape), niter=4)
        rows = F.normalize(left[:, :rank] * values[:rank], dim=1) * there.unsqueeze(1)
        return _widened(rows, dim)


def cooccurrence_and_vectors(sequences: Sequences, vectors: Tensor, dim: int, *, seed: int) -> Tensor:
    """`cooccurrence_rows` and `vector_rows` beside each other, fp32 `[items, dim]`; a part that is not known is zeros."""
    of_vectors = min(round(dim * VECTOR_SHARE), *vectors.shape)
    of_histories = min(dim - of_vectors, MAX_RANK)
    together = F.normalize(cooccurrence_rows(sequences, len(vectors), of_histories, seed=seed), dim=1)
    rows = torch.cat([together, VECTOR_WEIGHT * vector_rows(vectors, of_vectors, seed=seed)], dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _widened(rows, dim)


def _widened(rows: Tensor, dim: int) -> Tensor:
    """Turned into a wider space by a random rotation."""
    return rows if rows.shape[1] == dim else rows @ nn.init.orthogonal_(torch.empty(rows.shape[1], dim))


def _normalised(rows: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """Every row at length `norm`; rows of zeros get a random direction."""
    empty = rows.norm(dim=1, keepdim=True) < 1e-8
    rows = torch.where(empty, torch.randn(rows.shape, generator=generator), rows)
    return rows * (norm / rows.norm(dim=1, keepdim=True))


def _mean_norm(weight: nn.Parameter) -> float:
    with gathered(weight), torch.no_grad():
        return float(weight.float().norm(dim=1).mean())


def initial_rows(
    model: GenRecBackbone,
    tokenizer: PreTrainedTokenizerBase,
    vocab: IdVocab,
    layout: PromptLayout,
    train: Sequences,
    *,
    method: RowInit = "auto",
    vectors: Tensor | None = None,
    pretrained: bool = True,
    tie: bool = True,
    seed: int = 0,
) -> tuple[IdTokens, str]:
    """Build the rows of the new tokens.

    "auto" takes co-occurrence, which says more than text about what follows what (a prototype's early NDCG@10 was four
    times that of random rows), with the vectors of the items beside it if there are any; unless fewer than half of the items
    occur in training, and then the vectors or the text, if there is one.
    Lengths match the backbone's own rows (input) and head rows (output); without pretrained rows they are 1.

    Args:
        vectors: of the items, `[items, width]`, from `read_item_vectors`.

    Returns:
        The rows, and the method that was used.

    Raises:
        ConfigError: text is asked for, but items have none or the backbone has read none; vectors, but there are none; or
            there are vectors that the method does not read.
    """
    has_text = "title" in vocab.items or "categories" in vocab.items
    if method == "text" and not (has_text and pretrained):
        missing = (
            "the items have no title or categories" if not has_text else "a backbone with random weights reads none"
        )
        raise ConfigError(f"row_init: text is not possible ({missing}): choose cooccurrence or random")
    if method == "auto":
        cold = len(np.unique(train.items)) / vocab.num_items < 0.5
        if vectors is not None:
            method = "vectors" if cold else "cooccurrence+vectors"
        else:
            method = "text" if cold and has_text and pretrained else "cooccurrence"
    if ("vectors" in method) != (vectors is not None):
        raise ConfigError(
            f"row_init: {method} needs --item-vectors" if vectors is None
            else f"item_vectors: rows that start from {method} do not read them: leave row_init at auto, or them out"
        )  # fmt: skip

    generator = torch.Generator().manual_seed(seed)
    dim = model.config.d_model
    if method == "text":
        rows = text_rows(model, tokenizer, vocab)
        written = rows.any(dim=1)
        rows[written] -= rows[written].mean(dim=0)
    elif method == "cooccurrence":
        rows = cooccurrence_rows(train, vocab.num_items, dim, seed=seed)
    elif method == "cooccurrence+vectors" and vectors is not None:
        rows = cooccurrence_and_vectors(train, vectors, dim, seed=seed)
    elif vectors is not None:
        rows = vector_rows(vectors, dim, seed=seed)
    else:
        rows = torch.zeros(vocab.num_items, dim)

    norm_in = norm_out = RANDOM_NORM
    if pretrained:
        norm_in = _mean_norm(model.get_input_embeddings().weight) * embed_scale(model)
        norm_out = _mean_norm(model.get_output_embeddings().weight) * head_scale(model)
    item_in = _normalised(rows, norm_in, generator)
    user_in = torch.randn(layout.num_user_rows, dim, generator=generator) * (USER_NORM * norm_in / dim**0.5)
    item_out = None if tie else item_in * (norm_out / norm_in)
    logger.info("item rows: %s, length %.3g (input) and %.3g (output)", method, norm_in, norm_out)
    return IdTokens(item_in, user_in, item_out, scale=norm_out / norm_in), method


def embed_scale(model: GenRecBackbone) -> float:
    """What the backbone multiplies its input rows with (BART may; new rows are kept after that scale)."""
    return float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))


def head_scale(model: GenRecBackbone) -> float:
    """What the backbone multiplies the decoder's output with before its head: d^-0.5 in tied T5, else 1."""
    scaled = "t5" in model.config.model_type and model.config.scale_decoder_outputs
    return float(model.config.d_model) ** -0.5 if scaled else 1.0
