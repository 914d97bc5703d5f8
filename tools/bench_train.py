"""Training steps of this toolkit beside transformers' Seq2SeqTrainer with PEFT, same backbone, same data, in one run.

    python tools/bench_train.py --data-dir ../shared/data --out docs/results/speed_cpu.json
    python tools/bench_train.py --data-dir ../shared/data --threads 2 --out docs/results/speed_cpu.json
    python tools/bench_train.py --data-dir ../shared/data --shape micro --epoch --out docs/results/speed_cpu.json
    python tools/bench_train.py --data-dir ../shared/data --arms a ours --ours sparse_user_rows=true

Arms: `a`, Seq2SeqTrainer + PEFT with trainable tokens, random batches padded to the longest; `b`, the same with batches
grouped by length; `same-loss`, ours with the softmax over the whole vocabulary that these two compute; `ours`, as it is by
default. Each is a process of its own that calls `train()`; one computes at a time, a block of steps in turn, and the best of
the blocks after the first counts. Before that each arm shows, in a process of its own, that a few steps move all rows
that they should and nothing else, and that those with the same objective have the same loss. With --one-at-a-time an arm
is checked and timed, with all the memory to itself, before the next one starts; one that fails leaves the others.

A block is a fair sample of an epoch's batches, the same ones in each block: every arm's own sampler deals out the whole
data, the batches are sorted by their padded tokens, and --steps of them are taken at equal distances. The block that does
not count begins with the largest, so that peak memory is that of an epoch. With --epoch a block is a whole epoch. On a
GPU, CUDA events stand in for CPU time and allocated for resident memory. "Waiting" is the wall time of a step in `next()` of
its loader.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from bench_results import GIB, MEMORY, Meter, compare, peak_bytes, processor, record, table
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from genrec_llm.args import DataArguments, GenRecTrainingArguments, parse_args
from genrec_llm.batching import as_tensors
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError, exits_cleanly
from genrec_llm.item_loss import item_loss
from genrec_llm.model import UNTIED_KEYS, GenRecUntiedT5, IdTokens, ItemHead, add_lora, id_tokens_of, unwrapped
from genrec_llm.provenance import provenance
from genrec_llm.rows import initial_rows
from genrec_llm.tasks import NextItem, PromptLayout
from genrec_llm.tokenizer import bare_tokenizer
from genrec_llm.trainer import GenRecTrainer

LORA = {"r": 16, "alpha": 32, "dropout": 0.0}
RATE = 1e-3
CHECKED_STEPS = 3
CHECKED_EXAMPLES = 64
SAME_LOSS = 1e-4
"""Largest relative difference of the fp32 losses of one objective, whose sums differ in their order."""
ARMS = {
    "a": "(a) Seq2SeqTrainer + PEFT, random batches",
    "b": "(b) Seq2SeqTrainer + PEFT, batches by length",
    "same-loss": "ours, softmax over the whole vocabulary",
    "ours": "ours",
}
RIVALS = ("a", "b")
WHOLE_SOFTMAX = ("a", "b", "same-loss")
"""Arms with one and the same objective."""


@dataclass(frozen=True)
class Shape:
    """A backbone's geometry.

    Attributes:
        sizes: keywords of a T5Config.
        tokens: of the base tokenizer.
        matrix: rows of the embedding, which may be more.
        masks: token ids of `<extra_id_0>`, ….
    """

    sizes: dict[str, int]
    tokens: int
    matrix: int
    masks: tuple[int, ...]

    def config(self) -> T5Config:
        """Of the backbone, before rows are added."""
        return T5Config(
            **self.sizes, vocab_size=self.matrix, feed_forward_proj="gated-gelu", dropout_rate=0.1, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=self.masks[0],
            scale_decoder_outputs=False,  # as it is read from a published checkpoint whose head is its own
        )  # fmt: skip

    def layout(self, data: Data) -> PromptLayout:
        """Token ids of a catalogue behind the base tokenizer's."""
        return PromptLayout(
            base=self.tokens, num_items=data.vocab.num_items, num_user_rows=data.vocab.num_user_rows,
            mask_ids=self.masks, eos_id=1, pad_id=0, user_token=data.vocab.user_mode != "none", max_history=data.max_history,
        )  # fmt: skip

    def __str__(self) -> str:
        layers = f"{self.sizes['num_layers']} + {self.sizes['num_decoder_layers']} layers"
        return f"d_model {self.sizes['d_model']}, {layers}, {self.tokens:,} base tokens"


