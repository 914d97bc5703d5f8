"""Sweeps: killed at any time they go on, no trial runs twice, poor ones are ended, failed ones say why."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from genrec_llm.errors import ConfigError
from genrec_llm.files import read_json

optuna = pytest.importorskip("optuna", reason="pip install 'genrec-llm[sweep]' to run the tests of sweeps")

import sweep  # noqa: E402

FAKE = '''
"""Leaves behind what recipes/finetune.py leaves: checkpoints with a log, a manifest last, run.json at the end."""
import json, os, signal, sys, time
from pathlib import Path
import yaml
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
run = Path(settings["output_dir"])
run.mkdir(parents=True, exist_ok=True)
with (run / "starts").open("a") as file:
    print(os.getpid(), json.dumps(sys.argv[3:]), file=file)
if settings["dropout"] > 0.8:
    print("Traceback ...")
    print("error: dropout: nothing is left", file=sys.stderr)
    sys.exit(2)
if settings["dropout"] == 0.6:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
done = sorted(run.glob("checkpoint-*/manifest.json"), key=lambda path: int(path.parent.name[11:]))
log = json.loads((done[-1].parent / "trainer_state.json").read_text())["log_history"] if done else []
for epoch in range(len(log) + 1, settings["num_train_epochs"] + 1):
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    worth = settings["learning_rate"] * (epoch if epoch < 4 else 6 - epoch)
    log.append({"eval_ndcg@10": worth, "eval_mrr": 0.0, "epoch": float(epoch)})
    folder = run / f"checkpoint-{10 * epoch}"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "manifest.json").write_text("{}")
(run / "log_history.json").write_text(json.dumps(log))
(run / "run.json").write_text(json.dumps({"finished": {"best": max(entry["eval_ndcg@10"] for entry in log)}}))
'''


@pytest.fixture
def ground(tmp_path: Path) -> Path:
    """The fake recipe and its configuration."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "base.yaml").write_text("dropout: 0.1\nnum_train_epochs: 5\nlearning_rate: 0.01\n")
    return tmp_path


