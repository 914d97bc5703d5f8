"""The bytes that a strategy communicates in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from genrec_llm.memory import ZERO3_LIVE, frozen_bytes
from genrec_llm.shape import Shape
from genrec_llm.workload import (
    FP32,
    INDEX,
    Run,
    dense_parameters,
    lora_parameters,
    lora_targets,
    row_parameters,
    trained_parameters,
    trained_size,
    weight_size,
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device hands to collectives in a step: the whole tensor each time, not its share."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    def sent(self, processes: int) -> float:
        """Bytes that a device sends by ring algorithms (Patarasuk and Yuan, 2009)."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (processes - 1) / processes


def traffic(shape: Shape, run: Run) -> Traffic:
    """What the strategy communicates in a step, all micro-batches together.

    DDP reduces all dense gradients in fp32, once a step; sparse ones of user rows are gathered as (index, row) pairs, as
    many of each device as of the one that has the most. DeepSpeed's ZeRO-1 and -2 all-reduce them too (each process then
    keeps its part) and gather the updated weights; ZeRO-2 reduces in each micro-batch. ZeRO-3 gathers all weights that
    compute, once where they are few enough to stay (`ZERO3_LIVE`), else again for the backward pass, which is then an upper
    bound; FSDP2 gathers the blocks twice and the rest once.
    """
    if run.processes == 1:
        return Traffic()
    size, trained = trained_size(run), trained_parameters(shape, run)
    if run.strategy == "ddp":
        pairs = run.processes * run.touched_users * (FP32 * shape.d_model + INDEX) if run.sparse_users else 0
        return Traffic(all_reduce=FP32 * dense_parameters(shape, run), all_gather=pairs)
    if run.strategy in ("zero1", "zero2"):
        times = run.accumulation if run.strategy == "zero2" else 1
        return Traffic(all_reduce=size * trained * times, all_gather=size * trained)
    rows, lora = row_parameters(shape, run), lora_parameters(shape, run)
    positions = 2 * shape.positions * shape.d_model
    if run.strategy == "fsdp2":  # the root's weights stay gathered from the forward to the backward pass
        width = weight_size(run)
        # fully_shard splits rows and pads them to a multiple of the devices: the r rows of A to 64 of them, for one.
        padding = sum(
            (-run.lora_r % run.processes) * shape.linears[name][0] * shape.occurrences(name)
            for name in (lora_targets(shape, run) if run.tuning == "lora" else ())
        )
        root = width * (shape.embedding_parameters + shape.head_parameters + positions + rows)
        blocks = width * (shape.linear_parameters + shape.other_parameters - positions + lora + padding)
        return Traffic(
            all_gather=(2 * blocks + root) * run.accumulation,
            reduce_scatter=FP32 * (trained + padding) * run.accumulation,
        )
    used = replace(shape, own_head=False)  # a head that no score passes through is never gathered
    words: float = (size if run.tuning == "full" else weight_size(run)) * shape.embedding_parameters
    backbone: float = size * used.parameters if run.tuning == "full" else frozen_bytes(used, run)
    whole: float = backbone + size * (lora + rows)
    if used.parameters + lora + rows > ZERO3_LIVE:
        # Nothing lasts to its next use: a table is read where tokens are looked up, that of items by scores, and by the
        # gradient of each use. A frozen table has none.
        tables = run.items * shape.d_model * (1 if run.tied_rows else 2)
        users = run.user_rows * shape.d_model
        looked_up = size * (4 * tables + 2 * users) + (2 if run.tuning == "full" else 1) * words
        whole = 2 * (whole - size * rows - words) + looked_up
    return Traffic(all_gather=whole * run.accumulation, reduce_scatter=size * trained * run.accumulation)
