"""The parts of gpu_check.py, one at a time, in this process.

    python tools/gpu_parts.py train --data-dir ../shared/data --out gpu_results

`imports`, what is installed; `ceiling`, what a product of 8192³ reaches; `train`, steps at Flan-T5-XL's shape with real
lengths and with drawn histories of about 61 items; `rank`, the one-step path; `profile`, three steps by kernel; `exact`,
the kernels, packed rows and lists against what they stand for; `sync`, where the host waits in a step that is not logged;
`rivals`, bench_train.py and bench_topn.py at Flan-T5-small's shape; `rivals-at-size`, both at XL's, training with a batch
of 128, one arm in memory at a time; `compile`, --torch-compile without and with CUDA graphs; `stages`, both stages;
`quantized`, nf4; `auto-batch`, a batch that does not fit.

Weights are random. On a CPU everything runs too, in fp32, and its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import bench_topn
import bench_train
import numpy as np
import torch
from bench_results import GIB, MEMORY, Meter, compare, peak_bytes, record
from bench_topn import MASK, OURS, Bench, best_size, timed
from bench_train import LORA, SHAPES, Job, backbone, rows_of
from gpu_check import FINDINGS, ROWS, add_flags, findings, packages, without_places
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from genrec_llm import kernels
from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.backbone import Quantization, load_backbone, quantized, ready_to_train
from genrec_llm.batching import as_tensors, train_loader
from genrec_llm.decoding import mask_seen_, top_items
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError, exits_cleanly
from genrec_llm.evaluation import user_batches
from genrec_llm.files import atomic_file, write_json
from genrec_llm.model import GenRecBackbone, GenRecUntiedT5, add_lora
from genrec_llm.prediction import estimate_run
from genrec_llm.privacy import redacted
from genrec_llm.provenance import provenance
from genrec_llm.rows import initial_rows
from genrec_llm.shape import Shape
from genrec_llm.tasks import IntArray, MaskedItem, NextItem, Sequences
from genrec_llm.tokenizer import bare_tokenizer
from genrec_llm.trainer import GenRecTrainer
from genrec_llm.workload import Run, operations

CUDA = torch.cuda.is_available()
CLOCK = "GPU" if CUDA else "CPU"
BLOCKS = 3
"""That count, of which the best is taken."""
LONG_HISTORY, LONG_SEQUENCE, LONG_USERS = 100, 128, 512
"""Prefixes of 1 … 127 items of which at most 100 are read have 61.0 on average: 64.0 tokens with user, mask and end."""
LISTS, LISTED_USERS = 20, 64


@dataclass
class Check:
    """One part as it runs: what it was asked for, and where its findings go.

    Attributes:
        found: facts noted so far.
        measured: bench and shape → arm → unit → values, recorded so far.
    """

    part: str
    args: argparse.Namespace
    found: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    @cached_property
    def data(self) -> Data:
        """What is trained on and ranked."""
        return load_data(DataArguments(dataset=self.args.dataset, data_dir=self.args.data_dir))

    @cached_property
    def made(self) -> dict[str, Any]:
        """What makes the findings."""
        return provenance() | {"shape": self.args.shape, "cuda": CUDA}

    @property
    def small(self) -> str:
        """A shape for comparisons in higher precision and with rivals."""
        return "flan-t5-small" if self.args.shape == "flan-t5-xl" else str(self.args.shape)

    def note(self, **facts: Any) -> None:
        """Print a finding and write it."""
        print(f"{self.part}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        self.found.append(facts)
        self.write()

    def write(self, **ending: Any) -> None:
        """Put this part's findings in place of those of an earlier run of it; other parts stay."""
        entry = {**self.made, "found": self.found, **ending}
        write_json(self.args.out / FINDINGS, findings(self.args.out) | {self.part: entry})

    def measure(self, bench: str, shape: str, arm: str, values: dict[str, list[float]], rivals: Sequence[str]) -> None:
        """Record an arm, of its bench the ratio to those of the rivals that were measured before it.

        Of arms that differ in their units each unit is compared among those that have it.
        """
        arms = self.measured.setdefault((bench, shape), {})
        arms[arm] = values
        known = [name for name in rivals if name in arms] or list(arms)
        rows = []
        for unit in dict.fromkeys(unit for of_arm in arms.values() for unit in of_arm):
            alike = {name: {unit: of_arm[unit]} for name, of_arm in arms.items() if unit in of_arm}
            rows += compare(bench, shape, alike, known, provenance())
        record(self.args.out / ROWS, rows)


