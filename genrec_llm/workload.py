"""What is trained of a backbone, under which strategy, and how many rows, elements and operations that makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from genrec_llm.errors import ConfigError
from genrec_llm.packing import MULTIPLE
from genrec_llm.shape import Shape

Strategy = Literal["cpu", "single_gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
ONE_DEVICE = ("cpu", "single_gpu")
SPARSE_STRATEGIES = (*ONE_DEVICE, "ddp")
"""Where user rows can have sparse gradients."""
FP32, BF16, INDEX = 4, 2, 8
PADDING = 1.05
"""Tokens computed for each token that counts, with batches of like lengths."""
FILLING = 1.02
"""The same where examples share rows: what is left empty, and what a batch has above the mean."""


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Args:
        items: of the catalogue.
        user_rows: rows of users, `<user_unknown>` included.
        examples: input rows that a device works on at once (the micro-batch).
        tied_rows: items are scored with their input rows.
        tuning: "lora" or "full".
        lora_r, lora_targets, lora_dropout: as in `ModelArguments`.
        strategy: one of `STRATEGIES`.
        processes: devices.
        accumulation: micro-batches a step.
        mean_length: tokens of an input row on average, user, mask and end among them.
        longest: tokens of the longest input row of a batch.
        targets: predictions an input row: masked items in pretraining, 1 in finetuning.
        prompt: tokens of a decoder prompt.
        bf16: bf16 autocast; the frozen backbone is held in bf16 then.
        quantization: of the frozen backbone's linear layers.
        optimizer_bytes: state of the optimizer for each trained element: 8 for AdamW, 2 for its 8-bit form.
        sparse_users: user rows have sparse gradients (`--sparse-user-rows`); their optimizer state is whole.
        packing: examples share rows of the encoder's input, where the backbone allows it.
        kernels: T5's layers have the forms of `kernels`.
    """

    items: int
    user_rows: int
    examples: int
    tied_rows: bool = True
    tuning: Literal["lora", "full"] = "lora"
    lora_r: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    strategy: Strategy = "single_gpu"
    processes: int = 1
    accumulation: int = 1
    mean_length: float = 24.0
    longest: int = 53
    targets: int = 1
    prompt: int = 2
    bf16: bool = False
    quantization: Literal["8bit", "4bit"] | None = None
    optimizer_bytes: float = 8.0
    sparse_users: bool = False
    packing: bool = True
    kernels: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name.replace('_', ' ')}: {getattr(self, name)} is not at least 1"
            for name in ("items", "user_rows", "examples", "processes", "accumulation", "longest", "targets", "prompt")
            if getattr(self, name) < 1
        ]
        if not 1 <= self.mean_length <= self.longest:
            problems.append(
                f"mean length: {self.mean_length:g} tokens is not between 1 and the longest, {self.longest}"
            )
        if self.strategy not in STRATEGIES:
            problems.append(f"strategy: {self.strategy!r} is none of {', '.join(STRATEGIES)}")
        if self.strategy in ONE_DEVICE and self.processes > 1:
            problems.append(f"strategy: {self.strategy} is for one process, not {self.processes}: take ddp")
        if self.quantization and self.tuning == "full":
            problems.append("quantization: a quantised backbone cannot be tuned in full: take LoRA")
        if self.sparse_users and self.strategy not in SPARSE_STRATEGIES:
            problems.append(f"sparse user rows: {self.strategy} has no sparse gradients: take ddp")
        if problems:
            raise ConfigError(problems)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed holds the optimizer, with fp32 masters beside bf16 copies."""
        return self.strategy.startswith("zero")

    @property
    def cpu(self) -> bool:
        """Whether it computes on a CPU."""
        return self.strategy == "cpu"

    @property
    def global_batch(self) -> int:
        """Examples a step."""
        return self.examples * self.processes * self.accumulation

    @property
    def touched_users(self) -> int:
        """User rows that a device's examples of a step touch, at most."""
        return min(self.examples * self.accumulation, self.user_rows)


# --- what is trained --------------------------------------------------------------------------------------------------


def lora_targets(shape: Shape, run: Run) -> tuple[str, ...]:
    """Names of the linear layers that get adapters.

    Raises:
        ConfigError: the backbone has no layer of such a name.
    """
    names = run.lora_targets or (("q_proj", "v_proj") if shape.family == "bart" else ("q", "v"))
    unknown = [name for name in names if name not in shape.linears]
    if unknown:
        raise ConfigError(
            [f"lora_target_modules: no layer {name!r}: there are {', '.join(shape.linears)}" for name in unknown]
        )
    return tuple(names)


