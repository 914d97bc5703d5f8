"""The launch files: each says how it is used, and none decides what the training arguments decide."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH_FILES = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))
DEEPSPEED_FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))

each_launch_file = pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
each_deepspeed_file = pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)


def header(path: Path) -> list[str]:
    """The comment lines that the file begins with, without their `#`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def value_after(option: str, words: list[str]) -> str:
    return words[words.index(option) + 1]


def has_key(tree: Any, key: str) -> bool:
    if not isinstance(tree, dict):
        return False
    return key in tree or any(has_key(branch, key) for branch in tree.values())


def test_there_is_one_file_a_strategy() -> None:
    several = {"ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}
    nodes = {"ddp_multi_node", "zero2_multi_node", "zero3_multi_node"}
    assert {path.stem for path in LAUNCH_FILES} == {"cpu", "single_gpu"} | several | nodes
    assert {path.stem for path in DEEPSPEED_FILES} == {name for name in several if name.startswith("zero")}


@each_launch_file
def test_the_header_says_when_to_use_the_file_and_how_to_launch_it(path: Path) -> None:
    comment = header(path)
    assert comment and len(comment[0].split()) > 3, "the first line says when to use the file"
    commands = [shlex.split(line) for line in comment if line.startswith("accelerate launch ")]
    assert len(commands) == 1
    (command,) = commands
    assert value_after("--config_file", command) == f"accelerate_configs/{path.name}"
    recipe = next(word for word in command if word.endswith(".py"))
    assert (REPOSITORY / recipe).is_file()
    assert (REPOSITORY / value_after("--config", command)).is_file()


@each_launch_file
def test_accelerate_reads_the_file_and_knows_every_key(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1  # -1 would make the launch line of the header an error


def test_the_single_gpu_file_shows_its_process_one_gpu() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(REPOSITORY / "accelerate_configs" / "single_gpu.yaml")).gpu_ids == "0"


@each_launch_file
def test_precision_and_optimizer_are_left_to_the_training_arguments(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in (
        "mixed_precision",
        "fp16",
        "bf16",
        "optimizer",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert not has_key(config, key)


@each_launch_file
def test_a_deepspeed_file_that_is_named_exists(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config["distributed_type"] == "DEEPSPEED":
        named = config["deepspeed_config"]["deepspeed_config_file"]
        assert REPOSITORY / named in DEEPSPEED_FILES
    else:
        assert "deepspeed_config" not in config


@each_deepspeed_file
def test_no_optimizer_scheduler_or_fp16_stands_in_a_deepspeed_file(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("optimizer", "scheduler", "fp16"):  # an optimizer block discards the separate learning rates
        assert not has_key(config, key)


@each_deepspeed_file
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_training_arguments_fill_every_auto(path: Path, bf16: bool, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is installed on Linux only")
    from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.25,
    )
    shape = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(shape)
    try:
        deepspeed = HfTrainerDeepSpeedConfig(str(path))
        deepspeed.trainer_config_process(arguments)
        deepspeed.trainer_config_finalize(arguments, model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()

    assert "auto" not in json.dumps(deepspeed.config)
    assert deepspeed.config["bf16"]["enabled"] is bf16
    assert deepspeed.config["train_micro_batch_size_per_gpu"] == 3
    assert deepspeed.config["gradient_accumulation_steps"] == 5
    assert deepspeed.config["gradient_clipping"] == 0.25


def test_zero3_saves_whole_weights() -> None:
    zero = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
