"""Sparse user rows: the gradients of dense ones, the training of one process, and no row touched that is in no step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import launch_command, recipe, run
from torch import Tensor, nn
from transformers import AutoTokenizer

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.batching import as_tensors, train_loader
from genrec_llm.build import build_model
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError
from genrec_llm.model import id_tokens_of, unwrapped
from genrec_llm.sparse_rows import LazyAdamW, exchange, with_dense_gradients
from genrec_llm.tasks import MaskedItem, NextItem, Task
from genrec_llm.tokenizer import prompt_layout
from genrec_llm.trainer import GenRecTrainer
from genrec_llm.world import describe_launch

USERS = 37
FILES = ("adapter_model.safetensors", "id_tokens.safetensors")
TOLERANCE = 2e-5
"""Largest difference of a trained value in fp32 between one process and two, as in test_launch."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log and the base checkpoints."""
    return tiny.save_ground(tmp_path_factory.mktemp("sparse"), users=USERS)


@pytest.fixture(scope="module")
def data(home: Path) -> Data:
    return load_data(DataArguments(dataset=str(home / "log.csv")))


@pytest.fixture
def trainer(home: Path, data: Data, tmp_path: Path) -> Callable[..., GenRecTrainer]:
    """Builds a trainer without validation, checkpoints or dropout; arguments override that."""

    def build(
        kind: str = "t5-untied",
        model: dict[str, Any] | None = None,
        masks: int = 0,
        sparse: bool = True,
        user_dropout: float = 0.3,
        **arguments: Any,
    ) -> GenRecTrainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "max_steps": 4,
            "global_batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 0, "eval_strategy": "no",
            "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1, "report_to": "none",
            "sparse_user_rows": sparse,
        }  # fmt: skip
        training = GenRecTrainingArguments(**(settings | arguments))
        torch.manual_seed(0)
        options = {"lora_dropout": 0.0, "dropout": 0.0, "row_init": "random"} | (model or {})
        built = build_model(ModelArguments(backbone=str(home / kind), lora_r=2, **options), training, data)
        task: Task = (
            MaskedItem(data.train, built.layout, seed=0, masks_per_sequence=masks, user_dropout=user_dropout)
            if masks
            else NextItem(data.train, built.layout, seed=0, user_dropout=user_dropout)
        )
        return GenRecTrainer(built.model, training, task=task, layout=built.layout, validation=None)

    return build


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def users_of_steps(built: GenRecTrainer, steps: int) -> np.ndarray:
    first = built.layout.first_user_id
    ids = [batch["input_ids"].numpy().ravel() - first for batch in built.get_train_dataloader()]
    of_steps = np.unique(np.concatenate(ids[: steps * built.args.gradient_accumulation_steps]))
    return of_steps[of_steps >= 0]


# --- gradients ------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(("kind", "masks"), [("t5-untied", 0), ("t5-tied", 3), ("bart", 1)])
def test_sparse_gradients_are_the_dense_ones_and_hold_the_rows_of_the_batch_alone(
    trainer, kind: str, masks: int, tuning: str
) -> None:
    gradients: dict[bool, dict[str, Tensor]] = {}
    for sparse in (False, True):
        built = trainer(kind, masks=masks, sparse=sparse, model={"tuning": tuning})
        examples = np.arange(0, len(built.task.lengths), 3)
        batch = as_tensors(built.task.batch(0, examples))
        named = bool((batch["decoder_input_ids"] >= built.layout.first_user_id).any())
        assert named == (masks > 0), "a mask without a left neighbour has its user in the prompt"
        built.model.train()(**batch).loss.backward()
        gradients[sparse] = {name: p.grad for name, p in built.model.named_parameters() if p.grad is not None}
    (table,) = [name for name, value in gradients[True].items() if value.is_sparse]
    assert table.endswith("user_in.weight")
    rows = gradients[True][table].coalesce().indices()[0]
    there = (batch["input_ids"][:, 0] - built.layout.first_user_id).unique()
    assert rows.tolist() == there.tolist() and len(there) < USERS + 1
    pairs = gradients[True][table]._nnz()
    assert pairs == len(batch["input_ids"]), "one an input row, before those of one user are summed"
    assert gradients[True].keys() == gradients[False].keys()
    for name, value in gradients[True].items():
        torch.testing.assert_close(value.to_dense(), gradients[False][name], rtol=1e-5, atol=1e-7)
    assert gradients[False][table].abs().max() > 1e-4


