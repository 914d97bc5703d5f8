"""The script for a GPU goes through on a CPU, counts right, and loses nothing to a part that fails."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gpu_check
import numpy as np
import pytest
import tiny
import torch
from bench_train import SHAPES
from gpu_check import Check, Waits, adapted, busy_microseconds, largest_error, operations_an_example, with_kernels
from torch.utils.flop_counter import FlopCounterMode

from genrec_llm.args import DataArguments
from genrec_llm.batching import as_tensors
from genrec_llm.files import read_json
from genrec_llm.memory import Shape
from genrec_llm.runs import Data, load_data
from genrec_llm.tasks import NextItem


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    path = tiny.save_log(tmp_path_factory.mktemp("gpu") / "log.csv", users=60, items=60)
    return load_data(DataArguments(dataset=str(path)))


def check(part: str, data: Data, out: Path) -> Check:
    return Check(part, data, argparse.Namespace(out=out, shape="tiny", steps=2, batch=16, users=20, data_dir=None))


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
    # 2 %: LoRA of so narrow layers, which `memory.operations` counts roughly, is a large part of them.
    assert math.isclose(len(alike) * needed, counter.get_total_flops(), rel_tol=0.02)


def test_operations_of_a_mixture_are_the_mean_over_its_lengths() -> None:
    shape = Shape.from_config(SHAPES["flan-t5-xl"].config().to_dict(), own_head=True)
    short, long, both = (
        operations_an_example(shape, np.array(lengths), items=12_101) for lengths in ([4], [60], [4, 60])
    )
    assert both == pytest.approx((short + long) / 2)


def test_long_histories_have_the_mean_length_that_is_said(data: Data) -> None:
    task = NextItem(gpu_check.long_histories(data).train, SHAPES["tiny"].layout(gpu_check.long_histories(data)), seed=0)
    assert task.lengths.mean() == pytest.approx(64, abs=0.1)


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
        warnings.warn("something else", stacklevel=1)

    with warnings.catch_warnings(action="ignore"):
        for state.global_step in (1, 2, 3, 4):
            waiting()
            waits.on_step_end(None, state, None)
    ((place, count),) = waits.places.items()
    assert count == 1 and re.search(r"test_gpu_check\.py:\d+ waiting$", place)


def test_kernels_are_compared_one_by_one_and_a_wrong_one_is_named(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_check.exact(check("exact", data, tmp_path))
    found = read_json(tmp_path / "gpu.json")["exact"]["found"]
    compared = {one["compared"] for one in found if one.get("passes")}
    assert {"all kernels, packed rows", "rms_norm, packed rows", "cross_attention, packed rows"} <= compared
    assert {one["dtype"] for one in found if "dtype" in one} == {"torch.float32", "torch.bfloat16"}

    def wrong(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return 1.1 * type(self).forward(self, hidden_states)

    wrong.__name__ = "_rms_norm"
    monkeypatch.setattr(gpu_check.kernels, "_rms_norm", wrong)
    with pytest.raises(RuntimeError, match=r"stand for: .*all kernels, packed rows.*; rms_norm, packed rows") as error:
        gpu_check.exact(check("exact", data, tmp_path))
    assert "gated_gelu" not in str(error.value)


def test_a_part_that_fails_is_recorded_and_those_before_it_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tiny.save_log(tmp_path / "log.csv")

    def broken(part: Check) -> None:
        part.note(reached=1)
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu_check.PARTS, "sync", broken)
    args = argparse.Namespace(dataset=str(log), data_dir=None, out=tmp_path)
    assert gpu_check.run_part("ceiling", args) and not gpu_check.run_part("sync", args)
    parts = read_json(tmp_path / "gpu.json")
    assert parts["ceiling"]["failed"] is None and parts["ceiling"]["found"][0]["product_tflops"] > 0
    assert parts["sync"]["found"] == [{"reached": 1}] and "ValueError: no such kernel" in parts["sync"]["failed"]
    assert str(tiny.REPOSITORY) not in parts["sync"]["failed"]


@pytest.mark.slow
def test_the_whole_script_runs_through_on_a_cpu(tmp_path: Path) -> None:
    log, out = tiny.save_log(tmp_path / "log.csv", users=80, items=60), tmp_path / "out"
    flags = ["--shape", "tiny", "--steps", "2", "--batch", "16", "--users", "20", "--dataset", str(log)]
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *flags, "--out", str(out)], cwd=tiny.REPOSITORY,
        env=tiny.environment() | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = read_json(out / "gpu.json")
    assert list(parts) == list(gpu_check.PARTS) and not any(part["failed"] for part in parts.values())
    arms = [one["arm"] for one in parts["train"]["found"]]
    assert arms == [*gpu_check.ARMS, *gpu_check.LONG_ARMS]
    assert all(one["clock"] == "CPU" and one["peak_gib"] is None for one in parts["train"]["found"])
    assert sum(parts["profile"]["found"][0]["shares"].values()) == pytest.approx(1, abs=0.01)
    units = {row["unit"] for row in read_json(out / "speed_gpu.json")}
    assert not any("GPU" in unit for unit in units) and "CPU ms a user" in units
    assert os.path.getsize(out / "profile.txt") > 1000


@pytest.mark.slow
def test_a_part_whose_process_dies_does_not_end_the_others(tmp_path: Path) -> None:
    code = (
        "import os, sys, gpu_check\n"
        "gpu_check.PARTS['ceiling'] = lambda check: os._exit(7)\n"  # in the part's process too, which imports this file
        "if __name__ == '__main__':\n    gpu_check.main()\n"
    )
    script, log, out = tmp_path / "dying.py", tiny.save_log(tmp_path / "log.csv"), tmp_path / "out"
    script.write_text(code)
    environment = tiny.environment() | {"PYTHONPATH": f"{tiny.REPOSITORY}:{tiny.REPOSITORY / 'tools'}"}
    done = subprocess.run(
        [sys.executable, str(script), "--dataset", str(log), "--out", str(out), "--parts", "ceiling", "sync",
         "--shape", "tiny", "--batch", "16", "--steps", "2"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "failed: ceiling" in done.stdout, done.stdout + done.stderr
    parts = read_json(out / "gpu.json")
    assert parts["ceiling"]["failed"] == "its process ended (7)" and parts["sync"]["failed"] is None
