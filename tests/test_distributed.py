"""The same result on any split and after any kill, by the functions of tools/check_distributed.py, and its page."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from check_distributed import (
    LORA_TOLERANCE,
    LOSS_TOLERANCE,
    ROWS_TOLERANCE,
    SPLITS,
    STAGES,
    STRATEGIES,
    Checkpoints,
    Ground,
    Interrupted,
    Kill,
    difference,
    faults,
    finished,
    killed_and_relaunched,
    one_process,
    page,
    random_turn,
    resumed,
    split,
    workers,
)
from safetensors.torch import load_file, save_file

from genrec_llm.checkpoints import write_manifest
from genrec_llm.errors import ConfigError
from genrec_llm.files import read_json

RESULTS = tiny.REPOSITORY / "docs" / "results" / "distributed.json"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def interrupted(ground: Ground) -> Interrupted:
    return Interrupted(ground)


# --- what is published ------------------------------------------------------------


def test_the_page_is_what_the_results_say() -> None:
    text = (tiny.REPOSITORY / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert text == page(read_json(RESULTS)), (
        "python tools/check_distributed.py --out docs/results/distributed.json --page"
    )


def test_the_results_are_complete_and_within_their_tolerances() -> None:
    results = read_json(RESULTS)
    assert faults(results) == []
    rows = {(row["stage"], row["strategy"], row["world_size"], row["accumulation"]) for row in results["splits"]}
    assert rows >= {(stage, name, *part) for stage in STAGES for name in STRATEGIES for part in SPLITS}
    assert {(row["stage"], row["strategy"]) for row in results["resumed"]} >= {
        (stage, name) for stage in STAGES for name in STRATEGIES
    }
    assert len(results["kills"]) >= 20 and all(row["kills"] for row in results["kills"])
    assert all(made["commit"] and "+changes" not in made["commit"] for made in results["made"].values())


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("splits", {"loss_difference": 1e-3}, "loss beyond its tolerance"),
        ("splits", {"rows_difference": 1e-3}, "rows beyond its tolerance"),
        ("resumed", {"resumed_equal": False}, "not the run that nobody killed"),
        (
            "kills",
            {"problems": ["there was a moment without a whole checkpoint"]},
            "a moment without a whole checkpoint",
        ),
    ],
)
def test_a_fault_in_the_results_is_named(part: str, change: dict[str, Any], said: str) -> None:
    results = copy.deepcopy(read_json(RESULTS))
    results[part][-1].update(change)
    (fault,) = faults(results)
    assert said in fault and fault in page(results)


# --- the comparison and the loop see what they are there for ------------------------------------------------------------


def save_run(folder: Path, losses: list[float], lora: torch.Tensor, rows: torch.Tensor) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "log_history.json").write_text(json.dumps([{"loss": loss} for loss in losses] + [{"train_loss": 1.0}]))
    save_file({"lora": lora}, folder / "adapter" / "adapter_model.safetensors")
    save_file({"item_in": rows}, folder / "adapter" / "id_tokens.safetensors")
    return folder


def test_the_largest_difference_is_found_wherever_it_is(tmp_path: Path) -> None:
    lora, rows = torch.zeros(2, 3), torch.ones(4, 2)
    one = save_run(tmp_path / "one", [2.0, 1.0], lora, rows)
    assert difference(save_run(tmp_path / "same", [2.0, 1.0], lora, rows), one).nothing
    moved = rows.clone()
    moved[3, 1] += 0.25
    other = difference(save_run(tmp_path / "other", [2.0, 1.5], lora - 0.5, moved), one)
    assert (other.loss, other.lora, other.rows) == (0.5, 0.5, 0.25) and not other.nothing


@pytest.mark.parametrize(
    ("losses", "lora"), [([2.0], torch.zeros(2, 3)), ([2.0, 1.0], torch.zeros(0)), ([2.0, 1.0], torch.zeros(2, 2))],
    ids=["a step is missing", "not gathered", "another shape"],
)  # fmt: skip
def test_what_cannot_be_compared_is_no_small_difference(
    tmp_path: Path, losses: list[float], lora: torch.Tensor
) -> None:
    one = save_run(tmp_path / "one", [2.0, 1.0], torch.zeros(2, 3), torch.ones(4, 2))
    with pytest.raises(ConfigError, match="other"):
        difference(save_run(tmp_path / "other", losses, lora, torch.ones(4, 2)), one)


TRAINING = """
import shutil, sys, time
from pathlib import Path
from genrec_llm.checkpoints import last_complete_checkpoint, write_manifest