def freed() -> None:
    """Give back what the last model held, so that the next one's peak is its own."""
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- the machine ------------------------------------------------------------------------------------------------------


def imports(check: Check) -> None:
    """Part `imports`: all that is imported here was found; whether it is as pyproject.toml wants it, and the device."""
    device = torch.cuda.get_device_properties(0) if CUDA else None
    check.note(
        device=device.name if device else "CPU",
        memory_gib=round(device.total_memory / GIB, 1) if device else None,
        cuda_of_torch=torch.version.cuda,
        not_within_bounds={name: f"{here}, not {bounds}" for name, bounds, here, fits in packages() if not fits},
    )


# --- the ceiling ------------------------------------------------------------------------------------------------------


def product_tflops() -> float:
    """What a product of two square random matrices reaches, bf16 on a GPU: 10^12 operations a second, best of 5."""
    size, times = (8192, 10) if CUDA else (512, 2)
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = torch.mm(left, right)
    seconds = []
    for _ in range(5):
        meter = Meter(CUDA)
        meter.start()
        for _ in range(times):
            torch.mm(left, right, out=found)
        seconds.append(meter.stop()[CLOCK] / times)
    return 2 * size**3 / max(min(seconds), 1e-9) / 1e12


def ceiling(check: Check) -> None:
    """Part `ceiling`."""
    check.note(product_tflops=round(product_tflops(), 2), clock=CLOCK)


# --- is it right? -----------------------------------------------------------------------------------------------------

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest relative error of a tensor (norm of the difference over its norm) that passes, where transformers' own layers
have not half as much."""


def adapted(shape: str, data: Data, dtype: torch.dtype) -> nn.Module:
    """A model with layers of transformers and LoRA that does something; dropout off."""
    layout = SHAPES[shape].layout(data)
    model = backbone(GenRecUntiedT5, SHAPES[shape]).to(dtype)
    model.add_id_tokens(rows_of(model, data, layout, tie=True).to(model.device), layout.base)
    found = add_lora(model, **LORA, targets=None, base_name="random", revision=None)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return found.eval()


def with_kernels(model: nn.Module, only: str | None = None) -> nn.Module:
    """A copy that uses the kernels, or only the one of a name (of a function of `kernels`)."""
    quick = copy.deepcopy(model)
    kernels.quicken(quick)
    for module in quick.modules():
        given = vars(module).get("forward")
        if only and isinstance(given, MethodType) and given.__func__.__name__ != only:
            del module.forward
    return quick


def loss_and_gradients(model: nn.Module, batch: Any, *, bf16: bool = False) -> dict[str, Tensor]:
    """The loss and the gradient of each trained parameter by name, fp64."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = model(**on_device(batch, device)).loss
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: value.detach().double() for name, value in {"loss": loss, **gradients}.items()}


