"""The model of a stage: a backbone with id rows and adapters, fresh or with what an earlier stage taught."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from genrec_llm.args import GenRecTrainingArguments, ModelArguments
from genrec_llm.backbone import load_backbone, pinned_revision, quantized, ready_to_train
from genrec_llm.directory import ADAPTER, TRAINED, open_directory, trained_directory
from genrec_llm.encoded import Data
from genrec_llm.errors import ConfigError
from genrec_llm.loading import BaseModel, differences, fingerprint, quantization_guard, restore
from genrec_llm.model import GenRecBackbone, add_lora
from genrec_llm.rows import initial_rows
from genrec_llm.tasks import PromptLayout
from genrec_llm.tokenizer import add_id_words, prompt_layout
from genrec_llm.vectors import read_item_vectors


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
    """Load the backbone, add rows for the data set's items and users, and LoRA unless the whole backbone is tuned.

    What is drawn for them follows from the seed of training.
    """
    if args.last_items_share and training.choose_last_items_share:
        raise ConfigError(
            f"last_items_share: {args.last_items_share}, and choose_last_items_share as well: give --last-items-share 0 or "
            "--choose-last-items-share false"
        )
    set_seed(training.seed)
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
        last_items_share=args.last_items_share,
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


def inherit(built: Built, data: Data, training: GenRecTrainingArguments) -> None:
    """Go on with the adapters and rows of an earlier run, with a fresh optimizer; says what is inherited.

    Raises:
        ConfigError: that run used another backbone, data, ids, prompt or adapters, or is not finished; all at once.
    """
    folder = trained_directory(Path(training.from_run or ""))
    info, _, _, there = open_directory(folder, ADAPTER if isinstance(built.model, PeftModel) else TRAINED)
    problems = []
    for key in ("fingerprint", "vocabulary"):
        if info["data"][key] != getattr(data, key):
            problems.append(
                f"{folder}: was trained on {info['data']['name']} with another {key}; now the data is {data.name}"
            )
    # How items are ranked is no matter of what was trained.
    theirs = replace(there, last_items_weights=built.layout.last_items_weights).to_dict()
    ours = built.layout.to_dict()
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
