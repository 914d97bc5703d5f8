"""The memory and time of a training before it is started: what fits, the largest batch that does, and which strategy.

Everything is computed from the architecture, nothing is fitted: weights and optimizer state from parameter counts,
activations from the tensors that autograd keeps of each layer, the peak as the worst of the moments of a step,
communication from what each strategy hands to its collectives. docs/estimate.md has the formulas in words, and how far
they are from measured runs. Needs neither torch nor transformers, and takes microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genrec_llm.errors import ConfigError
from genrec_llm.hardware import USABLE, Hardware
from genrec_llm.memory import PARTS, moments
from genrec_llm.shape import GEOMETRIES, Shape
from genrec_llm.traffic import Traffic, traffic
from genrec_llm.workload import (
    FILLING,
    ONE_DEVICE,
    PADDING,
    SPARSE_STRATEGIES,
    STRATEGIES,
    Run,
    lora_parameters,
    operations,
    packs,
    row_parameters,
    trained_parameters,
)


@dataclass(frozen=True)
class Estimate:
    """What a run will take on each device. Times are predictions from assumed or given speeds.

    Args:
        shape, run, hardware: what it is of; `hardware` None on a machine whose speed nobody knows.
        moment: of the step when memory is fullest, one of `moments`.
        parts: bytes by part at that moment.
        largest: bytes by part, each at its own fullest moment.
        traffic: what goes through collectives in a step.
        epoch_steps: steps of an epoch, or None where the number of examples is not known.
    """

    shape: Shape
    run: Run
    hardware: Hardware | None
    moment: str
    parts: dict[str, float]
    largest: dict[str, float]
    traffic: Traffic
    epoch_steps: int | None = None

    @property
    def total(self) -> float:
        """Peak bytes on a device."""
        return sum(self.parts.values())

    @property
    def capacity(self) -> float | None:
        """Bytes of a device that a run can fill."""
        return None if self.hardware is None else USABLE * self.hardware.memory

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within `capacity`; None where that is not known."""
        return None if self.capacity is None else self.total <= self.capacity

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return self.traffic.sent(self.run.processes)

    @property
    def compute_seconds(self) -> float | None:
        """Arithmetic of a step; None where the speed is not known."""
        if self.hardware is None or not self.hardware.tflops:
            return None
        rows = self.run.examples * self.run.accumulation
        speed = self.hardware.tflops * 1e12 * self.hardware.utilisation
        more = FILLING if packs(self.shape, self.run) else PADDING
        return operations(self.shape, self.run) * more * rows / speed

    @property
    def communication_seconds(self) -> float:
        """Of a step, if nothing of it is hidden behind arithmetic."""
        return 0.0 if self.hardware is None else self.sent / self.hardware.bandwidth(self.run.processes)

    @property
    def step_seconds(self) -> float | None:
        """Of a step, communication behind arithmetic."""
        return None if self.compute_seconds is None else self.compute_seconds + self.communication_seconds

    @property
    def epoch_seconds(self) -> float | None:
        """Of an epoch."""
        if self.step_seconds is None or self.epoch_steps is None:
            return None
        return self.step_seconds * self.epoch_steps

    def to_dict(self) -> dict[str, Any]:
        """As `genrec estimate --json` prints it; bytes and seconds."""
        return {
            "strategy": self.run.strategy,
            "processes": self.run.processes,
            "examples_per_device": self.run.examples,
            "accumulation": self.run.accumulation,
            "global_batch_size": self.run.global_batch,
            "trained_parameters": trained_parameters(self.shape, self.run),
            "parameters": self.shape.parameters
            + lora_parameters(self.shape, self.run)
            + row_parameters(self.shape, self.run),
            "peak_bytes": round(self.total),
            "moment": self.moment,
            "bytes_at_the_peak": {name: round(value) for name, value in self.parts.items()},
            "largest_bytes": {name: round(value) for name, value in self.largest.items()},
            "usable_bytes": None if self.capacity is None else round(self.capacity),
            "fits": self.fits,
            "sent_bytes_per_step": round(self.sent),
            "predicted_compute_seconds": self.compute_seconds,
            "predicted_communication_seconds": self.communication_seconds,
            "predicted_step_seconds": self.step_seconds,
            "steps_per_epoch": self.epoch_steps,
            "predicted_epoch_seconds": self.epoch_seconds,
        }


