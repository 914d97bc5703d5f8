"""The `genrec` command: what it imports, what its verbs print and write, how it fails."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import tiny

from genrec_llm import cli, launch
from genrec_llm.args import EvaluateArguments, parse_args
from genrec_llm.ask import find_items
from genrec_llm.data import leave_last_two_out
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.recommender import Recommender
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


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "genrec_llm.cli", "--help"], check=True, capture_output=True)
        return time.monotonic() - start

    assert min(seconds() for _ in range(5)) < 0.3  # the quickest of five: other work on the machine is none of ours


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recomend", "folder", "a"], "did you mean recommend?"),
        (["data", "inof", "log.csv"], "did you mean info?"),
        (["recommend", "folder", "a", "--keepseen"], "--keepseen: unknown flag: did you mean --keep-seen?"),
        (["recommend", "folder", "a", "--keep"], "--keep: unknown flag"),  # no abbreviations
        (["data", "info", "log.csv", "--kcore", "3"], "did you mean --k-core?"),
        (["push", "folder", "org/name", "--dry"], "did you mean --dry-run?"),
        (["pull", "org/name", "folder"], "folder: unknown flag"),
        (["finetune", "--strategy", "zero"], "did you mean zero"),
        (["finetune", "--stratgy=ddp"], "did you mean --strategy?"),
        (["pretrain", "--process", "2"], "did you mean --processes?"),
        (["finetune", "--strategy", "cpu", "--processes", "2"], "take --strategy ddp"),
        (["finetune", "--strategy", "zero3_multi_node"], "on this machine alone take --strategy zero3"),
        (["finetune", "--strategy", "fsdp2", "--use_cpu"], "needs GPUs; take --strategy zero3"),
        (["recommend", "folder", "a", "--output", "x"], "goes with --input"),
        (["recommend", "folder", "a", "--input", "x"], "leave them out of the command"),
    ],
)
def test_misspelt_commands_get_the_nearest_name(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        genrec(monkeypatch, *arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("error: ") and not printed.out


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
    (following,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    assert "genrec pretrain --dataset" in following
    argv = shlex.split(following.partition("genrec pretrain")[2])
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

    from genrec_llm.backbone import load_backbone
    from genrec_llm.export import merge
    from genrec_llm.loading import Loaded
    from genrec_llm.model import IdTokens
    from genrec_llm.tokenizer import add_id_words, prompt_layout
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
    info = {
        "base_model": {"name": "tiny", "revision": None, "type": "t5"},
        "data": {"name": "toy", "fingerprint": "0" * 64, "vocabulary": vocab.fingerprint},
        "id_seed": 0,
        "user_mode": "none",
        "user_buckets": 0,
    }
    merge(Loaded(model.eval(), tokenizer, vocab, layout, info), folder / "merged", n=5)
    return folder / "merged"


def test_recommend_prints_ranked_items_with_titles(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genrec(monkeypatch, "recommend", str(merged), "a", "mu")
    understood, listed = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert [line.split() for line in understood[1:]] == [["a", "Tea"], ["b", "Mug"]]
    header, *rows = (line.split() for line in listed)
    assert header == ["rank", "item", "title", "score"]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert {row[1]: row[2:-1] for row in rows} == {"c": [], "d": ["Pot"], "e": ["Cup"]}
    scores = [float(row[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True)

    genrec(monkeypatch, "recommend", str(merged), "-k", "4", "--keep-seen", "a", "b")  # flags may stand first
    assert len(capsys.readouterr().out.split("\n\n")[1].splitlines()) == 5
    genrec(monkeypatch, "recommend", str(merged), "a", "b", "--exclude", "pot", "--exclude", "e")
    (_, row) = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert row.split()[1] == "c"


def test_recommend_says_that_nothing_is_left(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genrec(monkeypatch, "recommend", str(merged), *"abcde")
    printed = capsys.readouterr().out
    assert "Nothing is left to recommend" in printed and "--keep-seen" in printed and "rank" not in printed


def test_recommend_names_unknown_items_and_folders(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ((str(merged), "a", "nope", "u"), ("'nope'", "'u': 2 items", "b  Mug", "e  Cup")),
        ((str(tmp_path / "nowhere"), "a"), ("nowhere",)),
    ):
        with pytest.raises(SystemExit) as ended:
            genrec(monkeypatch, "recommend", *arguments)
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert all(word in printed for word in words), printed


FILMS = pd.DataFrame(
    {
        "item": ["1", "50", "7", "8", "9", "10"],
        "title": ["Toy Story (1995)", "Star Wars (1977)", "Heat", "Heat and Dust", "50 First Dates", None],
    }
)


@pytest.mark.parametrize(
    ("word", "item"),
    [
        ("50", "50"),
        ("toy", "1"),
        ("  STAR wars", "50"),
        ("heat", "7"),
        ("dust", "8"),
        ("first dates", "9"),
        ("10", "10"),
    ],
)
def test_an_id_comes_before_a_title_and_a_whole_title_before_a_part(word: str, item: str) -> None:
    assert find_items([word], FILMS) == [item]


def test_what_is_typed_ambiguously_is_refused_with_the_candidates() -> None:
    with pytest.raises(DataError) as caught:
        find_items(["19", "hea", "", "zz"], FILMS)
    both, heats, empty, nothing = caught.value.problems
    assert "1  Toy Story (1995)" in both and "50  Star Wars (1977)" in both and "2 items" in both
    assert "7  Heat" in heats and "8  Heat and Dust" in heats
    assert empty.startswith("''") and nothing.startswith("'zz'")
    many = pd.DataFrame({"item": [str(number) for number in range(30)], "title": [f"Film {n}" for n in range(30)]})
    with pytest.raises(DataError, match="and 20 more"):
        find_items(["film"], many)
    with pytest.raises(DataError, match="knows no titles"):
        find_items(["x"], many[["item"]])


def test_a_file_of_histories_is_answered_line_by_line(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    histories = [list("abcde"[start : start + 2]) for start in range(4)] * 3
    lines = [json.dumps({"id": number, "history": history}) for number, history in enumerate(histories)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines))
    monkeypatch.setattr("genrec_llm.ask._LINES", 5)
    flags = ["--input", str(tmp_path / "in.jsonl"), "-k", "2", "--exclude", "e"]
    genrec(monkeypatch, "recommend", str(merged), *flags, "--output", str(tmp_path / "out.jsonl"))
    assert "12 lines" in capsys.readouterr().err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    recommender = Recommender.from_pretrained(merged)
    assert [answer["id"] for answer in answers] == list(range(12))
    for history, answer in zip(histories, answers, strict=True):
        expected = recommender.recommend(history, k=2, exclude=["e"])
        assert [(one["item"], one["title"]) for one in answer["items"]] == [(one.item, one.title) for one in expected]
        assert [one["score"] for one in answer["items"]] == pytest.approx([one.score for one in expected], abs=1e-5)
    genrec(monkeypatch, "recommend", str(merged), *flags)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == answers
    before = (tmp_path / "in.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        genrec(monkeypatch, "recommend", str(merged), *flags, "--output", str(tmp_path / "." / "in.jsonl"))
    assert "is the file of histories" in capsys.readouterr().err and (tmp_path / "in.jsonl").read_bytes() == before


def test_standard_input_serves_and_other_fields_come_back(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = b'{"history": ["a", 5, "new"], "who": "\\ud800 \xc3\xa9", "more": [1, null]}\n{"history": []}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
    genrec(monkeypatch, "recommend", str(merged), "--input", "-")
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines())
    assert first["who"] == "\ud800 é" and first["more"] == [1, None] and "history" not in first
    assert len(first["items"]) == 4 and len(second["items"]) == 5
    assert "2 items ('5', 'new')" in printed.err and printed.err.count("new") == 1


def test_bad_lines_are_named_together_and_nothing_is_written(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [b"{", b"[]", b'{"history": "a"}', b'{"history": [1.5]}', b'{"history": [true]}', b'{"history": [], "user": []}',
           b'{"history": [], "items": 1}', b"\xff", b"[" * 100_000]  # fmt: skip
    path.write_bytes(b'{"history": ["a"]}\n' + b"\n".join(bad))
    out.write_text("before")
    for target in (["--output", str(out)], []):
        with pytest.raises(SystemExit) as ended:
            genrec(monkeypatch, "recommend", str(merged), "--input", str(path), *target)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == "" and out.read_text() == "before"
        assert re.findall(r"line (\d+):", printed.err) == [str(number) for number in range(2, 11)]
    path.write_bytes(b"x\n" * 70)
    with pytest.raises(SystemExit):
        genrec(monkeypatch, "recommend", str(merged), "--input", str(path))
    assert "and 50 more lines" in capsys.readouterr().err
    for content, words in ((b"", "holds no line"), (None, "cannot be read")):  # where an output is there, too
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit):
            genrec(monkeypatch, "recommend", str(merged), "--input", str(path), "--output", str(out))
        assert words in capsys.readouterr().err
        path.touch()


# --- push and pull ------------------------------------------------------------------------------------------


def test_push_and_pull_hand_on_their_flags_and_print_files_url_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genrec_llm.hub import Pulled, Pushed

    asked: list[tuple[object, ...]] = []

    def push(folder: Path, repo_id: str, **flags: object) -> Pushed:
        asked.append((folder, repo_id, flags))
        return Pushed(
            {"a.json": 12, "big.bin": 3_456_789}, f"https://hub/{repo_id}", None if flags["dry_run"] else "c0ffee"
        )

    def pull(repo_id: str, **flags: object) -> Pulled:
        asked.append((repo_id, flags))
        return Pulled(tmp_path, "c0ffee")

    monkeypatch.setattr("genrec_llm.hub.push", push)
    monkeypatch.setattr("genrec_llm.hub.pull", pull)
    genrec(monkeypatch, "push", "folder", "org/name", "--private", "--base-model", "org/base", "--revision", "v1")
    flags = {"revision": "v1", "private": True, "with_users": False, "base_model": "org/base", "dry_run": False}
    assert asked.pop() == (Path("folder"), "org/name", flags)
    printed = capsys.readouterr().out
    assert "https://hub/org/name, commit c0ffee" in printed
    assert re.search(r"big.bin +3,456,789 bytes", printed) and re.search(r"3,456,801 bytes", printed)

    genrec(monkeypatch, "push", "folder", "org/name", "--dry-run", "--with-users")
    _, _, given = asked.pop()
    assert isinstance(given, dict) and given["dry_run"] and given["with_users"] and not given["private"]
    assert "nothing was sent" in capsys.readouterr().out

    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "x.png").write_bytes(b"12345")
    genrec(monkeypatch, "pull", "org/name", "--revision", "v1", "--output-dir", "here")
    assert asked.pop() == ("org/name", {"revision": "v1", "output_dir": "here"})
    printed = capsys.readouterr().out
    assert "commit c0ffee" in printed and str(tmp_path) in printed and re.search(r"plots/x.png +5 bytes", printed)


# --- the training verbs -------------------------------------------------------------------------------------


def command(*arguments: str, gpus: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    return launch.training_command("finetune", arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "options", "file", "processes", "on_cpu"),
    [
        (0, {}, "cpu", None, True),
        (1, {}, "single_gpu", None, False),
        (4, {}, "ddp", "4", False),
        (4, {"processes": 1}, "single_gpu", None, False),
        (4, {"processes": 3}, "ddp", "3", False),
        (4, {"strategy": "zero3"}, "zero3", "4", False),
        (4, {"strategy": "cpu"}, "cpu", None, True),
        (0, {"processes": 2}, "ddp", "2", True),
        (0, {"strategy": "zero2"}, "zero2", "2", True),
        (1, {"strategy": "ddp"}, "ddp", "1", False),
    ],
)
def test_the_strategy_fits_the_machine(
    gpus: int,
    options: dict[str, object],
    file: str,
    processes: str | None,
    on_cpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny.REPOSITORY)
    words = command("--dataset", "my shop.csv", gpus=gpus, monkeypatch=monkeypatch, **options)
    assert words[:4] == ["accelerate", "launch", "--config_file", f"accelerate_configs/{file}.yaml"]
    assert (words[words.index("--num_processes") + 1] if "--num_processes" in words else None) == processes
    place = words.index("recipes/finetune.py")
    assert words[place + 1 :] == ["--dataset", "my shop.csv", *(["--use_cpu"] if on_cpu else [])]
    assert ("--deepspeed_config_file" in words[:place]) == file.startswith("zero")


def test_strategies_that_the_machine_cannot_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, options, words in (
        (0, {"strategy": "single_gpu"}, "shows no GPU"),
        (2, {"processes": 3}, "more than the 2 GPUs"),
        (2, {"strategy": "single_gpu", "processes": 2}, "one process"),
    ):
        with pytest.raises(ConfigError, match=words):
            command(gpus=gpus, monkeypatch=monkeypatch, **options)  # type: ignore[arg-type]
    words = command("--use_cpu", gpus=2, monkeypatch=monkeypatch, processes=3)
    assert words.count("--use_cpu") == 1 and words[words.index("--num_processes") + 1] == "3"


@pytest.mark.parametrize(
    ("gpus", "flags", "launched"),
    [
        (0, [], None),
        (1, [], None),
        (4, [], "ddp"),
        (4, ["--use_cpu"], None),
        (4, ["--processes", "1"], "single_gpu"),
        (0, ["--processes", "2"], "ddp"),
        (2, ["--strategy", "ddp"], "ddp"),
    ],
)
def test_an_evaluation_is_launched_where_several_gpus_can_share_it_or_on_request(
    gpus: int, flags: list[str], launched: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(cli, "run", lambda words: ran.append(list(words)) or 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.chdir(tiny.REPOSITORY)
    with pytest.raises(SystemExit):
        genrec(monkeypatch, "evaluate", "--run", "runs/x", *flags)
    (words,) = ran
    place = words.index("recipes/evaluate.py")
    assert words[place + 1 : place + 3] == ["--run", "runs/x"]
    if launched is None:
        assert words[:place] == ["python"]
    else:
        assert words[:4] == ["accelerate", "launch", "--config_file", f"accelerate_configs/{launched}.yaml"]
        parse_args(EvaluateArguments, argv=words[place + 1 :])


def test_the_files_of_a_launch_are_named_so_that_it_starts_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command(gpus=0, monkeypatch=monkeypatch, strategy="zero2")
    for flag in ("--config_file", "--deepspeed_config_file"):
        assert Path(words[words.index(flag) + 1]).is_file()
    assert Path(next(word for word in words if word.endswith("finetune.py"))).is_file()
    # What the launcher makes of them: the flag has to win over the file's own relative path.
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert Path(args.deepspeed_config_file) == tiny.REPOSITORY / "ds_configs" / "zero2.json"
    assert args.use_deepspeed and args.num_processes == 2


def test_the_verbs_hand_the_flags_of_the_recipe_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(cli, "run", lambda words: ran.append(list(words)) or 7)
    monkeypatch.chdir(tmp_path)
    for verb, flags in (
        (
            "finetune",
            ["--learning-rate", "1e-3", "--strategy", "ddp", "--seed=3", "--processes", "2", "--from_run", "x y"],
        ),
        ("merge", ["--run", "runs/x", "--without-users"]),
        ("evaluate", ["--run", "runs/x", "--split", "test"]),
    ):
        with pytest.raises(SystemExit) as ended:
            genrec(monkeypatch, verb, *flags)
        assert ended.value.code == 7
    finetune, merge, evaluate = ran
    place = finetune.index(str(tiny.REPOSITORY / "recipes" / "finetune.py"))
    assert finetune[place + 1 :] == ["--learning-rate", "1e-3", "--seed=3", "--from_run", "x y", "--use_cpu"]
    assert finetune[finetune.index("--num_processes") + 1] == "2"
    assert merge == ["python", str(tiny.REPOSITORY / "recipes" / "merge.py"), "--run", "runs/x", "--without-users"]
    assert evaluate[2:] == ["--run", "runs/x", "--split", "test"]
    capsys.readouterr()


def test_a_run_shows_its_command_and_has_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "a recipe.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(int(sys.argv[1]))")
    for code in (0, 2, 5):
        assert launch.run(["python", str(script), str(code), "x y"]) == code
        shown, said = capfd.readouterr().out.splitlines()
        assert shlex.split(shown) == ["$", "python", str(script), str(code), "x y"]
        assert said == f"['{code}', 'x y']"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert launch.run(["python", str(script)]) == 137


def _hear_ctrl_c() -> None:
    """What a shell starts in the background, such as these tests, ignores SIGINT, and so does all below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "recipe", "mend"),
    [
        (signal.SIGINT, "evaluate.py", ""),
        (signal.SIGTERM, "finetune.py", "; the same command, given again, goes on from the last checkpoint"),
    ],
)
def test_a_signal_ends_every_process_of_a_run(number: signal.Signals, recipe: str, mend: str, tmp_path: Path) -> None:
    """The worker ignores what it is asked politely, and the run has it ended all the same."""
    (tmp_path / recipe).write_text(
        "import os, signal, subprocess, sys, time\n"
        "if len(sys.argv) == 1:\n"
        "    worker = subprocess.Popen([sys.executable, __file__, 'worker'])\n"
        "    print('worker', worker.pid, flush=True)\n"
        "else:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    code = f"import sys; from genrec_llm.launch import run; sys.exit(run(['python', '{recipe}']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, text=True,
        env=tiny.environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"},  # and ten seconds that `run` adds
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=_hear_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(3)]
    (worker,) = [int(line[1]) for line in lines if line[0] == "worker"]
    os.kill(worker, 0)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.strip() == f"stopped by {number.name}{mend}"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cpu", "ddp"])
def test_a_launch_has_the_exit_code_of_its_recipe(strategy: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "genrec_llm.cli", "finetune", "--strategy", strategy, "--dataset", "nowhere.csv"],
        cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") >= 1 and "'nowhere.csv'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[0].startswith("$ ") and f"/{strategy}.yaml" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cpu", "ddp"])
def test_ctrl_c_ends_a_training_without_a_traceback_or_a_worker(strategy: str, tmp_path: Path) -> None:
    tiny.save_backbone("t5-tied", tmp_path / "base")
    tiny.save_log(tmp_path / "log.csv")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "genrec_llm.cli", "finetune", "--strategy", strategy, "--dataset", "log.csv",
            "--backbone", str(tmp_path / "base"), "--output-dir", "run", "--global-batch-size", "32", "--lora-r", "2",
            "--disable_tqdm", "true", "--num-train-epochs", "100000", "--eval-strategy", "no", "--save-strategy", "no",
            "--load-best-model-at-end", "false",
        ],
        cwd=tmp_path, env=tiny.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=_hear_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    while "examples an epoch" not in process.stdout.readline():
        assert process.poll() is None
    workers = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
    assert len(workers) >= 3  # the verb, the launcher, and one process or two
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by SIGINT" in said and "Traceback" not in said, said[-3000:]
    assert not any(_alive(int(folder.name)) for folder in workers)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


@pytest.mark.slow
def test_the_verbs_work_from_an_installed_wheel(tmp_path: Path) -> None:
    """Built from a copy, put into a folder of its own, and used far from any checkout: train, merge, recommend."""
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    source.mkdir()
    for name in ("genrec_llm", "recipes", "accelerate_configs", "ds_configs"):
        shutil.copytree(tiny.REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tiny.REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)

    inside = {name.removeprefix("genrec_llm/") for name in zipfile.ZipFile(wheel).namelist()}
    files = {str(path.relative_to(source)) for path in source.rglob("*.*") if path.suffix in (".py", ".yaml", ".json")}
    assert {
        name.removeprefix("genrec_llm/") for name in files if "/" in name and not name.startswith("build/")
    } <= inside

    work.mkdir()
    base, log = tiny.save_backbone("t5-tied", work / "base"), tiny.save_log(work / "log.csv")
    environment = {**tiny.environment(), "PYTHONPATH": str(site)}

    def genrec_of_wheel(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, site / "bin" / "genrec", *map(str, arguments)], cwd=work, env=environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    printed = genrec_of_wheel("pretrain", "--help")
    assert "--strategy" in printed and "--masks_per_sequence" in printed
    flags = ["--dataset", log.name, "--backbone", base.name, "--global-batch-size", 32, "--lora-r", 2, "--max-steps", 2]
    printed = genrec_of_wheel("finetune", *flags, "--output-dir", "run", "--disable_tqdm", "true")
    assert str(site / "genrec_llm" / "recipes" / "finetune.py") in printed.splitlines()[0]
    genrec_of_wheel("merge", "--run", "run")
    assert "i3" in genrec_of_wheel("recommend", "run/merged", "i1", "i2", "--keep-seen", "-k", 30)


# --- demo ---------------------------------------------------------------------------------------------------


def test_the_demo_goes_the_whole_way_and_stops_where_a_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    fails = 3

    def run(words: list[str]) -> int:
        ran.append(words)
        return 4 if len(ran) == fails else 0

    monkeypatch.setattr("genrec_llm.demo.run", run)
    with pytest.raises(SystemExit) as ended:
        genrec(monkeypatch, "demo", "--seed", "7", "--output-dir", str(tmp_path / "out"))
    assert ended.value.code == 4 and len(ran) == 3
    pretrain, finetune, merge = ran
    for words, stage in ((pretrain, "pretrain"), (finetune, "finetune")):
        config = Path(words[words.index("--config") + 1])
        assert config.is_file() and config.stem == stage
        assert words[words.index("--seed") + 1] == "7" and "--use_cpu" in words
        assert words[words.index("--output-dir") + 1] == str(tmp_path / "out" / stage)
    assert finetune[finetune.index("--from-run") + 1] == str(tmp_path / "out" / "pretrain")
    assert merge[-2:] == ["--run", str(tmp_path / "out" / "finetune")]
    capsys.readouterr()
