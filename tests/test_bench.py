"""The benchmarks measure what they say: wrong arms are refused, blocks are fair samples, ratios are of one run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import bench_results
import bench_topn
import bench_train
import numpy as np
import pytest
import tiny
import torch
from bench_results import MEMORY, Row, compare, record, table
from bench_topn import MASK, OURS, PREFIX, Bench
from bench_train import SHAPES, Fixed, Job, RivalT5, check, refuse, resized, spread
from torch.utils.data import DataLoader
from transformers import T5ForConditionalGeneration

from genrec_llm.args import DataArguments
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError
from genrec_llm.files import read_json

MADE = {"command": "x", "commit": "c", "hardware": "h", "versions": {}, "time": "t"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    path = tiny.save_log(tmp_path_factory.mktemp("bench") / "log.csv", users=50, items=60)
    return load_data(DataArguments(dataset=str(path)))


def job(arm: str, **changes: Any) -> Job:
    return replace(Job(arm, "tiny", "log.csv", None, batch=8, steps=3, blocks=1), **changes)


# --- training: what is timed is right ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_arm_moves_the_rows_it_should_and_those_of_one_objective_have_one_loss(
    dtype: torch.dtype, data: Data, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, settings = bench_train.backbone, bench_train.settings
    bf16 = {"bf16": dtype == torch.bfloat16}  # as on a GPU
    monkeypatch.setattr(bench_train, "backbone", lambda kind, shape: backbone(kind, shape).to(dtype))
    monkeypatch.setattr(bench_train, "settings", lambda folder, job: settings(folder, job) | bf16)
    folder = tmp_path_factory.mktemp("arms")
    found = {arm: check(bench_train.trainer_of(job(arm), data, str(folder)), SHAPES["tiny"].layout(data))
             for arm in bench_train.ARMS}  # fmt: skip
    assert all(one["faults"] == [] for one in found.values()), found
    refuse(found)
    losses = [found[arm]["loss"] for arm in bench_train.WHOLE_SOFTMAX]
    assert max(losses) - min(losses) < 1e-6 * max(losses)
    assert found["ours"]["loss"] < found["same-loss"]["loss"]  # over fewer candidates
    with pytest.raises(ConfigError, match="different objectives"):
        refuse({"a": found["a"], "same-loss": found["ours"]})


def test_a_rival_that_transformers_has_tied_is_refused(data: Data, tmp_path: Path) -> None:
    wrong = bench_train.rival(job("a", steps=0), data, str(tmp_path), kind=T5ForConditionalGeneration)
    found = check(wrong, SHAPES["tiny"].layout(data))
    assert any("that the encoder read did not move" in fault for fault in found["faults"])
    with pytest.raises(ConfigError, match="nothing was timed"):
        refuse({"a": found})


def test_rows_that_should_stay_are_looked_at_too(data: Data, tmp_path: Path) -> None:
    layout = SHAPES["tiny"].layout(data)
    before = bench_train.Tables.of(resized(RivalT5, SHAPES["tiny"], data), layout)
    encoder, others = before.encoder.clone(), before.others.clone()
    encoder[5] += 1
    others[0] += 1
    after = replace(before, encoder=encoder, others=others, items=before.items + 1)
    assert bench_train.faults(before, after, layout, torch.tensor([5])) == [
        "1 rows of the base vocabulary moved in the encoder",
        "encoder and decoder no longer have the same input rows",
        "1 output rows moved that are no items",
    ]


def test_the_rival_reads_our_examples(data: Data, tmp_path: Path) -> None:
    ours = bench_train.trainer_of(job("ours"), data, str(tmp_path))
    rival = bench_train.trainer_of(job("b"), data, str(tmp_path))
    batch = ours.task.batch(0, np.arange(4))
    collated = rival.data_collator([rival.train_dataset[place] for place in range(4)])
    assert np.array_equal(collated["input_ids"], batch["input_ids"])
    assert np.array_equal(collated["attention_mask"], batch["attention_mask"])
    assert np.array_equal(collated["decoder_input_ids"], batch["decoder_input_ids"])
    assert np.array_equal(collated["labels"][:, -1], SHAPES["tiny"].layout(data).base + batch["labels"])
    assert (collated["labels"][:, :-1] == -100).all()
    assert sorted(rival.train_dataset["length"]) == sorted(ours.task.lengths.tolist())
    assert isinstance(rival._get_train_sampler().lengths, list)  # of a column of datasets each look-up is slow


def test_a_training_argument_that_does_not_exist_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparse_rows.*did you mean --sparse-user-rows"):
        bench_train.trainer_of(job("ours", settings=("sparse_rows=true",)), data, str(tmp_path))


# --- training: a block is fair ----------------------------------------------------------------------------------------


def test_the_steps_of_a_block_stand_for_the_whole_epoch() -> None:
    costs = np.random.default_rng(0).integers(1, 50, size=999) ** 2
    chosen = spread(costs.tolist(), 9)
    assert len(set(chosen)) == 9 and np.mean(costs[chosen]) == pytest.approx(np.mean(costs), rel=0.02)
    assert chosen != sorted(chosen, key=lambda place: costs[place])


class Lengths(list[int]):
    """A data set of examples with so many tokens."""

    def __getitems__(self, places: list[int]) -> list[int]:
        return [self[place] for place in places]


def test_the_block_that_does_not_count_has_the_largest_batch_of_the_epoch() -> None:
    lengths = Lengths([*range(1, 33), 99, 2])
    padded = DataLoader(
        lengths, batch_size=2, collate_fn=lambda batch: {"input_ids": torch.empty(len(batch), max(batch))}
    )
    fixed = Fixed(padded, 4)
    assert [32, 33] not in fixed.batches and list(fixed) == fixed.batches and len(fixed) == 4
    fixed.warming = True
    assert list(fixed) == [[32, 33], *fixed.batches[1:]]


def test_every_block_has_the_same_batches_and_a_batch_by_length_has_less_padding(data: Data, tmp_path: Path) -> None:
    tokens = {}
    for arm in ("a", "b", "ours"):
        trainer = bench_train.trainer_of(job(arm, steps=4), data, str(tmp_path))
        blocks = [[batch["input_ids"] for batch in trainer.get_train_dataloader()] for _ in range(2)]
        assert all(torch.equal(first, second) for first, second in zip(*blocks, strict=True))
        whole: Any = bench_train.trainer_of(job(arm, steps=0), data, str(tmp_path)).get_train_dataloader()
        tokens[arm] = sum(batch["input_ids"].numel() for batch in whole)
        assert Fixed(whole, 4).representative == pytest.approx(1, rel=0.1)
        some = list(whole.batch_sampler)[:5]
        collated = [whole.collate_fn(whole.dataset.__getitems__(batch))["input_ids"] for batch in some]
        assert bench_train.padded_tokens(whole, some) == [batch.numel() for batch in collated]
    assert tokens["b"] < 0.9 * tokens["a"]


class Link:
    """The other end of a Gate, which lets every block begin."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def recv(self) -> str:
        return "go"

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("arm", ["b", "ours"])
def test_a_step_that_waits_for_its_batch_is_told(arm: str, data: Data, tmp_path: Path) -> None:
    trainer: Any = bench_train.trainer_of(job(arm, blocks=2), data, str(tmp_path))
    loader, link = trainer.get_train_dataloader(), Link()
    collate, pause = loader.collate_fn, 0.05

    def slowly(batch: Any) -> Any:
        time.sleep(pause)
        return collate(batch)

    loader.collate_fn = slowly
    trainer.add_callback(bench_train.Gate(link, 24, trainer))
    trainer.train()
    slow = [block["seconds"] for block in link.sent]
    assert len(slow) == 2 and all(3 * pause < block["waiting"] < block["wall"] for block in slow)
    loader.collate_fn = collate
    trainer.train()
    assert min(block["seconds"]["waiting"] for block in link.sent[2:]) < 3 * pause