run, fault = Path(sys.argv[1]), sys.argv[2]
there = sorted(run.glob("checkpoint-*"))
resumed = str(there[-1]) if fault == "careless" and there else last_complete_checkpoint(run)
print("5 examples an epoch" + (f"; going on from {resumed}" if resumed else ""), flush=True)
for step in range(int(resumed[-1]) + 1 if resumed else 1, 10):
    time.sleep(0.05)
    print({"loss": 1.0}, flush=True)
    if step % 3 == 0:
        folder = run / f"checkpoint-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        if fault == "hasty":
            for old in run.glob("checkpoint-*"):
                shutil.rmtree(old)
        folder.mkdir(parents=True)
        (folder / "weights").write_text("whole")
        time.sleep(0.3)
        write_manifest(folder, {})
        for old in run.glob("checkpoint-*"):
            if old != folder:
                shutil.rmtree(old)
"""
"""As a training that keeps one checkpoint of every third step; or one that reads broken ones, or deletes too early."""


@pytest.mark.parametrize(
    ("fault", "said"),
    [("none", None), ("careless", "the newest whole was"), ("hasty", "a moment without a whole checkpoint")],
)
def test_the_kill_loop_tells_a_careful_training_from_others(tmp_path: Path, fault: str, said: str | None) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "run"), fault]
    story = killed_and_relaunched(command, tmp_path / "run", [Kill("all", "checkpoint", 2), Kill("all", "step", 2)])
    assert len(story.kills) == 2
    if said is None:
        assert story.problems == [] and story.resumed_from == ["checkpoint-3", "checkpoint-3"]
    else:
        assert any(said in problem for problem in story.problems)


def test_a_checkpoint_that_is_deleted_is_not_taken_for_one_that_is_written(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    (tmp_path / "checkpoint-9").mkdir()
    assert run.being_written(0.0) == "checkpoint-9"
    (tmp_path / "checkpoint-12").mkdir()
    write_manifest(tmp_path / "checkpoint-12", {})
    assert run.being_written(0.0) is None and run.newest_whole() == str(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-15").mkdir()
    assert run.being_written(0.0) == "checkpoint-15" and run.being_written(time.time() + 60) is None


# --- the same on any split ------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(ground: Ground) -> Callable[[str], None]:
    """Makes the run of one process of a stage, once."""

    def make(stage: str) -> None:
        if not (ground.folder / f"{stage}-one").exists():
            one_process(ground, stage)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("part", SPLITS, ids=lambda part: f"{part[0]} processes, accumulation {part[1]}")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_split_gives_what_one_process_gives(
    ground: Ground, reference: Callable[[str], None], stage: str, strategy: str, part: tuple[int, int]
) -> None:
    """Every step's loss and the final adapter; see the tolerances in the tool."""
    reference(stage)
    row = split(ground, strategy, stage, *part)
    assert row["loss_difference"] < LOSS_TOLERANCE
    assert row["lora_difference"] < LORA_TOLERANCE and row["rows_difference"] < ROWS_TOLERANCE
    moved = load_file(ground.folder / f"{stage}-one" / "adapter" / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for name, value in moved.items() if "lora_B" in name) > 100 * LORA_TOLERANCE


# --- the same after any kill ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_launched_again_is_as_if_nothing_had_happened(
    interrupted: Interrupted, stage: str, strategy: str
) -> None:
    row = resumed(interrupted, strategy, stage)
    assert row["resumed_equal"] and row["problems"] == [], row
    assert row["resumed_from"] == ["checkpoint-9"]


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_kills_at_random_moments_lose_nothing(interrupted: Interrupted, turn: int) -> None:
    row = random_turn(interrupted, 1, turn)
    assert row["resumed_equal"] and row["problems"] == [], row


# --- what ZeRO-3 loads and saves ------------------------------------------------------------


LOADING = """
import sys
from safetensors.torch import load_file
from genrec_llm.args import GenRecTrainingArguments
from genrec_llm.backbone import load_backbone
from genrec_llm.model import gathered
from genrec_llm.world import leave

training = GenRecTrainingArguments(output_dir=sys.argv[2], global_batch_size=8, use_cpu=True)
model, _ = load_backbone(sys.argv[1])
published = load_file(sys.argv[1] + "/model.safetensors")
head = model.get_output_embeddings().weight
assert head is not model.get_input_embeddings().weight and published["lm_head.weight"].any()
for name, weight in model.named_parameters():
    assert hasattr(weight, "ds_id"), f"{name} is not shared out: this is not ZeRO-3"
    with gathered(weight):
        assert weight.equal(published[name]), name
print(f"process {training.process_index} of {training.world_size} has all", flush=True)
leave(at_once=True)
"""


