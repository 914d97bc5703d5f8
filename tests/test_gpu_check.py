"""The script for a GPU goes through on a CPU, counts right, and loses nothing to a part that fails."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_train
import gpu_check
import gpu_parts
import numpy as np
import pytest
import tiny
import torch
from bench_results import MEMORY, Meter
from bench_train import SHAPES
from gpu_check import summary
from gpu_parts import Check, Waits, adapted, busy_microseconds, largest_error, operations_an_example, with_kernels
from torch.utils.flop_counter import FlopCounterMode

from genrec_llm.args import DataArguments
from genrec_llm.batching import as_tensors
from genrec_llm.encoded import Data, load_data
from genrec_llm.files import read_json, write_json
from genrec_llm.shape import Shape
from genrec_llm.tasks import NextItem


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_log(tmp_path_factory.mktemp("gpu") / "log.csv", users=60, items=60)


@pytest.fixture(scope="module")
def data(log: Path) -> Data:
    return load_data(DataArguments(dataset=str(log)))


def arguments(log: Path | str, out: Path) -> argparse.Namespace:
    return argparse.Namespace(
        dataset=str(log), data_dir=None, out=out, shape="tiny", steps=2, batch=16, users=20, seconds=100.0, parts=None
    )


@pytest.fixture
def check(log: Path, tmp_path: Path) -> Callable[[str], Check]:
    return lambda part: Check(part, arguments(log, tmp_path))


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny", "micro"])
def test_operations_without_padding_are_those_that_torch_counts(shape: str, data: Data) -> None:
    model = with_kernels(adapted(shape, data, torch.float32))
    task = NextItem(data.train, SHAPES[shape].layout(data), seed=0)
    alike = np.flatnonzero(task.lengths == 9)
    # Unlike all others, products in place are not on torch's list (2.13).
    in_place = {torch.ops.aten.addmm_: lambda to, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(**as_tensors(task.batch(0, alike))).loss.backward()
    known = Shape.from_config(SHAPES[shape].config().to_dict(), own_head=True)
    needed = operations_an_example(known, task.lengths[alike], items=data.vocab.num_items)
    # 2 %: LoRA of so narrow layers, which `workload.operations` counts roughly, is a large part of them.
    assert math.isclose(len(alike) * needed, counter.get_total_flops(), rel_tol=0.02)


def test_operations_of_a_mixture_are_the_mean_over_its_lengths() -> None:
    shape = Shape.from_config(SHAPES["flan-t5-xl"].config().to_dict(), own_head=True)
    short, long, both = (
        operations_an_example(shape, np.array(lengths), items=12_101) for lengths in ([4], [60], [4, 60])
    )
    assert both == pytest.approx((short + long) / 2)


def test_long_histories_have_the_mean_length_that_is_said(data: Data) -> None:
    long = gpu_parts.long_histories(data)
    task = NextItem(long.train, SHAPES["tiny"].layout(long), seed=0)
    assert task.lengths.mean() == pytest.approx(64, abs=0.1) and long.name.startswith("drawn from")


def test_a_block_has_whole_steps(check: Callable[[str], Check], data: Data) -> None:
    settings = ("gradient_accumulation_steps=4",)
    with gpu_parts.training(check("train"), data, settings, blocks=1, steps=6) as (trainer, clock):
        assert len(clock.sample.batches) == trainer.steps == 8
        trainer.train()
    assert trainer.state.global_step == 2 * 8 / 4


def test_time_that_kernels_share_counts_once() -> None:
    assert busy_microseconds([(5, 7), (0, 4), (1, 2), (3, 5.5), (9, 9.5)]) == 7.5


def test_a_tensor_without_a_number_is_the_largest_error() -> None:
    wanted = {"a": torch.ones(2), "b": torch.ones(2)}
    assert largest_error({"a": torch.tensor([1.0, torch.nan]), "b": torch.zeros(2)}, wanted)[1] == "a"
    assert largest_error({"a": torch.ones(2), "b": 1.5 * torch.ones(2)}, wanted) == (0.5, "b")


def test_waits_are_counted_by_place_in_one_step_alone() -> None:
    waits, state = Waits(after=2), argparse.Namespace(global_step=0)

    def waiting() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)

    with warnings.catch_warnings(action="ignore"):
        for state.global_step in (1, 2, 3, 4):
            waiting()
            waits.on_step_end(None, state, None)
    ((place, count),) = waits.places.items()
    assert count == 1 and re.search(r"test_gpu_check\.py:\d+ waiting$", place)


def test_a_stage_waits_for_the_gpu_at_two_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, clock = [], gpu_parts.Clock(warm_up=2)
    monkeypatch.setattr(gpu_parts, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(state.global_step))
    state = argparse.Namespace(global_step=0, max_steps=6)
    for state.global_step in range(1, 7):
        clock.on_step_end(None, state, None)
    assert waited == [2, 6] and clock.seconds == clock.ends[1] - clock.ends[0]


def test_kernels_are_compared_one_by_one_and_a_wrong_one_is_named(
    check: Callable[[str], Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_parts.exact(check("exact"))
    found = read_json(tmp_path / "gpu.json")["exact"]["found"]
    compared = {one["compared"] for one in found if one.get("passes")}
    assert {"all kernels, packed rows", "rms_norm, packed rows", "cross_attention, packed rows"} <= compared
    assert "all kernels, packed rows, 3 classes of length" in compared  # as they are trained with
    assert {one["dtype"] for one in found if "dtype" in one} == {"torch.float32", "torch.bfloat16"}

    def wrong(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return 1.1 * type(self).forward(self, hidden_states)

    wrong.__name__ = "_rms_norm"
    monkeypatch.setattr(gpu_parts.kernels, "_rms_norm", wrong)
    with pytest.raises(RuntimeError, match=r"stand for: .*all kernels, packed rows.*; rms_norm, packed rows") as error:
        gpu_parts.exact(check("exact"))
    assert "gated_gelu" not in str(error.value)


# --- what is written --------------------------------------------------------------------------------------------------


def test_arms_are_compared_with_the_first_and_in_the_units_that_they_have(
    check: Callable[[str], Check], tmp_path: Path
) -> None:
    one = check("train")
    one.measure("step", "tiny", "ours", {"GPU ms": [2.0], MEMORY: [3.0]}, ["ours"])
    one.measure("step", "tiny", "ours, kernels=false", {"GPU ms": [4.0], MEMORY: [6.0]}, ["ours"])
    one.measure("step", "tiny", "ours, packing=false", {"GPU ms": [8.0]}, ["ours"])
    rows = read_json(tmp_path / "speed_gpu.json")
    assert [(row["arm"], row["unit"], row["ratio"]) for row in rows] == [
        ("ours", "GPU ms", None),
        ("ours, kernels=false", "GPU ms", 0.5),
        ("ours, packing=false", "GPU ms", 0.25),
        ("ours", MEMORY, None),
        ("ours, kernels=false", MEMORY, 2),
    ]


def test_memory_is_not_compared_where_the_micro_batch_is_what_fits(
    check: Callable[[str], Check], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    units: dict[str, list[str]] = {}

    def measure(
        self: Check, bench: str, shape: str, arm: str, values: dict[str, list[float]], rivals: list[str]
    ) -> None:
        units[arm] = [*values]

    monkeypatch.setattr(Check, "measure", measure)
    monkeypatch.setattr(gpu_parts, "CUDA", True)
    monkeypatch.setattr(gpu_parts, "Meter", lambda cuda: Meter(False))
    monkeypatch.setattr(gpu_parts, "peak_bytes", lambda cuda: 2**30)
    monkeypatch.setattr(gpu_parts, "freed", lambda: None)
    for arm in (gpu_parts.DEFAULTS, "ours, packing=false"):
        gpu_parts.time_arm(check("train"), data, arm, gpu_parts.ARMS[arm], "real lengths", best=1.0)
    assert units[gpu_parts.DEFAULTS] == [*units["ours, packing=false"], MEMORY]


def test_every_part_that_fails_is_recorded_and_those_before_it_stay(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(part: Check) -> None:
        part.note(reached=1)
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu_parts.PARTS, "sync", broken)
    args = arguments(log, tmp_path)
    assert gpu_parts.run_part("ceiling", args) and not gpu_parts.run_part("sync", args)
    assert not gpu_parts.run_part("exact", arguments("absent.csv", tmp_path))
    parts = read_json(tmp_path / "gpu.json")
    assert parts["ceiling"]["failed"] is None and parts["ceiling"]["found"][0]["product_tflops"] > 0
    assert parts["sync"]["found"] == [{"reached": 1}] and "ValueError: no such kernel" in parts["sync"]["failed"]
    assert str(tiny.REPOSITORY) not in parts["sync"]["failed"]
    assert "absent.csv" in parts["exact"]["failed"]


def test_findings_have_versions_where_the_package_is_not_installed(
    check: Callable[[str], Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name.startswith("genrec"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert check("ceiling").made["versions"]["genrec-llm"] == "0.1.0"


def test_benchmarks_name_the_command_that_a_reader_can_type_and_one_that_fails_leaves_the_others(
    check: Callable[[str], Check], log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def tool(main: Callable[[], None]) -> types.ModuleType:
        module = types.ModuleType("tool")
        module.__file__, module.main = str(tiny.REPOSITORY / "tools" / "bench.py"), main  # type: ignore[attr-defined]
        return module

    def failing() -> None:
        raise ValueError("does not fit")

    monkeypatch.chdir(tiny.REPOSITORY)
    monkeypatch.setattr(sys, "argv", [])  # put back at the end
    with pytest.raises(RuntimeError, match=r"tools/bench\.py --steps 1 [^\n]*\n(.*\n)*ValueError: does not fit"):
        gpu_parts.run_benchmarks(
            check("rivals"),
            (tool(failing), ["--steps", "1"]),
            (tool(lambda: commands.append(sys.argv)), ["--steps", "2"]),
        )
    assert commands == [
        ["tools/bench.py", "--steps", "2", "--dataset", str(log), "--out", str(tmp_path / "speed_gpu.json")]
    ]


# --- parts as processes -----------------------------------------------------------------------------------------------


def test_the_command_knows_the_parts_and_shapes_that_there_are() -> None:
    assert (tuple(gpu_parts.PARTS), tuple(bench_train.SHAPES)) == (gpu_check.PARTS, gpu_check.SHAPES)


def test_a_part_is_started_by_a_command_that_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.REPOSITORY)
    command = gpu_check.command_of("train", arguments("log.csv", Path("out")))
    assert command[2:] == [
        "tools/gpu_parts.py", "train", "--dataset", "log.csv", "--out", "out", "--shape", "tiny", "--steps", "2",
        "--batch", "16", "--users", "20",
    ]  # fmt: skip


def test_a_part_whose_process_dies_is_recorded_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(
        tmp_path / "gpu.json", {"train": {"failed": None}, "sync": {"found": [1], "failed": "of an earlier call"}}
    )
    monkeypatch.setattr(
        gpu_check, "command_of", lambda part, args: ["bash", "-c", f"echo no module x in {os.getcwd()}; exit 7"]
    )
    monkeypatch.chdir(tiny.REPOSITORY)
    assert not gpu_check.run_part("sync", arguments("log.csv", tmp_path), 10)
    parts = read_json(tmp_path / "gpu.json")
    assert parts["train"] == {"failed": None} and parts["sync"].keys() == {"failed"}
    assert parts["sync"]["failed"].startswith("its process ended (7); its last words:\nno module x in")
    monkeypatch.setattr(gpu_check, "command_of", lambda part, args: ["true"])
    assert gpu_check.run_part("sync", arguments("log.csv", tmp_path), 10)


def test_a_part_that_takes_too_long_is_stopped_with_all_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "command_of", lambda part, args: ["bash", "-c", "sleep 100 & echo child $!; wait"])
    begun = time.monotonic()
    assert not gpu_check.run_part("sync", arguments("log.csv", tmp_path), 1)
    assert time.monotonic() - begun < 50
    assert read_json(tmp_path / "gpu.json")["sync"]["failed"].startswith("stopped after 1 s")
    child = int(re.search(r"child (\d+)", capsys.readouterr().out)[1])  # type: ignore[index]
    for _ in range(100):  # until whoever inherits it has asked how it ended
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} lives on")


def test_parts_that_do_not_fit_into_the_budget_are_named_and_the_table_is_printed_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, given = [0.0], []

    def run_part(part: str, args: argparse.Namespace, seconds: float) -> bool:
        given.append((part, seconds))
        clock[0] += 50
        return part != "sync"

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    flags = ["--out", str(tmp_path), "--parts", "train", "sync", "exact", "--seconds", "100"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1 and given == [("train", 95), ("sync", 45)]
    printed = capsys.readouterr().out
    assert "no time was left for: exact; call again with --parts exact\nfailed: sync" in printed
    assert printed.count("measure  ") == 3
    assert re.search(r"transformers +<5\.25,>=5\.23 +5\.\d+\.\d+\n", printed)


def test_packages_out_of_bounds_and_absent_ones_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "datasets":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"transformers": "5.17.0", "torch": "2.11.0+cu130"}.get(name, "999")

    monkeypatch.setattr(gpu_check, "version", version)
    found = {name: (here, fits) for name, _, here, fits in gpu_check.packages()}
    assert found["transformers"] == ("5.17.0", False) and found["datasets"] == ("absent", False)
    assert found["torch"] == ("2.11.0+cu130", True) and not found["peft"][1] and "bitsandbytes" in found


# --- the table --------------------------------------------------------------------------------------------------------


def parts_at(shape: str, *, cuda: bool) -> dict[str, Any]:
    about = {"shape": shape, "cuda": cuda, "hardware": "1 x a GPU"}
    real = {
        "arm": "ours",
        "lengths": "real lengths",
        "mean_tokens": 11.4,
        "examples_per_second": 7000.0,
        "peak_gib": 46.0,
    }
    long = {
        "arm": "ours",
        "lengths": "long histories",
        "mean_tokens": 64.0,
        "examples_per_second": 1200.0,
        "peak_gib": 9.0,
    }
    work = {"mfu": 0.413, "product_tflops": 790.1}
    slow = real | {"arm": "ours, kernels=false", "examples_per_second": 1.0}
    ranked = [{"arm": "lists", "users_per_second": 17_000.0}, {"arm": "ranks", "users_per_second": 9.0}]
    shares = {"products": 0.6, "elementwise": 0.3}
    profile = {"shares": shares, "idle": 0.072, "launches_a_step": 12_000, "step_ms": 151.2}
    return {
        "train": {**about, "found": [slow | work, real | work, long | work], "failed": None},
        "rank": {**about, "found": ranked, "failed": "one is slow"},
        "profile": {**about, "found": [profile, {"kernel": "x"}]},
        "sync": {"failed": "its process ended (7)"},
    }


def lines_of(text: str) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for line in text.splitlines() if len(cells := re.split(" {2,}", line)) == 5}


def test_what_was_found_stands_beside_what_was_asked_for() -> None:
    both = {"bench": "train step, flan-t5-xl, GPU", "arm": "ours", "rival": "(a) padded"}
    rows = [
        both | {"unit": "GPU ms an example", "ratio": 5.02},
        both | {"unit": MEMORY, "ratio": 0.42},
        both | {"unit": "waiting ms an example", "ratio": 9.0},
        both | {"unit": "GPU ms an example", "ratio": None, "rival": None},
        both | {"unit": "GPU ms an example", "ratio": 2.0, "rival": "ours"},
    ]
    text = summary(parts_at("flan-t5-xl", cuda=True), rows)
    assert lines_of(text) == {
        "measure": ["found", "floor", "aim", "met"],
        "examples/s, mean of 11.4 tokens": ["7,000.0", "6,400.0", "8,300.0", "floor"],
        "peak GiB, mean of 11.4 tokens": ["46.0", "45.0", "36.0", "no"],
        "examples/s, mean of 64.0 tokens": ["1,200.0", "1,100.0", "-", "floor"],
        "users/s, lists": ["17,000.0", "12,500.0", "16,000.0", "aim"],
        "users/s, ranks": ["9.0", "12,500.0", "16,000.0", "no"],
        "useful operations, mean of 11.4 tokens": ["41.3 % of a product's 790.1 TFLOP/s", "-", "-", "-"],
        "useful operations, mean of 64.0 tokens": ["41.3 % of a product's 790.1 TFLOP/s", "-", "-", "-"],
        "train step, flan-t5-xl, GPU: ours": ["5.02x as fast as (a) padded, 0.42 of its memory", "-", "-", "-"],
        "idle, 12,000 launches a step of 151 ms": ["7.2 %", "-", "-", "-"],
        "time by kind of kernel": ["products 60 %, elementwise 30 %", "-", "-", "-"],
    }
    assert text.splitlines()[0] == "1 x a GPU" and text.endswith("failed: rank, sync")


@pytest.mark.parametrize(("shape", "cuda"), [("tiny", True), ("flan-t5-xl", False)])
def test_floors_are_for_the_large_shape_on_a_gpu_alone(shape: str, cuda: bool) -> None:
    lines = lines_of(summary(parts_at(shape, cuda=cuda), []))
    assert lines["examples/s, mean of 11.4 tokens"] == ["7,000.0", "-", "-", "-"]
    assert lines["users/s, ranks"] == ["9.0", "-", "-", "-"]


def test_there_is_a_table_before_anything_was_found() -> None:
    assert lines_of(summary({}, []))["users/s, ours"] == ["-", "-", "-", "-"]


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_script_runs_through_on_a_cpu(tmp_path: Path) -> None:
    log, out = tiny.save_log(tmp_path / "log.csv", users=80, items=60), tmp_path / "out"
    flags = ["--shape", "tiny", "--steps", "2", "--batch", "16", "--users", "20", "--dataset", str(log)]
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *flags, "--out", str(out), "--seconds", "1500"], cwd=tiny.REPOSITORY,
        env=tiny.environment() | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = read_json(out / "gpu.json")
    assert tuple(parts) == gpu_check.PARTS and not any(part["failed"] for part in parts.values())
    arms = [one["arm"] for one in parts["train"]["found"]]
    assert arms == [*gpu_parts.ARMS, *gpu_parts.LONG_ARMS]
    assert all(one["clock"] == "CPU" and one["peak_gib"] is None for one in parts["train"]["found"])
    assert sum(parts["profile"]["found"][0]["shares"].values()) == pytest.approx(1, abs=0.01)
    rows = read_json(out / "speed_gpu.json")
    units = {row["unit"] for row in rows}
    assert not any("GPU" in unit for unit in units) and "CPU ms a user" in units
    assert {row["arm"] for row in rows if row["bench"] == "train step, tiny, 1 thread"} == set(
        bench_train.ARMS.values()
    )
    assert {row["command"].split()[0] for row in rows} == {
        "tools/gpu_parts.py", "tools/bench_train.py", "tools/bench_topn.py"
    }  # fmt: skip
    assert os.path.getsize(out / "profile.txt") > 1000
    last = done.stdout[done.stdout.rindex("measure  ") :]
    lines = lines_of(last)
    assert all(values[1:] == ["-", "-", "-"] for name, values in lines.items() if name != "measure")
    assert {"users/s, ours, rank_recommender", "time by kind of kernel"} < lines.keys()
    assert last.count("x as fast as (a)") == 2 and last.count("of its memory") == 4
