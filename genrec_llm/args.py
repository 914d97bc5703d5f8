"""The configuration: typed arguments with documented defaults, YAML files, and overrides on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from genrec_llm.errors import ConfigError

DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("8bit", "4bit")
ROW_INITS = ("auto", "cooccurrence", "cooccurrence+vectors", "vectors", "text", "random")
SPARSE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def _one_of(name: str, value: str, choices: Sequence[str]) -> list[str]:
    if value in choices:
        return []
    return [f"{name}: {value!r} is not one of {', '.join(choices)}"]


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _refuse_stale_store() -> None:
    """After a restart by the launcher, processes meet at the store of the attempt before, whose addresses are dead.

    torch 2.13 makes a new store only for the c10d rendezvous, and only when it is told not to share it. Said at the first
    start: at a restart the nodes may count differently, and those that still count none would hang.
    """
    restarts, shared = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if restarts != "0" and shared == "True":
        raise ConfigError(
            "launch: after a restart (--max_restarts) processes would hang over the addresses of those before: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give --rdzv_backend c10d to the launcher"
        )


def _hub_problems(push_to_hub: bool, hub_model_id: str | None) -> list[str]:
    if push_to_hub and not hub_model_id:
        return ["push_to_hub: say where to with --hub-model-id org/name"]
    return []


@dataclass
class DataArguments:
    """Which interactions, how they are read, and how ids become tokens."""

    dataset: str = field(
        metadata={"help": "movielens-100k, amazon-beauty, amazon-sports, yelp, or a csv, parquet, jsonl or txt file."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of a named data set that cannot be downloaded (Beauty, Sports, Yelp)."},
    )
    items_file: str | None = field(
        default=None,
        metadata={"help": "File of items (column `item`, optional `title`, `categories`); may list cold ones."},
    )
    user_column: str = field(default="user", metadata={"help": "Column of the user id."})
    item_column: str = field(default="item", metadata={"help": "Column of the item id."})
    time_column: str = field(
        default="timestamp", metadata={"help": "Column of the time; file order counts without one."}
    )
    k_core: int = field(
        default=0,
        metadata={"help": "Drop users and items with fewer interactions, until none is left; 0 keeps all."},
    )
    drop_duplicates: bool = field(
        default=False, metadata={"help": "Drop rows that repeat user, item and time exactly."}
    )
    shuffle_ties: int | None = field(
        default=None,
        metadata={
            "help": "Seed of a random order of a user's interactions with equal times, in place of the file's order."
        },
    )
    without_last: int = field(
        default=0,
        metadata={
            "help": "How many of each user's last interactions to leave out, to choose a recipe with the test split closed."
        },
    )
    max_history: int = field(default=50, metadata={"help": "Most recent items of a history that the model reads."})
    id_seed: int = field(
        default=0,
        metadata={"help": "Seed of the permutation that numbers items and users; order must say nothing."},
    )
    users: str = field(
        default="each",
        metadata={"help": "User tokens: each (one a user), hashed (to --user-buckets), or none."},
    )
    user_buckets: int = field(default=0, metadata={"help": "Buckets of --users hashed."})

    def __post_init__(self) -> None:
        problems = _one_of("users", self.users, ("each", "hashed", "none"))
        if self.users == "hashed" and self.user_buckets < 1:
            problems.append("user_buckets: hashed users need a number of buckets above 0, such as 10000")
        if self.max_history < 1:
            problems.append(f"max_history: {self.max_history} is not at least 1")
        _raise(problems)


@dataclass
class ModelArguments:
    """The backbone, what is trained on it, and where the new rows start."""

    backbone: str = field(
        default="google/flan-t5-small",
        metadata={"help": "Folder or Hub name of a T5 or BART checkpoint; with random weights also t5-micro, …"},
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    backbone_init: str = field(
        default="pretrained", metadata={"help": "pretrained, or random: fresh weights, blocks that begin silent."}
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "LoRA on a frozen backbone of 8bit or 4bit (nf4) linear layers, by bitsandbytes."},
    )
    dropout: float | None = field(default=None, metadata={"help": "Replaces the backbone's dropout probability."})
    tuning: str = field(
        default="lora", metadata={"help": "lora, or full (a backbone trained from nothing needs full)."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters: alpha / r."})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout in front of the adapters; with it, cross-attention has to make keys and values."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get adapters; by default the queries and values of all attention."},
    )
    row_init: str = field(
        default="auto",
        metadata={
            "help": "First item rows: cooccurrence, cooccurrence+vectors, vectors, text, random; auto takes co-occurrence, "
            "with vectors if given, unless most items are cold."
        },
    )
    item_vectors: str | None = field(
        default=None,
        metadata={
            "help": "Parquet file with a vector of each item (columns item, vector), for their first rows; `genrec vectors` "
            "makes one of titles."
        },
    )
    tie_item_rows: bool = field(
        default=True,
        metadata={"help": "Score with the input rows (and a learned scale): half the rows, faster learning."},
    )
    decoder_prompt: str = field(
        default="last-item",
        metadata={"help": "last-item: mask token and last item; mask: the mask token alone."},
    )
    last_items_share: float = field(
        default=0.0,
        metadata={
            "help": "Ranking: share of what the model says after each of the last 4 items alone, beside the whole history; "
            "the loss does not change."
        },
    )

    def __post_init__(self) -> None:
        problems = [
            *_one_of("backbone_init", self.backbone_init, ("pretrained", "random")),
            *_one_of("tuning", self.tuning, ("lora", "full")),
            *_one_of("row_init", self.row_init, ROW_INITS),
            *_one_of("decoder_prompt", self.decoder_prompt, ("last-item", "mask")),
        ]
        if not 0 <= self.last_items_share < 1:
            problems.append(f"last_items_share: {self.last_items_share} is not at least 0 and below 1")
        if self.quantization is not None:
            problems += _one_of("quantization", self.quantization, QUANTIZATIONS)
            if self.tuning == "full":
                problems.append(
                    "quantization: full tuning trains the weights that would be quantised: use --tuning lora on a "
                    "checkpoint, or leave quantization out"
                )
        if self.backbone_init == "random" and self.tuning == "lora":
            problems.append(
                "tuning: adapters on a frozen backbone with random weights cannot be shared, since nobody else has that "
                "backbone; use --tuning full, or a checkpoint"
            )
        _raise(problems)


@dataclass
class GenRecTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with this project's defaults and what its tasks need."""

    output_dir: str = field(default="runs/run", metadata={"help": "The run directory: checkpoints, logs, artifacts."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU; so it is where no GPU is found."})
    global_batch_size: int = field(
        default=256,
        metadata={"help": "Examples a step over all processes and accumulation steps; shared out by length."},
    )
    rows_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the id rows; by default that of the rest (--learning-rate)."},
    )
    rows_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the id rows."})
    sparse_user_rows: bool = field(
        default=False,
        metadata={
            "help": "Exchange and update only the user rows of a step, for very many users; others do not move on by "
            "momentum. One process or DDP, torch's AdamW."
        },
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Fill rows of a fixed length with several examples each, exact for the T5 family; BART, and all without "
            "it, has batches of like length, padded to their longest."
        },
    )
    kernels: bool = field(
        default=True,
        metadata={
            "help": "Faster forms of T5's norm, gated GELU, dropout, attention and LoRA layers, which compute the same."
        },
    )
    masks_per_sequence: int = field(default=1, metadata={"help": "Pretraining: items hidden in one history."})
    last_item_probability: float = field(
        default=0.0,
        metadata={"help": "Pretraining: how often the last item of the history is hidden by choice."},
    )
    targets: str = field(
        default="all",
        metadata={"help": "Finetuning: all prefixes of the training part, or last: one a user."},
    )
    user_dropout: float = field(
        default=0.1,
        metadata={"help": "How often <user_unknown> stands in for a user, so that new users are served."},
    )
    auto_batch_size: bool = field(
        default=False,
        metadata={"help": "Try before training, and double --gradient-accumulation-steps until a micro-batch fits."},
    )
    choose_last_items_share: bool = field(
        default=False,
        metadata={"help": "Choose last_items_share at each validation, by its NDCG@10; the best model keeps its own."},
    )
    validation_users: int = field(
        default=0, metadata={"help": "Users ranked while training, a fixed sample; 0 ranks all."}
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after so many validations without a better NDCG@10; 0 never stops early."},
    )
    from_run: str | None = field(
        default=None,
        metadata={"help": "Finetuning: run directory of the pretraining whose adapters and rows go on."},
    )
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of the adapters (or the backbone)."}
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "How the learning rates fall after warm-up."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps, or below 1 the share of all steps, of warm-up."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to rank the validation users."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept; the best and the last are among them."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Finish with the best checkpoint, not the last."}
    )
    metric_for_best_model: str | None = field(
        default="ndcg@10", metadata={"help": "What the best checkpoint is best in."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave losses that are no numbers out of the log, for which every step waits; they end a run."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between lines of the log."})
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Users ranked at once on a device; fewer where the catalogue is very large."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "DDP: look for parameters without a gradient; there are none, and looking costs time."},
    )
    seed: int = field(default=0, metadata={"help": "Of weights, draws and dropout."})
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Push the finished adapter to --hub-model-id, without user rows; no checkpoint is pushed."},
    )
    hub_strategy: str = field(default="end", metadata={"help": "Only `end`: the finished adapter is pushed."})
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Make the repository private where it is not there yet."}
    )

    def __post_init__(self) -> None:
        problems = [*_one_of("targets", self.targets, ("all", "last"))]
        rates = {"learning_rate": self.learning_rate, "rows_learning_rate": self.rows_learning_rate}
        problems += [
            f"{name}: {rate} is not a number of at least 0"
            for name, rate in rates.items()
            if rate is not None and not rate >= 0
        ]
        if self.fp16:
            problems.append(
                "fp16: T5 overflows to NaN in fp16 (transformers issue 23918): use --bf16 on a GPU that has it (Ampere or "
                "newer), or neither for fp32"
            )
        if not self.average_tokens_across_devices:
            problems.append(
                "average_tokens_across_devices: the loss is a mean over the targets of the whole global batch: leave it true"
            )
        if self.auto_batch_size and self.deepspeed:
            problems.append(
                "auto_batch_size: --deepspeed fixes the accumulation when it is read: launch with a file of "
                "accelerate_configs/"
            )
        if self.choose_last_items_share and self.eval_strategy == "no":
            problems.append(
                "choose_last_items_share: it is chosen on validation, and eval_strategy is no: leave one of the two out"
            )
        if self.sparse_user_rows:
            problems += self._sparse_problems()
        problems += _hub_problems(self.push_to_hub, self.hub_model_id)
        if self.hub_strategy not in ("end", HubStrategy.END):
            problems.append(f"hub_strategy: {self.hub_strategy!r} would share checkpoints: leave it at end")
        _raise(problems)
        _refuse_stale_store()
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()  # DeepSpeed looks for a GPU unless told
        super().__post_init__()
        if isinstance(self.gradient_checkpointing_kwargs, dict):
            self.gradient_checkpointing_kwargs.setdefault("use_reentrant", False)  # torch's default is the other one
        if self.packing and self.kernels and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "gradient_checkpointing_kwargs: re-entrant checkpointing loses the gradient from packed decoder prompts to "
                "the encoder: leave use_reentrant false, or add --packing false or --kernels false"
            )
        if self.load_best_model_at_end and self.eval_strategy == "steps" and self.save_steps != self.eval_steps:
            raise ConfigError(
                f"save_steps: {self.save_steps}, but eval_steps {self.eval_steps}: what validates best has to be saved "
                "to be kept: make them equal, or give --load-best-model-at-end false"
            )
        if self.global_batch_size < self.world_size * self.gradient_accumulation_steps:
            raise ConfigError(
                f"global_batch_size: {self.global_batch_size} examples cannot be shared by {self.world_size} processes x "
                f"{self.gradient_accumulation_steps} accumulation steps"
            )
        self.accumulate(self.gradient_accumulation_steps)

    def _sparse_problems(self) -> list[str]:
        problems = []
        optimizer = OptimizerNames(self.optim).value
        if optimizer not in SPARSE_OPTIMIZERS:
            problems.append(
                f"optim: {optimizer} cannot update the rows of a step alone: with --sparse-user-rows take "
                f"{' or '.join(SPARSE_OPTIMIZERS)}"
            )
        if self.rows_weight_decay:
            problems.append(
                f"rows_weight_decay: {self.rows_weight_decay} would have to shrink every user row in every step, which "
                "--sparse-user-rows does not touch: leave one of the two out"
            )
        return problems

    def accumulate(self, steps: int) -> None:
        """Share the global batch out over so many accumulation steps."""
        self.gradient_accumulation_steps = steps
        # What DeepSpeed and the Trainer's log are told; the sharing itself goes by global_batch_size alone.
        self.per_device_train_batch_size = -(-self.global_batch_size // (self.world_size * steps))

    @property
    def length_classes(self) -> int:
        """At most so many classes of length in packed batches: `kernels` read them apart, other layers need one."""
        return 3 if self.kernels else 1

    @property
    def rows_rate(self) -> float:
        """Learning rate of the id rows."""
        return self.learning_rate if self.rows_learning_rate is None else self.rows_learning_rate


@dataclass
class MergeArguments:
    """What `recipes/merge.py` reads and writes."""

    run: str = field(metadata={"help": "Run directory of a finetuning (or pretraining)."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the merged model goes; by default <run>/merged."}
    )
    backbone: str | None = field(
        default=None, metadata={"help": "The base checkpoint, when it is no longer where the adapter says."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16: of the merged weights."})
    without_users: bool = field(
        default=False, metadata={"help": "Leave the user rows out; all users are <user_unknown>."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the merged model to --hub-model-id, without user rows."}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "org/name on the Hub."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch on the Hub; by default the main one."})
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Make the repository private where it is not there yet."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub name of the base checkpoint for the card, when the run was trained on a folder."},
    )

    def __post_init__(self) -> None:
        _raise(_one_of("dtype", self.dtype, DTYPES) + _hub_problems(self.push_to_hub, self.hub_model_id))


@dataclass
class EvaluateArguments:
    """What `recipes/evaluate.py` ranks and compares."""

    run: str = field(metadata={"help": "Run directory whose merged/ model is evaluated, on that run's data."})
    split: str = field(default="validation", metadata={"help": "validation or test; each opening of test is recorded."})
    keep_seen: bool = field(default=False, metadata={"help": "Let items of the history be recommended again."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Where the data folder, or that of the own files, is now, when it has moved."}
    )
    batch_size: int = field(default=256, metadata={"help": "Users whose scores are computed together."})
    use_cpu: bool = field(default=False, metadata={"help": "Rank on the CPU, even where there are GPUs."})
    rivals: list[str] = field(
        default_factory=list, metadata={"help": "Folders of `tools/rivals.py`, ranked beside the model."}
    )
    generate_users: int = field(
        default=0,
        metadata={"help": "Users whose top 20 is also asked of `generate`, a fixed sample; 0 asks for all."},
    )

    def __post_init__(self) -> None:
        problems = _one_of("split", self.split, ("validation", "test"))
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is not at least 1")
        _raise(problems)


def parse_args(*classes: type[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse a command line into dataclasses; `--config file.yaml` sets defaults that other flags override.

    A YAML file may begin with comments on how to launch it and holds one flat mapping of field names to values.

    Raises:
        ConfigError: the file is absent, is no mapping, or has unknown keys (each with the nearest name); a flag is unknown;
            values do not fit together. All problems of the file at once.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="?", const="")
    chosen, arguments = before.parse_known_args(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        list(classes), description="See the recipe's docstring for the launch command.", allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of defaults for the flags below.")
    parser.error = _refuse
    if chosen.config == "":
        raise ConfigError("--config: the name of a YAML file is missing behind it")
    known = {entry.name for cls in classes for entry in dataclasses.fields(cls) if entry.init}
    if chosen.config is not None:
        values = _yaml_values(Path(chosen.config), known)
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    *parsed, extra = parser.parse_args_into_dataclasses(args=arguments, return_remaining_strings=True)
    _raise([_unknown_flag(flag, known) for flag in [flag for flag in extra if flag.startswith("--")] or extra])
    return tuple(parsed[: len(classes)])


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"command line or configuration file: {message}; --help lists the flags")


def _unknown_flag(flag: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(flag.lstrip("-").split("=")[0].replace("-", "_"), known, n=1)
    return f"{flag}: unknown flag" + (f": did you mean --{close[0].replace('_', '-')}?" if close else "")


def _yaml_values(path: Path, known: Collection[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: no such configuration file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: has to be one mapping of field names to values")
    problems = []
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help for the names there are"
            problems.append(f"{path}: unknown key {key!r}: {hint}")
    _raise(problems)
    # YAML reads a bare `no` as false; for a strategy it is the word that was meant.
    return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in values.items()}
