"""The estimate against models that are built, trainings that are measured, and collectives that are counted."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, BartConfig, T5Config

from genrec_llm import cli
from genrec_llm.backbone import load_backbone
from genrec_llm.batching import GlobalBatches, as_tensors, fixed_shapes
from genrec_llm.errors import ConfigError
from genrec_llm.hardware import GIB, HARDWARE
from genrec_llm.kernels import quicken
from genrec_llm.memory import activations
from genrec_llm.model import GenRecBart, GenRecT5, GenRecUntiedT5, IdTokens, add_lora, unwrapped
from genrec_llm.packing import Packing
from genrec_llm.prediction import (
    by_strategy,
    estimate,
    estimate_run,
    largest_batch,
    predicted_scaling,
    read_geometry,
    recommended,
)
from genrec_llm.shape import GEOMETRIES, Shape
from genrec_llm.traffic import traffic
from genrec_llm.workload import (
    STRATEGIES,
    Run,
    Strategy,
    encoder_rows,
    lora_parameters,
    operations,
    packs,
    row_parameters,
    trained_parameters,
)

XL = Shape.from_config(GEOMETRIES["google/flan-t5-xl"])
BEAUTY = Run(items=12_101, user_rows=22_364, examples=1_024, mean_length=10.3, bf16=True, strategy="ddp")
"""Amazon Beauty, all prefixes (docs/data.md)."""


def built(
    config: Any, tuning: str, *, items: int = 30, users: int = 7, tie: bool = True, own_head: bool = True,
    lora_dropout: float = 0.0, targets: list[str] | None = None, bf16: bool = False,
) -> Any:  # fmt: skip
    """A model as training makes it."""
    if config.model_type == "bart":
        model: Any = GenRecBart(config)
    else:
        model = (GenRecUntiedT5 if own_head else GenRecT5)(config)
    if bf16 and tuning == "lora":
        model = model.to(torch.bfloat16)
    item_out = None if tie else torch.randn(items, config.d_model)
    model.add_id_tokens(IdTokens(torch.randn(items, config.d_model), torch.randn(users, config.d_model), item_out), 100)
    if tuning == "lora":
        return add_lora(model, r=4, alpha=8, dropout=lora_dropout, targets=targets, base_name="x", revision=None)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.get_output_embeddings().requires_grad_(False)
    return model


def small(kind: str) -> Any:
    if kind == "bart":
        return BartConfig(
            vocab_size=150, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
            attention_dropout=0.1,
        )  # fmt: skip
    projection = "gated-gelu" if kind == "gated" else "relu"
    return T5Config(
        vocab_size=150, d_model=32, d_kv=12, num_heads=2, d_ff=48, num_layers=3, num_decoder_layers=2,
        feed_forward_proj=projection,
    )  # fmt: skip


# --- parameters and operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["relu", "gated", "bart"])
def test_parameters_are_those_of_the_model(kind: str, tuning: Any, tie: bool) -> None:
    config, own_head = small(kind), kind == "gated"
    model = built(config, tuning, tie=tie, own_head=own_head)
    shape = Shape.from_config(config.to_dict(), own_head=own_head)
    run = Run(items=30, user_rows=7, examples=1, tuning=tuning, tied_rows=tie, lora_r=4)
    named = model.named_parameters()
    every = sum(parameter.numel() for name, parameter in named if ".original_module." not in name)  # PEFT's empty copy
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape.parameters + row_parameters(shape, run) + lora_parameters(shape, run) == every
    assert trained_parameters(shape, run) == trained


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("google/flan-t5-small", 76_961_152), ("google/flan-t5-base", 247_577_856), ("google/flan-t5-large", 783_150_080),
        ("google/flan-t5-xl", 2_849_757_184), ("google/flan-t5-xxl", 11_135_332_352), ("t5-small", 60_506_624),
        ("t5-base", 222_903_552), ("t5-3b", 2_851_598_336), ("facebook/bart-base", 139_420_416),
        ("facebook/bart-large", 406_291_456),
    ],
)  # fmt: skip
def test_published_geometries_have_as_many_weights_as_the_checkpoints(name: str, published: int) -> None:
    assert Shape.from_config(GEOMETRIES[name]).parameters == published


@pytest.mark.parametrize("told", [{}, {"packing": False}, {"kernels": False}, {"packing": False, "kernels": False}])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["relu", "gated", "bart"])
def test_operations_are_those_that_torch_counts(kind: str, tuning: Any, told: dict[str, Any]) -> None:
    config = small(kind)
    shape, model = Shape.from_config(config.to_dict(), own_head=True), built(config, tuning)
    run = Run(
        items=30, user_rows=7, examples=16, tuning=tuning, lora_r=4, longest=20, mean_length=20, targets=2, strategy="cpu",
        **told,
    )  # fmt: skip
    if run.kernels:
        quicken(model)
    batch = packed_batch(shape, run)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    tokens = batch["input_ids"].numel() / run.examples / run.mean_length
    # 8 %: layers without a way to a trained weight compute no gradient.
    assert math.isclose(tokens * run.examples * operations(shape, run), counter.get_total_flops(), rel_tol=0.08)


@pytest.mark.parametrize(("length", "published"), [(10.3, 62e9), (24, 137e9), (64, 358e9)])
def test_operations_of_flan_t5_xl_are_those_computed_by_hand(length: float, published: float) -> None:
    run = replace(BEAUTY, mean_length=length, longest=64, prompt=1, packing=False, kernels=False)
    assert math.isclose(operations(XL, run), published, rel_tol=0.03)
    absorbed = operations(XL, replace(run, kernels=True, strategy="cpu"))
    assert 0.82 < absorbed / operations(XL, run) < 0.9  # keys and values of cross-attention are one part in seven


# --- memory -----------------------------------------------------------------------------------------------------------


def packed_batch(shape: Shape, run: Run) -> dict[str, torch.Tensor]:
    """A micro-batch of examples that are all of the run's mean length, in as many rows as it has."""
    ids, prompts = torch.full((run.examples, run.longest), 3), (run.targets, run.prompt)
    batch = {
        "input_ids": ids.numpy(), "attention_mask": np.ones_like(ids),
        "decoder_input_ids": np.full((run.examples, *prompts), 3), "labels": np.zeros((run.examples, run.targets), int),
    }  # fmt: skip
    if packs(shape, run):
        rows, length = encoder_rows(shape, run)
        batch = Packing(length, rows, ((run.examples, run.longest),)).pack(batch)
    return as_tensors(batch)


