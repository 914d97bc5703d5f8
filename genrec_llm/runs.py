"""From arguments to a run: the data and model of a stage, and the run directory that remembers them."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.baselines.neural import FACTS as RIVAL_FACTS
from genrec_llm.baselines.neural import NeuralRecommender
from genrec_llm.card.facts import stage_facts
from genrec_llm.card.origins import is_hub_name
from genrec_llm.checkpoints import MANIFEST, any_written, last_complete_checkpoint, needs_joining
from genrec_llm.data import Interactions, leave_last_two_out
from genrec_llm.errors import ConfigError, counted
from genrec_llm.evaluation import EvalData
from genrec_llm.export import export_trained, versions
from genrec_llm.files import atomic_file, read_json, sha256_file, write_json
from genrec_llm.guards import validations_without_better
from genrec_llm.hub import check_remote, push_finished
from genrec_llm.loading import (
    ADAPTER,
    MERGED,
    ROWS_FILE,
    TRAINED,
    BaseModel,
    differences,
    fingerprint,
    open_directory,
    quantization_guard,
    read_info,
    restore,
    trained_directory,
)
from genrec_llm.model import (
    GenRecBackbone,
    add_id_words,
    add_lora,
    load_backbone,
    pinned_revision,
    prompt_layout,
    quantized,
    ready_to_train,
    unwrapped,
)
from genrec_llm.out_of_memory import explained
from genrec_llm.prediction import Estimate, estimate_run
from genrec_llm.privacy import redacted
from genrec_llm.processes import ALONE, Processes
from genrec_llm.rows import initial_rows
from genrec_llm.sources import SOURCES, load_interactions
from genrec_llm.tasks import PromptLayout, Sequences
from genrec_llm.trainer import GenRecTrainer
from genrec_llm.vectors import read_item_vectors
from genrec_llm.vocab import ITEMS_FILE, USERS_FILE, IdVocab
from genrec_llm.world import agree, from_first

logger = logging.getLogger(__name__)
RUN_FILE, LOG_FILE = "run.json", "log_history.json"
SEQUENCES_FILE = "sequences.arrow"
HELD_OUT = ("validation", "test")
MODEL_SHAPE = (
    "backbone",
    "backbone_init",
    "tuning",
    "quantization",
    "lora_r",
    "lora_alpha",
    "tie_item_rows",
    "decoder_prompt",
)
"""Model arguments that two runs in one directory may never differ in."""
COURSE = {
    "data": ("max_history",),
    "model": ("lora_target_modules", "lora_dropout", "dropout", "row_init", "item_vectors", "backbone_revision"),
    "training": (
        "seed", "global_batch_size", "masks_per_sequence", "last_item_probability", "targets", "user_dropout",
        "learning_rate", "rows_learning_rate", "rows_weight_decay", "weight_decay", "warmup_steps", "lr_scheduler_type",
        "num_train_epochs", "max_steps", "from_run", "bf16", "optim", "label_smoothing_factor",
        "sparse_user_rows", "packing", "kernels",
    ),
}  # fmt: skip
"""Arguments that change what training does: a run that goes on from a checkpoint keeps them."""


@dataclass(frozen=True)
class Data:
    """A data set with its ids encoded."""

    name: str
    fingerprint: str
    vocab: IdVocab
    train: Sequences
    splits: dict[str, Sequences]
    targets: dict[str, np.ndarray]
    max_history: int

    @property
    def vocabulary(self) -> str:
        """Fingerprint of the ids."""
        return self.vocab.fingerprint

    def held_out(self, split: str, *, sample: int = 0) -> EvalData:
        """Users, histories and targets of "validation" or "test"; a fixed random sample of users if asked for."""
        sequences, targets = self.splits[split], self.targets[split]
        chosen = np.arange(len(sequences))
        if 0 < sample < len(chosen):
            chosen = np.sort(np.random.default_rng(0).permutation(len(chosen))[:sample])
        histories = [sequences[int(user)] for user in chosen]
        return EvalData(
            users=sequences.users[chosen],
            histories=histories,
            seen=histories,
            targets=targets[chosen],
            num_items=self.vocab.num_items,
            item_counts=np.bincount(self.train.items, minlength=self.vocab.num_items),
            split=split,
            dataset=self.name,
            fingerprint=self.fingerprint,
            max_history=self.max_history,
        )

    def save(self, folder: Path) -> None:
        """Write it into a folder, for `open`. Raw user ids are among it: the folder has to stay home."""
        columns = {"user": pa.array(self.train.users)}
        for name, part in {"train": self.train, **self.splits}.items():
            columns[name] = pa.LargeListArray.from_arrays(part.offsets, part.items)
        columns |= {f"{name} target": pa.array(targets) for name, targets in self.targets.items()}
        facts = {"name": self.name, "fingerprint": self.fingerprint, "max_history": self.max_history}
        # Neither compressed nor in several batches: what is read is what is mapped.
        batch = pa.record_batch(columns).replace_schema_metadata({b"genrec": json.dumps(facts).encode()})
        with pa.ipc.new_file(str(folder / SEQUENCES_FILE), batch.schema) as file:
            file.write_batch(batch)
        self.vocab.save_items(folder / ITEMS_FILE)
        self.vocab.save_users(folder / USERS_FILE)

    @classmethod
    def open(cls, folder: Path) -> Data:
        """Map what `save` wrote: arrays are read-only views of the file's pages, which all processes share.

        The folder may go; the pages stay until the last process that maps them ends (on a POSIX system).
        """
        batch = pa.ipc.open_file(pa.memory_map(str(folder / SEQUENCES_FILE))).get_batch(0)
        users = batch["user"].to_numpy()

        def sequences(name: str) -> Sequences:
            lists = batch[name]
            return Sequences(lists.values.to_numpy(), lists.offsets.to_numpy(), users)

        return cls(
            **json.loads(batch.schema.metadata[b"genrec"]),
            vocab=IdVocab.load(folder),
            train=sequences("train"),
            splits={name: sequences(name) for name in HELD_OUT},
            targets={name: batch[f"{name} target"].to_numpy() for name in HELD_OUT},
        )


def load_data(args: DataArguments, processes: Processes = ALONE) -> Data:
    """Read, split and encode the interactions that the arguments name; the same arguments give the same ids.

    Args:
        processes: all of which call this. One a node reads; the others map what it has found.
    """
    return processes.once_a_node(lambda: _read_data(args), Data.save, Data.open)


def _read_data(args: DataArguments) -> Data:
    interactions = load_interactions(
        args.dataset,
        data_dir=args.data_dir,
        user_column=args.user_column,
        item_column=args.item_column,
        time_column=args.time_column,
        items_path=args.items_file,
        k_core=args.k_core,
        drop_duplicates=args.drop_duplicates,
        shuffle_ties=args.shuffle_ties,
    )
    return encode_data(interactions, args)


def encode_data(interactions: Interactions, args: DataArguments) -> Data:
    """Split interactions and encode their ids, as the arguments say.

    Raises:
        DataError: users have fewer than 3 interactions.
    """
    splits = leave_last_two_out(interactions)
    vocab = IdVocab.build(
        interactions.catalogue,
        splits["train"]["user"],
        seed=args.id_seed,
        user_mode=args.users,  # type: ignore[arg-type]  # its __post_init__ has checked it
        user_buckets=args.user_buckets,
    )
    return Data(
        name=interactions.name,
        fingerprint=interactions.fingerprint(),
        vocab=vocab,
        train=Sequences.encode(splits["train"], vocab, "items"),
        splits={name: Sequences.encode(splits[name], vocab, "history") for name in HELD_OUT},
        targets={name: vocab.encode_items(splits[name]["target"]) for name in HELD_OUT},
        max_history=args.max_history,
    )


@dataclass(frozen=True)
class Built:
    """A model ready to train."""

    model: PeftModel | GenRecBackbone
    tokenizer: PreTrainedTokenizerBase
    layout: PromptLayout
    base: BaseModel
    row_init: str


def _quantized_backbone(
    args: ModelArguments, training: GenRecTrainingArguments, revision: str | None, dtype: torch.dtype
) -> tuple[GenRecBackbone, PreTrainedTokenizerBase, str]:
    """A backbone quantised on this process's device, its tokenizer, and the fingerprint of the weights that it came from.

    The fingerprint is what an adapter asks of its base, which others load unquantised. For the time that it takes, the
    weights are in memory in bf16.

    Raises:
        ConfigError: the launch shares weights out, bitsandbytes is absent or cannot do it on this device.
    """
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ConfigError(
            f"quantization: {args.quantization} weights are whole in each process, where ZeRO-3 and FSDP share weights "
            "out: launch with ddp or zero2, or leave quantization out"
        )
    kind: Any = args.quantization
    quantizing = quantized(kind, dtype=dtype, device=training.device)
    whole, tokenizer = load_backbone(args.backbone, revision=revision, dtype=torch.bfloat16)
    base_fingerprint = fingerprint(whole)
    del whole
    with quantization_guard(kind, training.device):
        model, _ = load_backbone(args.backbone, revision=revision, dtype=dtype, dropout=args.dropout, **quantizing)
    ready_to_train(model)
    return model, tokenizer, base_fingerprint


def build_model(args: ModelArguments, training: GenRecTrainingArguments, data: Data) -> Built:
    """Load the backbone, add rows for the data set's items and users, and LoRA unless the whole backbone is tuned."""
    revision = pinned_revision(args.backbone, args.backbone_revision)
    dtype = torch.bfloat16 if training.bf16 and args.tuning == "lora" else torch.float32
    base_fingerprint: str | None
    if args.quantization:
        model, tokenizer, base_fingerprint = _quantized_backbone(args, training, revision, dtype)
    else:
        model, tokenizer = load_backbone(
            args.backbone, init=args.backbone_init, revision=revision, dtype=dtype, dropout=args.dropout
        )
        base_fingerprint = fingerprint(model) if args.tuning == "lora" else None
    base = BaseModel(name=args.backbone, revision=revision, type=model.config.model_type, fingerprint=base_fingerprint)
    layout = prompt_layout(
        tokenizer,
        data.vocab,
        max_history=data.max_history,
        decoder_prompt=args.decoder_prompt,  # type: ignore[arg-type]
    )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < data.max_history + 3:
        raise ConfigError(
            f"max_history: {data.max_history} items and three more tokens do not fit the {positions} positions of "
            f"{args.backbone}: at most {positions - 3}"
        )
    rows, method = initial_rows(
        model,
        tokenizer,
        data.vocab,
        layout,
        data.train,
        method=args.row_init,  # type: ignore[arg-type]
        vectors=read_item_vectors(args.item_vectors, data.vocab) if args.item_vectors else None,
        pretrained=args.backbone_init == "pretrained",
        tie=args.tie_item_rows,
        seed=training.seed,
    )
    model.add_id_tokens(rows.to(model.device), layout.base)  # quantised layers are on their device already
    add_id_words(tokenizer, data.vocab)
    if args.tuning == "full":
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.get_output_embeddings().requires_grad_(False)  # a head that no score passes through
        return Built(model, tokenizer, layout, base, method)
    adapted = add_lora(
        model,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=args.lora_target_modules,
        base_name=args.backbone,
        revision=revision,
    )
    return Built(adapted, tokenizer, layout, base, method)