@pytest.mark.parametrize("arm", ["b", "ours"])
@pytest.mark.parametrize("pinned", [True, False])
def test_batches_of_a_block_are_pinned_as_those_of_the_trainer_are(
    arm: str, pinned: bool, data: Data, tmp_path: Path
) -> None:
    trainer: Any = bench_train.trainer_of(job(arm), data, str(tmp_path))
    trainer.args.dataloader_pin_memory = pinned
    assert isinstance(trainer.get_train_dataloader().batch_sampler, Fixed)
    assert trainer.get_train_dataloader().pin_memory is pinned


# --- training: arms that do not fit together ---------------------------------------------------------------------------

RIGHT = {"loss": 5.0, "faults": []}


def jobs_of(*arms: str) -> list[Job]:
    return [job(arm, blocks=5) for arm in arms]


def test_one_at_a_time_an_arm_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def checked(one: Job, folder: str) -> dict[str, Any]:
        done.append(f"check {one.arm}")
        return RIGHT if one.arm != "same-loss" else {"loss": 5.0, "faults": ["an output row did not move"]}

    def timed(jobs: list[Job], folder: str) -> dict[str, dict[str, list[float]]]:
        (one,) = jobs
        done.append(f"time {one.arm}")
        if one.arm == "a":
            raise ConfigError("(a): its process ended (1); its last words: out of memory")
        return {one.name: {"ms": [1.0]}}

    monkeypatch.setattr(bench_train, "checked", checked)
    monkeypatch.setattr(bench_train, "timed", timed)
    found = []
    with pytest.raises(ConfigError) as error:
        for measured in bench_train.measure(jobs_of("a", "same-loss", "ours", "b"), "", one_at_a_time=True):
            found.append([*measured])
    assert done == ["check a", "time a", "check same-loss", "check ours", "time ours", "check b", "time b"]
    assert found == [[bench_train.ARMS["ours"]], [bench_train.ARMS["ours"], bench_train.ARMS["b"]]]
    assert len(error.value.problems) == 2 and "out of memory" in error.value.problems[0]


