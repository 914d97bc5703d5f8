"""Training: the Trainer with id rows in a group of their own, ranks as its validation, and whole checkpoints."""

from __future__ import annotations

import logging
import math
import shutil
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, TrainerControl
from transformers.trainer_utils import rotate_checkpoints
from transformers.training_args import OptimizerNames

from genrec_llm.args import GenRecTrainingArguments
from genrec_llm.batching import EpochDataLoader, GlobalBatches, as_tensors, train_loader
from genrec_llm.checkpoints import (
    is_complete,
    join_partitions,
    last_complete_checkpoint,
    needs_joining,
    remove_later,
    write_manifest,
)
from genrec_llm.decoding import mask_seen_, mixed_scores, mixtures, rank_targets, users_at_once
from genrec_llm.errors import ConfigError, ExportError, listed
from genrec_llm.evaluation import EvalData, user_batches
from genrec_llm.files import writing
from genrec_llm.guards import EarlyStopping, Losses, SameWeights, StopOnSignal
from genrec_llm.kernels import quicken
from genrec_llm.metrics import Ranks, hit_rate, ndcg, reciprocal_rank
from genrec_llm.model import id_tokens_of, unwrapped
from genrec_llm.out_of_memory import fitting_accumulation
from genrec_llm.sparse_rows import LazyAdamW, exchange, make_sparse, with_dense_gradients
from genrec_llm.tasks import IGNORED, LAST_ITEMS_SHARES, IntArray, PromptLayout, Task, last_items_weights
from genrec_llm.world import Watch, describe_launch, from_first, leave

logger = logging.getLogger(__name__)
SHARE = "last_items_share"
"""What validation notes the share of the last items under that it chose."""