@pytest.mark.slow
def test_zero3_loads_every_weight_of_an_untied_checkpoint_through_the_launch(ground: Ground, tmp_path: Path) -> None:
    """The head above all, which transformers 5 would tie; the launch test of ZeRO-3 compares what is trained on it."""
    script = tmp_path / "load.py"
    script.write_text(LOADING)
    line = tiny.launch_command("zero3", "finetune")
    command = [*line[: line.index("recipes/finetune.py")], str(script), str(ground.folder / "base"), str(tmp_path)]
    output = tiny.run(command)
    assert all(f"process {rank} of 2 has all" in output for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_zero3_saves_every_tensor_whole_in_every_checkpoint(
    ground: Ground, interrupted: Interrupted, strategy: str
) -> None:
    """Names and shapes of a process that has all weights to itself; none empty, none without numbers."""
    every = ("--save-total-limit", "20")
    for name in ("cpu", strategy):
        command = interrupted.command(name, "finetune", f"every-{name}")
        finished([*command, *every], ground.folder / f"every-{name}.log")
    expected = load_file(ground.folder / "every-cpu" / "checkpoint-24" / "adapter_model.safetensors")
    checkpoints = sorted((ground.folder / f"every-{strategy}").glob("checkpoint-*"))
    assert len(checkpoints) == 8
    for checkpoint in checkpoints:
        saved = load_file(checkpoint / "adapter_model.safetensors")
        assert {name: value.shape for name, value in saved.items()} == {
            name: value.shape for name, value in expected.items()
        }
        assert all(value.numel() and value.isfinite().all() for value in saved.values())


# --- FSDP2 ------------------------------------------------------------


FSDP2 = """
import copy, sys
import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.batching import as_tensors
from genrec_llm.build import build_model
from genrec_llm.encoded import load_data
from genrec_llm.tasks import NextItem
from genrec_llm.world import leave

base, log, out, tie = sys.argv[1:]
training = GenRecTrainingArguments(output_dir=out, use_cpu=True, global_batch_size=16, seed=0)
rank, world = training.process_index, training.world_size
data = load_data(DataArguments(dataset=log))
settings = ModelArguments(backbone=base, lora_r=2, lora_dropout=0.0, dropout=0.0, tie_item_rows=tie == "True")
built = build_model(settings, training, data)
task = NextItem(data.train, built.layout, seed=0)
alone, shared = built.model, copy.deepcopy(built.model)
mesh = init_device_mesh("cpu", (world,))
for module in [module for module in shared.modules() if type(module).__name__ == "T5Block"]:
    fully_shard(module, mesh=mesh)  # as accelerate_configs/fsdp2.yaml wraps: each block, then the rest
fully_shard(shared, mesh=mesh)
before = {name: value.detach().clone() for name, value in alone.named_parameters(remove_duplicate=False)}

def train(model, mine, scale):
    # With AdamW's own eps a gradient near nothing is divided by its rounding, which differs from CPU to CPU.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    losses = []
    for epoch in range(3):
        loss = model(**as_tensors(task.batch(epoch, mine)), num_items_in_batch=16).loss
        (loss * scale).backward()  # FSDP takes the mean over the processes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)

expected = train(alone, np.arange(16), 1)
found = train(shared, np.arange(16)[rank::world], world)
torch.distributed.all_reduce(found)
torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
ours = dict(alone.named_parameters(remove_duplicate=False))
theirs = dict(shared.named_parameters(remove_duplicate=False))
assert ours.keys() == theirs.keys()
moved = 0
for name, value in theirs.items():
    assert isinstance(value, DTensor), f"{name} is not shared out"
    torch.testing.assert_close(value.detach().full_tensor(), ours[name].detach(), rtol=0, atol=2e-6)
    moved += bool(value.requires_grad and not torch.equal(ours[name], before[name]))
tables = [name for name in theirs if name.endswith("item_in.weight") or name.endswith("item_out.weight")]
trained = [theirs[name] for name in tables if theirs[name].requires_grad]
assert (trained[0] is trained[1]) == (tie == "True"), tables
print(f"process {rank} of {world}: {moved} tensors moved", flush=True)
leave(at_once=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False], ids=["tied rows", "untied rows"])
def test_fsdp2_shares_the_whole_model_out_and_trains_as_one_process(ground: Ground, tmp_path: Path, tie: bool) -> None:
    """torch's `fully_shard` on a CPU mesh; accelerate offers FSDP on GPUs alone. Nesting and tied rows survive it."""
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2)
    output = tiny.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         str(ground.folder / "base"), str(ground.folder / "log.csv"), str(tmp_path / "out"), str(tie)]
    )  # fmt: skip
    assert all(f"process {rank} of 2: " in output and " 0 tensors moved" not in output for rank in (0, 1))


def test_a_process_is_found_however_long_its_command_and_narrow_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # which `ps` goes by
    line = [sys.executable, "-c", "import time; time.sleep(60)", "long" * 50, "recipes/finetune.py"]
    process = subprocess.Popen(line, env={**os.environ, "RANK": "0"})
    try:
        assert process.pid in workers(os.getpid())
    finally:
        process.kill()
        process.wait()
