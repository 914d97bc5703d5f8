"""Which examples are in a step, and which process works on which of them.

A global batch is a fixed set of examples, a function of (seed, epoch, step) alone. Processes and accumulation steps
share it out by tokens, so that one process with eight examples and four processes with two see the same step. Each share
is packed into rows of a fixed length or, where a backbone's positions do not allow that, padded to its longest example.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, Dataset, Sampler

from genrec_llm.errors import ConfigError
from genrec_llm.packing import Packing
from genrec_llm.tasks import IntArray, Task

GROUPED_BATCHES = 64
"""Global batches whose examples are sorted by length together: little padding, and still a random order of steps."""
SMALLEST_GROUPS = 8
"""An epoch has at least so many groups, or no groups at all: in one, every epoch would have the same batches."""
SAMPLED_EXAMPLES, FEWEST_SAMPLED = 2**14, 16
"""Of the first epoch, by whose shares the shapes of packed rows are chosen; and at least so many shares."""


class GlobalBatches:
    """The global batches of an epoch.

    Args:
        lengths: tokens of the encoder's input of each example, `[examples]`.
        size: examples in a global batch. An epoch has `ceil(examples / size)` steps whose sizes differ by one at most,
            so that every example is seen once and no step is a small remainder.
        seed: of the order.
        shares: processes times accumulation steps.
        alike: a batch has examples of like length, as padded rows need it. Otherwise each has all lengths in the proportion
            of the whole epoch, and two batches differ by the longest example at most in their tokens.

    Raises:
        ConfigError: a global batch would have fewer examples than there are shares.
    """

    def __init__(self, lengths: IntArray, size: int, *, seed: int, shares: int, alike: bool = False) -> None:
        self.lengths, self.seed, self.shares, self.alike = lengths, seed, shares, alike
        self.steps = -(-len(lengths) // size)
        if len(lengths) // self.steps < shares:
            raise ConfigError(
                f"global_batch_size: {size} examples or the remainder of an epoch of {len(lengths)} cannot be shared by "
                f"{shares} processes x gradient_accumulation_steps: raise global_batch_size or start fewer processes"
            )

    def epoch(self, epoch: int) -> list[IntArray]:
        """Example indices of every step, `steps` arrays; equal on every process."""
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.lengths))
        return self._alike(shuffled, random) if self.alike else self._mixed(shuffled, random)

    def _alike(self, shuffled: IntArray, random: np.random.Generator) -> list[IntArray]:
        batches = np.array_split(shuffled, self.steps)
        grouped: list[IntArray] = []
        group = max(1, min(GROUPED_BATCHES, self.steps // SMALLEST_GROUPS))
        for start in range(0, self.steps, group):
            part = batches[start : start + group]
            together = np.concatenate(part)
            together = together[np.argsort(self.lengths[together], kind="stable")]
            grouped += np.split(together, np.cumsum([len(batch) for batch in part])[:-1])
        return [grouped[step] for step in random.permutation(self.steps)]

    def _mixed(self, shuffled: IntArray, random: np.random.Generator) -> list[IntArray]:
        """Examples of neighbouring length, one for each step, are dealt to the steps at random, and so on to the longest."""
        ordered = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
        deals = -(-len(ordered) // self.steps)
        steps = random.random((deals, self.steps)).argsort(axis=1).ravel()
        steps = steps[len(steps) - len(ordered) :]  # the first deal, of the shortest, is the one that may not be whole
        counts = np.bincount(steps, minlength=self.steps)
        return np.split(ordered[np.argsort(steps, kind="stable")], np.cumsum(counts)[:-1])

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


class TaskDataset(Dataset[dict[str, Any]]):
    """A task as the DataLoader wants it: a list of (epoch, example) in, one finished batch out.

    Args:
        packing: of the batches; None to pad them to their longest example.
    """

    def __init__(self, task: Task, packing: Packing | None) -> None:
        self.task, self.packing = task, packing

    def __len__(self) -> int:
        return len(self.task.lengths)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        epoch = keys[0][0]
        batch = self.task.batch(epoch, np.array([example for _, example in keys], dtype=np.int64))
        return as_tensors(batch if self.packing is None else self.packing.pack(batch))


class EpochDataLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that tells its batch sampler which epoch it is. accelerate must not shard it again."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def as_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """numpy → torch, without a copy, of arrays and tuples of arrays."""

    def tensor(values: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    return {
        name: tuple(map(tensor, values)) if isinstance(values, tuple) else tensor(values)
        for name, values in batch.items()
    }


def _whole(batch: Any) -> Any:
    return batch


def _follow(worker: int) -> None:
    """A DataLoader's worker leaves SIGTERM, which torchrun and SLURM give to all of a group, to its process, which saves.

    It ends with its process, even where it hangs: it would keep the launch's output open.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # Linux; elsewhere torch does nothing


def heaviest_batch(task: Task, size: int, *, seed: int, shares: int, packed: bool, classes: int = 1) -> dict[str, Any]:
    """A micro-batch that takes as much memory as any: packed, all are alike; padded, it has the longest examples."""
    batches = GlobalBatches(task.lengths, size, seed=seed, shares=shares, alike=not packed)
    if packed:
        return as_tensors(fixed_shapes(batches, classes).pack(task.batch(0, batches.share_out(batches.epoch(0)[0])[0])))
    longest = np.argsort(-task.lengths, kind="stable")
    return as_tensors(task.batch(0, longest[: -(-size // shares)]))


def fixed_shapes(batches: GlobalBatches, classes: int = 1) -> Packing:
    """Shapes that the shares of all batches have, as far as a sample of the first epoch tells; see `Packing.fitting`.

    The steps of the longest example and of the most examples are always in the sample: no later one needs more.
    """
    epoch = batches.epoch(0)
    count = max(FEWEST_SAMPLED, SAMPLED_EXAMPLES * batches.shares // len(epoch[0]))
    steps = set(np.linspace(0, len(epoch) - 1, min(count, len(epoch))).astype(int).tolist())
    steps.add(int(np.argmax([batches.lengths[batch].max() for batch in epoch])))
    steps.add(int(np.argmax([len(batch) for batch in epoch])))
    sample = [epoch[step] for step in sorted(steps)]
    return Packing.fitting((batches.lengths[batches.share_out(batch)[0]] for batch in sample), most_classes=classes)


def train_loader(
    task: Task,
    *,
    global_batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    packed: bool,
    classes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> EpochDataLoader:
    """This process's micro-batches of the task's global batches, packed (in so many classes of length) or padded."""
    shares = world_size * accumulation
    batches = GlobalBatches(task.lengths, global_batch_size, seed=seed, shares=shares, alike=not packed)
    return EpochDataLoader(
        TaskDataset(task, fixed_shapes(batches, classes) if packed else None),
        batch_sampler=RankBatches(batches, rank=rank, world_size=world_size),
        collate_fn=_whole,
        worker_init_fn=_follow,
        num_workers=workers,
        pin_memory=pin_memory,
    )