BARE_MASKS = tuple(range(3, 103))
SHAPES = {
    "flan-t5-xl": Shape(
        {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32},
        tokens=32_100, matrix=32_128, masks=tuple(range(32_099, 31_999, -1)),
    ),
    "flan-t5-small": Shape(
        {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6},
        tokens=32_100, matrix=32_128, masks=tuple(range(32_099, 31_999, -1)),
    ),
    "micro": Shape(
        {"d_model": 64, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2},
        tokens=103, matrix=128, masks=BARE_MASKS,
    ),
    "tiny": Shape(
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2},
        tokens=103, matrix=128, masks=BARE_MASKS,
    ),
}  # fmt: skip
"""The published geometries of google/flan-t5-xl and -small; that of this project's t5-micro; one for tests."""


@dataclass(frozen=True)
class Job:
    """What one arm does.

    Attributes:
        steps: of a block; 0 makes a block of a whole epoch.
        blocks: of the whole training: one that is discarded, those that count, and one that is never begun.
        settings: `name=value` of GenRecTrainingArguments, of our arms.
    """

    arm: str
    shape: str
    dataset: str
    data_dir: str | None
    batch: int = 64
    threads: int = 1
    steps: int = 32
    blocks: int = 5
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it stands in the results."""
        ours = [] if self.arm in RIVALS else self.settings
        return ", ".join([ARMS[self.arm], *ours])


# --- a fair sample of an epoch ----------------------------------------------------------------------------------------


def spread(costs: Sequence[int], steps: int) -> list[int]:
    """Places of `steps` entries at equal distances in the order of `costs`, shuffled with a fixed seed.

    Of all places where such a row can begin, that whose mean is nearest to the mean of all: a midpoint would miss the tail.
    """
    values = np.asarray(costs)
    order = np.argsort(values, kind="stable")
    rows = [((np.arange(steps) + begin) * len(order) / steps).astype(np.int64) for begin in np.arange(0, 1, 0.01)]
    places = min(rows, key=lambda row: abs(values[order[row]].mean() - values.mean()))
    return [int(place) for place in np.random.default_rng(0).permutation(order[places])]


def padded_tokens(loader: DataLoader[Any], batches: Sequence[Any]) -> list[int]:
    """Tokens of each batch of a loader's data, padding included."""
    dataset: Any = loader.dataset
    if isinstance(dataset, datasets.Dataset):  # padded to its longest, which need not be done to be counted
        lengths = np.array(dataset["length"])
        return [len(batch) * int(lengths[batch].max()) for batch in batches]
    return [int(loader.collate_fn(dataset.__getitems__(batch))["input_ids"].numel()) for batch in batches]


class Fixed:
    """The same batches in every epoch.

    Attributes:
        representative: padded tokens of a batch, over those of the mean batch of the epoch that it stands for.
        warming: while this is true, the epoch's largest batch stands first, so that peak memory is that of an epoch.
    """

    def __init__(self, loader: DataLoader[Any], steps: int) -> None:
        batches = list(loader.batch_sampler)
        # The Trainer checks the size of the first batch against that of the epoch's first.
        batches = [batch for batch in batches if len(batch) == len(batches[0])]
        costs = padded_tokens(loader, batches)
        chosen = spread(costs, steps)
        self.batches, self.largest = [batches[place] for place in chosen], batches[int(np.argmax(costs))]
        self.representative = float(np.mean([costs[place] for place in chosen]) / np.mean(costs))
        self.warming = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.largest, *self.batches[1:]] if self.warming else self.batches)


class OnSample(Seq2SeqTrainer):
    """A Trainer whose every epoch is the same fair sample of its own first epoch's batches.

    Attributes:
        waited: seconds that its steps have spent in `next()` of the loader.
    """

    steps = 0
    loader: Any = None
    waited = 0.0

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> Any:
        """Of the Trainer that this is mixed into, with a look at the clock around each batch."""
        return super().get_batch_samples(self._watched(epoch_iterator), *args)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - begun
            yield batch

    def get_train_dataloader(self) -> Any:
        """Of the Trainer that this is mixed into, or the sample of its batches; made once."""
        if self.loader is None:
            self.loader = super().get_train_dataloader()
            if self.steps:
                fixed = Fixed(self.loader, self.steps)
                self.loader = DataLoader(
                    self.loader.dataset, batch_sampler=fixed, collate_fn=self.loader.collate_fn,
                    pin_memory=self.loader.pin_memory,
                )  # fmt: skip
        return self.loader