def on_device(batch: Any, device: torch.device) -> dict[str, Any]:
    """A batch, some of whose values may be tuples of tensors, elsewhere."""
    return {
        name: tuple(one.to(device) for one in value) if isinstance(value, tuple) else value.to(device)
        for name, value in batch.items()
    }


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Of all tensors the largest ‖found - wanted‖ / ‖wanted‖, NaN before all, and whose it is."""
    assert found.keys() == wanted.keys()
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items() if value.any()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def exact(check: Check) -> None:
    """Part `exact`: loss and gradients against fp64, checkpointed dropout against the same without, lists against beams."""
    layout = SHAPES[check.small].layout(check.data)
    task = NextItem(check.data.train, layout, seed=0)
    size = min(64, len(task.lengths))
    most = GenRecTrainingArguments(output_dir="none").length_classes
    loaders: list[Any] = [
        train_loader(
            task, global_batch_size=size, accumulation=1, rank=0, world_size=1, seed=0, packed=True, classes=classes
        )
        for classes in (1, most)
    ]
    keys = next(iter(loaders[0].batch_sampler))
    packed, in_classes = (loader.dataset.__getitems__(keys) for loader in loaders)
    padded = as_tensors(task.batch(0, np.array([example for _, example in keys])))
    wrong = []

    def compared(name: str, dtype: torch.dtype, error: float, worst: str, tolerance: float) -> None:
        passes = error <= tolerance
        wrong.extend([] if passes else [f"{name}, {dtype}"])
        check.note(compared=name, dtype=str(dtype), error=error, tolerance=tolerance, tensor=worst, passes=passes)

    for dtype in TOLERANCES:
        model, bf16 = adapted(check.small, check.data, dtype), dtype == torch.bfloat16
        wanted = loss_and_gradients(copy.deepcopy(model).double(), padded)
        error, worst = largest_error(loss_and_gradients(model, padded, bf16=bf16), wanted)
        tolerance = max(TOLERANCES[dtype], 2 * error)
        check.note(compared="transformers' layers, padded rows", dtype=str(dtype), error=error, tensor=worst)
        quick = with_kernels(model)
        forms = {"transformers' layers, packed rows": (model, packed), "all kernels, padded rows": (quick, padded)}
        forms |= {"all kernels, packed rows": (quick, packed)}
        forms |= {f"all kernels, packed rows, {len(in_classes['segments'])} classes of length": (quick, in_classes)}
        replaced = {module.forward.__name__ for module in quick.modules() if "forward" in vars(module)}
        forms |= {f"{name.strip('_')}, packed rows": (with_kernels(model, name), packed) for name in sorted(replaced)}
        for name, (form, batch) in forms.items():
            found = loss_and_gradients(form, batch, bf16=bf16)
            compared(name, dtype, *largest_error(found, wanted), tolerance)

        quick.train()
        drawn = []
        for again in (kernels.checkpoint, lambda work, *given, use_reentrant: work(*given)):
            before, kernels.checkpoint = kernels.checkpoint, again
            set_seed(1)
            drawn.append(loss_and_gradients(quick, in_classes, bf16=bf16))
            kernels.checkpoint = before
        compared("dropout computed again by checkpoint", dtype, *largest_error(*drawn), TOLERANCES[dtype])
        del model, quick, forms
        freed()

    bench = Bench.build(check.small, check.data, LISTED_USERS, dtype=torch.float32)
    lists, name = {OURS: bench.ours(16), MASK: bench.mask(16)}, f"one-step top {LISTS} and beam search"
    try:
        bench.refuse_other_lists(lists)
    except ConfigError as error:
        wrong.append(str(error))
    check.note(compared=name, users=len(bench.data.targets), passes=not any("lists" in one for one in wrong))
    if wrong:
        raise RuntimeError(f"not what they stand for: {'; '.join(wrong)}")


# --- training steps ---------------------------------------------------------------------------------------------------


def long_histories(data: Data) -> Data:
    """The same catalogue with drawn sequences, items as often as in the data: the examples have 64.0 tokens on average."""
    drawn = np.random.default_rng(0).choice(data.train.items, size=LONG_USERS * LONG_SEQUENCE)
    users = 1 + np.arange(LONG_USERS) % (data.vocab.num_user_rows - 1)
    offsets = np.arange(LONG_USERS + 1) * LONG_SEQUENCE
    return replace(
        data, name=f"drawn from {data.name}", train=Sequences(drawn, offsets, users), max_history=LONG_HISTORY
    )


def operations_an_example(shape: Shape, lengths: IntArray, *, items: int) -> float:
    """Floating-point operations that a training step needs for one example on average: no padding, nothing computed twice.

    By `workload.operations`, at each of the lengths alone. With n tokens, a prompt of p = 2, width d, heads × size = e,
    feed-forward f, h heads, r the rank of LoRA, two operations a multiplication and addition:

    - an encoder layer has 4de + 3df elements that each of n tokens meets, and n²e twice for scores and sums;
    - a decoder layer 4de + 3df of p tokens, p²e twice, and cross-attention as `kernels` computes it: 4de of p tokens (keys
      and values absorbed into the query and the sum), and p·n·h·d twice;
    - LoRA on q and v adds r(d + e) elements each; the head scores one state against all items, d × items.

    The frozen matrices cost that forward and again for the gradient that goes on, since rows below them are trained (2
    times); products of two activations, LoRA and the item rows have a third one (3 times). What is used in place of
    this (keys and values of transformers' layers, the second forward pass of checkpoint) counts for nothing.
    """
    run = Run(
        items=items, user_rows=1, examples=1, packing=False, strategy="cpu", longest=int(lengths.max()),
        mean_length=float(lengths.mean()), lora_r=int(LORA["r"]),
    )  # fmt: skip
    values, counts = np.unique(lengths, return_counts=True)
    needed = [operations(shape, run, float(length)) for length in values]
    return float(np.average(needed, weights=counts))


class Blocks(TrainerCallback):
    """Times each epoch of a fair sample of batches; the first begins with the largest of them and does not count."""

    def __init__(self, sample: Any) -> None:
        self.sample, self.meter = sample, Meter(CUDA)
        self.seconds: dict[str, list[float]] = {}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sample.warming = state.global_step == 0
        self.meter.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for clock, seconds in self.meter.stop().items():
            self.seconds.setdefault(clock, []).append(seconds)


@contextmanager
def training(
    check: Check, data: Data, settings: tuple[str, ...] = (), *, blocks: int = BLOCKS, steps: int = 0
) -> Iterator[tuple[Any, Blocks]]:
    """Our trainer as in bench_train.py, on batches that stand for an epoch, and the clock of its blocks.

    Args:
        settings: `name=value` of GenRecTrainingArguments.
        blocks: that count.
        steps: micro-batches of a block, by default those asked for, and in any case whole steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = steps or check.args.steps
        job = Job(
            "ours", check.args.shape, data.name, None, check.args.batch, steps=steps, blocks=1 + blocks,
            settings=settings,
        )  # fmt: skip
        trainer: Any = bench_train.ours(job, data, folder)
        accumulation = trainer.args.gradient_accumulation_steps
        trainer.steps = -(-steps // accumulation) * accumulation
        trainer.counted = True  # micro-batches of the sample are of several global batches
        clock = Blocks(trainer.get_train_dataloader().batch_sampler)
        trainer.add_callback(clock)
        freed()
        yield trainer, clock


DEFAULTS = "ours"
ARMS: dict[str, tuple[str, ...]] = {
    DEFAULTS: (),
    "ours, kernels=false": ("kernels=false",),
    "ours, packing=false": ("packing=false", "auto_batch_size=true"),  # the longest examples do not fit together
}
LONG_ARMS: dict[str, tuple[str, ...]] = {DEFAULTS: ("gradient_accumulation_steps=4",)}
COMPILED_ARMS: dict[str, tuple[str, ...]] = {
    DEFAULTS: (),
    "ours, torch_compile=true": ("torch_compile=true",),
    "ours, torch_compile_mode=reduce-overhead": ("torch_compile_mode=reduce-overhead",),
}


def time_arms(check: Check, data: Data, arms: dict[str, tuple[str, ...]], about: str) -> None:
    """Time arms one after the other and note what they reach.

    Raises:
        RuntimeError: at the end, where arms failed; the others are measured.
    """
    best, failed = product_tflops(), []
    freed()
    for arm, settings in arms.items():
        try:
            time_arm(check, data, arm, settings, about, best)
        except Exception:  # recorded, and an arm's failure says nothing of the others
            failed.append(f"{arm}: {traceback.format_exc()}")
        freed()
    if failed:
        raise RuntimeError("\n".join(failed))


def time_arm(check: Check, data: Data, arm: str, settings: tuple[str, ...], about: str, best: float) -> None:
    """Train one arm and note its figures.

    Args:
        about: what is trained on.
        best: TFLOP/s of a plain product, measured in this process.
    """
    with training(check, data, settings) as (trainer, clock):
        examples = sum(map(len, clock.sample.batches))
        trainer.train()
        peak, task, args = peak_bytes(CUDA), trainer.task, trainer.args
    shape, config = SHAPES[check.args.shape], SHAPES[check.args.shape].config().to_dict()
    longest, mean = int(task.lengths.max()), float(task.lengths.mean())
    estimated = estimate_run(
        config, ModelArguments(), args, items=data.vocab.num_items, user_rows=data.vocab.num_user_rows, longest=longest,
        mean_length=mean, strategy="single_gpu" if CUDA else "cpu", processes=1, own_head=True,
    )  # fmt: skip
    values = {
        f"{name} ms an example": [1000 * one / examples for one in seconds[1:]]
        for name, seconds in clock.seconds.items()
    }
    # Of a CPU's process the peak is that of all arms so far; and where the micro-batch is what fits, it says nothing.
    if CUDA and not args.auto_batch_size:
        values[MEMORY] = [peak / GIB]
    bench = f"train step, {check.args.shape}, {about}, {CLOCK}, {check.part}"
    where = f"{shape}; {data.name}, {about}, mean {mean:.1f} tokens; batch {check.args.batch}"
    check.measure(bench, where, arm, values, [DEFAULTS])
    needed = operations_an_example(Shape.from_config(config, own_head=True), task.lengths, items=data.vocab.num_items)
    rate = 1000 / max(min(values[f"{CLOCK} ms an example"]), 1e-9)
    check.note(
        arm=arm, lengths=about, mean_tokens=round(mean, 2), clock=CLOCK, examples_per_second=round(rate, 1),
        peak_gib=round(peak / GIB, 2) if CUDA else None, estimated_gib=round(estimated.total / GIB, 2),
        gflop_an_example=round(needed / 1e9, 3), tflops=round(rate * needed / 1e12, 2), product_tflops=round(best, 2),
        mfu=round(rate * needed / 1e12 / best, 4), accumulation=args.gradient_accumulation_steps,
        padded_tokens_of_the_mean=round(clock.sample.representative, 3),
    )  # fmt: skip


def train(check: Check) -> None:
    """Part `train`."""
    failed = []
    for data, arms, about in (
        (check.data, ARMS, "real lengths"),
        (long_histories(check.data), LONG_ARMS, "long histories"),
    ):
        try:
            time_arms(check, data, arms, about)
        except RuntimeError as error:
            failed.append(f"{about}: {error}")
    if failed:
        raise RuntimeError("\n".join(failed))


def compiled(check: Check) -> None:
    """Part `compile`."""
    time_arms(check, check.data, COMPILED_ARMS, "real lengths")


# --- where the time goes ----------------------------------------------------------------------------------------------


class Waits(TrainerCallback):
    """Counts what makes the host wait for the GPU from the end of one step to the end of the next, by place in the code.

    By torch's debug mode, which sees copies to and from the host and operators that ask for a value, and warns of each.
    """

    def __init__(self, after: int) -> None:
        self.after, self.places = after, Counter[str]()
        self.guard = warnings.catch_warnings()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            self.guard.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._see
            if CUDA:
                torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == self.after + 1:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
            self.guard.__exit__(None, None, None)

    def _see(self, message: Any, *about: Any, **more: Any) -> None:
        if "called a synchronizing" in str(message):  # torch also warns, once, that the mode is a prototype
            frames = [(Path(frame.filename).name, frame) for frame in traceback.extract_stack()[:-1]]
            places = [f"{name}:{frame.lineno} {frame.name}" for name, frame in frames if name != "warnings.py"]
            self.places[" > ".join(places[-3:])] += 1


def sync(check: Check) -> None:
    """Part `sync`."""
    with training(check, check.data, blocks=1, steps=3) as (trainer, _):
        waits = Waits(after=4)  # within the second block, when everything is there
        trainer.add_callback(waits)
        trainer.train()
    check.note(steps=1, waits=sum(waits.places.values()), places=dict(waits.places.most_common()), clock=CLOCK)


FAMILIES = {
    "attention and softmax": r"fmha|flash|attention|softmax",
    "products": r"gemm|cutlass|nvjet|xmma|cublas|gemv|::(add|badd)?b?mm_?$",
    "copies": r"memcpy|memset|copy",
    "norms and sums": r"norm|reduce|::sum|::mean",
    "rows": r"index|embedding|gather|scatter|sort|scan",
    "optimizer": r"adam|multi_tensor",
    "elementwise": r"elementwise|vectorized|gelu|dropout|triton",
}
"""Kernels by what is in their names, in this order; others are `other`."""


class Profiled(TrainerCallback):
    """Profiles the last block."""

    def __init__(self, block: int) -> None:
        self.block = block
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] * CUDA)]
        self.profiler = torch.profiler.profile(activities=kinds)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if round(state.epoch) == self.block:
            self.profiler.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if round(state.epoch) == self.block + 1:
            if CUDA:
                torch.cuda.synchronize()
            self.profiler.stop()


