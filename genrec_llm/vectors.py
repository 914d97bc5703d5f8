"""Vectors of items from outside the interactions, such as sentence embeddings of their titles: reading and making them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from genrec_llm.errors import ConfigError, DataError, counted, listed
from genrec_llm.files import atomic_file
from genrec_llm.vocab import IdVocab

logger = logging.getLogger(__name__)

MOST_PIECES = 512
"""Of a text, where its encoder's tokenizer names no limit."""


def read_item_vectors(path: str | os.PathLike[str], vocab: IdVocab) -> Tensor:
    """Vectors of a vocabulary's items, fp32 `[items, width]`; rows of zeros for items that the file lacks.

    The file is parquet with the columns `item` (raw ids) and `vector` (lists of numbers, all of one length). Items that are
    not in the vocabulary are left out.

    Raises:
        DataError: every problem of the file.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not read as parquet ({str(error).splitlines()[0]})") from error
    missing = [f"{path}: no column `{name}`" for name in ("item", "vector") if name not in table.column_names]
    if missing:
        raise DataError(missing)
    lists = table["vector"].combine_chunks()
    kind = lists.type
    a_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not a_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(f"{path}: column `vector` holds {kind}, not lists of numbers")
    if not (pa.types.is_string(table["item"].type) or pa.types.is_large_string(table["item"].type)
            or pa.types.is_integer(table["item"].type)):  # fmt: skip
        raise DataError(f"{path}: column `item` holds {table['item'].type}, not ids (text or whole numbers)")
    widths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(widths) != 1 or not widths[0]:
        raise DataError(f"{path}: vectors have the lengths {listed(map(str, widths))}: all need one, above 0")
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, widths[0])
    raw = table["item"].cast(pa.string()).to_pylist()
    places = vocab.find_items(raw)
    known = np.flatnonzero(places >= 0)
    counts = np.bincount(places[known], minlength=vocab.num_items)
    problems = [
        f"{path}: item {vocab.item_id(int(index))!r} has more than one vector" for index in np.flatnonzero(counts > 1)
    ]
    problems += [
        f"{path}: the vector of item {raw[row]!r} holds a value that is no finite number"
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1))
    ]
    if not len(known):
        problems.append(f"{path}: none of its {counted(len(raw), 'item')} is in the data set: are these its raw ids?")
    elif not values[known].any():
        problems.append(f"{path}: every vector is zeros")
    if problems:
        raise DataError(problems)
    if len(known) < vocab.num_items:
        logger.info("%s: no vector for %s", path, counted(vocab.num_items - len(known), "item"))
    vectors = torch.zeros(vocab.num_items, widths[0])
    vectors[torch.from_numpy(places[known])] = torch.from_numpy(values[known])
    return vectors


def write_item_vectors(
    path: str | os.PathLike[str], items: Sequence[str], vectors: NDArray[np.float32], made_by: str = ""
) -> None:
    """Write what `read_item_vectors` reads.

    Args:
        vectors: `[items, width]`.
        made_by: is kept in the file's metadata, as `made_by`.
    """
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({"item": pa.array(items, pa.string()), "vector": column}, metadata={"made_by": made_by})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


@torch.inference_mode()
def embed_texts(
    texts: Sequence[str], encoder: str, *, revision: str | None = None, batch_size: int = 64
) -> NDArray[np.float32]:
    """Vectors of texts by a pretrained encoder, `[texts, width]`: the mean of its last states, as Sentence-Transformers do.

    Args:
        encoder: folder or Hub name of a model with an encoder alone (BERT, MiniLM, MPNet, …) and safetensors weights.
        batch_size: texts of like length that are read together.

    Raises:
        ConfigError: the encoder does not load.
    """
    if Path(encoder).is_dir() and not (Path(encoder) / "config.json").is_file():
        raise ConfigError(f"encoder: {encoder!r} has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, revision=revision, trust_remote_code=False)
        model = AutoModel.from_pretrained(encoder, revision=revision, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"encoder: {encoder!r} does not load: {str(error).splitlines()[0]}") from error
    if model.config.is_encoder_decoder:
        raise ConfigError(f"encoder: {encoder!r} has a decoder: name a sentence encoder, such as all-MiniLM-L6-v2")
    if tokenizer.pad_token is None:
        raise ConfigError(f"encoder: the tokenizer of {encoder!r} has no padding token: name a sentence encoder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().to(device)
    most = min(tokenizer.model_max_length, MOST_PIECES)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = torch.zeros(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = tokenizer([texts[place] for place in places], padding=True, truncation=True, max_length=most,
                          return_tensors="pt").to(device)  # fmt: skip
        states = model(**batch).last_hidden_state.float()
        real = batch["attention_mask"].unsqueeze(-1)
        found[places] = ((states * real).sum(dim=1) / real.sum(dim=1)).cpu()
    return found.numpy()


def item_texts(catalogue: Iterable[tuple[str | None, ...]]) -> list[str]:
    """Title and categories of each item as one text; empty where it has neither."""
    return [". ".join(part for part in parts if part) for parts in catalogue]