def test_clipping_counts_a_sparse_gradient_in_once_and_scales_it() -> None:
    torch.manual_seed(0)
    table, other = nn.Embedding(9, 4, sparse=True), nn.Parameter(torch.randn(5))
    weights = torch.randn(3, 4)
    for most in (0.5, 100.0, float("inf")):
        table.weight.grad = other.grad = None
        ((table(torch.tensor([2, 7, 2])) * weights).sum() + (other**2).sum()).backward()
        exchange(table.weight)
        dense = [nn.Parameter(table.weight.detach().clone()), nn.Parameter(other.detach().clone())]
        dense[0].grad, dense[1].grad = table.weight.grad.to_dense(), other.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(dense, most)
        found = torch.nn.utils.clip_grad_norm_(list(with_dense_gradients([table.weight, other])), most)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(table.weight.grad.to_dense(), dense[0].grad)
        torch.testing.assert_close(other.grad, dense[1].grad)
        assert most > 0.5 or found > 0.5


# --- the optimizer ----------------------------------------------------------


def sparse_steps(optimizer: torch.optim.Optimizer, table: nn.Embedding, batches: list[list[int]]) -> None:
    for place, batch in enumerate(batches):
        optimizer.zero_grad()
        rows = torch.tensor(batch)
        torch.manual_seed(place)
        (table(rows) * torch.randn(len(batch), 4)).sum().backward()
        if table.sparse:
            exchange(table.weight)
        optimizer.step()


def table_of(*, sparse: bool) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(6, 4, sparse=sparse)


def test_rows_in_every_step_are_updated_as_by_adamw() -> None:
    lazy, dense = table_of(sparse=True), table_of(sparse=False)
    batches = [[0, 1, 2, 3, 4, 5, 2]] * 8
    sparse_steps(LazyAdamW(lazy.parameters(), lr=0.1, weight_decay=0.0), lazy, batches)
    sparse_steps(torch.optim.AdamW(dense.parameters(), lr=0.1, weight_decay=0.0), dense, batches)
    torch.testing.assert_close(lazy.weight, dense.weight, rtol=1e-6, atol=1e-6)