def busy_microseconds(spans: Sequence[tuple[float, float]]) -> float:
    """Of the time in which at least one of the spans (begin, end) runs."""
    total, reached = 0.0, -np.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def profile(check: Check) -> None:
    """Part `profile`."""
    steps = 3
    with training(check, check.data, blocks=2, steps=steps) as (trainer, clock):
        watched = Profiled(block=2)
        trainer.add_callback(watched)
        trainer.train()
    profiler, attribute = watched.profiler, "self_device_time_total" if CUDA else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    # Spans that were only named, such as the optimizer's step, are drawn on the GPU's time as well.
    ran = [one for one in profiler.key_averages() if one.device_type == kind and not one.is_user_annotation]
    ran = sorted((one for one in ran if getattr(one, attribute)), key=lambda one: -getattr(one, attribute))
    total = sum(getattr(one, attribute) for one in ran)
    shares = Counter[str]()
    for one in ran:
        family = next((name for name, part in FAMILIES.items() if re.search(part, one.key.lower())), "other")
        shares[family] += getattr(one, attribute) / total
    spans = [
        (one.time_range.start, one.time_range.end)
        for one in profiler.events()
        if one.device_type == kind and not one.is_user_annotation
    ]
    busy = busy_microseconds(spans) / 1e6
    unprofiled = clock.seconds[CLOCK][1]
    check.note(
        steps=steps, clock=CLOCK, busy_ms_a_step=round(1000 * busy / steps, 3),
        step_ms=round(1000 * unprofiled / steps, 3), idle=round(1 - busy / unprofiled, 4) if CUDA else None,
        launches_a_step=sum(one.count for one in ran) // steps,
        shares={name: round(share, 4) for name, share in shares.most_common()},
    )  # fmt: skip
    for one in ran[:40]:
        spent = getattr(one, attribute)
        check.note(kernel=one.key[:160], calls=one.count, ms=round(spent / 1000, 3), share=round(spent / total, 4))
    with atomic_file(check.args.out / "profile.txt") as temporary:
        text = profiler.key_averages().table(sort_by=attribute, row_limit=60, max_name_column_width=100)
        temporary.write_text(text + "\n", encoding="utf-8")