def git_commit() -> str | None:
    """Commit of the checkout that runs, with "+changes" where it has any.

    Outside git, or installed in another's, what the environment variable GENREC_COMMIT says, or None.
    """
    folder, here = Path(__file__).parent, Path(__file__).name
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", here], cwd=folder, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GENREC_COMMIT")
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def hardware() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}, {platform.machine()}"


def provenance() -> dict[str, Any]:
    """What made a number: command, commit, versions, hardware, time (UTC)."""
    return {
        "command": redacted(sys.argv),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_data(data: Data, args: DataArguments) -> dict[str, Any]:
    """Facts about a data set that go with every model of it: its size and protocol; no path, no user id."""
    held_out = sum(len(targets) for targets in data.targets.values())
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "vocabulary": data.vocabulary,
        "public": args.dataset in SOURCES,
        "users": len(data.train),
        "items": data.vocab.num_items,
        "items_without_training_interactions": int(data.vocab.num_items - len(np.unique(data.train.items))),
        "interactions": len(data.train.items) + held_out,
        "k_core": args.k_core,
        "split": "leave-last-two-out",
        "max_history": data.max_history,
        "text_columns": [name for name in data.vocab.items if name not in ("index", "item")],
    }


class TrainingClock(TrainerCallback, ExportableState):
    """Seconds of training over all sessions of a run: each checkpoint remembers those up to it.

    What a stopped session did after its last checkpoint is done again, and counts once.
    """

    def __init__(self) -> None:
        self.earlier, self.start = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Up to now."""
        return self.earlier + time.monotonic() - self.start

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(
        self, args: GenRecTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what the checkpoint remembers, if it does."""
        stored: dict[str, Any] = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.earlier, self.start = stored["attributes"]["seconds"], time.monotonic()