class GenRecTrainer(Seq2SeqTrainer):
    """Trains on the global batches of a task and validates by full ranking.

    Args:
        model: a `PeftModel` around a `GenRecBackbone`, or the backbone itself.
        args: see `GenRecTrainingArguments`.
        task: examples of the stage.
        layout: how histories become token ids.
        validation: users, histories and targets ranked at every evaluation; None for no validation.

    Raises:
        ConfigError: the launch is not what was asked for, see `describe_launch`, or sparse user rows without users.
    """

    args: GenRecTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: GenRecTrainingArguments,
        *,
        task: Task,
        layout: PromptLayout,
        validation: EvalData | None,
    ) -> None:
        self.task, self.layout = task, layout
        self.masters: dict[str, Tensor] = {}
        self.counted = False
        if args.sparse_user_rows:
            if not layout.user_token:
                raise ConfigError("sparse_user_rows: there are no user rows with --users none: leave it out")
            make_sparse(model, id_tokens_of(model).user_in)
        if args.kernels:
            quicken(model)
        if args.auto_batch_size:
            args.accumulate(fitting_accumulation(model, task, args))
        super().__init__(model=model, args=args, eval_dataset=validation)
        self.launch = describe_launch(args, self.accelerator.state)
        self.watch, self.stop = Watch(args), StopOnSignal()
        self.losses = Losses(self.accelerator, layout.num_items, self._about_batch)
        if args.early_stopping_patience:
            self.add_callback(EarlyStopping(args.early_stopping_patience))
        # The losses are looked at before what a signal asks for is saved.
        for callback in (self.watch, self.stop, self.losses, SameWeights(self.accelerator)):
            self.add_callback(callback)
        unwrapped(model).label_smoothing = args.label_smoothing_factor
        self.label_smoother = None  # the Trainer's asks for logits of token ids; the loss is computed in `forward`

    def get_train_dataloader(self) -> EpochDataLoader:
        """This process's share of the global batches. accelerate must not shard it again, so it is not prepared."""
        return train_loader(
            self.task,
            global_batch_size=self.args.global_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.args.seed,
            packed=self.packed,
            classes=self.args.length_classes,
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    @property
    def packed(self) -> bool:
        """Whether rows of tokens hold several examples each."""
        return self.args.packing and unwrapped(self.model).packs

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `--optim`) with two groups of learning rates: adapters or backbone, and id rows."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decay = set(self.get_decay_parameter_names(model))
        rows = {id(parameter) for parameter in id_tokens_of(model).parameters()}
        sparse = [id_tokens_of(model).user_in.weight] if self.args.sparse_user_rows else []
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or any(parameter is table for table in sparse):
                continue
            if id(parameter) in rows:
                scale = name.endswith("item_out.scale")  # one factor of all scores, no row
                key = (self.args.rows_rate, 0.0 if scale else self.args.rows_weight_decay)
            else:
                key = (self.args.learning_rate, self.args.weight_decay if name in decay else 0.0)
            groups.setdefault(key, []).append(parameter)
        try:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        except ImportError as error:
            raise ConfigError(
                f"optim: {OptimizerNames(self.args.optim).value} needs a package that does not load here ({error}): for "
                "those of bitsandbytes pip install 'genrec-llm[quant]', or leave optim out"
            ) from error
        parts: list[dict[str, Any]] = [
            {"params": part, "lr": rate, "weight_decay": weight} for (rate, weight), part in groups.items()
        ]
        if sparse:
            optimizer_class = LazyAdamW
            parts.append({"params": sparse, "lr": self.args.rows_rate, "weight_decay": 0.0, "fused": False})
        optimizer: torch.optim.Optimizer = optimizer_class(parts, **settings)
        if settings.get("optim_bits") == 8:
            keep_rows_in_32_bits(optimizer, rows)
        self.optimizer = optimizer
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; the loss is looked at where it is, sparse gradients are shared after the last micro-batch."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.args.sparse_user_rows and self.accelerator.sync_gradients:
            exchange(id_tokens_of(self.model).user_in.weight, self.args.world_size)
        self.losses.see(loss * self.args.gradient_accumulation_steps, self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the Trainer's, sparse gradients counted in."""
        if not self.args.sparse_user_rows:
            return super()._clip_grad_norm(model)
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the Trainer's, sparse gradients counted in."""
        if self.args.sparse_user_rows and grad_norm is None:
            grad_norm = self._clipped(model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clipped(self, model: nn.Module, most: float) -> Any:
        return self.accelerator.clip_grad_norm_(list(with_dense_gradients(model.parameters())), most)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """As the Trainer's; the first step is counted over all processes.

        Raises:
            ConfigError: its examples are not those of the global batch.
        """
        samples, targets = super().get_batch_samples(*args, **kwargs)
        if not self.counted:
            self.counted = True
            labels = [batch["labels"].view(len(batch["labels"]), -1) for batch in samples]
            filled = sum(int((of_batch != IGNORED).any(dim=1).sum()) for of_batch in labels)
            here = torch.tensor(filled, device=self.args.device)
            step = self.state.global_step + 1
            got, wanted = int(self.accelerator.reduce(here, "sum")), len(self._examples(step))
            if got != wanted:
                raise ConfigError(
                    f"launch: the processes were given {got} examples in step {step}, whose global batch has {wanted}: "
                    "something shares the batches out a second time; launch with a file of accelerate_configs/"
                )
        return samples, targets

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """As the Trainer's, which asks all processes: those that have no batch yet are told apart from here on."""
        self.watch.progress = self.state.global_step + 0.5
        if self.args.world_size > 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        # Counted on the host, and sent from there as batches are.
        return self._prepare_input(super()._get_num_items_in_batch(batch_samples, torch.device("cpu")))

    def _prepare_input(self, data: Any) -> Any:
        """As the Trainer's, which at each tensor of a batch waits until the GPU has done all it was asked before.

        Nobody writes into a batch, so that nothing has to wait until it was copied.
        """
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _run_epoch(self, **settings: Any) -> None:
        """As the Trainer's, which would make one more step of a run that goes on from its last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**settings)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which with one checkpoint to keep would delete the last: a run is exported after this."""
        with self._keeping_all():
            return super()._finalize_training(*args, **kwargs)

    def _examples(self, step: int) -> IntArray:
        """The global batch of a step, counted from 1."""
        batches = GlobalBatches(
            self.task.lengths, self.args.global_batch_size, seed=self.args.seed, shares=1, alike=not self.packed
        )
        epoch, place = divmod(step - 1, batches.steps)
        return batches.epoch(epoch)[place]

    def _about_batch(self, step: int) -> str:
        """Whose histories were in a step, by row, and what to do; no raw id."""
        users = self.task.user_rows(self._examples(step))
        good = last_complete_checkpoint(Path(self.args.output_dir))
        return (
            f"its batch holds the histories of the user rows {listed(map(str, users))} (users.parquet says whose they are). "
            f"Nothing was saved since; the last good checkpoint is {good or 'none yet'}. Try a lower --learning-rate or "
            "--rows-learning-rate, more --warmup-steps, or fp32, in another --output-dir"
        )

    # --- validation ---------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: EvalData | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank every validation user once over all processes, seen items removed. Only ranks are gathered, no scores.

        Where the share of the last items is to be chosen, it is the one with the best NDCG@10, and noted as a metric.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        chosen = {}
        if self.args.choose_last_items_share:
            of_shares = self._rank(data, LAST_ITEMS_SHARES)
            best = int(np.argmax([ndcg(ranks, 10).mean() for ranks in of_shares]))
            ranks, chosen = of_shares[best], {f"{metric_key_prefix}_{SHARE}": LAST_ITEMS_SHARES[best]}
        else:
            ranks = self.rank(data)
        values = {f"hit_rate@{k}": hit_rate(ranks, k) for k in (5, 10)} | {f"ndcg@{k}": ndcg(ranks, k) for k in (5, 10)}
        values["mrr"] = reciprocal_rank(ranks)
        metrics = {f"{metric_key_prefix}_{name}": float(value.mean()) for name, value in values.items()} | chosen
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def rank(self, data: EvalData, *, exclude_seen: bool = True) -> Ranks:
        """Ranks of the targets by the one-step path; every process gets all of them, in the order of `data`.

        The batches follow from the data and their size alone, so that ranks do not depend on the number of processes.
        """
        return self._rank(data, None, exclude_seen=exclude_seen)[0]

    def chosen_share(self) -> float | None:
        """The share of the last items that validation chose for the kept model, the best or the last; None for none."""
        noted = {entry["step"]: entry[f"eval_{SHARE}"] for entry in self.state.log_history if f"eval_{SHARE}" in entry}
        if not noted:
            return None
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return noted[max(noted) if best is None else best]

    def _rank(self, data: EvalData, shares: Sequence[float] | None, *, exclude_seen: bool = True) -> list[Ranks]:
        """As `rank`, for each share of the last items, or for that of the layout alone."""
        layout = self.layout
        if shares:  # of these weights only the proportions count
            layout = replace(layout, last_items_weights=last_items_weights(0.5))
        model = self._wrap_model(self.model_wrapped, training=False)
        if not self.is_in_train and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        world, me = self.args.world_size, self.args.process_index
        most = users_at_once(data.num_items, self.args.per_device_eval_batch_size)
        batches = user_batches(data, np.arange(len(data.targets)), most)
        counts = torch.zeros(len(shares) if shares else 1, 2, len(data.targets), dtype=torch.long)

        def score(histories: Sequence[IntArray], users: IntArray) -> Tensor:
            return model(**self._prepare_inputs(as_tensors(self.layout.encode_histories(histories, users)))).logits

        for first in range(0, len(batches), world):
            # Under ZeRO-3 every process takes part in every forward: those without a batch left repeat one, uncounted.
            users = batches[(first + me) % len(batches)]
            asked = [data.histories[user] for user in users], data.users[users]
            targets, found = torch.from_numpy(data.targets[users]).to(self.args.device), []
            with torch.no_grad():
                ranked = mixtures(score, layout, shares, *asked) if shares else [mixed_scores(score, layout, *asked)]
                for scores in ranked:
                    if exclude_seen:
                        mask_seen_(scores, [data.seen[user] for user in users])
                    found.append(torch.stack(rank_targets(scores, targets)))
            if first + me < len(batches):
                counts[:, :, torch.from_numpy(users)] = torch.stack(found).cpu()
        whole = self.accelerator.reduce(counts.to(self.args.device), "sum").cpu().numpy()
        return [Ranks(better=better, tied=tied, candidates=data.num_items) for better, tied in whole]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; under DeepSpeed in bf16 the fp32 masters are saved, not the bf16 copies that compute."""
        self.masters = fp32_masters(self.model) if self.is_deepspeed_enabled and self.args.bf16 else {}
        super().save_model(output_dir, _internal_call)
        self.masters = {}

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: the Trainer would push checkpoints, user rows and all. `RunDirectory.train` pushes the adapter."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Nothing; see `init_hf_repo`."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing; see `init_hf_repo`."""

    @contextmanager
    def _reading(self, checkpoint: str | None) -> Iterator[None]:
        """Have DeepSpeed read a checkpoint in its universal form where another number of processes wrote it."""
        universal = checkpoint is not None and needs_joining(Path(checkpoint), self.launch)
        if universal and self.is_world_process_zero():
            join_partitions(Path(str(checkpoint)))
        self.accelerator.wait_for_everyone()
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["checkpoint"] = {"load_universal": universal}  # for an engine that is made inside
            if self.deepspeed is not None:  # for the one that there is
                self.deepspeed._config.load_universal_checkpoint = universal
        yield

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As the Trainer's, which resumes here."""
        with self._reading(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As the Trainer's; the best checkpoint may be older than the processes."""
        with self._reading(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's, but for further names of a tied weight, which a file holds once."""
        missing = set(load_result.missing_keys)
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        read = {id(weight) for name, weight in weights.items() if name not in missing}
        lost = [name for name in load_result.missing_keys if id(weights.get(name)) not in read]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=lost))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The best checkpoint is looked for in this run alone, whatever path it had when the state was saved."""
        done = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            whole = from_first(lambda: is_complete(best))
            if not whole:
                logger.warning("%s, the best so far, is gone or broken; a later one has to be better", best)
            self.state.best_model_checkpoint = str(best) if whole else None
            self.state.best_global_step = self.state.best_global_step if whole else None
        return done

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained tensors: PEFT's files for an adapter, one safetensors file for full tuning.

        Raises:
            ExportError: a tensor was not gathered, holds no numbers, or the disk is full.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            state_dict = {name: self.masters.get(name, value) for name, value in state_dict.items()}
        empty = [
            name for name, value in (state_dict or {}).items() if not value.numel() and ".original_module" not in name
        ]
        if empty:
            raise ExportError(f"{folder}: these tensors were not gathered whole from all processes: {', '.join(empty)}")
        poisoned = [name for name, value in self._trained(state_dict).items() if not value.isfinite().all()]
        if poisoned:
            raise ExportError(
                f"{folder}: after step {self.state.global_step} tensors hold NaN or infinite values and are not saved: "
                f"{listed(poisoned)}. {self._about_batch(max(1, self.state.global_step))}"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(self.model, PeftModel):
                # "auto" would add the backbone's embedding tables for a base that came from a folder (PEFT 0.21).
                self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            else:
                state = unshared(state_dict or self.model.state_dict())
                save_file(state, folder / "model.safetensors", {"format": "pt"})

    @contextmanager
    def _keeping_all(self) -> Iterator[None]:
        """Have the Trainer delete no checkpoint: it does not know which are whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _trained(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The trained tensors of a gathered state, or of the model."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        trained = {name: value for name, value in named.items() if value.requires_grad}
        return trained if state_dict is None else {name: state_dict[name] for name in trained if name in state_dict}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint counts only with its manifest, which the first process writes when all others are done.

        Older checkpoints go only then, so that one that is whole is there at any time. After a signal to stop the run ends
        here.

        Raises:
            ExportError: it cannot be written whole.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # what a stopped run left of it
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        try:
            with writing(folder), self._keeping_all():
                super()._save_checkpoint(model, trial)
        except ExportError as error:
            error.alone = True  # each process writes files of its own
            raise
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_manifest(folder, self.launch)
            remove_later(folder.parent, self.state.global_step)
            rotate_checkpoints(
                self.args.output_dir, limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=False
            )
        self.accelerator.wait_for_everyone()
        if self.stop.stopping:
            if self.is_world_process_zero():
                print(f"stopped by SIGTERM; {folder} is whole, and the same command goes on from it", flush=True)
            self.finish(128 + signal.SIGTERM)

    def finish(self, code: int = 0) -> None:
        """End the run on every process, with an exit code."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        leave(code, at_once=self.args.world_size > 1 and self.args.device.type == "cpu")


def keep_rows_in_32_bits(optimizer: torch.optim.Optimizer, rows: Collection[int]) -> None:
    """Leave the state of id rows unquantised in an 8-bit optimizer of bitsandbytes, as the Trainer does for embeddings.

    Most rows of a step have no gradient, so that a block of 256 values shares one scale between rows just seen and rows
    long not seen.

    Args:
        rows: `id()` of the rows' parameters.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Said of each one: the manager goes by id(), which a parameter of an earlier run may have had.
            manager.override_config(parameter, "optim_bits", 32 if id(parameter) in rows else 8)


def fp32_masters(model: nn.Module) -> dict[str, Tensor]:
    """DeepSpeed's fp32 values of the trained parameters, on the CPU, tied ones under each of their names.

    A collective: every process has to call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    values = {
        parameter: safe_get_full_fp32_param(parameter).cpu()
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    named = model.named_parameters(remove_duplicate=False)
    return {name: values[parameter] for name, parameter in named if parameter in values}


def unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under its first name: safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    return {
        name: value.detach().contiguous()
        for name, value in state_dict.items()
        if not (value.data_ptr() in seen or seen.add(value.data_ptr()))  # type: ignore[func-returns-value]
    }