# --- ranking ----------------------------------------------------------------------------------------------------------


def lists_on_device(bench: Bench, size: int) -> IntArray:
    """Top lists of all users as `Recommender.recommend` makes them: scores stay on the device, lists alone come back."""
    batches = user_batches(bench.data, np.arange(len(bench.data.targets)), size)
    found = []
    for users in batches:
        scores = bench.recommender.score_tensor([bench.data.histories[user] for user in users], bench.data.users[users])
        found.append(top_items(mask_seen_(scores, [bench.data.seen[user] for user in users]), LISTS)[0])
    return torch.cat(found).cpu().numpy()[np.argsort(np.concatenate(batches))]


def rank(check: Check) -> None:
    """Part `rank`."""
    bench = Bench.build(check.args.shape, check.data, check.args.users)
    users = len(bench.data.targets)
    arms: dict[str, Callable[[int], IntArray]] = {
        "ours, rank_recommender": bench.ours,
        "ours, lists alone come back": partial(lists_on_device, bench),
    }
    for arm, ask in arms.items():
        lists = ask(min(256, users))
        if len(lists) != users or (lists[:, 0] < 0).any():
            raise RuntimeError(f"{arm}: {len(lists)} lists for {users} users, or empty ones")
        size = best_size(ask, (256, 1024, 4096))
        blocks = [timed(ask, size) for _ in range(BLOCKS)]
        values = {f"{name} ms a user": [1000 * one[name] / users for one in blocks] for name in blocks[0]}
        where = f"{SHAPES[check.args.shape]}; {check.data.name}, {users} validation users; top {LISTS}"
        check.measure(f"top {LISTS}, {check.args.shape}, {CLOCK}, {check.part}", where, arm, values, [*arms][:1])
        rate = 1000 / max(min(values[f"{CLOCK} ms a user"]), 1e-9)
        check.note(arm=arm, batch=size, users=users, clock=CLOCK, users_per_second=round(rate, 1))


