"""What ends a training early: patience, a signal, copies that drift apart, losses that are no numbers."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from genrec_llm.args import GenRecTrainingArguments
from genrec_llm.errors import ConfigError
from genrec_llm.world import connect

EXPLODED = 10.0
"""A loss of so many times that of a guess among all items, or of the first step if that is more, is no training any more."""


def validations_without_better(log_history: Sequence[Mapping[str, float]], args: GenRecTrainingArguments) -> int:
    """How many validations at the end of a log came after the best one."""
    name = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
    best, without = None, 0
    for value in [entry[name] for entry in log_history if name in entry]:
        if best is None or (value > best if args.greater_is_better else value < best):
            best, without = value, 0
        else:
            without += 1
    return without


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping whose patience a resumed run does not get anew: what the log has seen counts."""

    def on_train_begin(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count again from the log of the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = validations_without_better(state.log_history, args)


class StopOnSignal(TrainerCallback):
    """On SIGTERM (a preempted node, a scheduler's time limit) all processes save after the same step and end.

    The signal may reach one process or all, at different steps. Process 0 says one step ahead, in the launch's store,
    whether a step is the last; so nobody waits in a collective for somebody who has stopped.
    """

    def __init__(self) -> None:
        self.signalled = self.stopping = False
        self.before: Any = None

    def on_train_begin(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to save."""
        self.store = connect("stop", args.ddp_timeout)
        if threading.current_thread() is threading.main_thread():  # nobody else is told of signals
            self.before = signal.signal(signal.SIGTERM, self._hear)
        if args.process_index == 0:
            self._decide(state.global_step + 1)

    def on_train_end(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training is over: a signal ends the process as before."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def _decide(self, step: int) -> None:
        self.store.set(f"after {step}", "stop" if self.store.check(["signalled"]) else "go on")

    def on_step_end(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint where this step is the last. At the end of an epoch its validation comes first."""
        step = state.global_step
        if self.signalled:
            self.store.set("signalled", "yes")
        if args.process_index == 0:
            self._decide(step + 1)
            self.store.delete_key(f"after {step - 1000}")  # nobody is so far behind
        self.stopping = self.stopping or self.store.get(f"after {step}") == b"stop"
        if self.stopping and not float(state.epoch or 0.0).is_integer():
            control.should_save = True

    def on_epoch_end(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `on_step_end`."""
        control.should_save = control.should_save or self.stopping


class SameWeights(TrainerCallback):
    """Refuses a run whose processes do not share their gradients: each would train a model of its own, and say nothing.

    Looks once, after the first step; ZeRO-3 and FSDP hold no copies that could be compared.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.done = accelerator, False

    def on_step_end(
        self,
        args: GenRecTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Compare the sums of all trained tensors.

        Raises:
            ConfigError: they differ.
        """
        if self.done or args.world_size == 1:
            return
        self.done = True
        kind = self.accelerator.distributed_type
        if kind == DistributedType.FSDP or (
            kind == DistributedType.DEEPSPEED and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        ):
            return
        trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        everybody = self.accelerator.gather(torch.stack([value.sum().float() for value in trained]).unsqueeze(0))
        # Kernels of another kind of GPU may sum in another order.
        same = [torch.allclose(each, everybody[0], rtol=1e-4, atol=1e-5, equal_nan=True) for each in everybody]
        different = [rank for rank, equal in enumerate(same) if not equal]
        if different:
            raise ConfigError(
                f"launch: after step {state.global_step} the weights of process {different[0]} are not those of process 0: "
                "the processes train copies of their own. Launch with a file of accelerate_configs/"
            )


class Losses(TrainerCallback):
    """Stops a training whose loss is no number or has exploded, before it is logged or saved.

    Losses are looked at on their device as they come; the host asks where a step is logged, validated, saved or the last.

    Args:
        accelerator: of the trainer.
        items: size of the catalogue.
        explain: text about a step's batch, and the mend.
    """

    def __init__(self, accelerator: Accelerator, items: int, explain: Callable[[int], str]) -> None:
        self.accelerator, self.explain = accelerator, explain
        self.guess = math.log(max(items, 2))
        self.first_bad: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Note a micro-batch's loss of the step that is being made."""
        if self.first_bad is None:
            self.first_bad = torch.zeros((), dtype=torch.long, device=loss.device)
            self.bound = EXPLODED * loss.clamp(min=self.guess)
        bad = ~(loss.isfinite() & (loss <= self.bound))
        self.first_bad = torch.where(bad & (self.first_bad == 0), step, self.first_bad)

    def on_step_end(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask, where something is done with the step.

        Raises:
            ConfigError: on every process, with the first such step.
        """
        used = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        if not used or self.first_bad is None:
            return
        steps = self.accelerator.gather(self.first_bad.unsqueeze(0)).tolist()
        found = [step for step in steps if step]
        if found:
            ranks = [rank for rank, step in enumerate(steps) if step == min(found)]
            where = "" if len(steps) == 1 else f" in process {', '.join(map(str, ranks))}"
            raise ConfigError(
                f"step {min(found)}: the loss{where} is NaN, infinite or {EXPLODED:.0f} times that of the start: "
                f"{self.explain(min(found))}"
            )

    on_epoch_end = on_step_end