class RunDirectory:
    """`runs/<name>/`: what a stage was started with, its checkpoints, logs and artifacts.

    Args:
        stage: "pretrain" or "finetune".

    Raises:
        ConfigError: the directory holds a run of another data set, catalogue, stage or backbone, or checkpoints that
            were trained with other settings.
    """

    def __init__(
        self,
        stage: str,
        data: Data,
        data_args: DataArguments,
        model_args: ModelArguments,
        training: GenRecTrainingArguments,
    ) -> None:
        self.path, self.stage, self.data, self.model_args, self.training = (
            Path(training.output_dir), stage, data, model_args, training,
        )  # fmt: skip
        self.facts: dict[str, Any] = {
            "stage": stage,
            **provenance(),
            "data": describe_data(data, data_args),
            "arguments": {
                "data": asdict(data_args),
                "model": asdict(model_args),
                "training": training.to_dict(),
            },
        }
        self._refuse_another()
        if training.push_to_hub:
            self._refuse_push()

    def _refuse_push(self) -> None:
        """Refuse now what would be refused when the finished adapter is pushed."""
        base, name = self.model_args.backbone, str(self.training.hub_model_id)
        if self.model_args.tuning == "full":
            raise ConfigError(
                "push_to_hub: full tuning leaves no adapter: leave it out here, and give it to recipes/merge.py"
            )
        if not is_hub_name(base):
            raise ConfigError(
                f"push_to_hub: backbone {base!r} is a folder that nobody else has: give its Hub name as --backbone, or "
                f"leave --push-to-hub out and use `genrec push {self.path / ADAPTER} {name} --base-model org/name` then"
            )
        if self.training.process_index == 0:
            check_remote(
                name,
                revision=self.training.hub_revision,
                private=bool(self.training.hub_private_repo),
                base_model=base,
                token=self.training.hub_token,
            )

    def _refuse_another(self) -> None:
        if not (self.path / RUN_FILE).is_file():
            return
        there = read_json(self.path / RUN_FILE)
        problems = []
        if there["stage"] != self.stage:
            problems.append(f"{self.path}: holds a {there['stage']} run, this is {self.stage}")
        for key in ("fingerprint", "vocabulary"):
            if there["data"][key] != self.facts["data"][key]:
                problems.append(
                    f"{self.path}: was made from {there['data']['name']} ({key} {there['data'][key][:12]}), now the data is "
                    f"{self.data.name} ({key} {self.facts['data'][key][:12]})"
                )
        kept = [("model", key) for key in MODEL_SHAPE]
        if any_written(self.path):
            kept += [(part, key) for part, keys in COURSE.items() for key in keys]
        for part, key in kept:
            theirs, ours = there["arguments"][part].get(key), self.facts["arguments"][part][key]
            if theirs != ours:
                problems.append(f"{self.path}: was made with {key} {theirs}, now it is {ours}")
        if problems:
            raise ConfigError([f"{problem}: choose another --output-dir, or remove that run" for problem in problems])

    def train(self, trainer: GenRecTrainer, built: Built) -> None:
        """Note the start, train (from the last whole checkpoint of this run, if there is one), and export the best model."""
        launch = trainer.launch
        self._agree(trainer)
        trainable = sum(getattr(p, "ds_numel", p.numel()) for p in built.model.parameters() if p.requires_grad)
        self.facts |= {"launch": launch, "trainable_parameters": trainable, "row_init": built.row_init}
        if self.model_args.item_vectors:
            self.facts["item_vectors_sha256"] = sha256_file(self.model_args.item_vectors)
        if isinstance(built.model, PeftModel):
            self.facts["lora_targets"] = sorted(built.model.peft_config["default"].target_modules)
        resumed = from_first(lambda: last_complete_checkpoint(self.path))
        going_on = self._going_on(Path(resumed), launch) if resumed else ""
        before = read_json(self.path / RUN_FILE) if (self.path / RUN_FILE).is_file() else {}
        if trainer.is_world_process_zero():
            print(f"{self.stage}: " + ", ".join(f"{name} {value}" for name, value in launch.items()), flush=True)
            print(
                f"{self.data.name}: {len(self.data.train)} users, {self.data.vocab.num_items} items, "
                f"{len(trainer.task.lengths)} examples an epoch; {trainable} trainable parameters; "
                f"item rows from {built.row_init}{going_on}",
                flush=True,
            )
            write_json(self.path / RUN_FILE, self.facts)
            self.data.vocab.save_items(self.path / ITEMS_FILE)
            self.data.vocab.save_users(self.path / USERS_FILE)
        clock, stages = TrainingClock(), self._earlier_stages()
        trainer.add_callback(clock)
        if resumed and self.training.early_stopping_patience:
            state = read_json(Path(resumed) / TRAINER_STATE_NAME)
            if validations_without_better(state["log_history"], self.training) >= self.training.early_stopping_patience:
                self.training.max_steps = state["global_step"]  # it had stopped: no step is left
        figures = partial(self._estimate, trainer, built)
        with trainer.watch, explained(figures, self.training.process_index):
            trainer.train(resume_from_checkpoint=resumed)
            best = self._best(trainer)
            trainer.save_model(str(self.path / "final"))
            trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            out = self.path / (ADAPTER if isinstance(built.model, PeftModel) else TRAINED)
            finished = {
                "seconds": round(clock.seconds, 1),
                "steps": trainer.state.global_step,
                "epochs": round(trainer.state.epoch or 0.0, 2),
                "best": best,
            }
            if resumed == str(self.path / f"checkpoint-{finished['steps']}") and "finished" in before:
                # No step was left: what it was made by stays, as far as it was written down then.
                self.facts, finished = before | {"data": self.facts["data"]}, finished | before["finished"]
            self.facts |= {"finished": finished}
            info = {
                "stage": self.stage,
                "base_model": asdict(built.base),
                "data": self.facts["data"],
                "training": [*stages, stage_facts(self.facts)],
                "metrics": {"validation_ndcg@10": best},
                "seed": self.training.seed,
                "id_seed": self.data.vocab.seed,
                "user_mode": self.data.vocab.user_mode,
                "user_buckets": self.data.vocab.user_buckets,
            }
            export_trained(
                self.path / "final",
                out,
                model=built.model,
                tokenizer=built.tokenizer,
                vocab=self.data.vocab,
                layout=built.layout,
                info=info,
            )
            shutil.rmtree(self.path / "final")
            write_json(self.path / LOG_FILE, trainer.state.log_history)
            write_json(self.path / RUN_FILE, self.facts)
            shown = "not measured" if best is None else f"{best:.4f}"
            print(
                f"{self.stage}: best validation NDCG@10 {shown}; {finished['steps']} steps; written to {out}",
                flush=True,
            )
            if self.training.push_to_hub:
                push_finished(
                    out,
                    str(self.training.hub_model_id),
                    revision=self.training.hub_revision,
                    private=bool(self.training.hub_private_repo),
                    token=self.training.hub_token,
                )

    def _estimate(self, trainer: GenRecTrainer, built: Built) -> Estimate:
        """What this run takes of memory, by the architecture of its model."""
        launch, lengths = trainer.launch, trainer.task.lengths
        strategy = f"zero{launch['zero_stage']}" if "zero_stage" in launch else launch["strategy"].lower()
        named = {"no": "single_gpu" if torch.cuda.is_available() else "cpu", "fsdp": "fsdp2", "zero0": "ddp"}
        named |= {"multi_gpu": "ddp", "multi_cpu": "ddp", "zero3": "zero3_offload" if "offload" in launch else "zero3"}
        around = 3  # user, mask and end
        return estimate_run(
            unwrapped(built.model).config.to_dict(),
            self.model_args,
            self.training,
            items=self.data.vocab.num_items,
            user_rows=self.data.vocab.num_user_rows,
            longest=int(lengths.max()) + around,
            mean_length=float(lengths.mean()) + around,
            strategy=named.get(strategy, strategy),
            processes=self.training.world_size,
            targets=self.training.masks_per_sequence if self.stage == "pretrain" else 1,
        )

    def _going_on(self, checkpoint: Path, launch: dict[str, Any]) -> str:
        """What is said about the checkpoint that training goes on from.

        Raises:
            ConfigError: this launch cannot go on from it.
        """
        needs_joining(checkpoint, launch)
        before = read_json(checkpoint / MANIFEST)["launch"]["world_size"]
        changed = f", written by a run of world size {before}: the same examples, other draws of dropout"
        return f"; going on from {checkpoint}" + (changed if before != launch["world_size"] else "")

    def _best(self, trainer: GenRecTrainer) -> float | None:
        """What the best checkpoint is worth, after it was loaded.

        Raises:
            ConfigError: it is not there any more.
        """
        best = trainer.state.best_metric
        if self.training.load_best_model_at_end and best is not None and trainer.state.best_model_checkpoint is None:
            raise ConfigError(
                f"{self.path}: its best checkpoint (validation {self.training.metric_for_best_model} {best}) is gone or "
                "broken, and no later one was better: bring it back, or choose another --output-dir or remove that run"
            )
        return best

    def _agree(self, trainer: GenRecTrainer) -> None:
        """Refuse processes that were started with something else, or on a node that does not see the run directory."""
        of_process = ("local_rank", "logging_dir", "use_cpu", "hub_token")
        training = {key: value for key, value in self.facts["arguments"]["training"].items() if key not in of_process}
        agree(
            {
                "commit": self.facts["commit"],
                "versions": self.facts["versions"],
                "data": self.facts["data"]["fingerprint"],
                "vocabulary": self.facts["data"]["vocabulary"],
                "model arguments": self.facts["arguments"]["model"],
                "training arguments": training,
            }
        )
        mark = self.path / ".seen-by-all"
        if trainer.is_world_process_zero():
            with atomic_file(mark) as temporary:
                temporary.write_text(f"{time.time_ns()}", encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
        agree({f"a mark in {self.path}": mark.read_text(encoding="utf-8") if mark.is_file() else "not there"})
        if trainer.is_world_process_zero():
            mark.unlink()

    def _earlier_stages(self) -> list[dict[str, Any]]:
        """Facts of the stages that this one went on from, earliest first."""
        if not self.training.from_run:
            return []
        info = read_info(trained_directory(Path(self.training.from_run)), ADAPTER, TRAINED)
        return list(info.get("training", []))


def inherit(built: Built, data: Data, training: GenRecTrainingArguments) -> None:
    """Go on with the adapters and rows of an earlier run, with a fresh optimizer; says what is inherited.

    Raises:
        ConfigError: that run used another backbone, data, ids, prompt or adapters, or is not finished; all at once.
    """
    folder = trained_directory(Path(training.from_run or ""))
    info, *_ = open_directory(folder, ADAPTER if isinstance(built.model, PeftModel) else TRAINED)
    problems = []
    for key in ("fingerprint", "vocabulary"):
        if info["data"][key] != getattr(data, key):
            problems.append(
                f"{folder}: was trained on {info['data']['name']} with another {key}; now the data is {data.name}"
            )
    theirs, ours = info["prompt"], built.layout.to_dict()
    problems += [
        f"{folder}: its prompt has {key} {theirs[key]}, this run's {ours[key]}"
        for key in ours
        if theirs[key] != ours[key]
    ]
    problems = [f"{problem}: give the same data and prompt settings as in pretraining" for problem in problems]
    base = info["base_model"]
    if base["type"] != built.base.type or base.get("fingerprint") not in (None, built.base.fingerprint):
        problems.append(
            f"{folder}: was trained on backbone {base['name']!r}, whose weights are not those of {built.base.name!r}: "
            "give the same --backbone"
        )
    problems += differences(built.model, folder)
    if problems:
        raise ConfigError(problems)
    restore(built.model, folder)
    if training.process_index == 0:
        # On another quantization too: adapters fit one base within its rounding, and training takes that up.
        quantization = info["training"][-1]["settings"].get("quantization") if info.get("training") else None
        weights = f"trained on {quantization} weights, " if quantization else ""
        print(
            f"finetune: weights and rows from {folder} ({info['stage']}, seed {info['seed']}, {weights}validation NDCG@10 "
            f"{info['metrics']['validation_ndcg@10']}); fresh optimizer, learning rate {training.learning_rate:g} "
            f"(rows {training.rows_rate:g})",
            flush=True,
        )


def load_run_data(run: Path, *, data_dir: str | None = None, processes: Processes = ALONE) -> Data:
    """The data set of a run, read again from where it was.

    Args:
        data_dir: where its folder is now, when it has moved.
        processes: as for `load_data`.

    Raises:
        ConfigError: not a run directory, or the files are no longer those that it was trained on.
    """
    return processes.once_a_node(lambda: _read_run_data(run, data_dir), Data.save, Data.open)


def _read_run_data(run: Path, data_dir: str | None) -> Data:
    if not (run / RUN_FILE).is_file():
        raise ConfigError(f"{run}: no {RUN_FILE}: give the run directory of a pretraining or finetuning")
    facts = read_json(run / RUN_FILE)
    arguments = facts["arguments"]["data"] | ({"data_dir": data_dir} if data_dir else {})
    data = _read_data(DataArguments(**arguments))
    problems = [
        f"{run}: its data had {key} {facts['data'][key][:12]}, {arguments['dataset']} now has {getattr(data, key)[:12]}"
        for key in ("fingerprint", "vocabulary")
        if facts["data"][key] != getattr(data, key)
    ]
    if problems:
        raise ConfigError([f"{problem}: bring the files back that it was trained on" for problem in problems])
    return data


def check_merged(run: Path, info: dict[str, Any], data: Data) -> None:
    """Refuse to measure a merged model that is not this run's: made from another adapter, an earlier one, other data.

    Args:
        info: genrec.json of the merged directory.
        data: of the run.

    Raises:
        ConfigError: what differs, all at once.
    """
    merged, trained = run / MERGED, trained_directory(run)
    problems = [
        f"{merged}: was made on {info['data']['name']} with another {key} than the data of {run}"
        for key in ("fingerprint", "vocabulary")
        if info["data"][key] != getattr(data, key)
    ]
    if info.get("rows_sha256") != sha256_file(trained / ROWS_FILE):
        problems.append(f"{merged}: was not made from {trained} as it is now")
    if problems:
        raise ConfigError([f"{problem}: run recipes/merge.py --run {run} first" for problem in problems])


def open_rivals(folders: Sequence[str], data: Data) -> tuple[list[NeuralRecommender], dict[str, dict[str, Any]]]:
    """Trained rivals, and by name what made each: seed, seconds of training, command, commit, hardware.

    Raises:
        ConfigError: a folder holds none, one was trained on other data or other ids, or two have one name; all at once.
    """
    problems, rivals, made = [], [], {}
    for folder in map(Path, folders):
        if not (folder / RIVAL_FACTS).is_file():
            problems.append(
                f"rivals: {folder} has no {RIVAL_FACTS}: train one with tools/rivals.py, or wait for its end"
            )
            continue
        facts = read_json(folder / RIVAL_FACTS)
        wanted = {"fingerprint": data.fingerprint, "vocabulary": data.vocab.without_users().fingerprint}
        if other := [name for name, value in wanted.items() if facts[name] != value]:
            problems.append(f"rivals: {folder} was trained on {facts['dataset']} with another {' and '.join(other)}")
        elif facts["name"] in made:
            problems.append(f"rivals: {folder}: there is a {facts['name']} already: name one of a kind")
        else:
            rivals.append(NeuralRecommender.load(folder))
            made[facts["name"]] = {"seed": facts["settings"]["seed"]} | {
                name: facts[name] for name in ("seconds", "command", "commit", "hardware")
            }
    if problems:
        raise ConfigError(problems)
    return rivals, made