# --- ours -------------------------------------------------------------------------------------------------------------


class WholeVocabulary(ItemHead):
    """Scores items, then base tokens and users with frozen rows: the softmax that an ordinary head computes.

    Attributes:
        frozen: rows `[base tokens, d_model]` and `[users, d_model]`; no parameters, so that nothing copies or trains them.
    """

    frozen: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """`[targets, items + base tokens + users]`, or the loss; labels are item indices, as they are without this."""
        with torch.autocast(hidden.device.type, enabled=False):
            if labels is not None:
                return item_loss(
                    hidden.float(), self.weight, labels, label_smoothing=label_smoothing, others=self.frozen
                )
            others = [F.linear(hidden.float(), rows.float()) for rows in self.frozen]
        return torch.cat([super().forward(hidden), *others], dim=1)


class Ours(OnSample, GenRecTrainer):
    """`GenRecTrainer` on a fair sample."""


def backbone(kind: type[T5ForConditionalGeneration], shape: Shape) -> Any:
    """A model with the shape's geometry: random weights, equal for every class, and scores of the size of 1."""
    cuda = torch.cuda.is_available()
    set_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = kind._from_config(shape.config(), dtype=torch.bfloat16 if cuda else torch.float32)
    with torch.no_grad():
        # Unscaled, the softmax underflows and most item rows would get no gradient at all.
        model.lm_head.weight.mul_(model.config.d_model**-0.5)
    return model


def rows_of(model: Any, data: Data, layout: PromptLayout, *, tie: bool) -> IdTokens:
    """The same random rows for every arm, in fp32: such as the tables of the rivals, in the backbone's dtype, hold too."""
    rows, _ = initial_rows(model, bare_tokenizer("t5"), data.vocab, layout, data.train, method="random", tie=tie)
    return rows.to(model.dtype).float()


def settings(folder: str, job: Job) -> dict[str, Any]:
    """Training arguments that all arms share; everything else is left at its default."""
    return {
        "output_dir": folder, "num_train_epochs": job.blocks, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "bf16": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available(), "seed": 0,
        "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "load_best_model_at_end": False,
        "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip


def ours(job: Job, data: Data, folder: str) -> Seq2SeqTrainer:
    """Our trainer, with the item head or with `WholeVocabulary` in its place."""
    shape, whole = SHAPES[job.shape], job.arm in WHOLE_SOFTMAX
    layout = shape.layout(data)
    common = settings(folder, job) | {"global_batch_size": job.batch}
    common |= dict(setting.split("=", 1) for setting in job.settings)
    flags = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    (training,) = parse_args(GenRecTrainingArguments, argv=flags)
    model = backbone(GenRecUntiedT5, shape)
    rows = rows_of(model, data, layout, tie=not whole)
    if whole:
        rows.item_out = WholeVocabulary(rows.item_out.weight, None)
    model.add_id_tokens(rows.to(model.device), layout.base)
    adapted = add_lora(model, **LORA, targets=None, base_name="random", revision=None)
    if whole:
        head: Any = id_tokens_of(adapted).item_out
        base = model.get_output_embeddings().weight.detach()
        head.frozen = (base[: layout.base], base.new_zeros(layout.num_user_rows, base.shape[1]))
    return Ours(adapted, training, task=NextItem(data.train, layout, seed=0), layout=layout, validation=None)


# --- the rivals -------------------------------------------------------------------------------------------------------


class RivalT5(T5ForConditionalGeneration):
    """Stock T5 with a head of its own that stays so.

    transformers 5.23 would tie it to the input embedding on resize, and PEFT 0.21 would then train one in the other's
    place; and its Trainer believes that T5 divides the loss by the number of targets, which it does not.
    """

    _tied_weights_keys = UNTIED_KEYS
    accepts_loss_kwargs = False


class Rival(OnSample):
    """`Seq2SeqTrainer` on a fair sample."""

    def _get_train_sampler(self, *args: Any) -> Any:
        """As the Trainer's, which sorts by a column that datasets 5 reads anew for each example: 14 s an epoch of Beauty."""
        sampler = super()._get_train_sampler(*args)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = list(sampler.lengths)
        return sampler


def rival_data(task: NextItem, layout: PromptLayout, batch: int) -> datasets.Dataset:
    """The examples of our first epoch as a user of transformers has them: tokenised, unpadded, with their lengths.

    The label stands at the last position of the two-token decoder prompt that we train with.
    """
    ids, prompts, labels, lengths = [], [], [], []
    for places in np.array_split(np.arange(len(task.lengths)), -(-len(task.lengths) // batch)):
        encoded = task.batch(0, places)
        mask = encoded["attention_mask"].astype(bool)
        ids.append(encoded["input_ids"][mask])
        lengths.append(mask.sum(axis=1))
        prompts.append(encoded["decoder_input_ids"])
        target = np.full_like(prompts[-1], -100)
        target[:, -1] = layout.base + encoded["labels"]
        labels.append(target)
    every = np.concatenate(lengths)
    columns = {
        "input_ids": pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(every)]), np.concatenate(ids)),
        "decoder_input_ids": pa.FixedSizeListArray.from_arrays(np.concatenate(prompts).ravel(), prompts[0].shape[1]),
        "labels": pa.FixedSizeListArray.from_arrays(np.concatenate(labels).ravel(), prompts[0].shape[1]),
        "length": pa.array(every),
    }
    return datasets.Dataset(pa.table(columns))


