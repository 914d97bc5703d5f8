"""The `genrec` command: what it imports, what its verbs print and write, how it fails."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from genrec_llm import cli
from genrec_llm.data import leave_last_two_out
from genrec_llm.sources import load_interactions
from genrec_llm.tables import read_catalogue

LOG = """user,item,timestamp
u,a,10
u,b,20
u,a,30
u,c,40
v,a,15
v,c,25
v,b,35
w,b,1000000000
"""


def genrec(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["genrec", *arguments])
    cli.main()


def table(printed: str) -> dict[str, str]:
    """The rows of two columns, by the first."""
    return dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "my shop.csv"
    path.write_text(LOG)
    return path


# --- starting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["data", "prepare", "--help"], ["recommend", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from genrec_llm.cli import main
sys.argv = ["genrec", *{arguments}]
try:
    main()
except SystemExit as ended:
    assert not ended.code
print(sorted({{"torch", "transformers", "datasets", "pandas", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("usage: genrec")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_data_verbs_do_without_torch(log: Path) -> None:
    code = f"""
import sys
from genrec_llm.cli import main
sys.argv = ["genrec", "data", "info", {str(log)!r}]
main()
print(sorted({{"torch", "transformers", "datasets"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_mistakes_end_with_every_problem_and_code_2(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        genrec(monkeypatch, "data", "info", str(log), "--user-column", "who", "--time-column", "when")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert "no column 'who'" in first and "no column 'when'" in second


@pytest.mark.parametrize("arguments", [[], ["data"], ["recommend", "folder"], ["recommend", "folder", "a", "-k", "0"]])
def test_incomplete_commands_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        genrec(monkeypatch, *arguments)
    assert ended.value.code == 2


# --- data info ----------------------------------------------------------------------------------------------


def test_info_of_a_small_log(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"item": "a", "title": "A"}\n{"item": "d", "title": null}\n')
    genrec(monkeypatch, "data", "info", str(log), "--items-file", str(items))
    printed = capsys.readouterr().out
    # The split: u trains on a b, then a, then c; v trains on a, then c, then b; w is too short for it.
    assert {name: value.strip() for name, value in table(printed).items()} == {
        "users": "3",
        "items": "4, 1 without interactions",
        "interactions": "8",
        "interactions a user": "min 1, median 3, mean 2.7, max 4",
        "sparsity": "33.33%",
        "time range": "1970-01-01 00:00:10 to 2001-09-09 01:46:40 UTC",
        "items with a title": "1 of 4 (25.0%)",
        "cold validation targets": "1 of 2 (50.0%)",
        "cold test targets": "1 of 2 (50.0%)",
        "repeats in test targets": "0 of 2 (0.0%)",
        "users not counted in targets": "1 with fewer than 3 interactions; --k-core 3 drops them",
    }
    (following,) = [line for line in printed.splitlines() if line.startswith("Next: ")]
    assert shlex.split(following)[1:] == [
        "genrec", "data", "prepare", str(log), "--items-file", str(items), "--k-core", "3",
        "--output-dir", "prepared/my shop",
    ]  # fmt: skip


def test_info_of_sequences_without_times_or_titles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.txt"
    path.write_text("u a b c a\nv c a b\n")
    genrec(monkeypatch, "data", "info", str(path))
    rows = table(capsys.readouterr().out)
    assert "order of rows" in rows["time range"]
    assert rows["items with a title"].strip() == "none"
    assert rows["repeats in test targets"].strip() == "1 of 2 (50.0%)"


def test_info_agrees_with_the_split_of_beauty(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genrec(monkeypatch, "data", "info", "amazon-beauty", "--data-dir", str(shared_data))
    rows = table(capsys.readouterr().out)
    assert rows["interactions a user"].strip() == "min 5, median 6, mean 8.9, max 204"
    assert rows["sparsity"].strip() == "99.93%"
    # The counts of the split, which tests/test_sources.py takes from its rows.
    assert rows["cold test targets"].strip() == "138 of 22,363 (0.6%)"
    assert rows["cold validation targets"].strip() == "51 of 22,363 (0.2%)"
    assert rows["repeats in test targets"].strip() == "0 of 22,363 (0.0%)"


# --- data prepare -------------------------------------------------------------------------------------------


def test_prepare_writes_the_split_and_the_items(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    out = tmp_path / "prepared" / "movielens"
    flags = ["--data-dir", str(shared_data), "--k-core", "5"]
    genrec(monkeypatch, "data", "prepare", "movielens-100k", *flags, "--output-dir", str(out))
    data = load_interactions("movielens-100k", data_dir=shared_data, k_core=5)
    expected, found = leave_last_two_out(data), datasets.load_from_disk(str(out))
    assert {name: split.to_dict() for name, split in found.items()} == {
        name: split.to_dict() for name, split in expected.items()
    }
    pd.testing.assert_frame_equal(read_catalogue(out / "items.parquet"), data.catalogue, check_dtype=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset_dict.json", "items.parquet", "test", "train", "validation",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert str(out) in printed and "943 users" in printed and "1,349 items" in printed


def test_the_next_command_of_prepare_names_the_same_data(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genrec_llm.args import DataArguments, GenRecTrainingArguments, parse_args

    flags = ["--k-core", "3", "--drop-duplicates"]
    with pytest.raises(SystemExit):  # too small a log for a 3-core
        genrec(monkeypatch, "data", "prepare", str(log), *flags, "--output-dir", str(tmp_path / "out"))
    log.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{i}\n" for u in range(3) for i in range(3)))
    genrec(monkeypatch, "data", "prepare", str(log), *flags, "--output-dir", str(tmp_path / "out"))
    (following,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next, ")]
    assert "recipes/pretrain.py --dataset" in following
    argv = shlex.split(following.partition("recipes/pretrain.py")[2])
    data, training = parse_args(DataArguments, GenRecTrainingArguments, argv=argv)
    assert (data.dataset, data.k_core, data.drop_duplicates) == (str(log), 3, True)
    assert training.output_dir == "runs/my shop/pretrain"


def test_prepare_leaves_a_folder_with_files_alone(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        genrec(monkeypatch, "data", "prepare", str(log), "--output-dir", str(tmp_path))
    assert "already there" in capsys.readouterr().err
    assert log.read_text() == LOG


# --- recommend ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny merged model of five items with random rows."""
    import tiny
    import torch

    from genrec_llm.export import merge
    from genrec_llm.loading import Loaded
    from genrec_llm.model import IdTokens, add_id_words, load_backbone, prompt_layout
    from genrec_llm.vocab import IdVocab

    folder = tmp_path_factory.mktemp("tiny")
    base = tiny.save_backbone("t5-untied", folder / "base")
    model, tokenizer = load_backbone(str(base))
    catalogue = pd.DataFrame({"item": list("abcde"), "title": ["Tea", "Mug", None, "Pot", "Cup"]})
    vocab = IdVocab.build(catalogue, [], seed=0, user_mode="none")
    layout = prompt_layout(tokenizer, vocab, max_history=8, decoder_prompt="last-item")
    items = torch.randn(5, model.config.d_model, generator=torch.Generator().manual_seed(0))
    model.add_id_tokens(IdTokens(items, torch.zeros(1, model.config.d_model), None), layout.base)
    add_id_words(tokenizer, vocab)
    info = {"base_model": {"name": "tiny", "revision": None, "type": "t5"}, "data": {"name": "toy"}}
    merge(Loaded(model.eval(), tokenizer, vocab, layout, info), folder / "merged", n=5)
    return folder / "merged"


def test_recommend_prints_ranked_items_with_titles(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genrec(monkeypatch, "recommend", str(merged), "a", "b")
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["rank", "item", "title", "score"]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert {row[1]: row[2:-1] for row in rows} == {"c": [], "d": ["Pot"], "e": ["Cup"]}
    scores = [float(row[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True)

    genrec(monkeypatch, "recommend", str(merged), "a", "b", "--keep-seen", "-k", "4")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_recommend_names_unknown_items_and_folders(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ((str(merged), "a", "nope"), "'nope'"),
        ((str(tmp_path / "nowhere"), "a"), "no such directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            genrec(monkeypatch, "recommend", *arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
