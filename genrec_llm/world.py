"""The processes of a run: what was launched and what was got, that all agree, that all live, and their end."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from genrec_llm.args import GenRecTrainingArguments
from genrec_llm.errors import EXIT_CODE, ConfigError, listed

Found = TypeVar("Found")
BEAT = 1.0
"""Seconds between two signs of life of a process."""
LOST_SHARE = 0.1
"""Share of `ddp_timeout` after which a process without a sign of life is given up: three minutes of the default 30."""
STUCK_SHARE = 0.8
"""Share of `ddp_timeout` after which a process that the others wait for is given up, before the backend gives up them."""
CONNECTION = re.compile(r"gloo|nccl|connection|timed? ?out|socket|broken pipe|recvValue|TCPStore", re.IGNORECASE)


def describe_launch(args: GenRecTrainingArguments, state: AcceleratorState) -> dict[str, Any]:
    """Strategy, processes, precision and global batch that the run really has.

    Raises:
        ConfigError: the launcher promised several processes, DeepSpeed or FSDP, and the Trainer got something else; an
            optimizer, or sparse user rows, that do not go with the strategy.
    """
    facts: dict[str, Any] = {
        "strategy": state.distributed_type.value,
        "world_size": args.world_size,
        "device": str(args.device),
        "precision": "bf16" if args.bf16 else "fp32",
        "global_batch_size": args.global_batch_size,
        "accumulation": args.gradient_accumulation_steps,
    }
    if state.distributed_type == DistributedType.DEEPSPEED:
        plugin = state.deepspeed_plugin
        facts["zero_stage"] = plugin.zero_stage
        offloaded = [
            name
            for name in ("offload_param", "offload_optimizer")
            if plugin.deepspeed_config["zero_optimization"].get(name, {}).get("device", "none") != "none"
        ]
        if offloaded:
            facts["offload"] = " and ".join(name.removeprefix("offload_") for name in offloaded)
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    asked = {
        "DeepSpeed": os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or bool(args.deepspeed),
        "FSDP": os.environ.get("ACCELERATE_USE_FSDP") == "true",
    }
    got = {
        "DeepSpeed": state.distributed_type == DistributedType.DEEPSPEED,
        "FSDP": state.distributed_type == DistributedType.FSDP,
    }
    problems = []
    if promised != args.world_size:
        problems.append(f"launch: {promised} processes were started, but this run has world size {args.world_size}")
    if args.n_gpu > 1:
        problems.append(
            f"launch: one process on {args.n_gpu} GPUs would split each batch by nn.DataParallel: launch with "
            "accelerate_configs/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0"
        )
    for name in asked:
        if asked[name] and not got[name]:
            mend = (
                "leave ACCELERATE_USE_CPU and --cpu out, and give --use_cpu behind the recipe"
                if name == "DeepSpeed"
                else "FSDP needs a GPU a process; take accelerate_configs/zero3.yaml on a CPU"
            )
            problems.append(f"launch: {name} was asked for, but this run has strategy {facts['strategy']}: {mend}")
    if state.mixed_precision != ("bf16" if args.bf16 else "no"):
        problems.append(
            f"launch: the accelerate file says mixed_precision {state.mixed_precision}, the arguments say "
            f"{facts['precision']}: leave it out of the accelerate file and use --bf16"
        )
    optimizer = OptimizerNames(args.optim).value
    if "zero_stage" in facts and "8bit" in optimizer:
        problems.append(
            f"optim: {optimizer} under DeepSpeed, which makes one flat tensor of a group, would keep the state of id rows "
            "in 8 bits: leave optim out (ZeRO shares the state out already), or launch with ddp"
        )
    split = {
        "DeepSpeed": "makes one flat tensor of the gradients and reduces no sparse ones",
        "FSDP": "splits every table over the processes and has no sparse gradients",
    }
    problems += [
        f"sparse_user_rows: {name} {why}: launch with accelerate_configs/ddp.yaml, or leave it out and keep the table small "
        "with --users hashed --user-buckets 10000"
        for name, why in split.items()
        if args.sparse_user_rows and (asked[name] or got[name])
    ]
    if problems:
        raise ConfigError(problems)
    return facts


def agree(facts: Mapping[str, Any]) -> None:
    """Refuse to train when processes were started with different arguments, data, weights or code. A collective.

    Raises:
        ConfigError: on every process, what differs and where.
    """
    everybody = gather_object([{"host": socket.gethostname(), **facts}])
    problems = []
    for name in facts:
        values = [json.dumps(each[name], sort_keys=True, default=str) for each in everybody]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            where = listed(f"{values[rank]} in process {rank} on {everybody[rank]['host']}" for rank in others)
            problems.append(
                f"launch: {name} is {values[0]} in process 0 on {everybody[0]['host']}, but {where}: give every node "
                "the same command, code, data and backbone"
            )
    if problems:
        raise ConfigError(problems)


def from_first(find: Callable[[], Found]) -> Found:
    """What process 0 finds, on every process: no two of them shall see a folder differently. A collective."""
    found = [find() if PartialState().is_main_process else None]
    return cast("Found", broadcast_object_list(found)[0])


def leave(code: int = 0, *, at_once: bool) -> None:
    """End this process after its work, or after a stop that was asked for.

    Args:
        code: exit code.
        at_once: for processes that share a CPU run. Gloo workers abort at interpreter exit in up to half of all runs after
            the work is done (torch 2.13, "terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once:
        os._exit(code)
    if code:
        sys.exit(code)


def connect(name: str, timeout: float) -> distributed.Store:
    """A connection of its own to the store of the launch; a private store where there is one process.

    Args:
        name: its keys are apart from those of other names. Attempts (`--max_restarts`) have a store each: nodes count them
            differently, a node that came back from nought.
        timeout: seconds that a key is waited for.
    """
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return distributed.HashStore()
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=timeout)
    )
    return distributed.PrefixStore(f"genrec/{name}", store)