def estimate(shape: Shape, run: Run, hardware: Hardware | None = None, *, examples: int | None = None) -> Estimate:
    """Memory, communication and time of a run.

    Args:
        examples: of an epoch.

    Raises:
        ConfigError: LoRA targets that the backbone has not.
    """
    at = moments(shape, run)
    moment = max(at, key=lambda name: sum(at[name].values()))
    largest = {part: max(parts[part] for parts in at.values()) for part in PARTS}
    steps = None if examples is None else -(-examples // run.global_batch)
    return Estimate(shape, run, hardware, moment, at[moment], largest, traffic(shape, run), steps)


def largest_batch(shape: Shape, run: Run, capacity: float) -> int:
    """The most examples of a device at once whose peak is within `capacity` bytes; 0 where not even one is."""

    def fits(examples: int) -> bool:
        return estimate(shape, replace(run, examples=examples)).total <= capacity

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def by_strategy(
    shape: Shape, run: Run, hardware: Hardware | None = None, *, examples: int | None = None
) -> dict[str, Estimate]:
    """The same run under each strategy that its number of devices allows."""
    names = [run.strategy] if run.cpu else [ONE_DEVICE[1]] if run.processes == 1 else STRATEGIES[2:]
    if run.sparse_users:
        names = [name for name in names if name in SPARSE_STRATEGIES]
    return {
        name: estimate(shape, replace(run, strategy=name), hardware, examples=examples)  # type: ignore[arg-type]
        for name in names
    }


def recommended(estimates: Mapping[str, Estimate]) -> str | None:
    """The first strategy that fits; `STRATEGIES` has them in order of what they cost in time and complexity."""
    return next((name for name in STRATEGIES if name in estimates and estimates[name].fits is not False), None)


@dataclass(frozen=True)
class Scaling:
    """Predicted efficiency of many devices: the step of one, over the same step of each among many."""

    processes: int
    sent: float
    communication_seconds: float
    efficiency: float


def predicted_scaling(
    shape: Shape,
    run: Run,
    hardware: Hardware,
    *,
    processes: Sequence[int] = (8, 64),
    step_seconds: float | None = None,
    imbalance: float = 0.01,
) -> list[Scaling]:
    """Weak scaling at `run.examples` a device: communication is added to the step, none of it hidden.

    Args:
        run: as under the strategy on many devices.
        step_seconds: a measured step of one device; without it, predicted from `hardware`.
        imbalance: how much longer the slowest device computes than the mean, when examples are dealt by length.

    Raises:
        ConfigError: neither a measured step nor a speed to predict one from.
    """
    alone = step_seconds
    if alone is None:
        alone = estimate(shape, replace(run, processes=1, strategy="single_gpu"), hardware).compute_seconds
    if not alone:
        raise ConfigError("step seconds: give a measured step of one device, or --tflops to predict one from")
    found = []
    for count in processes:
        many = replace(run, processes=count)
        sent = traffic(shape, many).sent(count)
        seconds = sent / hardware.bandwidth(count)
        found.append(Scaling(count, sent, seconds, alone / (alone * (1 + imbalance) + seconds)))
    return found


# --- from what is at hand ---------------------------------------------------------------------------------------------


def estimate_run(
    config: Mapping[str, Any],
    model_args: Any,
    training_args: Any,
    *,
    items: int,
    user_rows: int,
    longest: int,
    mean_length: float | None = None,
    strategy: str,
    processes: int,
    own_head: bool | None = None,
    targets: int = 1,
    hardware: Hardware | None = None,
    examples: int | None = None,
) -> Estimate:
    """The estimate of a run from the arguments that it is started with; quick enough for an `except` block.

    Args:
        config: `model.config.to_dict()`, or a `config.json`.
        model_args, training_args: `ModelArguments` and `GenRecTrainingArguments`.
        longest: tokens of the longest input row; the mean is taken to be as long where it is not given.
        own_head: whether the backbone's head is not its embedding matrix; see `Shape.from_config`.
        targets: predictions an input row.
        examples: of an epoch.
    """
    shape = Shape.from_config(config, own_head=own_head)
    if model_args.dropout is not None:
        shape = replace(shape, dropout=model_args.dropout)
        if shape.family == "t5":
            shape = replace(shape, attention_dropout=model_args.dropout, activation_dropout=model_args.dropout)
    accumulation = training_args.gradient_accumulation_steps
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    run = Run(
        items=items,
        user_rows=user_rows,
        examples=-(-training_args.global_batch_size // (processes * accumulation)),
        tied_rows=model_args.tie_item_rows,
        tuning=model_args.tuning,
        lora_r=model_args.lora_r,
        lora_targets=tuple(model_args.lora_target_modules) if model_args.lora_target_modules else None,
        lora_dropout=model_args.lora_dropout,
        strategy=strategy,  # type: ignore[arg-type]  # its __post_init__ checks it
        processes=processes,
        accumulation=accumulation,
        mean_length=longest if mean_length is None else mean_length,
        longest=longest,
        targets=targets,
        prompt=2 if model_args.decoder_prompt == "last-item" else 1,
        bf16=training_args.bf16,
        quantization=model_args.quantization,
        optimizer_bytes=0.0 if optimizer == "sgd" else 2.0 if "8bit" in optimizer else 8.0,
        sparse_users=training_args.sparse_user_rows,
        packing=training_args.packing,
        kernels=training_args.kernels,
    )
    return estimate(shape, run, hardware, examples=examples)


def read_geometry(
    name: str, *, init: str = "pretrained", revision: str | None = None
) -> tuple[dict[str, Any], bool | None]:
    """A backbone's configuration and whether its head is its own: of a folder, a published name, a named size, the Hub.

    Raises:
        ConfigError: it is none of these, or the Hub does not answer.
    """
    own_head = True if init == "random" else None  # fresh T5 weights get one; BART never has
    if (Path(name) / "config.json").is_file():
        try:
            return json.loads((Path(name) / "config.json").read_text(encoding="utf-8")), own_head
        except ValueError as error:
            raise ConfigError(f"backbone: {name}/config.json is not readable as json: {error}") from error
    if name in GEOMETRIES:
        return GEOMETRIES[name], own_head
    from transformers import PreTrainedConfig

    from genrec_llm.backbone import NAMED_SIZES
    from genrec_llm.tokenizer import bare_tokenizer

    if name in NAMED_SIZES:
        config = NAMED_SIZES[name].to_dict()
        return config | {"vocab_size": len(bare_tokenizer(config["model_type"]))}, True
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backbone: {name!r} is neither a folder with a config.json, nor a geometry known here, nor a model that the "
            f"Hub answers for ({str(error).splitlines()[0]}). Known: {', '.join([*NAMED_SIZES, *GEOMETRIES])}"
        ) from error
    return config, own_head
