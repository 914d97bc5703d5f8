"""The ablation: one thing changed at a time, a killed command goes on, and what cannot be says why."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ablation
import pytest
import tiny
from ablation import BASE, VARIANTS, Outcome

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.errors import ConfigError
from genrec_llm.files import read_json, write_json

FIGURES = dict.fromkeys(ablation.METRICS, 0.25)


def test_every_change_is_an_argument_that_there_is() -> None:
    known = {
        name for cls in (DataArguments, ModelArguments, GenRecTrainingArguments) for name in cls.__dataclass_fields__
    }
    assert all({*variant.changes, *variant.pretraining} <= known for variant in VARIANTS.values())
    assert VARIANTS[BASE] == ablation.Variant()


def test_the_table_has_means_spreads_and_reasons() -> None:
    outcomes = [
        Outcome(BASE, 0, FIGURES, 10.0),
        Outcome(BASE, 1, dict.fromkeys(ablation.METRICS, 0.35), 20.0),
        Outcome("no pretraining", 0, FIGURES, 5.0),
        Outcome("rows: text", 0, reason="row_init: text is not possible"),
    ]
    header, _, base, without, text = ablation.table(outcomes).splitlines()
    assert header.count("|") == base.count("|") == text.count("|")
    assert base.startswith(f"| {BASE} | 0.3000 ± 0.0707 |") and base.endswith("| 2 | 15 |")
    assert without.startswith("| no pretraining | 0.2500 |") and "row_init: text is not possible" in text


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    configs, trial = tiny.save_stages(tmp_path), ablation.Trial(ablation.ALONE, 0, tmp_path / "out")
    (trial.folder / "finetune").mkdir(parents=True)
    write_json(trial.folder / "finetune" / "run.json", {"finished": {}})
    kept = trial.folder / "finetune.yaml"
    kept.write_text("seed: 0\nlearning_rate: 0.5\n")
    with pytest.raises(ConfigError, match=f"^{kept}: this run has other settings: choose another --out"):
        trial.run(configs, [])
    assert kept.read_text() == "seed: 0\nlearning_rate: 0.5\n"


def test_a_run_with_other_flags_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, trial = tiny.save_stages(tmp_path), ablation.Trial(ablation.ALONE, 0, tmp_path / "out")
    monkeypatch.setattr(ablation.Trial, "_train", lambda *_: "stopped here")
    flags = ["--without-last", "1"]
    assert trial.run(configs, flags).reason == "stopped here"
    (trial.folder / "finetune").mkdir()
    write_json(trial.folder / "finetune" / "run.json", {})
    assert trial.run(configs, flags).reason == "stopped here"
    with pytest.raises(ConfigError, match="this run has other settings"):
        trial.run(configs, [])


def test_flags_of_a_run_that_never_began_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, trial = tiny.save_stages(tmp_path), ablation.Trial(ablation.ALONE, 0, tmp_path / "out")
    monkeypatch.setattr(ablation.Trial, "_train", lambda *_: "stopped here")
    for flags in (["--dropuot", "0.1"], []):
        assert trial.run(configs, flags).reason == "stopped here"
    (trial.folder / "finetune").mkdir()
    write_json(trial.folder / "finetune" / "run.json", {})
    assert trial.run(configs, []).reason == "stopped here"


@pytest.mark.parametrize("flags", [["--max-history", "20"], ["--dropout", "0.1", "--max_history=20"]])
def test_a_flag_does_not_undo_a_variant(flags: list[str], tmp_path: Path) -> None:
    trial = ablation.Trial("history of 50", 0, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^-- max_history: 'history of 50' changes it"):
        trial.run(tiny.save_stages(tmp_path), flags)
    assert not trial.folder.exists()


def test_the_page_says_what_was_trained_where_and_from_changed_files_too(tmp_path: Path) -> None:
    commits = ["a" * 40, "b" * 40 + "+changes"]
    done = Outcome(BASE, 0, FIGURES, 10.0, commits=commits, hardware="CPU")
    refused = Outcome("rows: text", 0, reason="not possible")
    for outcomes, said in (
        ([done, refused], f"\nTrained at commit {'a' * 10}, {'b' * 10}+changes on CPU. Made by\n"),
        ([replace(done, commits=[])], "\nTrained on CPU. Made by\n"),
        ([refused], "\n\nMade by\n"),
    ):
        ablation.write(tmp_path, outcomes)
        assert said in (tmp_path / "ablation.md").read_text()


def test_a_variant_pretrains_where_it_or_the_configuration_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = tiny.save_stages(tmp_path)
    trained: list[str] = []
    monkeypatch.setattr(ablation.Trial, "_train", lambda _, stage, flags: trained.append(stage) or "stopped here")
    for variant, first in ((BASE, "pretrain"), (ablation.ALONE, "finetune"), ("masked pretraining", "pretrain")):
        assert ablation.Trial(variant, 0, tmp_path / variant).run(configs, []).reason == "stopped here"
        assert trained.pop() == first
    (configs / "pretrain.yaml").unlink()
    config = (configs / "finetune.yaml").read_text()
    (configs / "finetune.yaml").write_text(config.replace("from_run: elsewhere\n", ""))
    trial = ablation.Trial(BASE, 1, tmp_path / "one stage")
    assert trial.run(configs, []).reason == "stopped here" and trained == ["finetune"]
    assert "from_run: null" in (trial.folder / "finetune.yaml").read_text()
    (configs / "finetune.yaml").write_text(config)
    with pytest.raises(ConfigError, match=f"^{configs}: finetune.yaml names a from_run, and there is no pretrain.yaml"):
        ablation.Trial(BASE, 1, tmp_path / "missing").run(configs, [])
    (configs / "finetune.yaml").write_text(config.replace("from_run: elsewhere\n", ""))
    trial = ablation.Trial("masked pretraining", 1, tmp_path / "other")
    assert trial.run(configs, []).reason == "stopped here" and trained == ["finetune", "pretrain"]
    assert "masks_per_sequence: 3" in (trial.folder / "pretrain.yaml").read_text()


def test_a_variant_that_the_configuration_has_already_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(ablation.Trial, "_train", lambda self, *_: trained.append(self.variant) or "stopped here")
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "finetune.yaml").write_text("users: none\ntuning: full\nbackbone_init: random\n")
    reasons = {name: ablation.Trial(name, 0, tmp_path / name).run(configs, []).reason for name in VARIANTS}
    same = {name for name, reason in reasons.items() if reason == "the same as 'as configured'"}
    assert same >= {
        ablation.ALONE,
        "no user token",
        "full tuning",
        "one mask a sequence",
        "ranked by the history alone",
    }
    assert {*trained} == VARIANTS.keys() - same >= {BASE, "LoRA", "masked pretraining", "rows: random"}


def test_what_cannot_be_begun_leaves_the_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other settings are refused before anything is trained; a crash, or a refusal of what is configured, is an error."""
    configs, out = tiny.save_stages(tmp_path), tmp_path / "out"
    ablation.write(out, [Outcome(BASE, 0, FIGURES, 10.0)])
    before = {path: path.read_bytes() for path in out.iterdir()}

    def main(*flags: str, code: int, said: str = "error: no room") -> str:
        def run(command: object, log: Path) -> int:
            log.write_text(f"{said}\n")
            return code

        monkeypatch.setattr(ablation, "run", run)
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--configs", str(configs), "--out", str(out), *flags])
        with pytest.raises(SystemExit, match="2"):
            ablation.main()
        return capsys.readouterr().err

    log = out / "as-configured_seed-0" / "pretrain.log"
    for code in (1, 2):
        assert main("--variants", BASE, "--", "--dropout", "0.1", code=code).endswith(f"error: {log}: no room\n")
    (log.parent / "pretrain").mkdir()
    write_json(log.parent / "pretrain" / "run.json", {})
    assert "pretrain.yaml: this run has other settings" in main("--variants", "rows: text", BASE, code=0)
    assert {path: path.read_bytes() for path in before} == before and not (out / "rows-text_seed-0").exists()
    main("--variants", "rows: text", "rows: random", code=1)
    assert "-- from_run, seed: each stage gets its own" in main("--", "--seed", "5", "--from-run", "x", code=0)
    begun = out / "rows-text_seed-0" / "pretrain"
    begun.mkdir()
    write_json(begun / "run.json", {})
    assert main("--variants", "rows: text", code=2).endswith(f"error: {begun}.log: no room\n")  # accepted once
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_variants_are_trained_and_not_trained_again(tmp_path: Path) -> None:
    configs = tiny.save_stages(tmp_path)
    out = tmp_path / "out"
    command = [
        sys.executable, "tools/ablation.py", "--configs", str(configs), "--out", str(out), "--jobs", "2",
        "--variants", BASE, "no pretraining", "rows: text",
    ]  # fmt: skip
    assert "row_init: text is not possible" in tiny.run(command)
    rows = {row["variant"]: row for row in read_json(out / "ablation.json")}
    assert rows[BASE]["metrics"].keys() == rows["no pretraining"]["metrics"].keys() == set(ablation.METRICS)
    assert not rows["rows: text"]["metrics"]
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    made = (out / "ablation.md").read_text()
    assert "```bash\npython tools/ablation.py --configs" in made and f"on {rows[BASE]['hardware']}." in made
    assert rows[BASE]["commits"] == [read_json(out / "as-configured_seed-0" / "finetune" / "run.json")["commit"]]
    runs = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    assert len(runs) >= 3 and not (tmp_path / "elsewhere").exists()
    before = ablation.table([Outcome(**row) for row in rows.values()])
    assert before in tiny.run(command)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    shown = subprocess.run([sys.executable, "tools/ablation.py", "--out", str(out), "--table"], cwd=tiny.REPOSITORY,
                           env=tiny.environment(), capture_output=True, text=True, check=True)  # fmt: skip
    assert shown.stdout == before