class Watch(TrainerCallback):
    """Names the process that is gone or stuck, where the others would hang or only learn that a connection broke.

    Every process tells the launch's store once a second that it lives. Process 0 looks whether all others do, all others
    look whether process 0 does. A context: where a collective fails inside it because somebody is missing, this process
    says who and ends with exit code 2.

    Args:
        args: world size, and the `ddp_timeout` of which a tenth without a sign of life means that a process is lost.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.rank, self.world = args.process_index, args.world_size
        self.timeout, self.patience = args.ddp_timeout, args.ddp_timeout * LOST_SHARE
        self.progress = 0.0
        """Steps that are done, and a half more once the batch of the next one is there."""
        self.ended = threading.Event()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note how far this process is."""
        self.progress = state.global_step

    def __enter__(self) -> Watch:
        if self.world > 1:
            self.store = connect("watch", self.patience)
            self.answered = time.monotonic()
            self._sign_of_life(0)
            for target in (self._beat, self._guard):
                threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if self.world > 1 and isinstance(error, RuntimeError) and CONNECTION.search(str(error)):
                self._explain(str(error).splitlines()[0])
        finally:
            self.ended.set()

    def _sign_of_life(self, count: int) -> None:
        self.store.set(str(self.rank), json.dumps([count, self.progress, socket.gethostname(), os.getpid()]))

    def _beat(self) -> None:
        """Thread: be seen, and look at those that this process watches."""
        watched = [rank for rank in (range(self.world) if self.rank == 0 else (0,)) if rank != self.rank]
        heard = dict.fromkeys(watched, ("", time.monotonic()))
        count, furthest, moved = 0, 0.0, time.monotonic()
        while not self.ended.wait(BEAT):
            count += 1
            # A store that does not answer is the other thread's matter.
            with suppress(RuntimeError):
                self._sign_of_life(count)
                if self.store.check(["lost"]):
                    self._give_up(**json.loads(self.store.get("lost")))
                now = time.monotonic()
                signs = self._signs([*watched, self.rank])
                for rank in [rank for rank in watched if rank in signs]:
                    sign = json.dumps(signs[rank])
                    if heard[rank][0] != sign:
                        heard[rank] = (sign, now)
                lost = [rank for rank, (_, when) in heard.items() if now - when > self.patience]
                if lost:
                    self._tell(lost, f"gave no sign of life for {self.patience:.0f} s")
                if furthest != max(sign[1] for sign in signs.values()):
                    furthest, moved = max(sign[1] for sign in signs.values()), now
                behind = [rank for rank, sign in signs.items() if sign[1] < furthest]
                if self.rank == 0 and behind and now - moved > STUCK_SHARE * self.timeout:
                    self._tell(behind, f"is stuck: the others have waited for {now - moved:.0f} s")
                self.answered = now

    def _tell(self, lost: list[int], why: str) -> NoReturn:
        """Have every process end for the same reason."""
        self.store.set("lost", json.dumps({"lost": lost, "why": why}))
        self._give_up(lost, why)

    def _guard(self) -> None:
        """Thread: end this process when the store, which is on the first node, does not answer any more."""
        while not self.ended.wait(BEAT):
            if time.monotonic() - self.answered > 2 * self.patience:
                self._end(f"{self._first_node()} has not answered for {2 * self.patience:.0f} s")

    def _signs(self, ranks: Iterable[int] | None = None) -> dict[int, list[Any]]:
        """`[count, progress, host, process id]` of processes (by default all) that have been seen."""
        seen = [rank for rank in ranks or range(self.world) if self.store.check([str(rank)])]
        return {rank: json.loads(self.store.get(str(rank))) for rank in seen}

    def _describe(self, ranks: Sequence[int], signs: Mapping[int, list[Any]]) -> str:
        """Who they are; one that has never been seen has no host."""
        seen = {
            rank: f" on {signs[rank][2]} (pid {signs[rank][3]}, after step {int(signs[rank][1])})"
            for rank in ranks
            if rank in signs
        }
        return ", ".join(f"process {rank}{seen.get(rank, '')}" for rank in ranks)

    def _end(self, what: str, missing: Sequence[int] = (), signs: Mapping[int, list[Any]] | None = None) -> NoReturn:
        """Say once a host what happened, and end this process: its main thread may hang in a collective."""
        here = [rank for rank, sign in (signs or {}).items() if sign[2] == socket.gethostname() and rank not in missing]
        if self.rank == min(here, default=self.rank):
            print(
                f"error: {what}; training ends here. Its own error, if it left one, stands in its output; a node may have "
                "gone down or run out of memory. The same command goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _give_up(self, lost: list[int], why: str) -> NoReturn:
        signs = self._signs()
        self._end(f"{self._describe(lost, signs)} {why}", lost, signs)

    def _explain(self, error: str) -> None:
        """Find out who is missing after a failed collective; return if nobody is."""
        said = f" (what failed here: {error})"
        try:
            before = self._signs()
            time.sleep(3 * BEAT)
            after = self._signs()
        except RuntimeError:
            self._end(f"{self._first_node()} does not answer")
        gone = [rank for rank in after if rank != self.rank and after[rank][0] == before.get(rank, [None])[0]]
        behind = [rank for rank in after if after[rank][1] < self.progress]
        if gone:
            self._end(f"{self._describe(gone, after)} is gone{said}", gone, after)
        if behind:
            self._end(f"{self._describe(behind, after)} is stuck{said}", behind, after)

    def _first_node(self) -> str:
        return f"the first node ({os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']})"