def kept_bytes(model: Any, batch: dict[str, torch.Tensor], *, bf16: bool) -> int:
    """Bytes of all tensors that autograd keeps of a forward pass: weights and all that is as wide as the scores aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.train()(**batch).loss
    items = unwrapped(model).id_tokens.item_in.num_embeddings
    assert loss.requires_grad
    return sum(
        tensor.untyped_storage().nbytes()
        for place, tensor in kept.items()
        if place not in own and not (tensor.ndim == 2 and tensor.shape[1] == items)
    )


FORMS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "transformers' layers, padded": {"kernels": False, "packing": False},
    "transformers' layers": {"kernels": False},
    "padded": {"packing": False},
    "three targets": {"targets": 3},
    "dropout before the adapters": {"lora_dropout": 0.05},
    "adapters on all layers": {"lora_targets": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")},
}
"""What of a run decides how its layers are computed; the last two are of LoRA."""


def kinds_of_runs() -> Iterator[Any]:
    """(form, tuning, kind of backbone, bf16, dropout); slow but for the two main forms of each family in fp32."""
    for form, tuning, kind, bf16, dropout in itertools.product(
        FORMS, ("lora", "full"), ("gated", "bart", "relu"), (False, True), (0.1, 0.0)
    ):
        adapters = form in list(FORMS)[-2:]
        if (adapters and tuning == "full") or ("lora_targets" in FORMS[form] and kind != "gated"):
            continue
        few = form in list(FORMS)[:2] and kind != "relu" and not bf16 and dropout
        name = f"{kind}-{tuning}-{'bf16' if bf16 else 'fp32'}-dropout {dropout}-{form}"
        marks = [] if few else [pytest.mark.slow]
        yield pytest.param(form, tuning, kind, bf16, dropout, id=name, marks=marks)


@pytest.mark.parametrize(("form", "tuning", "kind", "bf16", "dropout"), list(kinds_of_runs()))
def test_activations_are_what_autograd_keeps(form: str, tuning: Any, kind: str, bf16: bool, dropout: float) -> None:
    config = small(kind)
    for name in ("dropout", "attention_dropout") if kind == "bart" else ("dropout_rate",):
        setattr(config, name, dropout)
    shape = Shape.from_config(config.to_dict(), own_head=True)
    run = Run(
        items=30, user_rows=7, examples=17, longest=12, mean_length=12, tuning=tuning, lora_r=4, strategy="cpu", bf16=bf16,
        **FORMS[form],
    )  # fmt: skip
    targets = list(run.lora_targets) if run.lora_targets else None
    model = built(config, tuning, lora_dropout=run.lora_dropout, targets=targets, bf16=bf16)
    if run.kernels:
        quicken(model)
    ours, found = activations(shape, run), kept_bytes(model, packed_batch(shape, run), bf16=bf16)
    # 2.5 %: what a stack of few layers has once and no formula counts, such as the buckets of T5's bias.
    assert math.isclose(ours.encoder + ours.decoder + ours.cached_weights, found, rel_tol=0.025)


@pytest.mark.parametrize("examples", [8, 64, 256])
@pytest.mark.parametrize(("shortest", "longest"), [(4, 53), (4, 33), (100, 203), (33, 33)])
def test_packed_rows_have_the_tokens_that_are_counted(shortest: int, longest: int, examples: int) -> None:
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, 20 * examples)
    made = fixed_shapes(GlobalBatches(lengths, examples, seed=0, shares=1))
    run = Run(items=30, user_rows=7, examples=examples, longest=longest, mean_length=float(lengths.mean()))
    rows, length = encoder_rows(XL, run)
    # How well examples fit depends on all lengths, and of a few rows one is much: rather too many than too few.
    assert -0.08 < rows * length / (made.rows * made.row_length) - 1 < (0.25 if examples == 8 else 0.05)


def check_memory() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "tools" / "check_memory.py"))


def deviation(name: str) -> float:
    tool = check_memory()
    peak = tool["measured"](name, ways=("allocator",))["allocator"]
    return float(tool["predict"](tool["CASES"][name], cuda=False).total / peak - 1)


def test_the_peak_of_a_small_training_is_within_15_percent_of_the_measured_one() -> None:
    assert abs(deviation("t5-micro-full")) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["t5-mid-lora", "t5-mid-full", "logits", "bart-full", "t5-mid-pretraining", "many-users-sparse"]
)
def test_the_peak_of_a_training_is_within_15_percent_of_the_measured_one(name: str) -> None:
    assert abs(deviation(name)) < 0.15


@pytest.mark.parametrize(
    "change",
    [
        {"examples": 65}, {"items": 5_000}, {"user_rows": 500_000}, {"longest": 60}, {"targets": 2}, {"tied_rows": False},
        {"tuning": "full"}, {"accumulation": 2, "user_rows": 100_000},
    ],
)  # fmt: skip
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_of_anything_takes_no_less_memory(strategy: Strategy, change: dict[str, Any]) -> None:
    shape = Shape.from_config(GEOMETRIES["google/flan-t5-small"])
    processes = 1 if strategy in ("cpu", "single_gpu") else 8
    run = Run(items=4_000, user_rows=1_000, examples=64, strategy=strategy, processes=processes)
    assert estimate(shape, replace(run, **change)).total >= estimate(shape, run).total


def test_each_stage_of_zero_takes_less_than_the_one_before() -> None:
    run = replace(BEAUTY, examples=8, processes=8, user_rows=1_000_000)
    totals = [estimate(XL, replace(run, strategy=name)).total for name in ("ddp", "zero1", "zero2", "zero3_offload")]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


@pytest.mark.parametrize("strategy", ["single_gpu", "ddp", "zero2", "zero3"])
def test_the_largest_batch_fits_and_one_more_does_not(strategy: Strategy) -> None:
    run = replace(BEAUTY, strategy=strategy, processes=1 if strategy == "single_gpu" else 8)
    most = largest_batch(XL, run, 60 * GIB)
    assert most > 1
    assert (
        estimate(XL, replace(run, examples=most)).total
        <= 60 * GIB
        < estimate(XL, replace(run, examples=most + 1)).total
    )
    assert largest_batch(XL, run, 1 * GIB) == 0


def test_the_recommended_strategy_is_the_simplest_that_fits() -> None:
    run, card = replace(BEAUTY, processes=8, examples=64), HARDWARE["h100"]
    assert recommended(by_strategy(XL, run, card)) == "ddp"
    assert recommended(by_strategy(XL, replace(run, user_rows=2_000_000), card)) == "zero1"
    xxl = Shape.from_config(GEOMETRIES["google/flan-t5-xxl"])
    assert recommended(by_strategy(xxl, replace(run, examples=8), replace(card, memory=20 * GIB))) in ("zero3", "fsdp2")
    assert recommended(by_strategy(xxl, run, replace(card, memory=GIB))) is None


def test_an_estimate_is_quick_enough_for_an_except_block() -> None:
    began = time.perf_counter()
    for _ in range(100):
        estimate(XL, BEAUTY)
    assert (time.perf_counter() - began) / 100 < 0.01


# --- communication ----------------------------------------------------------------------------------------------------


def counted(*arguments: object) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "collectives.py"), *map(str, arguments)],
        env=tiny.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def assert_counted(strategy: Any, world: int, tuning: Any, precision: str, *more: str) -> None:
    from collectives import EXAMPLES, GEOMETRY, ITEMS, USERS

    shape = Shape.from_config({"model_type": "t5", **GEOMETRY}, own_head=True)
    run = Run(
        items=ITEMS, user_rows=USERS, examples=EXAMPLES, tuning=tuning, strategy=strategy, processes=world,
        bf16=precision == "bf16", sparse_users="sparse" in more,
    )  # fmt: skip
    expected, found = traffic(shape, run), counted(strategy, world, tuning, precision, *more)
    # 1 %: tensors are padded to a multiple of the group, and a norm goes along.
    for kind, size in (
        ("allreduce", expected.all_reduce), ("allgather", expected.all_gather), ("reduce_scatter", expected.reduce_scatter),
    ):  # fmt: skip
        assert math.isclose(found.get(kind, 0), size, rel_tol=0.01, abs_tol=64), (kind, found, expected)


def test_ddp_sends_what_is_counted_at_64_ranks() -> None:
    assert_counted("ddp", 64, "lora", "fp32")


@pytest.mark.parametrize("world", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_sparse_user_rows_send_what_is_counted(world: int) -> None:
    assert_counted("ddp", world, "lora", "fp32", "sparse")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world", "tuning", "precision"),
    [
        ("ddp", 8, "full", "fp32"),
        ("fsdp2", 8, "lora", "fp32"),
        ("fsdp2", 8, "full", "fp32"),
        ("fsdp2", 64, "lora", "fp32"),
        ("zero1", 8, "lora", "bf16"),
        ("zero1", 64, "full", "bf16"),
        ("zero2", 8, "full", "fp32"),
        ("zero2", 64, "lora", "bf16"),
        ("zero3", 8, "lora", "bf16"),
        ("zero3", 64, "full", "bf16"),
    ],
)
def test_each_strategy_sends_what_is_counted(strategy: str, world: int, tuning: str, precision: str) -> None:
    assert_counted(strategy, world, tuning, precision)


@pytest.mark.slow
def test_zero3_above_its_limit_gathers_again_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genrec_llm.traffic.ZERO3_LIVE", 0)
    assert_counted("zero3", 8, "lora", "fp32", "once")


def test_a_ring_sends_each_byte_nearly_twice() -> None:
    run = replace(BEAUTY, processes=8)
    sent = estimate(XL, run).sent
    assert sent == 2 * 7 / 8 * 4 * trained_parameters(XL, run)
    assert estimate(XL, replace(run, processes=1, strategy="single_gpu")).sent == 0


def test_predicted_scaling_of_flan_t5_xl_on_beauty() -> None:
    card = HARDWARE["h100"]
    eight, many = predicted_scaling(XL, BEAUTY, card)
    assert eight.efficiency >= 0.97 and many.efficiency >= 0.92
    slower = predicted_scaling(XL, BEAUTY, replace(card, network_bandwidth=50e9))
    assert slower[0] == eight and slower[1].efficiency < many.efficiency


def test_a_dense_reduction_of_a_million_users_scales_badly_and_a_sparse_exchange_does_not() -> None:
    card, run = HARDWARE["h100"], replace(BEAUTY, user_rows=1_000_001)
    assert max(found.efficiency for found in predicted_scaling(XL, run, card)) < 0.85
    sparse = predicted_scaling(XL, replace(run, sparse_users=True), card)
    assert sparse[0].efficiency >= 0.97 and sparse[1].efficiency >= 0.92
    known = predicted_scaling(XL, replace(run, user_rows=1), card)[1]
    assert sparse[1].sent - known.sent == 63 * 1_024 * (2_048 * 4 + 8) - 2 * 63 / 64 * 2_048 * 4


def test_a_measured_step_takes_the_place_of_the_predicted_one() -> None:
    (found,) = predicted_scaling(XL, BEAUTY, HARDWARE["h100"], processes=(8,), step_seconds=1.0, imbalance=0.0)
    assert found.efficiency == 1 / (1 + found.communication_seconds)
    with pytest.raises(ConfigError, match="--tflops"):
        predicted_scaling(XL, BEAUTY, replace(HARDWARE["h100"], tflops=0.0))


# --- from what is at hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_folder_is_read_as_its_model_is_loaded(kind: str, tmp_path: Path) -> None:
    folder = tiny.save_backbone(kind, tmp_path / kind)
    config, own_head = read_geometry(str(folder))
    model, _ = load_backbone(str(folder))
    assert Shape.from_config(config, own_head=own_head).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["t5-micro", "bart-micro"])
def test_a_named_size_is_read_as_its_model_is_built(name: str) -> None:
    config, own_head = read_geometry(name, init="random")
    model, _ = load_backbone(name, init="random")
    shape = Shape.from_config(config, own_head=own_head)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_backbone_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"neither a folder .* Known: t5-micro"):
        read_geometry(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="type 'gpt2' is not a supported seq2seq family"):
        Shape.from_config({"model_type": "gpt2"})
    loaded = AutoConfig.for_model("t5", num_layers=2).to_dict()
    assert Shape.from_config(loaded).encoder_layers == 2


def test_all_problems_of_a_run_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Run(items=0, user_rows=1, examples=1, mean_length=99, strategy="single_gpu", processes=2)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="no layer 'query'"):
        estimate(XL, replace(BEAUTY, lora_targets=("query",)))


def test_the_estimate_of_arguments_is_that_of_the_run_they_start(tmp_path: Path) -> None:
    from genrec_llm.args import GenRecTrainingArguments, ModelArguments

    training = GenRecTrainingArguments(
        output_dir=str(tmp_path), global_batch_size=96, gradient_accumulation_steps=3, use_cpu=True
    )
    found = estimate_run(
        GEOMETRIES["google/flan-t5-small"], ModelArguments(), training, items=50, user_rows=9, longest=20, strategy="ddp",
        processes=4,
    )  # fmt: skip
    assert (found.run.examples, found.run.accumulation, found.run.global_batch) == (8, 3, 96)
    assert found.run.optimizer_bytes == 8 and found.run.prompt == 2
    assert found.run.packing and found.run.kernels
    training.packing = training.kernels = False
    plain = estimate_run(
        GEOMETRIES["google/flan-t5-small"], ModelArguments(), training, items=50, user_rows=9, longest=20, strategy="ddp",
        processes=4,
    )  # fmt: skip
    assert not plain.run.packing and not plain.run.kernels and plain.total > found.total


# --- the verb ---------------------------------------------------------------------------------------------------------


def genrec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["genrec", "estimate", *arguments])
    cli.main()
    return capsys.readouterr().out


NUMBERS = ("--items", "12101", "--users", "22363", "--interactions", "198502", "--mean-length", "10.3")


def test_the_verb_needs_no_data_and_no_network(monkeypatch: Any, capsys: Any) -> None:
    printed = genrec(
        monkeypatch, capsys, *NUMBERS, "--backbone", "google/flan-t5-xl", "--bf16", "--global-batch-size", "1024",
        "--processes", "8",
    )  # fmt: skip
    assert "ddp, 8 x 128 examples x 1 accumulated = 1024 a step" in printed
    assert "predicted epoch:" in printed and "129 steps" in printed
    assert "Recommended: ddp" in printed and "Next: genrec finetune --strategy ddp --processes 8" in printed
    assert "user rows exchanged dense: 0.9" in printed
    assert "user rows exchanged sparse, with --sparse-user-rows: 0.9" in printed


def test_the_verb_reads_sparse_user_rows_and_offers_only_what_has_them(monkeypatch: Any, capsys: Any) -> None:
    flags = ("--items", "12101", "--users", "1000000", "--backbone", "google/flan-t5-xl", "--bf16", "--processes", "8")
    dense = json.loads(genrec(monkeypatch, capsys, *flags, "--strategy", "ddp", "--json"))
    sparse = json.loads(genrec(monkeypatch, capsys, *flags, "--strategy", "ddp", "--json", "--sparse-user-rows"))
    assert sparse["strategies"].keys() == {"ddp"} and {"ddp", "zero2"} < dense["strategies"].keys()
    table = 1_000_001 * 2048 * 4
    saved = {part: dense["largest_bytes"][part] - sparse["largest_bytes"][part] for part in dense["largest_bytes"]}
    assert saved["optimizer state"] == saved["id rows"] == 0, "both stay whole"
    assert saved["buffers"] == table and 0.99 * table < saved["gradients"] < table
    assert {found["exchange_of_user_rows"] for found in sparse["predicted_scaling"]} == {"sparse"}
    with pytest.raises(SystemExit):
        genrec(monkeypatch, capsys, *flags, "--strategy", "zero2", "--sparse-user-rows")
    assert "zero2 has no sparse gradients: take ddp" in capsys.readouterr().err


def test_sparse_user_rows_take_less_than_dense_ones_and_more_with_more_examples() -> None:
    run = replace(BEAUTY, examples=4, processes=8, user_rows=1_000_000)
    sparse = estimate(XL, replace(run, sparse_users=True)).total
    assert sparse < estimate(XL, run).total - 2 * 8e9, "neither the gradient nor DDP's copy of it"
    assert estimate(XL, replace(run, sparse_users=True, examples=128)).total > sparse


def test_the_verb_reads_a_recipes_data_and_prints_json(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    log = tiny.save_log(tmp_path / "log.csv", users=20, longest=6)
    flags = ("--dataset", str(log), "--backbone", "t5-micro", "--backbone-init", "random", "--tuning", "full")
    facts = json.loads(genrec(monkeypatch, capsys, *flags, "--global-batch-size", "16", "--strategy", "cpu", "--json"))
    rows = [line.split(",")[0] for line in log.read_text().splitlines()[1:]]
    examples = sum(rows.count(user) - 3 for user in set(rows))
    assert facts["steps_per_epoch"] == -(-examples // 16)
    assert facts["fits"] is None and facts["peak_bytes"] == sum(facts["bytes_at_the_peak"].values())
    assert facts["launch"].startswith("genrec finetune --strategy cpu --dataset")


def test_what_does_not_fit_is_told_with_the_mend(monkeypatch: Any, capsys: Any) -> None:
    flags = (*NUMBERS, "--backbone", "google/flan-t5-xl", "--bf16", "--global-batch-size", "32768", "--processes", "8")
    printed = genrec(monkeypatch, capsys, *flags)
    assert "DOES NOT FIT" in printed and "Nothing fits." in printed
    steps = printed.split("--gradient-accumulation-steps ")[1].split(".")[0]
    assert "Recommended: ddp" in genrec(monkeypatch, capsys, *flags, "--gradient-accumulation-steps", steps)


def test_wrong_arguments_of_the_verb_are_refused(monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        genrec(monkeypatch, capsys, "--stage", "test", "--strategy", "zero4", "--users", "3")
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    with pytest.raises(SystemExit):
        genrec(monkeypatch, capsys, *NUMBERS, "--hardware", "h1000")
    assert "did you mean h100?" in capsys.readouterr().err
