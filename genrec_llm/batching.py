"""Which examples are in a step, and which process works on which of them.

A global batch is a fixed set of examples, a function of (seed, epoch, step) alone. Processes and accumulation steps
share it out by length, so that one process with eight examples and four processes with two see the same step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from genrec_llm.errors import ConfigError
from genrec_llm.tasks import Batch, IntArray, Task

GROUPED_BATCHES = 64
"""Global batches whose examples are sorted by length together: little padding, and still a random order of steps."""
SMALLEST_GROUPS = 8
"""An epoch has at least so many groups, or no groups at all: in one, every epoch would have the same batches."""


class GlobalBatches:
    """The global batches of an epoch.

    Args:
        lengths: items in the encoder's input of each example, `[examples]`.
        size: examples in a global batch. An epoch has `ceil(examples / size)` steps whose sizes differ by one at most,
            so that every example is seen once and no step is a small remainder.
        seed: of the order.
        shares: processes times accumulation steps.

    Raises:
        ConfigError: a global batch would have fewer examples than there are shares.
    """

    def __init__(self, lengths: IntArray, size: int, *, seed: int, shares: int) -> None:
        self.lengths, self.seed, self.shares = lengths, seed, shares
        self.steps = -(-len(lengths) // size)
        if len(lengths) // self.steps < shares:
            raise ConfigError(
                f"global_batch_size: {size} examples or the remainder of an epoch of {len(lengths)} cannot be shared by "
                f"{shares} processes x gradient_accumulation_steps: raise global_batch_size or start fewer processes"
            )

    def epoch(self, epoch: int) -> list[IntArray]:
        """Example indices of every step, `steps` arrays; equal on every process."""
        random = np.random.default_rng([self.seed, epoch])
        batches = np.array_split(random.permutation(len(self.lengths)), self.steps)
        grouped: list[IntArray] = []
        group = max(1, min(GROUPED_BATCHES, self.steps // SMALLEST_GROUPS))
        for start in range(0, self.steps, group):
            part = batches[start : start + group]
            together = np.concatenate(part)
            together = together[np.argsort(self.lengths[together], kind="stable")]
            grouped += np.split(together, np.cumsum([len(batch) for batch in part])[:-1])
        return [grouped[step] for step in random.permutation(self.steps)]

    def share_out(self, batch: IntArray) -> list[IntArray]:
        """Deal a global batch to the shares, longest first and back and forth, so that all have like token counts."""
        order = batch[np.argsort(-self.lengths[batch], kind="stable")]
        position = np.arange(len(order))
        turn, place = np.divmod(position, self.shares)
        owner = np.where(turn % 2 == 0, place, self.shares - 1 - place)
        return [order[owner == share] for share in range(self.shares)]


class RankBatches(Sampler[list[tuple[int, int]]]):
    """One process's micro-batches: lists of (epoch, example), `accumulation` of them a step.

    The epoch travels with the index, so that data-loading workers hold no state of their own.
    """

    def __init__(self, batches: GlobalBatches, *, rank: int, world_size: int) -> None:
        self.batches, self.rank, self.world_size = batches, rank, world_size
        self.current_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, also through accelerate's wrapper that skips batches on resume."""
        self.current_epoch = epoch

    def __len__(self) -> int:
        return self.batches.steps * self.batches.shares // self.world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches.epoch(self.current_epoch):
            for share in self.batches.share_out(batch)[self.rank :: self.world_size]:
                yield [(self.current_epoch, int(example)) for example in share]


class TaskDataset(Dataset[dict[str, torch.Tensor]]):
    """A task as the DataLoader wants it: a list of (epoch, example) in, one finished batch out."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task.lengths)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        epoch = keys[0][0]
        return as_tensors(self.task.batch(epoch, np.array([example for _, example in keys], dtype=np.int64)))


class EpochDataLoader(DataLoader[dict[str, torch.Tensor]]):
    """A DataLoader that tells its batch sampler which epoch it is. accelerate must not shard it again."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def as_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """numpy → torch, without a copy."""
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}


def _whole(batch: Any) -> Any:
    return batch


def _deaf(worker: int) -> None:
    """A DataLoader's worker leaves SIGTERM, which torchrun and SLURM give to all of a group, to its process, which saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train_loader(
    task: Task,
    *,
    global_batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> EpochDataLoader:
    """This process's micro-batches of the task's global batches."""
    batches = GlobalBatches(task.lengths, global_batch_size, seed=seed, shares=world_size * accumulation)
    return EpochDataLoader(
        TaskDataset(task),
        batch_sampler=RankBatches(batches, rank=rank, world_size=world_size),
        collate_fn=_whole,
        worker_init_fn=_deaf,
        num_workers=workers,
        pin_memory=pin_memory,
    )