class Collator(DataCollatorForSeq2Seq):
    """Pads to the longest of a batch; lengths are for the sampler alone."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        """A batch of tensors."""
        return super().__call__([{name: value for name, value in one.items() if name != "length"} for one in features])


def resized(kind: type[T5ForConditionalGeneration], shape: Shape, data: Data) -> Any:
    """A model of transformers whose own tables hold the rows of items and users behind the base tokenizer's."""
    layout, model = shape.layout(data), backbone(kind, shape)
    rows = rows_of(model, data, layout, tie=False)
    model.resize_token_embeddings(layout.vocab_size, mean_resizing=False)
    with torch.no_grad():
        model.shared.weight[layout.base : layout.first_user_id] = rows.item_in.weight
        model.shared.weight[layout.first_user_id :] = rows.user_in.weight
        model.lm_head.weight[layout.base : layout.first_user_id] = rows.item_out.weight
        model.lm_head.weight[layout.first_user_id :] = 0
    return model


def rival(job: Job, data: Data, folder: str, kind: type[T5ForConditionalGeneration] = RivalT5) -> Seq2SeqTrainer:
    """`Seq2SeqTrainer` + PEFT, with LoRA as ours and trainable tokens: items and users going in, items coming out."""
    layout = SHAPES[job.shape].layout(data)
    items, users = range(layout.base, layout.first_user_id), range(layout.first_user_id, layout.vocab_size)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"],
        target_modules=["q", "v"], trainable_token_indices={"shared": [*items, *users], "lm_head": [*items]},
    )  # fmt: skip
    training = Seq2SeqTrainingArguments(
        **settings(folder, job), per_device_train_batch_size=job.batch, label_names=["labels"], remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if job.arm == "b" else "random",
    )  # fmt: skip
    return Rival(
        get_peft_model(resized(kind, SHAPES[job.shape], data), config),
        training,
        train_dataset=rival_data(NextItem(data.train, layout, seed=0), layout, job.batch),
        data_collator=Collator(bare_tokenizer("t5")),
    )


def trainer_of(job: Job, data: Data, folder: str) -> Seq2SeqTrainer:
    """The arm's Trainer, ready to train."""
    trainer: Any = (rival if job.arm in RIVALS else ours)(job, data, folder)
    trainer.steps = job.steps
    return trainer