# --- rivals -----------------------------------------------------------------------------------------------------------


def run_benchmarks(check: Check, *lines: tuple[ModuleType, list[str]]) -> None:
    """Run other benchmarks of this folder as their commands would; they write their rows themselves.

    Raises:
        RuntimeError: at the end, where some of them failed.
    """
    args, failed = check.args, []
    common = ["--dataset", args.dataset, "--out", str(args.out / ROWS)]
    common += ["--data-dir", args.data_dir] if args.data_dir else []
    for tool, flags in lines:
        sys.argv = [os.path.relpath(str(tool.__file__)), *flags, *common]  # the command that their rows name
        began = time.monotonic()
        try:
            inspect.unwrap(tool.main)()  # with its errors as they are
        except Exception:  # recorded, and the failure of one says nothing of the others
            failed.append(f"{redacted(sys.argv)}: {traceback.format_exc()}")
        check.note(command=redacted(sys.argv), seconds=round(time.monotonic() - began, 1))
        freed()
    if failed:
        raise RuntimeError("\n".join(failed))


def rivals(check: Check) -> None:
    """Part `rivals`: of a small shape."""
    args, users = check.args, check.args.users or 2048
    few = min(256, users)  # (c) spends tens of milliseconds of the host on each user
    run_benchmarks(
        check,
        (bench_train,
         ["--shape", check.small, "--batch", str(min(256, args.batch)), "--steps", str(args.steps)]),
        (bench_topn,
         ["--shape", check.small, "--users", str(min(2048, users)), "--prefix-users", str(few),
          "--batches", "64", "256", "1024"]),
    )  # fmt: skip


