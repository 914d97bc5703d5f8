"""Work that the processes of one launch share: each part is done once, and every process has all results.

Results do not depend on the number of processes, nor on that of a CPU's cores: the parts are cut before anyone knows who
works on them, and on a CPU one thread works on a part from its beginning to its end. (A matrix product that several
threads share is summed in another order, and differs in its last digits.)
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from genrec_llm.errors import ConfigError, GenRecError
from genrec_llm.files import writing

Part = TypeVar("Part")
Result = TypeVar("Result")
_PATIENCE = timedelta(days=7)
"""How long a process waits for the results of others. The launcher ends it earlier if one of them dies."""


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, as one of them sees them. All have to make the same calls in the same order.

    Attributes:
        index: of this process, from 0.
        count: of all of them.
        device: that this process computes on.
        threads: parts that this process works on at once.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """An error of one process inside the block is an error of all at its end, so that none waits for it for ever.

        Raises:
            GenRecError: other processes have failed; what they say. The error of this process is raised as it is.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        problems: list[str] = []
        if isinstance(error, GenRecError):
            problems = error.problems
        elif error is not None:
            problems = [f"process {self.index} of {self.count} failed: {type(error).__name__}: {error}"]
        told = list(dict.fromkeys(problem for each in self.gather(problems) for problem in each))
        if error is not None and not isinstance(error, GenRecError):
            raise error
        if told:
            raise GenRecError(told) from error

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, in their order, in each of them.

        Raises:
            GenRecError: another process was ended from outside.
        """
        if self.count == 1:
            return [value]
        values: list[Result] = [value] * self.count
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo's "Connection closed by peer"
            raise GenRecError(
                "launch: another process was ended from outside, perhaps for want of memory: start fewer, or take a smaller "
                "--batch-size"
            ) from error
        return values

    def map(
        self, work: Callable[[Part], Result], parts: Sequence[Part], *, name: str, at_once: int | None = None
    ) -> list[Result]:
        """`work` of each part, in the order of `parts`, in every process; each part is done once, by one process.

        Args:
            work: called by several threads where `threads` is more than one.
            parts: the same ones in every process, the largest first: they are dealt back and forth.
            name: of the progress bar.
            at_once: no more parts than this at a time, for the sake of memory.

        Raises:
            GenRecError: as `step` does.
        """
        mine = self._share(len(parts))
        done: list[Result] = []
        before = torch.get_num_threads()
        with self.step():
            try:
                if self.threads > 1:
                    torch.set_num_threads(1)
                found = _in_threads(work, [parts[place] for place in mine], min(self.threads, at_once or self.threads))
                done = list(tqdm(found, total=len(mine), desc=name, unit="batch", disable=None if self.first else True))
            finally:
                torch.set_num_threads(before)
        results = dict(pair for pairs in self.gather(list(zip(mine, done, strict=True))) for pair in pairs)
        return [results[place] for place in range(len(parts))]

    def once_a_node(
        self, make: Callable[[], Result], save: Callable[[Result, Path], None], open: Callable[[Path], Result]
    ) -> Result:
        """What the first process of each node makes and saves, opened by all processes of the node.

        The folder that it goes through is the node's own (`TMPDIR`), closed to other users, and gone before this
        returns: what stays mapped lives on without a name.

        Args:
            make: called by one process a node; the only one of a launch where there is one.
            save: writes it into an empty folder.
            open: reads it from there.

        Raises:
            GenRecError: as `step` does.
            ExportError: the folder cannot be written.
        """
        if self.count == 1:
            return make()
        maker = os.environ.get("LOCAL_RANK", "0") == "0"
        with self.step():
            made = make() if maker else None
        with ExitStack() as stack:
            folder: Path | None = None
            with self.step():
                if maker:
                    with writing(f"the temporary folder (TMPDIR={os.environ.get('TMPDIR', '')})"):
                        folder = stack.enter_context(_own_folder())
                        save(made, folder)  # type: ignore[arg-type]  # a maker has made it
                    made = None
            # Launchers number the processes node by node, the maker of each first.
            folders = [each for each in self.gather(folder)[: self.index + 1] if each]
            with self.step():
                return open(folders[-1])

    def _share(self, parts: int) -> list[int]:
        turn, place = np.divmod(np.arange(parts), self.count)
        owner = np.where(turn % 2 == 0, place, self.count - 1 - place)
        return [int(part) for part in np.flatnonzero(owner == self.index)]


ALONE = Processes()
"""One process that nobody launched, and one part at a time."""


def launched(*, use_cpu: bool = False) -> Processes:
    """Join the processes of `accelerate launch` or torchrun, each on a GPU of its own or all on the CPU.

    Args:
        use_cpu: leave the GPUs alone.

    Raises:
        ConfigError: more processes were started on this machine than it shows GPUs.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus and here > gpus:
        raise ConfigError(
            f"launch: {here} processes were started on the {gpus} GPUs that this machine shows: start one a GPU "
            f"(--num_processes {gpus}), or rank on the CPU with --use_cpu"
        )
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if count > 1:
        # Only numbers in main memory are gathered, for which gloo serves with GPUs as well.
        dist.init_process_group("gloo", timeout=_PATIENCE)
        # A gloo worker that ends with an open group aborts now and then (torch 2.13, "terminate called without an
        # active exception"), and its exit code is lost.
        atexit.register(dist.destroy_process_group)
    index = dist.get_rank() if count > 1 else 0
    return Processes(index, count, device, threads=1 if gpus else torch.get_num_threads())


def joined() -> Processes:
    """The processes of the group that training arguments have made, for work on the CPU; this one alone without a group."""
    if not dist.is_initialized():
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder that this user alone can read; gone at the end, which SIGTERM (of a launcher) brings as well."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="genrec-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_threads(work: Callable[[Part], Result], parts: Sequence[Part], threads: int) -> Iterator[Result]:
    if threads == 1:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what has not begun is not begun
