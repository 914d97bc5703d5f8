"""The run directory of a stage: what it was started with, its checkpoints, logs and artifacts; and how it is read again."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.baselines.neural import FACTS as RIVAL_FACTS
from genrec_llm.baselines.neural import NeuralRecommender
from genrec_llm.build import Built
from genrec_llm.card.facts import stage_facts
from genrec_llm.card.origins import is_hub_name
from genrec_llm.checkpoints import MANIFEST, any_written, last_complete_checkpoint, needs_joining
from genrec_llm.directory import ADAPTER, MERGED, ROWS_FILE, TRAINED, check_files, read_info, trained_directory
from genrec_llm.encoded import Data, describe_data, read_data
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.export import export_trained
from genrec_llm.files import atomic_file, read_json, sha256_file, write_json, writing
from genrec_llm.guards import validations_without_better
from genrec_llm.hub import check_remote, push_finished
from genrec_llm.model import unwrapped
from genrec_llm.out_of_memory import explained
from genrec_llm.prediction import Estimate, estimate_run
from genrec_llm.processes import ALONE, Processes
from genrec_llm.provenance import provenance
from genrec_llm.sources import SOURCES
from genrec_llm.tasks import last_items_weights
from genrec_llm.trainer import GenRecTrainer
from genrec_llm.vocab import ITEMS_FILE, USERS_FILE, IdVocab
from genrec_llm.world import agree, from_first

RUN_FILE, LOG_FILE, LOCK_FILE = "run.json", "log_history.json", ".training.lock"
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
    "model": (
        "lora_target_modules", "lora_dropout", "dropout", "row_init", "item_vectors", "backbone_revision",
        "last_items_share",
    ),
    "training": (
        "seed", "global_batch_size", "masks_per_sequence", "last_item_probability", "targets", "user_dropout",
        "learning_rate", "rows_learning_rate", "rows_weight_decay", "weight_decay", "warmup_steps", "lr_scheduler_type",
        "num_train_epochs", "max_steps", "from_run", "bf16", "optim", "label_smoothing_factor",
        "sparse_user_rows", "packing", "kernels", "choose_last_items_share",
    ),
}  # fmt: skip
"""Arguments that change what training does, or what it keeps: a run that goes on from a checkpoint keeps them."""
ENDING = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
"""Arguments that say when training ends and which checkpoint is kept: with others a finished run is looked at again."""
_LATER = {"last_items_share": 0.0, "choose_last_items_share": False}
"""Of these, what the run.json of earlier releases has not, and what they did."""


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
            theirs, ours = there["arguments"][part].get(key, _LATER.get(key)), self.facts["arguments"][part][key]
            if theirs != ours:
                problems.append(f"{self.path}: was made with {key} {theirs}, now it is {ours}")
        if problems:
            raise ConfigError([f"{problem}: choose another --output-dir, or remove that run" for problem in problems])

    def train(self, trainer: GenRecTrainer, built: Built) -> None:
        """Note the start, train (from the last whole checkpoint of this run, if there is one), and export the best model.

        What has been trained to its end is left as it is.

        Raises:
            ConfigError: another training writes into this directory, or this one cannot go on from what is there.
        """
        with ExitStack() as stack:
            if not from_first(lambda: self._locked(stack)):
                raise ConfigError(
                    f"{self.path}: another training is writing there: wait for its end, or choose another --output-dir"
                )
            self._agree(trainer)
            done = from_first(self._finished)
            if done is None:
                self._train(trainer, built)
            elif trainer.is_world_process_zero():
                print(f"{self.stage}: was finished before; {done} is as it was", flush=True)
            if trainer.is_world_process_zero():
                pretrained = f"genrec finetune … --from-run {self.path} --output-dir …"
                print(
                    f"Next: {pretrained if self.stage == 'pretrain' else f'genrec merge --run {self.path}'}", flush=True
                )
            if self.training.push_to_hub and trainer.is_world_process_zero():
                push_finished(
                    trained_directory(self.path),
                    str(self.training.hub_model_id),
                    revision=self.training.hub_revision,
                    private=bool(self.training.hub_private_repo),
                    token=self.training.hub_token,
                )

    def _locked(self, stack: ExitStack) -> bool:
        """Whether no other process holds this directory; it is held until the stack closes, or this process ends."""
        place = self.path / LOCK_FILE
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(place.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        if not place.exists() or not os.path.samestat(place.stat(), os.fstat(file.fileno())):
            return False  # of a training that has just ended, and taken it away
        stack.callback(place.unlink, missing_ok=True)
        return True

    def _finished(self) -> Path | None:
        """Where the model is that was trained to its end here, if it and the last checkpoint are whole."""
        facts = read_json(self.path / RUN_FILE) if (self.path / RUN_FILE).is_file() else {}
        if "epochs" not in facts.get("finished", {}):  # not finished, or by an earlier release, which knew less
            return None
        if last_complete_checkpoint(self.path) != str(self.path / f"checkpoint-{facts['finished']['steps']}"):
            return None
        theirs, ours = (each["arguments"]["training"] for each in (facts, self.facts))
        if any(theirs.get(key) != ours[key] for key in ENDING):
            return None
        with suppress(ConfigError, DataError):
            out = trained_directory(self.path)
            check_files(out, read_info(out, ADAPTER, TRAINED))
            if IdVocab.load(self.path).items.equals(self.data.vocab.items):  # with the titles that there are now
                return out
        return None

    def _train(self, trainer: GenRecTrainer, built: Built) -> None:
        launch = trainer.launch
        trainable = sum(getattr(p, "ds_numel", p.numel()) for p in built.model.parameters() if p.requires_grad)
        self.facts |= {"launch": launch, "trainable_parameters": trainable, "row_init": built.row_init}
        if isinstance(built.model, PeftModel):
            self.facts["lora_targets"] = sorted(built.model.peft_config["default"].target_modules)
        resumed = from_first(lambda: last_complete_checkpoint(self.path))
        going_on = self._going_on(Path(resumed), launch) if resumed else ""
        before = read_json(self.path / RUN_FILE) if (self.path / RUN_FILE).is_file() else {}
        if trainer.is_world_process_zero():
            if self.model_args.item_vectors:
                self.facts["item_vectors_sha256"] = sha256_file(self.model_args.item_vectors)
            print(f"{self.stage}: " + ", ".join(f"{name} {value}" for name, value in launch.items()), flush=True)
            print(
                f"{self.data.name}: {len(self.data.train)} users, {self.data.vocab.num_items} items, "
                f"{len(trainer.task.lengths)} examples an epoch; {trainable} trainable parameters; "
                f"item rows {'as that stage left them' if self.training.from_run else f'from {built.row_init}'}{going_on}",
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
                before["arguments"]["training"] |= {name: self.facts["arguments"]["training"][name] for name in ENDING}
                self.facts, finished = before | {"data": self.facts["data"]}, finished | before["finished"]
            layout = built.layout
            if (share := trainer.chosen_share()) is not None:
                finished["last_items_share"] = share
                layout = replace(layout, last_items_weights=last_items_weights(share))
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
                layout=layout,
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


def load_run_data(run: Path, *, data_dir: str | None = None, processes: Processes = ALONE) -> Data:
    """The data set of a run, read again from where it was.

    Args:
        data_dir: where its folder is now, when it has moved; an own file is looked for there by its name.
        processes: as for `load_data`.

    Raises:
        ConfigError: not a run directory, or the files are no longer those that it was trained on.
    """
    return processes.once_a_node(lambda: _read_run_data(run, data_dir), Data.save, Data.open)


def merged_directory(run: Path) -> Path:
    """Where the merged model of a run is.

    Raises:
        ConfigError: not a run directory, or not finished or merged yet.
    """
    _check_run(run)
    if not (run / MERGED).is_dir():
        trained_directory(run)  # which says so where there is nothing to merge
        raise ConfigError(f"{run}: not merged yet: genrec merge --run {run}")
    return run / MERGED


def _check_run(run: Path) -> None:
    if not (run / RUN_FILE).is_file():
        around = f", here {run.parent}" if (run.parent / RUN_FILE).is_file() else ""
        raise ConfigError(f"{run}: no {RUN_FILE}: give the run directory of a pretraining or finetuning{around}")


def _read_run_data(run: Path, data_dir: str | None) -> Data:
    _check_run(run)
    facts = read_json(run / RUN_FILE)
    arguments = facts["arguments"]["data"]
    own = {name: arguments.get(name) for name in ("dataset", "items_file")}
    gone = {name: file for name, file in own.items() if file and file not in SOURCES and not Path(file).is_file()}
    if data_dir:
        moved = {name: str(Path(data_dir) / Path(file).name) for name, file in gone.items()}
        arguments |= {"data_dir": data_dir} | moved
    try:
        data = read_data(DataArguments(**arguments))
    except DataError as error:
        if not gone:
            raise
        mend = f"{run} was trained on it: give its folder, where it is now, as --data-dir"
        raise DataError([*error.problems, mend]) from error
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
