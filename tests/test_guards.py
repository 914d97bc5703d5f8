"""What stops a training: losses that are no numbers, tensors that are none, processes that do not belong together."""

from __future__ import annotations

import fcntl
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import DistributedType

from genrec_llm import world
from genrec_llm.errors import ConfigError
from genrec_llm.guards import Losses, SameWeights
from genrec_llm.model import GenRecBackbone
from genrec_llm.runs import LOCK_FILE

STEPS = ("--max-steps", 8, "--eval-strategy", "no", "--load-best-model-at-end", "false", "--save-strategy", "steps",
         "--save-steps", 2, "--logging-steps", 100, "--save-total-limit", 9)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    tiny.save_backbone("t5-untied", folder / "base")
    return folder


@pytest.mark.parametrize(
    ("factor", "accumulation"), [(float("nan"), 1), (float("inf"), 1), (1e4, 1), (float("nan"), 2)]
)
def test_a_loss_that_is_no_number_stops_at_its_step_and_names_the_last_good_checkpoint(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    accumulation: int,
) -> None:
    """Step 5 is spoiled; steps are looked at when something is done with them, here at the checkpoint of step 6."""
    forward, calls = GenRecBackbone.forward, 0

    def spoiled(self: GenRecBackbone, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        output = forward(self, *args, **kwargs)
        if self.training:
            calls += 1
            if calls == 5 * accumulation:
                output.loss = output.loss * factor
        return output

    monkeypatch.setattr(GenRecBackbone, "forward", spoiled)
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        tiny.train(home / "base", home, run, *STEPS, "--gradient-accumulation-steps", accumulation)
    error = capsys.readouterr().err
    assert re.search(r"error: step 5: the loss is NaN, infinite or 10 times that of the start: ", error), error[-2000:]
    assert f"the last good checkpoint is {run / 'checkpoint-4'}" in error
    assert "private.example" not in error, "users are told by their rows"
    assert not (run / "checkpoint-6").exists() and not (run / "adapter").exists()


def test_the_bound_is_ten_times_the_first_loss_or_that_of_guessing() -> None:
    losses = Losses(None, 1000, str)  # type: ignore[arg-type]  # gathering is another test's
    for step, loss in enumerate([20.0, 199.0, 201.0, 1e9], start=1):
        losses.see(torch.tensor(loss), step)
    assert losses.first_bad is not None and int(losses.first_bad) == 3
    losses = Losses(None, 1000, str)  # type: ignore[arg-type]
    for step, loss in enumerate([0.1, 69.0, 70.0], start=1):  # ln(1000) = 6.9
        losses.see(torch.tensor(loss), step)
    assert losses.first_bad is not None and int(losses.first_bad) == 3


def test_weights_that_are_no_numbers_are_not_saved(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient that overflows in the backward of the last step before a checkpoint: no loss has seen it yet."""
    step = torch.optim.AdamW.step
    calls = 0

    def poisoned(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(SystemExit):
        tiny.train(home / "base", home, tmp_path / "run", *STEPS)
    error = capsys.readouterr().err
    assert "after step 4 tensors hold NaN or infinite values and are not saved: " in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}" in error


def test_a_directory_that_another_training_writes_into_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            tiny.train(home / "base", home, run, *STEPS)
    assert f"error: {run}: another training is writing there" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]


def test_a_finished_run_stays_as_it_is_and_is_measured_where_its_log_went(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "here"
    log.mkdir()
    run = tiny.train(home / "base", log, tmp_path / "run")
    tiny.recipe("merge", "--run", run)
    tiny.recipe("evaluate", "--run", run)
    before = tiny.contents(run)
    assert b"model-index" in before["adapter/README.md"] and LOCK_FILE not in before
    capsys.readouterr()
    tiny.train(home / "base", log, run)
    said = capsys.readouterr().out
    assert f"finetune: was finished before; {run / 'adapter'} is as it was" in said
    assert f"Next: genrec merge --run {run}" in said
    assert tiny.contents(run) == before
    (run / "adapter" / "id_tokens.safetensors").unlink()  # what is not whole is made again
    tiny.train(home / "base", log, run)
    again = tiny.contents(run)
    assert again["adapter/id_tokens.safetensors"] == before["adapter/id_tokens.safetensors"]

    items = (log / "items.csv").read_text()
    (log / "items.csv").write_text(items.replace("Item, ", "Thing, "))  # a new title gets into what is exported
    tiny.train(home / "base", log, run)
    assert b"Thing, " in tiny.contents(run)["adapter/items.parquet"] != before["adapter/items.parquet"]
    (log / "items.csv").write_text(items)
    tiny.train(home / "base", log, run)

    log.rename(tmp_path / "there")
    log.mkdir()
    (tmp_path / "there" / "items.csv").rename(log / "items.csv")  # which has not moved
    with pytest.raises(SystemExit):
        tiny.recipe("evaluate", "--run", run)
    assert f"error: {run} was trained on it: give its folder, where it is now, as --data-dir" in capsys.readouterr().err
    tiny.recipe("evaluate", "--run", run, "--data-dir", tmp_path / "there")
    shutil.rmtree(run / "merged")
    with pytest.raises(SystemExit):
        tiny.recipe("evaluate", "--run", run, "--data-dir", tmp_path / "there")
    assert f"error: {run}: not merged yet: genrec merge --run {run}" in capsys.readouterr().err


class Pretended:
    """An accelerator of two processes whose second one has weights of its own, or the same."""

    distributed_type = DistributedType.MULTI_CPU

    def __init__(self, drift: float) -> None:
        self.drift = drift

    def gather(self, sums: torch.Tensor) -> torch.Tensor:
        return torch.cat([sums, sums + self.drift])


@pytest.mark.parametrize("drift", [0.0, 1e-3])
def test_processes_that_train_copies_of_their_own_are_refused(drift: float) -> None:
    guard = SameWeights(Pretended(drift))  # type: ignore[arg-type]
    args, state = type("Args", (), {"world_size": 2})(), type("State", (), {"global_step": 1})()
    if drift:
        with pytest.raises(ConfigError, match="after step 1 the weights of process 1 are not those of process 0"):
            guard.on_step_end(args, state, None, model=torch.nn.Linear(3, 3))  # type: ignore[arg-type]
    else:
        guard.on_step_end(args, state, None, model=torch.nn.Linear(3, 3))  # type: ignore[arg-type]


def test_processes_that_were_started_differently_are_refused_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"host": "b", "commit": "abc", "data": "9f", "arguments": {"seed": 1}}
    monkeypatch.setattr(world, "gather_object", lambda mine: [*mine, others])
    world.agree({"commit": "abc"})
    with pytest.raises(ConfigError) as caught:
        world.agree({"commit": "abc", "data": "7e", "arguments": {"seed": 0}})
    first, second = caught.value.problems
    assert 'data is "7e" in process 0 on ' in first and 'but "9f" in process 1 on b: ' in first
    assert 'arguments is {"seed": 0}' in second and '{"seed": 1} in process 1 on b' in second