# --- is it right? -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """What a model computes with, copied: looked up through its modules, not read from its parameters.

    Attributes:
        encoder, decoder: rows that the two see for every token id, `[vocabulary, d_model]`.
        items: output rows of the items, `[items, d_model]`.
        others: output rows of all that is no item, if that is scored at all.
        frozen, trained: parameters by name; trained ones that are no rows.
    """

    encoder: Tensor
    decoder: Tensor
    items: Tensor
    others: Tensor
    frozen: dict[str, Tensor]
    trained: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, layout: PromptLayout) -> Tables:
        """Of an arm's model."""
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        ids = torch.arange(layout.vocab_size, device=inner.device)
        basis = torch.eye(inner.config.d_model, device=inner.device)
        if isinstance(inner, GenRecUntiedT5):
            encoder = decoder = unwrapped(model).embed(ids)
            head = id_tokens_of(model).item_out(basis).T
            items, others = head[: layout.num_items], head[layout.num_items :]
        else:
            encoder, decoder = inner.encoder.embed_tokens(ids), inner.decoder.embed_tokens(ids)
            head = inner.lm_head(basis.to(inner.dtype)).T
            items = head[layout.base : layout.first_user_id]
            others = torch.cat([head[: layout.base], head[layout.first_user_id :]])
        copies = {name: value.detach().clone() for name, value in model.named_parameters()}
        learning = {name for name, value in model.named_parameters() if value.requires_grad}
        return cls(
            *(value.clone() for value in (encoder, decoder, items, others)),
            frozen={name: value for name, value in copies.items() if name not in learning},
            trained={name: value for name, value in copies.items() if "lora_" in name},
        )


def faults(before: Tables, after: Tables, layout: PromptLayout, seen: Tensor) -> list[str]:
    """What a training did other than to move the rows it should have moved, one sentence each.

    Args:
        seen: token ids that the inputs and decoder prompts of its steps hold.
    """
    found = []
    wanted = seen[seen >= layout.base]
    for side in ("encoder", "decoder"):
        moved = (getattr(before, side) != getattr(after, side)).any(dim=1)
        still = int((~moved[wanted]).sum())
        if still:
            found.append(f"{still} of the {len(wanted)} rows of items and users that the {side} read did not move")
        if base := int(moved[: layout.base].sum()):
            found.append(f"{base} rows of the base vocabulary moved in the {side}")
    if not torch.equal(after.encoder, after.decoder):
        found.append("encoder and decoder no longer have the same input rows")
    still = int((before.items == after.items).all(dim=1).sum())
    if still:
        found.append(f"{still} of the {len(before.items)} output rows of items did not move")
    if others := int((before.others != after.others).any(dim=1).sum()):
        found.append(f"{others} output rows moved that are no items")
    changed = [name for name, value in before.frozen.items() if not torch.equal(value, after.frozen[name])]
    found += [f"the frozen {name} changed" for name in changed]
    dead = [name for name, value in before.trained.items() if torch.equal(value, after.trained[name])]
    return found + [f"the adapter {name} did not move" for name in dead]


@torch.no_grad()
def first_loss(trainer: Any) -> float:
    """Loss of the first examples of the data, dropout off, in fp32: in bf16 the arms round their scores differently."""
    model = copy.deepcopy(trainer.model).float().eval()
    if isinstance(trainer, GenRecTrainer):
        places = np.arange(min(CHECKED_EXAMPLES, len(trainer.task.lengths)))
        batch = as_tensors(trainer.task.batch(0, places))
    else:
        places = range(min(CHECKED_EXAMPLES, len(trainer.train_dataset)))
        batch = trainer.data_collator([trainer.train_dataset[place] for place in places])
    return float(model(**{name: value.to(trainer.args.device) for name, value in batch.items()}).loss)


def check(trainer: Any, layout: PromptLayout) -> dict[str, Any]:
    """Train a little; `loss` before it, `faults` after it."""
    loss = first_loss(trainer)
    batches = list(trainer.get_train_dataloader())
    seen = torch.cat([batch[name].flatten() for batch in batches for name in ("input_ids", "decoder_input_ids")])
    before = Tables.of(trainer.model, layout)
    trainer.train()
    trainer.model.eval()
    after = Tables.of(trainer.model, layout)
    return {"loss": loss, "faults": faults(before, after, layout, seen.unique().to(before.encoder.device))}