def line(ground: Path, space: dict[str, Any], *more: object) -> list[str]:
    """The command of a sweep; what more has behind `--` goes to the trials."""
    (ground / "space.yaml").write_text(yaml.safe_dump(space))
    own = ["--space", ground / "space.yaml", "--config", ground / "base.yaml", "--recipe", ground / "fake.py"]
    return [sys.executable, "tools/sweep.py", "--out", str(ground / "out"), *map(str, own), *map(str, more)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], None]]:
    """Runs a command of `line` in this process, which has imported already what takes seconds to import."""
    before = signal.getsignal(signal.SIGTERM)

    def call(command: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", command[1:])
        sweep.main()

    yield call
    signal.signal(signal.SIGTERM, before)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=tiny.REPOSITORY, env=tiny.environment() | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def until(found: Callable[[], Any]) -> Any:
    for _ in range(600):
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def table(ground: Path) -> dict[int, dict[str, str]]:
    with (ground / "out" / "trials.csv").open(newline="") as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


def starts(ground: Path, trial: int) -> list[str]:
    return (ground / "out" / "trials" / f"{trial:04d}" / "starts").read_text().splitlines()


def pid(ground: Path, trial: int) -> int:
    return int(until(lambda: _written(ground, trial))[-1].split()[0])


def _written(ground: Path, trial: int) -> list[str]:
    path = ground / "out" / "trials" / f"{trial:04d}" / "starts"
    return starts(ground, trial) if path.is_file() and path.read_text().endswith("\n") else []


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


POINTS = [{"learning_rate": rate} for rate in (0.01, 0.02, 0.03)]


def test_a_queue_runs_each_point_once_and_says_why_a_trial_failed(
    ground: Path, here: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    points = [*POINTS[:2], {"dropout": 0.9}, {"dropout": 0.6}]
    here(line(ground, {"grid": points}, "--jobs", 2, "--", "--use_cpu"))
    output = capsys.readouterr().out
    rows = table(ground)
    assert [rows[number]["state"] for number in range(4)] == ["complete", "complete", "fail", "fail"]
    assert float(rows[1]["NDCG@10"]) == pytest.approx(0.06) and float(rows[1]["best epoch"]) == 3.0
    assert rows[1]["epochs"] == "5.0" and rows[1]["learning_rate"] == "0.02"
    assert rows[2]["error"] == "exit 2: error: dropout: nothing is left"
    assert rows[3]["error"] == "killed by signal 9 3 times without a new checkpoint" and len(starts(ground, 3)) == 3
    assert '["--use_cpu"]' in starts(ground, 0)[0] and "trial 2: fail; exit 2: error: dropout" in output
    # The same command, and one point more: that one alone runs.
    here(line(ground, {"grid": [*points, POINTS[2]]}, "--", "--use_cpu"))
    assert [len(starts(ground, number)) for number in range(5)] == [1, 1, 1, 3, 1]
    assert table(ground)[4]["state"] == "complete"
    capsys.readouterr()
    here([sys.executable, "sweep.py", "--out", str(ground / "out"), "--table"])
    shown = capsys.readouterr().out
    assert shown.splitlines()[2].startswith("| 4 | complete | 0.03 |")


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent by PR_SET_PDEATHSIG")
def test_a_sweep_killed_with_9_goes_on_with_the_same_arguments_from_the_last_checkpoints(
    ground: Path, here: Callable[[list[str]], None]
) -> None:
    space = {"space": {"learning_rate": {"low": 0.001, "high": 0.1, "log": True}}}
    command = line(ground, space, "--trials", 3, "--jobs", 2)
    process = start(command, FAKE_SECONDS="0.4")
    out = ground / "out" / "trials"
    until(lambda: (out / "0000" / "checkpoint-10" / "manifest.json").is_file())
    process.kill()
    process.communicate()
    until(lambda: gone(pid(ground, 0)) and gone(pid(ground, 1)))
    before = [(out / f"{number:04d}.yaml").read_text() for number in (0, 1)]
    assert not (out / "0000" / "run.json").exists()
    stamp = (out / "0000" / "checkpoint-10" / "trainer_state.json").stat().st_mtime_ns
    here(command)
    assert [(out / f"{number:04d}.yaml").read_text() for number in (0, 1)] == before
    assert (out / "0000" / "checkpoint-10" / "trainer_state.json").stat().st_mtime_ns == stamp  # not done again
    rows = table(ground)
    assert [rows[number]["state"] for number in range(3)] == ["complete"] * 3 and len(rows) == 3
    assert len({row["learning_rate"] for row in rows.values()}) == 3
    assert len(starts(ground, 0)) == 2 and len(starts(ground, 2)) == 1
    here(command)
    assert len(starts(ground, 0)) == 2 and len(table(ground)) == 3


@pytest.mark.slow
def test_a_trial_killed_with_9_is_started_again_and_a_stopped_sweep_stops_its_trials(ground: Path) -> None:
    command = line(ground, {"grid": POINTS[:1]})
    process = start(command, FAKE_SECONDS="0.3")
    first = pid(ground, 0)
    until(lambda: (ground / "out" / "trials" / "0000" / "checkpoint-10" / "manifest.json").is_file())
    os.kill(first, signal.SIGKILL)
    second = until(lambda: next((p for p in [pid(ground, 0)] if p != first), None))
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert "trial 0: killed by signal 9; it is started again" in output and process.returncode == 143
    assert gone(second)
    tiny.run(command)
    assert table(ground)[0]["state"] == "complete" and len(starts(ground, 0)) == 3


def test_a_trial_below_the_median_is_ended_early_and_stays_ended(
    ground: Path, here: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [{"learning_rate": rate} for rate in (0.02, 0.03, 0.04, 0.05, 0.06)]
    here([*line(ground, {"grid": points}, "--jobs", 3), "--pruner", "median"])
    monkeypatch.setenv("FAKE_SECONDS", "0.7")
    command = [*line(ground, {"grid": [*points, {"learning_rate": 0.002}]}), "--pruner", "median"]
    here(command)
    row = table(ground)[5]
    assert not list((ground / "out" / "trials" / "0005").glob("checkpoint-*"))
    assert row["state"] == "pruned" and float(row["epochs"]) == 2 and float(row["NDCG@10"]) == pytest.approx(0.004)
    here(command)
    assert len(starts(ground, 5)) == 1
    assert [table(ground)[number]["state"] for number in range(5)] == ["complete"] * 5


def test_a_trial_that_finished_as_the_sweep_died_is_not_run_again(
    ground: Path, here: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = line(ground, {"grid": POINTS[:2]})

    def dies(*arguments: object) -> None:
        raise SystemExit(1)

    with monkeypatch.context() as patched:
        patched.setattr(sweep.Sweep, "_tell", dies)
        with pytest.raises(SystemExit):
            here(command)
    here(command)
    assert [row["state"] for row in table(ground).values()] == ["complete"] * 2
    assert len(starts(ground, 0)) == 1 and float(table(ground)[0]["epochs"]) == 5


def test_a_second_sweep_in_one_folder_and_another_space_are_refused(
    ground: Path, here: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"space": {"learning_rate": {"low": 0.01, "high": 0.02}}}
    here(line(ground, space, "--trials", 1))
    with pytest.raises(SystemExit):
        here(line(ground, {"space": {"learning_rate": {"low": 0.01, "high": 0.5}}}, "--trials", 1))
    with sweep.alone(ground / "out"), pytest.raises(SystemExit):
        here(line(ground, space, "--trials", 2))
    with pytest.raises(SystemExit):
        here(line(ground, space, "--", "--learning-rate", "1"))
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and len(table(ground)) == 1
    assert "begun with another space" in errors[0] and "a sweep runs here already" in errors[1]
    assert "--learning_rate: stands in the space too" in errors[2]


def test_every_problem_of_a_space_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "space:\n  learning_rat: [1]\n  dropout: []\n  lora_r: {low: 8, high: 4}\n  learning_rate: {low: 1e-4, high: 1.0}\n"
        "  output_dir: [a, b]\n  seed: 3\nmore: 1\n"
    )
    with pytest.raises(ConfigError) as refused:
        sweep.Space.read(path)
    text = str(refused.value)
    assert len(refused.value.problems) == 7 and "did you mean learning_rate?" in text and "write 1.0e-3" in text
    path.write_text("grid:\n  - {seed: 1}\n  - {seed: 1}\n")
    with pytest.raises(ConfigError, match="twice"):
        sweep.Space.read(path)


@pytest.mark.slow
def test_trials_of_the_real_recipe_end_and_go_on(tmp_path: Path) -> None:
    tiny.save_log(tmp_path / "log.csv")
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(
            {"dataset": str(tmp_path / "log.csv"), "backbone": "t5-micro", "backbone_init": "random", "tuning": "full",
             "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 3, "global_batch_size": 32}
        )
    )  # fmt: skip
    (tmp_path / "space.yaml").write_text(
        yaml.safe_dump(
            {"space": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "users": ["each", "none"]}}
        )
    )
    command = [sys.executable, "tools/sweep.py", "--space", str(tmp_path / "space.yaml"), "--config",
               str(tmp_path / "base.yaml"), "--out", str(tmp_path / "out"), "--trials", "2"]  # fmt: skip
    process = start(command)
    first = tmp_path / "out" / "trials" / "0000"
    until(lambda: list(first.glob("checkpoint-*/manifest.json")))
    process.kill()
    process.communicate()
    tiny.run(command, timeout=600)
    rows = table(tmp_path)
    for number in (0, 1):
        run = read_json(tmp_path / "out" / "trials" / f"{number:04d}" / "run.json")
        assert rows[number]["state"] == "complete"
        assert float(rows[number]["NDCG@10"]) == pytest.approx(run["finished"]["best"], abs=1e-12)
        assert rows[number]["epochs"] == "3.0" and rows[number]["users"] == run["arguments"]["data"]["users"]
        assert not (first.parent / f"{number:04d}" / "test_openings.jsonl").exists()