def test_arms_that_take_turns_are_all_checked_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(bench_train, "checked", lambda one, folder: done.append(f"check {one.arm}") or RIGHT)
    monkeypatch.setattr(bench_train, "timed", lambda jobs, folder: done.append(f"time {len(jobs)}") or {"x": {}})
    assert list(bench_train.measure(jobs_of("b", "ours"), "")) == [{"x": {}}]
    assert done == ["check b", "check ours", "time 2"]


def test_arms_are_ended_where_one_of_them_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    class Failing:
        def __init__(self, one: Job, folder: str) -> None:
            self.job = one

        def answer(self) -> dict[str, Any]:
            if self.job.arm == "ours":
                raise ConfigError("out of memory")
            return {"examples": 1, "representative": 1.0}

        def end(self) -> None:
            ended.append(self.job.arm)

    monkeypatch.setattr(bench_train, "Arm", Failing)
    with pytest.raises(ConfigError, match="out of memory"):
        bench_train.timed(jobs_of("b", "ours"), "")
    assert ended == ["b", "ours"]


# --- the top 20 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(data: Data) -> Bench:
    return Bench.build("tiny", data, 12)


def test_all_arms_give_the_same_lists_in_batches_of_any_size(bench: Bench) -> None:
    for size in (5, 12):
        bench.refuse_other_lists({arm: ask(size) for arm, ask in bench.arms.items()})


def test_an_arm_whose_lists_differ_is_refused(bench: Bench) -> None:
    ours = bench.ours(4)
    swapped, seen = ours.copy(), ours.copy()
    swapped[3, [0, 1]] = swapped[3, [1, 0]]
    seen[5, 2] = bench.data.seen[5][0]
    with pytest.raises(ConfigError) as error:
        bench.refuse_other_lists({OURS: ours, PREFIX: swapped, MASK: seen})
    assert [problem.split(": ")[1] for problem in error.value.problems] == [
        f"1 of 12 lists are not those of {OURS}, 0 hold items of the history, 0 hold an item twice; nothing was timed",
        f"1 of 12 lists are not those of {OURS}, 1 hold items of the history, 0 hold an item twice; nothing was timed",
    ]


def test_the_fastest_batch_size_is_taken_after_a_pass_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(ask: Any, size: int) -> dict[str, float]:
        asked.append(("timed", size))
        return {"CPU": abs(size - 16), "wall": size}

    monkeypatch.setattr(bench_topn, "timed", timed)
    assert bench_topn.best_size(lambda size: asked.append(("untimed", size)), [64, 4, 16]) == 16
    assert asked == [(how, size) for size in (4, 16, 64) for how in ("untimed", "timed")]


def test_a_batch_size_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(size: int) -> Any:
        if size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_topn, "timed", lambda ask, size: {"GPU": 1 / size, "wall": 1.0})
    assert bench_topn.best_size(ask, [16, 64, 4]) == 16
    with pytest.raises(ConfigError, match="32 users do not fit"):
        bench_topn.best_size(ask, [32, 64])

    def broken(size: int) -> Any:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        bench_topn.best_size(broken, [4])


# --- the figures ------------------------------------------------------------------------------------------------------


def measured(ours: float, rival: float) -> dict[str, dict[str, list[float]]]:
    return {
        "(a)": {"CPU ms an example": [rival, rival + 1, rival + 2], MEMORY: [4.0]},
        "ours": {"CPU ms an example": [ours + 3, ours, ours + 1], MEMORY: [1.0]},
    }


