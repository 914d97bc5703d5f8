"""Every shipped launch file trains through the real `accelerate launch`, and gives what one process gives."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from genrec_llm.files import read_json

FILES = ("adapter_model.safetensors", "id_tokens.safetensors")
TOLERANCE = 2e-5
"""Largest difference of a trained value after 20 steps in fp32: AdamW divides by small numbers."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny.save_backbone("t5-untied", folder / "base")
    tiny.save_log(folder / "log.csv")
    return folder


def train(ground: Path, strategy: str, name: str, *extra: str, recipe: str = "finetune") -> str:
    """Twenty steps without dropout, whose masks differ between processes."""
    return tiny.run(
        tiny.launch_command(
            strategy, recipe, "--dataset", str(ground / "log.csv"), "--backbone", str(ground / "base"),
            "--output-dir", str(ground / name), "--max-steps", "20", "--global-batch-size", "16", "--lora-r", "2",
            "--dropout", "0", "--lora-dropout", "0", "--rows-learning-rate", "3e-3",
            "--eval-strategy", "steps", "--eval-steps", "10", "--save-strategy", "steps", "--save-steps", "10",
            *extra,
        )
    )  # fmt: skip


def trained_values(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in FILES for name, value in load_file(run / "adapter" / file).items()}


@pytest.fixture(scope="module")
def one_process(ground: Path) -> dict[str, torch.Tensor]:
    output = train(ground, "cpu", "cpu")
    assert "strategy NO, world_size 1" in output and "global_batch_size 16" in output
    return trained_values(ground / "cpu")


@pytest.mark.parametrize(
    ("strategy", "got"),
    [
        ("ddp", "strategy MULTI_CPU, world_size 2"),
        ("zero2", "strategy DEEPSPEED, world_size 2"),
        ("zero3", "strategy DEEPSPEED, world_size 2"),
    ],
)
def test_two_processes_train_the_adapter_of_one(
    ground: Path, one_process: dict[str, torch.Tensor], strategy: str, got: str
) -> None:
    output = train(
        ground, strategy, strategy, "--choose-last-items-share", "true"
    )  # asks the model more often, no more
    assert got in output and "global_batch_size 16" in output and "precision fp32" in output
    if "zero" in strategy:
        assert f"zero_stage {strategy[-1]}" in output
    base, alone = (read_json(ground / name / "adapter" / "genrec.json")["base_model"] for name in (strategy, "cpu"))
    assert base == alone, "the fingerprint covers names and values of all weights, the untied head among them"
    values = trained_values(ground / strategy)
    assert values.keys() == one_process.keys()
    for name, value in values.items():
        assert value.numel() and value.shape == one_process[name].shape
        torch.testing.assert_close(
            value, one_process[name], atol=TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_single_gpu_file_serves_one_process(ground: Path, one_process: dict[str, torch.Tensor]) -> None:
    output = train(ground, "single_gpu", "single_gpu")
    assert "strategy NO, world_size 1" in output
    for name, value in trained_values(ground / "single_gpu").items():
        torch.testing.assert_close(value, one_process[name], atol=TOLERANCE, rtol=0)


def test_both_learning_rates_work_under_zero(ground: Path) -> None:
    """The rows' own rate is lost when a DeepSpeed file brings an optimizer; zero must then move nothing."""
    train(ground, "zero2", "still-rows", "--rows-learning-rate", "0", "--max-steps", "4", "--eval-strategy", "no",
          "--save-strategy", "no", "--load-best-model-at-end", "false")  # fmt: skip
    train(ground, "zero2", "moved-rows", "--rows-learning-rate", "1e-2", "--max-steps", "4", "--eval-strategy", "no",
          "--save-strategy", "no", "--load-best-model-at-end", "false")  # fmt: skip
    still, moved = trained_values(ground / "still-rows"), trained_values(ground / "moved-rows")
    assert (still["item_in"] - moved["item_in"]).abs().max() > 1e-3
    lora_b = [name for name in still if "lora_B" in name]
    assert lora_b and all(still[name].any() for name in lora_b)


def test_pretraining_with_several_masks_and_bf16_runs_under_zero3(ground: Path) -> None:
    output = train(ground, "zero3", "pretrain", "--masks-per-sequence", "3", "--bf16", recipe="pretrain")
    assert "precision bf16" in output and "zero_stage 3" in output
    assert all(value.numel() and value.isfinite().all() for value in trained_values(ground / "pretrain").values())


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_exported_values_are_the_fp32_masters_of_a_bf16_run(ground: Path, strategy: str) -> None:
    train(ground, strategy, f"{strategy}-bf16", "--bf16")
    values = trained_values(ground / f"{strategy}-bf16")
    trained = {name: value for name, value in values.items() if "lora_B" in name or "item_in" in name}
    assert len(trained) > 1
    for name, value in trained.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), f"{name} is rounded to bf16"


def test_a_launch_that_lost_deepspeed_is_refused(ground: Path) -> None:
    """With ACCELERATE_USE_CPU, accelerate 1.15 silently makes plain DDP of a DeepSpeed launch."""
    command = tiny.launch_command(
        "zero2", "finetune", "--dataset", str(ground / "log.csv"), "--backbone", str(ground / "base"),
        "--output-dir", str(ground / "lost"), "--max-steps", "1", "--global-batch-size", "16",
    )  # fmt: skip
    environment = {**tiny.environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=tiny.REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: launch: DeepSpeed was asked for") == 1, done.stderr[-3000:]
    assert not (ground / "lost" / "run.json").exists()


def test_ctrl_c_ends_a_recipe_in_a_line_and_by_its_signal() -> None:
    program = "from genrec_llm.errors import exits_cleanly\n@exits_cleanly\ndef main(): raise KeyboardInterrupt\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=tiny.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGINT and done.stderr == "\nstopped; what was whole before is still there\n"
