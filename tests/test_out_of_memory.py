"""Out of memory: the micro-batch that fits is found, and an error says what takes it and what helps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from genrec_llm.model import GenRecBackbone
from genrec_llm.out_of_memory import describe, is_out_of_memory
from genrec_llm.prediction import estimate
from genrec_llm.shape import Shape
from genrec_llm.workload import Run

FILES = ("adapter_model.safetensors", "id_tokens.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.save_backbone("t5-untied", folder / "base")
    return folder


def limit_examples(monkeypatch: pytest.MonkeyPatch, most: int, *, rank: str = "0") -> list[int]:
    """A device on which training forwards of more than `most` examples find no memory; the sizes that were asked for."""
    asked: list[int] = []
    forward = GenRecBackbone.forward

    def limited(self: GenRecBackbone, decoder_input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if self.training:
            asked.append(len(decoder_input_ids))
            if len(decoder_input_ids) > most:
                monkeypatch.setenv("LOCAL_RANK", rank)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, decoder_input_ids=decoder_input_ids, **kwargs)

    monkeypatch.setattr(GenRecBackbone, "forward", limited)
    return asked


def test_the_accumulation_that_fits_is_found_and_the_model_is_that_of_one_pass(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--dropout", 0, "--lora-dropout", 0, "--max-steps", 6)
    tiny.train(home / "base", home, tmp_path / "whole", *same)
    asked = limit_examples(monkeypatch, 9)
    tiny.train(home / "base", home, tmp_path / "parts", *same, "--auto-batch-size")
    assert "global_batch_size 32, accumulation 4" in capsys.readouterr().out
    assert asked[:3] == [32, 16, 8] and max(asked[3:]) <= 8
    for name in FILES:
        whole, parts = (load_file(tmp_path / run / "adapter" / name) for run in ("whole", "parts"))
        assert all(torch.allclose(whole[key], parts[key], atol=2e-5) for key in whole)


def test_trying_uses_up_no_draw(home: Path, tmp_path: Path) -> None:
    """Dropout is on: the run that tried first ends as the one that did not, bit for bit."""
    for name, more in (("plain", ()), ("tried", ("--auto-batch-size",))):
        tiny.train(home / "base", home, tmp_path / name, "--max-steps", 4, *more)
    for name in FILES:
        assert (tmp_path / "plain" / "adapter" / name).read_bytes() == (
            tmp_path / "tried" / "adapter" / name
        ).read_bytes()


def test_the_layers_that_are_computed_again_are_so_in_the_try_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed_again: list[bool] = []
    forward = GenRecBackbone.forward

    def watched(self: GenRecBackbone, *args: Any, **kwargs: Any) -> Any:
        computed_again.append(self.is_gradient_checkpointing)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GenRecBackbone, "forward", watched)
    tiny.train(home / "base", home, tmp_path, "--max-steps", 1, "--auto-batch-size", "--gradient-checkpointing", "true")
    assert computed_again[0]


def test_where_not_even_one_example_fits_the_mend_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_examples(monkeypatch, 0)
    with pytest.raises(SystemExit):
        tiny.train(home / "base", home, tmp_path / "run", "--auto-batch-size")
    assert re.search(
        r"error: auto_batch_size: not even [12] examples? of \d+ tokens .* --quantization 4bit", capsys.readouterr().err
    )


def test_an_error_in_training_shows_the_estimate_and_what_helps(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_examples(monkeypatch, 9, rank="3")  # it is this process's error alone, so this process says it
    with pytest.raises(SystemExit) as ended:
        tiny.train(home / "base", home, tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("error: ") == 1
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.). By estimate the step takes" in error
    assert "--gradient-accumulation-steps 2 " in error and "--auto-batch-size" in error


def test_other_errors_are_left_alone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(GenRecBackbone, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        tiny.train(home / "base", home, tmp_path / "run", "--auto-batch-size")


def test_memory_that_the_machine_refuses_is_known_as_such() -> None:
    """torch's own error, from a process with a limit."""
    limit = "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); torch.empty(2**36)"
    done = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, check=False)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: ") and is_out_of_memory(RuntimeError(message)), message
    assert not is_out_of_memory(RuntimeError("connection closed")) and is_out_of_memory(MemoryError())
    for refused in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        assert is_out_of_memory(RuntimeError(refused))


SHAPE = Shape.from_config({"model_type": "t5", "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
                           "num_decoder_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"})  # fmt: skip


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ({"strategy": "ddp", "processes": 8}, ["--gradient-accumulation-steps 2", "--quantization", "zero2", "zero3"]),
        ({"strategy": "zero2", "processes": 8}, ["--gradient-accumulation-steps 2", "--quantization", "zero3"]),
        ({"strategy": "zero3", "processes": 8, "examples": 1}, []),
        ({"tuning": "full"}, ["--gradient-accumulation-steps 2"]),
        ({"quantization": "4bit"}, ["--gradient-accumulation-steps 2"]),
    ],
)
def test_only_switches_that_apply_are_named_each_with_less_memory(run: dict[str, Any], named: list[str]) -> None:
    found = estimate(SHAPE, Run(**({"items": 100_000, "user_rows": 100_000, "examples": 256} | run)))
    text = describe(found)
    assert re.findall(r"(--gradient-accumulation-steps 2|--quantization|zero\d)", text) == named
    figures = [float(figure) for figure in re.findall(r"(?:steps 2|4bit|yaml) (\d+\.\d)", text)]
    assert len(figures) == len(named) and all(figure < found.total / 2**30 for figure in figures)