def lora_parameters(shape: Shape, run: Run) -> int:
    """Elements of all adapters; none in full tuning."""
    if run.tuning == "full":
        return 0
    return sum(run.lora_r * sum(shape.linears[name]) * shape.occurrences(name) for name in lora_targets(shape, run))


def row_parameters(shape: Shape, run: Run) -> int:
    """Elements of the id rows."""
    return ((1 if run.tied_rows else 2) * run.items + run.user_rows) * shape.d_model + int(run.tied_rows)


def trained_parameters(shape: Shape, run: Run) -> int:
    """Elements that have a gradient."""
    backbone = shape.parameters - shape.head_parameters if run.tuning == "full" else 0
    return backbone + lora_parameters(shape, run) + row_parameters(shape, run)


def dense_parameters(shape: Shape, run: Run) -> int:
    """Elements that have a dense gradient."""
    return trained_parameters(shape, run) - (run.user_rows * shape.d_model if run.sparse_users else 0)


# --- how it is computed -----------------------------------------------------------------------------------------------


def packs(shape: Shape, run: Run) -> bool:
    """Whether examples share rows of tokens: where positions are relative."""
    return run.packing and shape.family == "t5"


def quickened(shape: Shape, run: Run) -> bool:
    """Whether layers have the forms of `kernels`, which are T5's."""
    return run.kernels and shape.family == "t5"


def absorbs(shape: Shape, run: Run) -> bool:
    """Whether cross-attention makes no keys and values: their layers are plain products."""
    key, value = shape.attention_names[1:3]
    noisy = run.tuning == "lora" and run.lora_dropout and {key, value} & set(lora_targets(shape, run))
    return quickened(shape, run) and not noisy and not run.quantization


def encoder_rows(shape: Shape, run: Run) -> tuple[int, int]:
    """Rows of the encoder's input, and tokens of a row.

    Packed rows are as long as `Packing.fitting` makes them: they hold the longest example, and two of those of the mean.
    Padded ones are those of the longest examples, since one such batch comes.
    """
    if not packs(shape, run):
        return run.examples, run.longest
    length = math.ceil(max(run.longest, 2 * run.mean_length) / MULTIPLE) * MULTIPLE
    return math.ceil(FILLING * run.examples * run.mean_length / length), length


def trained_size(run: Run) -> int:
    """Bytes of a trained weight as it computes, and of its gradient: DeepSpeed casts the module to bf16."""
    return BF16 if run.deepspeed and run.bf16 else FP32


def weight_size(run: Run) -> int:
    """Bytes of a weight that is held in the precision computed in."""
    return BF16 if run.bf16 else FP32


def operations(shape: Shape, run: Run, length: float | None = None) -> float:
    """Floating-point operations of a training step for one input row of `length` tokens (by default the mean).

    Two for each product of a matrix element and a token going forward, two for the gradient that goes on, two more for
    the gradient of a weight that is trained.
    """
    read = run.mean_length if length is None else length
    packed, absorbed = packs(shape, run), absorbs(shape, run)
    asked = run.targets * run.prompt
    seen = run.longest if packed else read  # states as cross-attention has them
    projected = 0 if absorbed else read if quickened(shape, run) else seen  # keys and values are made of
    d, inner = shape.d_model, shape.inner
    attention = 4 * d * inner
    encoder = shape.encoder_layers * (attention + shape.feed_forward) * read
    cross = attention if absorbed else 2 * d * inner  # of a query: its states are narrowed where it absorbs
    decoder = shape.decoder_layers * ((attention + cross + shape.feed_forward) * asked + 2 * d * inner * projected)
    pairs = shape.encoder_layers * read * (encoder_rows(shape, run)[1] if packed else read)
    pairs += shape.decoder_layers * asked * asked
    crossing = shape.decoder_layers * asked * seen * (shape.heads * d if absorbed else inner)
    passes = 3 if run.tuning == "full" else 2
    again = 0.0
    if absorbed and not run.cpu:  # its forward pass is computed a second time
        again = 2.0 * shape.decoder_layers * 2 * d * inner * asked + 4.0 * crossing
    head = 3 * 2.0 * run.targets * run.items * d
    lora = 0.0
    if run.tuning == "lora":
        tokens = shape.encoder_layers * read + shape.decoder_layers * (2 * asked + (projected or asked)) / 1.5
        layers = shape.encoder_layers + 2 * shape.decoder_layers
        lora = 3 * 2.0 * lora_parameters(shape, run) / layers * tokens
    return passes * 2.0 * (encoder + decoder) + 3 * 4.0 * (inner * pairs + crossing) + again + head + lora
