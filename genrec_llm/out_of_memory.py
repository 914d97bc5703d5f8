"""Out of memory: the largest micro-batch that fits, found before training, and an error that says what helps."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from genrec_llm.args import GenRecTrainingArguments
from genrec_llm.batching import heaviest_batch
from genrec_llm.errors import ConfigError, counted
from genrec_llm.model import unwrapped
from genrec_llm.prediction import Estimate, estimate
from genrec_llm.tasks import Task

ADAM_BYTES, BUCKET_BYTES = 8, 4
"""Two moments in fp32 for a trained number; its place in DDP's buckets, or its fp32 master under DeepSpeed."""
REFUSALS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of plain RuntimeErrors: of torch's allocator of main memory, and of what asks the driver past that of a GPU."""
STRONGER = {"ddp": ("zero2", "zero3"), "zero1": ("zero2", "zero3"), "zero2": ("zero3",)}
"""Strategies that share out more."""


class OutOfMemory(ConfigError):
    """One process alone had no memory left; the others did not see it."""

    alone = True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a GPU or of the machine was refused."""
    refused = isinstance(error, RuntimeError) and any(words in str(error) for words in REFUSALS)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


def fitting_accumulation(model: nn.Module, task: Task, args: GenRecTrainingArguments) -> int:
    """Fewest accumulation steps, doubling those of `args`, with which the heaviest micro-batch fits. A collective.

    Tried on a packed micro-batch, or, padded, on the longest examples that there are, forward and backward, with Adam's
    memory set aside. The global batch stays what it is, so that the number found changes no result but the sums' last
    digits.

    Raises:
        ConfigError: not even one example fits, or the weights are shared out (ZeRO-3, FSDP), where nothing can be tried
            before the first step.
    """
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ConfigError(
            "auto_batch_size: under ZeRO-3 and FSDP no process holds the weights to try with: leave it out, and ask `genrec "
            "estimate` which --gradient-accumulation-steps fits"
        )
    model.to(args.device)
    if args.gradient_checkpointing:  # which the Trainer turns on in `train`, and which decides what fits
        backbone = unwrapped(model)
        enable = getattr(backbone, "activation_checkpointing_enable", None)  # as transformers 5.24 names it
        (enable or backbone.gradient_checkpointing_enable)(args.gradient_checkpointing_kwargs)
    steps = -(-len(task.lengths) // args.global_batch_size)
    most = len(task.lengths) // steps // args.world_size  # of the smallest global batch
    accumulation = min(args.gradient_accumulation_steps, most)
    while True:
        heaviest = heaviest_batch(
            task,
            args.global_batch_size,
            seed=args.seed,
            shares=args.world_size * accumulation,
            packed=args.packing and unwrapped(model).packs,
            classes=args.length_classes,
        )
        if all(gather_object([_fits(model, heaviest, args)])):
            return accumulation
        if accumulation == most:
            size = counted(len(heaviest["decoder_input_ids"]), "example")
            raise ConfigError(
                f"auto_batch_size: not even {size} of {int(task.lengths.max())} tokens a process fits into memory: "
                "take a smaller backbone, --quantization 4bit, a smaller --max-history, or ZeRO-3 on several GPUs"
            )
        accumulation = min(2 * accumulation, most)


def _fits(model: nn.Module, heaviest: dict[str, Any], args: GenRecTrainingArguments) -> bool:
    """Whether a forward and a backward of a micro-batch find the memory they need. No draw of dropout is used up."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    beside = trained * (ADAM_BYTES + (BUCKET_BYTES if args.world_size > 1 else 0))
    devices = [args.device] if args.device.type == "cuda" else []
    fits = True
    aside = batch = loss = None
    with torch.random.fork_rng(devices):
        try:
            aside = torch.empty(beside, dtype=torch.uint8, device=args.device)
            batch = send_to_device(heaviest, args.device)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                loss = model.train()(**batch).loss
            loss.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
    del aside, batch, loss  # or the cache below has nothing to give back
    model.zero_grad(set_to_none=True)
    gc.collect()
    if devices:
        torch.cuda.empty_cache()
    return fits


@contextmanager
def explained(figures: Callable[[], Estimate], rank: int) -> Iterator[None]:
    """Turn an out-of-memory error in the block into one with numbers and the switch that helps.

    Args:
        figures: the estimate of the run; asked for only then.
        rank: of this process.

    Raises:
        OutOfMemory: in the process that it happened in.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        raise OutOfMemory(
            f"process {rank} on {socket.gethostname()}: out of memory ({first}). {describe(figures())}"
        ) from error


def describe(found: Estimate) -> str:
    """What a run takes by estimate, and what it would take with each switch that helps, the gentlest first."""
    run, gib = found.run, 2.0**30
    switches: list[tuple[str, dict[str, Any]]] = []
    if run.examples > 1:
        more = {"examples": -(-run.examples // 2), "accumulation": 2 * run.accumulation}
        switches.append((f"--gradient-accumulation-steps {2 * run.accumulation}", more))
    if run.tuning == "lora" and run.quantization is None and run.strategy not in ("zero3", "zero3_offload", "fsdp2"):
        switches.append(("--quantization 4bit", {"quantization": "4bit"}))
    if run.processes > 1 and not run.sparse_users:
        for strategy in STRONGER.get(run.strategy, ()):
            switches.append((f"accelerate_configs/{strategy}.yaml", {"strategy": strategy}))
    totals = {name: estimate(found.shape, replace(run, **changes)).total for name, changes in switches}
    helps = [f"{name} {total / gib:.1f}" for name, total in totals.items() if total < 0.99 * found.total]
    parts = ", ".join(f"{name} {size / gib:.1f}" for name, size in found.parts.items() if size >= 0.05 * gib)
    return (
        f"By estimate the step takes {found.total / gib:.1f} GiB a device ({parts or 'all of it small'}); it would take, in "
        f"GiB: {'; '.join(helps) or 'no less by a switch'}. --auto-batch-size finds the accumulation that fits; validation "
        "has --per-device-eval-batch-size"
    )