def refuse(checks: dict[str, dict[str, Any]]) -> None:
    """Refuse to time arms that are wrong.

    Args:
        checks: arm → what `check` found.

    Raises:
        ConfigError: an arm moves other rows than it should, or two of one objective have different losses.
    """
    problems = [f"{ARMS[arm]}: {fault}" for arm, found in checks.items() for fault in found["faults"]]
    losses = {arm: found["loss"] for arm, found in checks.items() if arm in WHOLE_SOFTMAX}
    if losses and not max(losses.values()) - min(losses.values()) <= SAME_LOSS * max(losses.values()):
        shown = ", ".join(f"{ARMS[arm]} {loss:.6g}" for arm, loss in losses.items())
        problems.append(f"the arms have different objectives: loss of the same examples before training: {shown}")
    if problems:
        raise ConfigError([f"{problem}; nothing was timed" for problem in problems])


# --- processes --------------------------------------------------------------------------------------------------------


class Gate(TrainerCallback):
    """Waits for the word before each block and reports what it took."""

    def __init__(self, link: Connection, examples: int, trainer: Any) -> None:
        self.link, self.examples, self.trainer = link, examples, trainer
        self.meter = Meter(torch.cuda.is_available())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.link.recv()
        self.trainer.get_train_dataloader().batch_sampler.warming = state.global_step == 0
        self.trainer.waited = 0.0
        self.meter.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = self.meter.stop() | {"waiting": self.trainer.waited}
        self.link.send({"seconds": taken, "examples": self.examples, "peak": peak_bytes(self.meter.cuda)})


def work(link: Connection, job: Job, folder: str, checking: bool) -> None:
    """What an arm's process does; whatever is printed in it goes to a file in `folder`."""
    with open(f"{folder}/{job.arm}.log", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(job.threads)
    data = load_data(DataArguments(dataset=job.dataset, data_dir=job.data_dir))
    trainer: Any = trainer_of(job, data, f"{folder}/{job.arm}")
    if checking:
        link.send(check(trainer, SHAPES[job.shape].layout(data)))
        return
    sample = trainer.get_train_dataloader().batch_sampler
    examples = sum(map(len, sample)) if job.steps else len(trainer.get_train_dataloader().dataset)
    trainer.add_callback(Gate(link, examples, trainer))
    link.send({"examples": examples, "representative": getattr(sample, "representative", 1.0)})
    trainer.train()


class Arm:
    """An arm's process, seen from the one that tells the arms when to go on."""

    def __init__(self, job: Job, folder: str, *, checking: bool = False) -> None:
        self.job, self.log = job, Path(folder, f"{job.arm}.log")
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, job, folder, checking), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it says next.

        Raises:
            ConfigError: it has ended.
        """
        try:
            return self.link.recv()
        except EOFError:
            self.process.join()
            text = self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""
            raise ConfigError(
                f"{self.job.name}: its process ended ({self.process.exitcode}); its last words: {text}"
            ) from None

    def block(self) -> Any:
        """Have it do a block."""
        self.link.send("go")
        return self.answer()

    def end(self) -> None:
        """End it where it waits, with what it holds."""
        self.process.kill()
        self.process.join()


def checked(job: Job, folder: str) -> dict[str, Any]:
    """What `check` finds of an arm, in a process of its own.

    Raises:
        ConfigError: the process ended.
    """
    arm = Arm(replace(job, steps=CHECKED_STEPS, blocks=1), folder, checking=True)
    found: dict[str, Any] = arm.answer()
    arm.process.join()
    verdict = "all intended rows move, no others" if not found["faults"] else "WRONG"
    print(f"checked: {job.name}: {verdict}; loss at first {found['loss']:.6g}", flush=True)
    return found


def timed(jobs: Sequence[Job], folder: str) -> dict[str, dict[str, list[float]]]:
    """Time arms in turn, all of them in memory; arm → unit → one value for each block that counts.

    Raises:
        ConfigError: the process of one of them ended.
    """
    arms: list[Arm] = []
    measured: dict[str, dict[str, list[float]]] = {job.name: {} for job in jobs}
    try:
        for job in jobs:
            arms.append(Arm(job, folder))
            ready = arms[-1].answer()
            print(
                f"ready: {job.name}: {ready['examples']:,} examples a block, padded tokens "
                f"{ready['representative']:.3f} of the epoch's mean",
                flush=True,
            )
        for number in range(jobs[0].blocks - 1):  # what a Trainer does at the very end is no part of a step
            for arm in arms:
                done = arm.block()
                values = measured[arm.job.name]
                for clock, seconds in done["seconds"].items():
                    whole = arm.job.steps == 0
                    unit = f"{clock} s an epoch" if whole else f"{clock} ms an example"
                    values.setdefault(unit, []).append(seconds if whole else 1000 * seconds / done["examples"])
                values.setdefault(MEMORY, []).append(done["peak"] / GIB)
                rate = done["examples"] / done["seconds"]["wall"]
                print(f"block {number or 'discarded'}: {arm.job.name}: {rate:.1f} examples/s", flush=True)
    finally:
        for arm in arms:
            arm.end()
    # Memory is that of the last block: all before it are in it.
    return {
        name: {unit: list_[-1:] if unit == MEMORY else list_[1:] for unit, list_ in values.items()}
        for name, values in measured.items()
    }


def measure(
    jobs: Sequence[Job], folder: str, *, one_at_a_time: bool = False
) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Check arms, then time them; all that is measured so far, each time that there is more of it.

    Args:
        one_at_a_time: check and time one arm after the other, each with all the memory; one that fails leaves the others.

    Raises:
        ConfigError: at the end, where an arm is wrong, or its process ended.
    """
    checks: dict[str, dict[str, Any]] = {}
    measured: dict[str, dict[str, list[float]]] = {}
    problems: list[str] = []
    for together in [[job] for job in jobs] if one_at_a_time else [jobs]:
        try:
            found = checks | {job.arm: checked(job, folder) for job in together}
            refuse(found)
            checks, measured = found, measured | timed(together, folder)
        except ConfigError as error:
            problems += error.problems
            print(f"failed: {', '.join(job.name for job in together)}", flush=True)
        else:
            yield measured
    if problems:
        raise ConfigError(problems)