def rivals_at_size(check: Check) -> None:
    """Part `rivals-at-size`: of the shape asked for, in training one arm after the other, since they do not fit together."""
    args, users = check.args, check.args.users or 1024
    run_benchmarks(
        check,
        (bench_train,
         ["--shape", args.shape, "--batch", str(min(128, args.batch)), "--steps", str(min(8, args.steps)),
          "--one-at-a-time", "--arms", "a", "ours", "same-loss", "b"]),
        (bench_topn,
         ["--shape", args.shape, "--users", str(min(1024, users)), "--prefix-users", str(min(64, users)),
          "--batches", "16", "64", "256"]),
    )  # fmt: skip


# --- whole stages -----------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Times the steps after a warm-up that compiles kernels and fills the allocator; waits for the GPU at its ends alone."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.ends: list[float] = []

    @property
    def seconds(self) -> float:
        """Between the two."""
        return self.ends[1] - self.ends[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.warm_up, state.max_steps):
            if CUDA:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())


def run_stage(
    check: Check,
    stage: str,
    batch: int,
    *,
    quantization: Quantization | None = None,
    auto_batch_size: bool = False,
) -> None:
    """Train one stage for some steps with rows from co-occurrence and a learning rate for them, and note what it took."""
    set_seed(0)
    data, shape, steps = check.data, SHAPES[check.args.shape], max(2, check.args.steps)
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    quantizing = quantized(quantization, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        options = GenRecTrainingArguments(
            output_dir=folder, max_steps=steps, global_batch_size=batch, bf16=CUDA, learning_rate=3e-4,
            rows_learning_rate=1e-3, eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
            logging_steps=max(1, steps // 2), auto_batch_size=auto_batch_size, disable_tqdm=True,
        )  # fmt: skip
        model: GenRecBackbone = backbone(GenRecUntiedT5, shape)
        parameters, tokenizer = model.num_parameters(), bare_tokenizer("t5")
        if quantizing:  # happens to a checkpoint while it is loaded
            model.save_pretrained(f"{folder}/base")
            tokenizer.save_pretrained(f"{folder}/base")
            del model
            freed()
            model, _ = load_backbone(f"{folder}/base", dtype=dtype, **quantizing)
            ready_to_train(model)
        layout = shape.layout(data)
        rows, _ = initial_rows(model, tokenizer, data.vocab, layout, data.train)
        model.add_id_tokens(rows.to(device), layout.base)
        wrapped = add_lora(model, **LORA, targets=None, base_name="random", revision=None)
        task = (MaskedItem if stage == "pretrain" else NextItem)(data.train, layout, seed=0)
        trainer = GenRecTrainer(wrapped, options, task=task, layout=layout, validation=None)
        clock = Clock(warm_up=max(1, steps // 5))
        trainer.add_callback(clock)
        freed()
        trainer.train()
        peak = peak_bytes(CUDA)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    estimated = estimate_run(
        shape.config().to_dict(), ModelArguments(quantization=quantization), options, items=data.vocab.num_items,
        user_rows=data.vocab.num_user_rows, longest=int(task.lengths.max()), mean_length=float(task.lengths.mean()),
        strategy="single_gpu" if CUDA else "cpu", processes=1, own_head=True,
    )  # fmt: skip
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    check.note(
        stage=stage, quantization=quantization, parameters=parameters + trainable, trainable=trainable,
        frozen_weights_mib=round(sum(p.nbytes for p in wrapped.parameters() if not p.requires_grad) / 2**20, 2),
        precision="bf16" if CUDA else "fp32", global_batch_size=batch,
        accumulation=options.gradient_accumulation_steps, steps=steps, losses=losses,
        examples_per_second=round((steps - clock.warm_up) * batch / clock.seconds, 1) if CUDA else None,
        peak_gib=round(peak / GIB, 2) if CUDA else None, estimated_gib=round(estimated.total / GIB, 2),
    )  # fmt: skip


def stages(check: Check) -> None:
    """Part `stages`."""
    for stage in ("pretrain", "finetune"):
        run_stage(check, stage, min(256, check.args.batch))
        freed()


def in_four_bits(check: Check) -> None:
    """Part `quantized`: QLoRA; left out where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        check.note(left_out="bitsandbytes is not installed")
    else:
        run_stage(check, "finetune", min(256, check.args.batch), quantization="4bit")


def auto_batch(check: Check) -> None:
    """Part `auto-batch`: the accumulation that is found for more than a GPU of 141 GB holds at once; a CPU refuses none."""
    run_stage(check, "finetune", 64 * check.args.batch if CUDA else check.args.batch, auto_batch_size=True)


# --- the parts --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Check], None]] = {
    "imports": imports,
    "ceiling": ceiling,
    "train": train,
    "rank": rank,
    "profile": profile,
    "exact": exact,
    "sync": sync,
    "rivals": rivals,
    "rivals-at-size": rivals_at_size,
    "compile": compiled,
    "stages": stages,
    "quantized": in_four_bits,
    "auto-batch": auto_batch,
}
"""In the order of `gpu_check.PARTS`."""


def run_part(name: str, args: argparse.Namespace) -> bool:
    """Run a part in this process, with its ending written whatever it is; whether it went well."""
    began, check, failed = time.monotonic(), Check(name, args), None
    try:
        check.write()
        PARTS[name](check)
    except Exception:  # it is to be read in the results, whatever it is
        failed = without_places(traceback.format_exc())
        print(f"{name}: FAILED\n{failed}", flush=True)
    check.write(failed=failed, seconds=round(time.monotonic() - began, 1))
    return failed is None


@exits_cleanly
def main() -> None:
    """Run a part; the exit status is 1 where it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    add_flags(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if run_part(args.part, args) else 1)


if __name__ == "__main__":
    main()