def test_rows_that_come_and_go_are_updated_as_by_torchs_sparse_adam() -> None:
    """Where epsilon is too small to matter: torch adds it before the correction for bias."""
    ours, theirs = table_of(sparse=True), table_of(sparse=True)
    batches = [[0, 1, 1], [3], [1, 3, 5], [0, 0], [5, 1]]
    sparse_steps(LazyAdamW(ours.parameters(), lr=0.1, eps=1e-20, weight_decay=0.0), ours, batches)
    sparse_steps(torch.optim.SparseAdam(list(theirs.parameters()), lr=0.1, eps=1e-20), theirs, batches)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-6)
    start = table_of(sparse=True).weight
    assert torch.equal(ours.weight[[2, 4]], start[[2, 4]]) and not torch.isclose(ours.weight, start)[[0, 1, 3, 5]].any()


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_where_every_user_is_in_every_step_training_is_that_of_dense_rows(trainer, tuning: str, optim: str) -> None:
    """With the rates, the clipping and the schedule of a whole training. The whole log is one batch."""
    runs = {}
    for sparse in (False, True):
        whole = {"global_batch_size": len(trainer(sparse=False).task.lengths), "max_steps": 5, "learning_rate": 1e-3}
        clip = {"max_grad_norm": 0.05, "rows_learning_rate": 3e-2, "gradient_accumulation_steps": 2}
        built = trainer(sparse=sparse, user_dropout=0.0, model={"tuning": tuning}, optim=optim, **whole, **clip)
        assert users_of_steps(built, 1).tolist() == list(range(1, USERS + 1))
        start = trainable(built.model)
        built.train()
        runs[sparse] = trainable(built.model)
        logged = [entry["grad_norm"] for entry in built.state.log_history if "grad_norm" in entry]
        assert len(logged) == 5 and min(logged) > 0.05, "clipping was at work"
        runs["norms", sparse] = torch.tensor(logged)
    torch.testing.assert_close(runs["norms", True], runs["norms", False], rtol=1e-3, atol=0)
    for name, value in runs[True].items():
        torch.testing.assert_close(
            value, runs[False][name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    (table,) = [name for name in start if name.endswith("user_in.weight")]
    assert (runs[True][table] - start[table]).abs().max() > 1e-2


@pytest.mark.parametrize("bf16", [False, True])
def test_rows_that_are_in_no_step_do_not_move_at_all(trainer, bf16: bool) -> None:
    built = trainer(max_steps=2, max_grad_norm=0.01, global_batch_size=8, bf16=bf16)
    in_steps = users_of_steps(built, 2)
    others = np.setdiff1d(np.arange(USERS + 1), in_steps)
    assert len(others)
    table = id_tokens_of(built.model).user_in.weight
    before = table.detach().clone()
    built.train()
    assert torch.equal(table.detach()[others], before[others])
    assert (table.detach()[in_steps] != before[in_steps]).any(dim=1).all()
    moments = built.optimizer.state[table]  # as accelerate wraps it
    assert not moments["exp_avg"][others].any() and moments["exp_avg"][in_steps].any(dim=1).all()
    assert table.grad is None


def test_validation_looks_users_up_as_ever(trainer, data: Data) -> None:
    built = trainer()
    held_out = data.held_out("validation")
    sparse = built.rank(held_out)
    id_tokens_of(built.model).user_in.sparse = False
    dense = built.rank(held_out)
    assert np.array_equal(sparse.better, dense.better) and np.array_equal(sparse.tied, dense.tied)


def test_an_input_that_begins_with_no_user_is_an_error_and_not_another_row(trainer) -> None:
    built = trainer()
    batch = as_tensors(built.task.batch(0, np.arange(4)))
    batch["input_ids"][0, 0] = built.layout.base
    with pytest.raises(IndexError):
        unwrapped(built.model)(**batch)


# --- refusals ---------------------------------------------------------------


def test_what_does_not_go_with_sparse_rows_is_refused_at_once_with_the_mend() -> None:
    with pytest.raises(ConfigError) as caught:
        GenRecTrainingArguments(use_cpu=True, sparse_user_rows=True, optim="adafactor", rows_weight_decay=0.1)
    text = str(caught.value)
    assert "optim: adafactor" in text and "take adamw_torch or adamw_torch_fused" in text
    assert "rows_weight_decay: 0.1" in text and "leave one of the two out" in text
    with pytest.raises(ConfigError, match="optim: adamw_bnb_8bit"):
        GenRecTrainingArguments(use_cpu=True, sparse_user_rows=True, optim="adamw_bnb_8bit")
    GenRecTrainingArguments(use_cpu=True, sparse_user_rows=True, optim="adamw_torch")


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_strategies_that_split_tables_refuse_sparse_rows(
    trainer, monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    built = trainer()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError) as caught:
        describe_launch(built.args, built.accelerator.state)
    assert f"sparse_user_rows: {name} " in str(caught.value) and "--users hashed" in str(caught.value)


def test_sparse_rows_without_user_rows_are_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(home, tmp_path / "run", "--users", "none")
    assert "error: sparse_user_rows: there are no user rows with --users none" in capsys.readouterr().err


# --- whole runs -----------------------------------------------------------


ARGUMENTS = (
    "--sparse-user-rows", "true", "--max-steps", "8", "--global-batch-size", "16", "--gradient-accumulation-steps", "2",
    "--max-grad-norm", "0.5", "--lora-r", "2", "--dropout", "0", "--lora-dropout", "0", "--rows-learning-rate", "3e-3",
    "--eval-strategy", "steps", "--eval-steps", "4", "--save-strategy", "steps", "--save-steps", "4", "--logging-steps", "1",
)  # fmt: skip


def arguments(home: Path, out: Path) -> list[str]:
    return [
        "--dataset",
        str(home / "log.csv"),
        "--backbone",
        str(home / "t5-untied"),
        "--output-dir",
        str(out),
        *ARGUMENTS,
    ]


def train(home: Path, out: Path, *more: str) -> Path:
    recipe("finetune", "--use_cpu", "--disable_tqdm", "true", *arguments(home, out), *more)
    return out


@pytest.fixture(scope="module")
def whole_run(home: Path) -> Path:
    """A finished run of one process with checkpoints at steps 4 and 8."""
    return train(home, home / "whole")


def shares_of(task: Task, rank: int) -> list[list[dict[str, Tensor]]]:
    """The micro-batches of a process of two, by step."""
    micro = list(
        train_loader(task, global_batch_size=16, accumulation=2, rank=rank, world_size=2, seed=0, packed=True)
    )[:16]
    return [micro[place : place + 2] for place in range(0, 16, 2)]


def values(run: Path) -> dict[str, Tensor]:
    return {name: value for file in FILES for name, value in load_file(run / "adapter" / file).items()}


def test_a_run_that_goes_on_ends_bit_for_bit_as_one_that_was_not_stopped(
    home: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(whole_run, stopped)
    shutil.rmtree(stopped / "adapter")
    shutil.rmtree(stopped / "checkpoint-8")
    train(home, stopped)
    assert f"going on from {stopped / 'checkpoint-4'}" in capsys.readouterr().out
    for file in FILES:
        assert (stopped / "adapter" / file).read_bytes() == (whole_run / "adapter" / file).read_bytes()
    state = [
        torch.load(run / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"] for run in (whole_run, stopped)
    ]
    assert state[0].keys() == state[1].keys()
    for key in state[0]:
        for name in state[0][key]:
            assert torch.equal(state[0][key][name], state[1][key][name])


def test_a_checkpoint_of_sparse_rows_does_not_go_on_with_dense_ones(
    home: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(home, whole_run, "--sparse-user-rows", "false")
    assert "was made with sparse_user_rows True, now it is False" in capsys.readouterr().err


def test_two_processes_train_the_rows_of_one(home: Path, data: Data, whole_run: Path, tmp_path: Path) -> None:
    """Accumulation and clipping at work; each process has its own users, and in some steps another number of them."""
    tokenizer = AutoTokenizer.from_pretrained(home / "t5-untied")
    task = NextItem(data.train, prompt_layout(tokenizer, data.vocab, max_history=50), seed=0)
    counts = [
        [len(np.unique(np.concatenate([micro["input_ids"][:, 0] for micro in step]))) for step in shares_of(task, rank)]
        for rank in (0, 1)
    ]
    assert counts[0] != counts[1]
    norms = [
        entry["grad_norm"] for entry in json.loads((whole_run / "log_history.json").read_text()) if "grad_norm" in entry
    ]
    assert len(norms) == 8 and min(norms) > 0.5
    output = run(launch_command("ddp", "finetune", *arguments(home, tmp_path / "ddp")))
    assert "strategy MULTI_CPU, world_size 2" in output
    alone, together = values(whole_run), values(tmp_path / "ddp")
    assert alone.keys() == together.keys() and "user_in" in alone
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], atol=TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