@exits_cleanly
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="amazon-beauty", help="as --dataset of the recipes")
    parser.add_argument("--data-dir", help="folder of the Beauty files")
    parser.add_argument("--out", type=Path, help="json file of results; rows of other benches in it stay")
    parser.add_argument("--shape", choices=SHAPES, default="flan-t5-small")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="at least one of them a rival, a or b"
    )
    parser.add_argument("--epoch", action="store_true", help="blocks are whole epochs")
    parser.add_argument("--steps", type=int, default=32, help="steps of a block without --epoch")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each arm that count, at least 3")
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in every arm")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="one arm after the other, for shapes of which several do not fit"
    )
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=VALUE", help="a training argument of our arms; repeatable"
    )
    args = parser.parse_args()
    problems = [f"--ours {setting}: not NAME=VALUE" for setting in args.ours if "=" not in setting]
    if not set(args.arms) & set(RIVALS) or not set(args.arms) - set(RIVALS):
        problems.append("--arms: a ratio needs a rival (a or b) and one of ours (same-loss or ours)")
    if args.blocks < 3:
        problems.append(f"--blocks: the best of {args.blocks} says little: at least 3")
    problems += [f"--{name}: at least 1" for name in ("steps", "batch", "threads") if getattr(args, name) < 1]
    if problems:
        raise ConfigError(problems)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes to come
    torch.set_num_threads(args.threads)
    steps = 0 if args.epoch else args.steps
    jobs = [
        Job(
            arm,
            args.shape,
            args.dataset,
            args.data_dir,
            args.batch,
            args.threads,
            steps,
            args.blocks + 2,
            tuple(args.ours),
        )
        for arm in dict.fromkeys(args.arms)
    ]
    part = "whole epochs" if args.epoch else f"{steps} steps spread over an epoch"
    bench = f"{'epoch' if args.epoch else 'train step'}, {args.shape}, {processor(args.threads)}"
    shape = f"{SHAPES[args.shape]}; {args.dataset}, all prefixes; batch {args.batch}; {part}"
    with tempfile.TemporaryDirectory() as folder:
        for measured in measure(jobs, folder, one_at_a_time=args.one_at_a_time):
            rivals = [ARMS[arm] for arm in RIVALS if ARMS[arm] in measured]
            rows = compare(bench, shape, measured, rivals or list(measured), provenance())
            print(f"\n{bench} ({shape}; best of {args.blocks})\n{table([vars(row) for row in rows])}", flush=True)
            if args.out:
                record(args.out, rows)
                print(f"written to {args.out}", flush=True)


if __name__ == "__main__":
    main()
