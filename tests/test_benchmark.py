"""The tool that makes the rows of a data set: ours and rivals, seed by seed, and again after a kill."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import benchmark
import make_tables
import pytest
import tiny

from genrec_llm.errors import ConfigError, DataError
from genrec_llm.evaluation import EvalReport
from genrec_llm.files import read_json
from genrec_llm.metrics import ndcg


@pytest.mark.slow
def test_rows_and_pairs_of_ours_and_a_rival(tmp_path: Path) -> None:
    configs = tiny.save_stages(tmp_path)
    with (configs / "finetune.yaml").open("a") as file:
        file.write("last_items_share: 0.5\n")
    quality = tmp_path / "quality.json"
    command = [
        sys.executable, "tools/benchmark.py", "--model", "genrec-tiny", "--configs", str(configs),
        "--out", str(tmp_path / "out"), "--quality", str(quality),
        "--rivals", "hgn", "--seeds", "0", "1", "--jobs", "2", "--split", "test",
    ]  # fmt: skip
    flags = ["--", "--dropout", "0.05"]
    tiny.run([*command, *flags])
    rows = read_json(quality)
    trained = ["genrec-tiny", "genrec-tiny, history alone", "hgn", "hgn, last items too"]
    assert {(row["model"], row["seed"], row["split"]) for row in rows} == {
        *((name, seed, "test") for name in trained for seed in (0, 1)),
        ("popularity", None, "test"), ("item-kNN", None, "test"),
    }  # fmt: skip
    too = next(row for row in rows if row["model"] == "hgn, last items too" and row["seed"] == 1)
    assert "--rivals hgn --split" in too["command"] and too["seconds"] > 0
    ours = next(row for row in rows if row["model"] == "genrec-tiny" and row["seed"] == 1)
    assert "--seeds 1 --split test" in ours["command"] and ours["seconds"] > 0
    assert ours["command"].endswith(f"--out {tmp_path / 'out'} -- --dropout 0.05")
    trained_with = read_json(tmp_path / "out" / "seed-1" / "finetune" / "run.json")["arguments"]["model"]
    assert trained_with["dropout"] == 0.05
    pairs = read_json(tmp_path / "quality_pairs.json")
    assert {pair["rival"] for pair in pairs if pair["model"] == "genrec-tiny"} == {
        "genrec-tiny, history alone", "hgn", "hgn, last items too", "item-kNN", "popularity"
    }  # fmt: skip
    assert [pair["rival"] for pair in pairs if pair["model"] == "genrec-tiny, history alone"] == ["hgn"]
    assert all(pair["seeds"] == [0, 1] for pair in pairs)

    # What is kept of each user gives the rows and the pairs, without the runs.
    make_tables.check_kept(rows, quality)
    folders = {seed: make_tables.kept_report(quality, ours | {"seed": seed}) for seed in (0, 1)}
    whole = EvalReport.load(tmp_path / "out" / "seed-1" / "finetune" / "evaluation" / "test" / "GenRec")
    kept = EvalReport.load(folders[1])
    assert (kept.protocol, "MRR" in kept.metrics) == (whole.protocol, False)
    assert ndcg(kept.ranks, 20).tolist() == ndcg(whole.ranks, 20).tolist()
    folders[1].rename(tmp_path / "aside")
    folders[0].rename(folders[1])
    with pytest.raises(DataError, match=r"genrec-tiny_seed_1: .* for its ranks"):
        make_tables.check_kept(rows, quality)
    folders[1].rename(folders[0])
    (tmp_path / "aside").rename(folders[1])

    tiny.run([*command, "--keep-seen", *flags])
    kept = [row for row in read_json(quality) if row["protocol"] == "seen kept"]
    assert {row["model"] for row in kept} == {*trained, "popularity", "item-kNN", "recent repeat"}
    for seed in (0, 1):  # each protocol opened the test split once, and the first command again does not
        opened = tmp_path / "out" / f"seed-{seed}" / "finetune" / "test_openings.jsonl"
        assert len(opened.read_text().splitlines()) == 2
    tiny.run([*command, *flags])
    tables = [read_json(tmp_path / name) for name in ("quality.json", "quality_pairs.json")]
    tiny.run([*(word for word in command if word not in ("--rivals", "hgn")), *flags])
    # Nothing was ranked again, and each row still says what makes it, whatever rivals the command names.
    assert len(opened.read_text().splitlines()) == 2 and len(tables[0]) == len(rows) + len(kept)
    assert [read_json(tmp_path / name) for name in ("quality.json", "quality_pairs.json")] == tables
    # A rival that is trained again is ranked again, and counts as what it is now.
    shutil.rmtree(tmp_path / "out" / "rivals" / "hgn_seed=1")
    tiny.run([*command, *flags])
    assert len(opened.read_text().splitlines()) == 3
    seconds = {row["seconds"] for row in read_json(quality) if row["model"] == "hgn" and row["seed"] == 1}
    assert read_json(tmp_path / "out" / "rivals" / "hgn_seed=1" / "rival.json")["seconds"] in seconds
    # A seed whose run is gone still counts in the pairs, by what is kept of it.
    shutil.rmtree(tmp_path / "out" / "seed-0")
    (tmp_path / "quality_pairs.json").unlink()
    tiny.run([*(word for word in command if word != "0"), *flags])
    assert all(pair["seeds"] == [0, 1] for pair in read_json(tmp_path / "quality_pairs.json"))


def test_what_cannot_be_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--out", str(tmp_path / "out"), *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            benchmark.main()
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    said = refused("--model", "SASRec", "--configs", tmp_path)
    assert "finetune.yaml has to be in it" in said and "begins with genrec" in said
    ours = ("--model", "genrec", "--configs", tiny.save_stages(tmp_path))
    assert "--rival hng: rivals.yaml has" in refused(*ours, "--rivals", "hgn", "hng")
    assert "-- without_last: the rivals would" in refused(*ours, "--rivals", "hgn", "--", "--without-last", "1")


def test_what_rivals_do_not_read_may_be_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[object] = []
    monkeypatch.setattr(benchmark, "each", lambda work, jobs, at_once: trained.extend(jobs))
    monkeypatch.setattr(benchmark.Benchmark, "rank", lambda *_: sys.exit(7))
    words = ["--out", tmp_path / "out", "--model", "genrec", "--configs", tiny.save_stages(tmp_path), "--rivals", "hgn"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words), "--", "--max-history", "10", "--users", "none"])
    with pytest.raises(SystemExit, match="7"):
        benchmark.main()
    assert trained == [(None, 0), ("hgn", 0)]


def test_a_folder_has_the_runs_of_one_model(tmp_path: Path) -> None:
    ours = benchmark.Benchmark(Path("configs"), "genrec-a", [], tmp_path / "out", "test", False, [])
    for _ in range(2):
        ours.keep_name()
    with pytest.raises(ConfigError, match=r"--model genrec-b: .*out has runs of genrec-a: choose another --out"):
        replace(ours, model="genrec-b").keep_name()


def test_no_secret_goes_into_a_row() -> None:
    flags = ["--hub-token", "hf_abcdefghijklmnopqrstuvwxyz"]
    ours = benchmark.Benchmark(Path("configs"), "genrec", [], Path("out"), "test", False, flags)
    assert ours.command(None, 0).endswith("--out out -- --hub-token '***'")
