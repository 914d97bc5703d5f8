"""Vectors of items from a file: what is read, what is refused, what is made of titles, and where rows begin with them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from transformers import BertModel

from genrec_llm import cli
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.files import read_json, sha256_file
from genrec_llm.vectors import embed_texts, read_item_vectors, write_item_vectors
from genrec_llm.vocab import IdVocab

WORDS = ["tea", "mug", "pot", "red", "blue"]


@pytest.fixture
def vocab() -> IdVocab:
    return IdVocab.build(pd.DataFrame({"item": ["tea", "mug", "pot"]}), [], seed=0, user_mode="none")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(WORDS, tmp_path_factory.mktemp("encoder"))


def test_vectors_stand_at_the_rows_of_their_items(
    vocab: IdVocab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "vectors.parquet"
    write_item_vectors(path, ["pot", "elsewhere", "tea"], np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32))
    with caplog.at_level(logging.INFO):
        found = read_item_vectors(path, vocab)
    assert found.dtype == torch.float32
    expected = {"pot": [1, 2], "mug": [0, 0], "tea": [5, 6]}
    assert found.tolist() == [expected[vocab.item_id(index)] for index in range(3)]
    assert "no vector for 1 item" in caplog.text


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int32(), 2)])
def test_any_program_may_write_them(kind: pa.DataType, vocab: IdVocab, tmp_path: Path) -> None:
    path = tmp_path / "vectors.parquet"
    items = pa.array(["tea", "mug"], pa.large_string())
    pq.write_table(pa.table({"item": items, "vector": pa.array([[0, 1], [2, 3]], kind), "note": ["", ""]}), path)
    assert read_item_vectors(path, vocab)[vocab.encode_items(["mug"])].tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"item": ["tea"]}, ["no column `vector`"]),
        ({"name": ["tea"]}, ["no column `item`", "no column `vector`"]),
        ({"item": ["tea"], "vector": [3.0]}, ["not lists of numbers"]),
        ({"item": ["tea", "mug"], "vector": [[1.0], [1.0, 2.0]]}, ["the lengths 1, 2"]),
        ({"item": ["tea"], "vector": [["1.0"]]}, ["not lists of numbers"]),
        ({"item": [["tea"]], "vector": [[1.0]]}, ["not ids (text or whole numbers)"]),
        ({"item": ["tea"], "vector": [[0.0]]}, ["every vector is zeros"]),
        ({"item": ["cup"], "vector": [[1.0]]}, ["none of its 1 item is in the data set"]),
        (
            {"item": ["tea", "tea", "mug"], "vector": [[1.0], [2.0], [float("nan")]]},
            ["item 'tea' has more than one vector", "the vector of item 'mug' holds a value that is no finite number"],
        ),
    ],
)
def test_a_file_that_is_not_as_it_should_be(
    columns: dict[str, list[object]], said: list[str], vocab: IdVocab, tmp_path: Path
) -> None:
    path = tmp_path / "vectors.parquet"
    pd.DataFrame(columns).to_parquet(path)
    with pytest.raises(DataError) as caught:
        read_item_vectors(path, vocab)
    assert len(caught.value.problems) == len(said)
    assert all(
        str(path) in problem and words in problem for problem, words in zip(caught.value.problems, said, strict=True)
    )


def test_a_file_that_is_not_parquet_or_not_there(vocab: IdVocab, tmp_path: Path) -> None:
    (tmp_path / "vectors.csv").write_text("item,vector\n")
    for name in ("vectors.csv", "absent.parquet"):
        with pytest.raises(DataError, match=rf"{name}: not read as parquet"):
            read_item_vectors(tmp_path / name, vocab)


def test_a_text_is_the_mean_of_its_states_whatever_stands_beside_it(encoder: Path) -> None:
    texts = ["red tea", "mug", "blue mug red tea pot pot pot pot", "pot blue red"]
    together = embed_texts(texts, str(encoder), batch_size=3)
    model = BertModel.from_pretrained(encoder).eval()
    for text, vector in zip(texts, together, strict=True):
        ids = torch.tensor([[2 + WORDS.index(word) for word in text.split()[:6]]])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-6)


def test_an_encoder_that_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder: .*no config.json"):
        embed_texts(["tea"], str(tmp_path))
    with pytest.raises(ConfigError, match="has a decoder"):
        embed_texts(["tea"], str(tiny.save_backbone("t5-untied", tmp_path / "t5")))


def test_from_titles_to_rows(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`genrec vectors`, then a run whose rows begin with them."""
    log, out = tiny.save_log(tmp_path / "log.csv"), tmp_path / "vectors.parquet"
    items = tmp_path / "items.csv"
    items.write_text(
        "\n".join(["item,title", *(f"i{n},{WORDS[n % 5]} {WORDS[n % 3]}" for n in range(29)), "i29,"]) + "\n"
    )
    flags = ["--items-file", str(items), "--encoder", str(encoder), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["genrec", "vectors", str(log), *flags])
    cli.main()
    said = capsys.readouterr().out
    assert "8 numbers for each of 29 of 30 items" in said and f"--item-vectors {out}" in said
    assert pd.read_parquet(out)["item"].tolist() == [f"i{n}" for n in range(29)]

    base = tiny.save_backbone("t5-untied", tmp_path / "base")
    run = ["--dataset", log, "--backbone", base, "--use_cpu", "--disable_tqdm", "true", "--max-steps", 1,
           "--item-vectors", out]  # fmt: skip
    tiny.recipe("finetune", *run, "--output-dir", tmp_path / "run")
    facts = read_json(tmp_path / "run" / "run.json")
    assert facts["row_init"] == "cooccurrence+vectors" and facts["item_vectors_sha256"] == sha256_file(out)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "vectors of the items" in card and out.name not in card
    with pytest.raises(SystemExit):
        tiny.recipe("finetune", *run, "--output-dir", tmp_path / "other", "--row-init", "random")
    assert "rows that start from random do not read them" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_titles_are_needed(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tiny.save_log(tmp_path / "log.csv"), tmp_path / "vectors.parquet"
    monkeypatch.setattr("sys.argv", ["genrec", "vectors", str(log), "--encoder", str(encoder), "--out", str(out)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no item has a title or categories" in capsys.readouterr().err and not out.exists()