def test_ratios_are_of_the_best_blocks_of_one_run_and_rows_of_other_benches_stay(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    record(path, compare("other", "s", measured(1, 2), ["(a)"], MADE))
    record(path, compare("train", "s", measured(5, 50), ["(a)"], MADE))
    record(path, compare("train", "s", measured(10, 20), ["(a)"], MADE))
    rows = read_json(path)
    assert [row["bench"] for row in rows] == ["other"] * 4 + ["train"] * 4
    assert all(row.keys() == {field.name for field in fields(Row)} for row in rows)
    assert [(row["arm"], row["rival"], row["value"], row["ratio"]) for row in rows[4:]] == [
        ("(a)", None, 20, None),
        ("(a)", None, 4, None),
        ("ours", "(a)", 10, 2),
        ("ours", "(a)", 1, 0.25),
    ]
    assert "2.00x" in table(rows[4:]) and "0.25\n" in table(rows[4:]) + "\n"


def test_files_of_several_calls_are_shown_together_and_the_last_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    record(paths[0], compare("train", "s", measured(1, 3), ["(a)"], MADE))
    record(paths[0], compare("top", "s", measured(1, 7), ["(a)"], MADE))
    record(paths[1], compare("train", "s", measured(1, 5), ["(a)"], MADE))
    monkeypatch.setattr(sys, "argv", ["bench_results.py", *map(str, paths)])
    bench_results.main()
    printed = capsys.readouterr().out
    assert printed.count("train (s; h, commit c)") == printed.count("top (s; h, commit c)") == 1
    assert "7.00x" in printed and "5.00x" in printed and "3.00x" not in printed


def test_arms_that_were_not_measured_alike_are_not_compared() -> None:
    values = measured(1, 2)
    del values["ours"][MEMORY]
    with pytest.raises(ValueError, match="ours: not measured in all of CPU ms an example, GiB"):
        compare("train", "s", values, ["(a)"], MADE)


def test_peak_memory_is_the_process_own_and_not_that_of_the_one_that_started_it() -> None:
    code = "import bench_results as b; print(b.peak_bytes(False)); b'1' * 2**28; print(b.peak_bytes(False))"
    environment = tiny.environment() | {"PYTHONPATH": f"{tiny.REPOSITORY}:{tiny.REPOSITORY / 'tools'}"}
    held = np.ones(2**27)  # 1 GiB in this process
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert bench_results.peak_bytes(False) > held.nbytes > after > before + 2**27


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "flags", "problem"),
    [
        (
            "bench_train",
            ["--arms", "ours", "--blocks", "2"],
            r"--arms: a ratio needs a rival.*\n.*--blocks: the best of 2",
        ),
        ("bench_topn", ["--blocks", "1", "--batches", "0"], r"--blocks: the best of 1.*\n.*--batches: at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    tool: str, flags: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *flags])
    with pytest.raises(SystemExit):
        {"bench_train": bench_train, "bench_topn": bench_topn}[tool].main()
    assert re.search(problem, capsys.readouterr().err)


@pytest.mark.slow
def test_arms_take_turns_as_processes_of_their_own_and_leave_a_table_and_a_picture(tmp_path: Path) -> None:
    log, out = tiny.save_log(tmp_path / "log.csv"), tmp_path / "speed.json"
    flags = [
        "--dataset",
        str(log),
        "--shape",
        "tiny",
        "--batch",
        "8",
        "--epoch",
        "--arms",
        "b",
        "ours",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "tools/bench_train.py", *flags, "--ours", "sparse_user_rows=true"], cwd=tiny.REPOSITORY,
        env=tiny.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("block")]
    assert blocks == ["(b) Seq2SeqTrainer + PEFT, batches by length", "ours, sparse_user_rows=true"] * 4
    rows = read_json(out)
    assert [row["unit"] for row in rows] == ["CPU s an epoch", "wall s an epoch", "waiting s an epoch", MEMORY] * 2
    assert all(len(row["values"]) == (1 if row["unit"] == MEMORY else 3) for row in rows)
    assert all(row["ratio"] > 0 for row in rows if row["rival"])
    picture = tmp_path / "speed.png"
    subprocess.run(
        [sys.executable, "tools/bench_results.py", str(out), "--plot", str(picture)], cwd=tiny.REPOSITORY,
        env=tiny.environment(), check=True, timeout=120,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_slow_arm_of_the_lists_may_have_fewer_users(tmp_path: Path) -> None:
    log, out = tiny.save_log(tmp_path / "log.csv", users=50, items=60), tmp_path / "speed.json"
    command = [sys.executable, "tools/bench_topn.py", "--dataset", str(log), "--shape", "tiny", "--users", "40",
               "--prefix-users", "7", "--batches", "8", "32", "--out", str(out)]  # fmt: skip
    printed = tiny.run(command)
    assert "the same for 40 users, (c)'s for 7" in printed
    rows = read_json(out)
    assert {row["bench"] for row in rows} == {"top 20, tiny, 1 thread"}
    assert all("40 validation users (7 for (c))" in row["shape"] and row["value"] > 0 for row in rows)


@pytest.mark.slow
def test_a_process_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench_train.py", "--dataset", str(tmp_path / "absent.csv"), "--shape", "tiny"],
        cwd=tiny.REPOSITORY, env=tiny.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "absent.csv" in done.stderr and "its process ended (1)" in done.stderr
