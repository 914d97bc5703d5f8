"""The model that comes back from an exported directory, and one that goes on from it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from genrec_llm.backbone import Quantization, load_backbone, quantized
from genrec_llm.directory import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    INFO_FILE,
    MERGED,
    ROWS_FILE,
    TRAINED,
    WEIGHTS_FILE,
    mended,
    open_directory,
    readable,
    tensor_shapes,
)
from genrec_llm.errors import ConfigError, listed
from genrec_llm.model import FAMILIES, GenRecBackbone, IdTokens, add_lora, gathered, id_tokens_of
from genrec_llm.tasks import PromptLayout
from genrec_llm.tokenizer import prompt_layout
from genrec_llm.vocab import IdVocab

_OF_A_RUN = {"r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision"}
"""Settings of PEFT that a run chooses; `add_lora` leaves the others as they are."""
_SAID_BY_PEFT = {"inference_mode", "peft_version", "task_type", "auto_mapping"}
LOST = ("missing_keys", "unexpected_keys", "mismatched_keys")
"""Where `transformers` reports weights that it did not find, and would have filled at random, or did not use."""
_SAMPLE = 64
"""Values of each weight that the fingerprint reads."""


# --- the base ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseModel:
    """The checkpoint that a model was trained from, as genrec.json names it.

    Attributes:
        name, revision: folder or Hub name, and the branch, tag or commit there.
        type: its `model_type`.
        fingerprint: see `fingerprint`; None after full tuning, whose directory holds the whole backbone.
    """

    name: str
    revision: str | None
    type: str
    fingerprint: str | None = None


def fingerprint(model: GenRecBackbone) -> str:
    """sha256 over the names and shapes of all weights of a backbone just loaded, and over a fixed sample of their values.

    A head of its own shows in the names. Values are read as bf16, so that a checkpoint loaded in bf16 and in fp32 gives
    the same. Every process has to call it, since ZeRO-3 has shared the weights out.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        with gathered(weight), torch.no_grad():
            values = weight.detach().flatten()
            sample = values[:: max(1, len(values) // _SAMPLE)][:_SAMPLE].to("cpu", torch.bfloat16)
            digest.update(f"{name} {list(weight.shape)} ".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model from an exported directory, with what its ids mean.

    Attributes:
        info: genrec.json; `rows_sha256` says which id rows a merged model was made from.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    vocab: IdVocab
    layout: PromptLayout
    info: dict[str, Any]


def load_trained(
    folder: Path,
    *,
    backbone: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
) -> Loaded:
    """Load an adapter directory on its freshly loaded base, or full tuning's trained directory.

    Args:
        backbone: where the base is now, when it is not where the adapter says, whose revision is then not asked for.
        quantization: of the base's linear layers. Its fingerprint is taken before: for that time the base is in memory
            as a whole, in bf16.

    Raises:
        ConfigError: the base is another one than the one trained on, or files are lost, cut short or do not fit together.
    """
    info, tokenizer, vocab, layout = open_directory(folder, ADAPTER, TRAINED)
    tensors, metadata = load_file(folder / ROWS_FILE), tensor_shapes(folder / ROWS_FILE)[1]
    base_name, revision = (backbone, None) if backbone else (info["base_model"]["name"], info["base_model"]["revision"])
    if quantization and info["kind"] == TRAINED:
        raise ConfigError(f"{folder}: quantization: full tuning's state is not quantised: merge it, and load {MERGED}/")
    quantizing = quantized(quantization, dtype=dtype, device=device)
    if info["kind"] == ADAPTER:
        whole_dtype = torch.bfloat16 if quantization else dtype
        try:
            model, base_tokenizer = load_backbone(base_name, revision=revision, dtype=whole_dtype)
        except ConfigError as error:
            if backbone:
                raise
            mend = f"{folder}: its adapter was trained on that one: say where it is now, as backbone (--backbone)"
            raise ConfigError([*error.problems, mend]) from error
        there = prompt_layout(base_tokenizer, vocab, max_history=layout.max_history)
        problems = _base_differences(model, there, info, layout, width=tensors["item_in"].shape[1])
        if problems:
            raise ConfigError(
                [
                    f"{folder}: backbone {base_name!r} is not the one it was trained on: {problem}; give that one"
                    for problem in problems
                ]
            )
        lora = _lora_config(folder, info)
        if quantization:
            del model
            with quantization_guard(quantization, device):
                model, _ = load_backbone(base_name, revision=revision, dtype=dtype, **quantizing)
    else:
        config = _config(folder, info)
        own_head, tied_head, _ = FAMILIES[config.model_type]
        has_head = "lm_head.weight" in tensor_shapes(folder / WEIGHTS_FILE)[0]
        model = (own_head if has_head else tied_head)(config).to(dtype)
    if not quantization:
        model.to(device)
    item_out = None if "tied_scale" in metadata else tensors["item_out"]
    model.add_id_tokens(IdTokens(tensors["item_in"], tensors["user_in"], item_out).to(device), layout.base)
    whole: GenRecBackbone | PeftModel = model
    if info["kind"] == ADAPTER:
        whole = add_lora(
            model,
            r=lora.r,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            targets=sorted(lora.target_modules),
            base_name=base_name,
            revision=lora.revision,
        )
    if problems := differences(whole, folder):
        raise ConfigError(problems)
    restore(whole, folder)
    return Loaded(whole.eval(), tokenizer, vocab, layout, info | {"rows_sha256": info["files"][ROWS_FILE]["sha256"]})


def _config(folder: Path, info: Mapping[str, Any]) -> PreTrainedConfig:
    """config.json of a directory that holds a whole backbone."""
    with readable(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != info["base_model"]["type"] or config.model_type not in FAMILIES:
        raise ConfigError(
            mended(
                folder, f"{folder}: is of type {config.model_type!r}, {INFO_FILE} says {info['base_model']['type']!r}"
            )
        )
    return config


def _lora_config(folder: Path, info: Mapping[str, Any]) -> LoraConfig:
    """adapter_config.json, which has to be LoRA as `add_lora` makes it: what else it says would be left out in silence."""
    path = folder / ADAPTER_CONFIG
    with readable(path):
        lora = PeftConfig.from_pretrained(str(folder))
    if not isinstance(lora, LoraConfig):
        raise ConfigError(mended(folder, f"{path}: peft_type is {lora.peft_type}, expected LORA"))
    base, plain = info["base_model"], LoraConfig()
    problems = [
        f"its {key} is {value!r}, {INFO_FILE} says {said!r}"
        for key, value, said in (
            ("base_model_name_or_path", lora.base_model_name_or_path, base["name"]),
            ("revision", lora.revision, base["revision"]),
        )
        if value != said
    ]
    if not isinstance(lora.target_modules, set) or type(lora.r) is not int or lora.r < 1:
        problems.append(
            f"r is {lora.r!r} on {lora.target_modules!r}, expected a number from 1 on and a list of modules"
        )
    problems += [
        f"{key} is {value!r}, expected {getattr(plain, key)!r}"
        for key, value in vars(lora).items()
        if key not in _OF_A_RUN | _SAID_BY_PEFT and value != getattr(plain, key)
    ]
    if problems:
        raise ConfigError([mended(folder, f"{path}: {problem}") for problem in problems])
    return lora


@contextmanager
def quantization_guard(kind: Quantization, device: str | torch.device) -> Iterator[None]:
    """Turn what bitsandbytes or `transformers` raise where a device cannot do it into an error."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise ConfigError(
            f"quantization: bitsandbytes cannot do {kind} for this model on {device} ({str(error).splitlines()[0]}): "
            "choose the other one, another device, or leave quantization out"
        ) from error


def try_quantized(loaded: Loaded, kind: Quantization) -> None:
    """Run a quantised model once: bitsandbytes lays its weights out on the first call, which two threads must not share.

    Raises:
        ConfigError: the device cannot run it.
    """
    layout, model = loaded.layout, loaded.model
    ids = torch.tensor([[layout.eos_id]], device=model.device)
    with quantization_guard(kind, model.device), torch.inference_mode():
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        encoded = inner.get_encoder()(input_ids=ids).last_hidden_state
        inner.get_decoder()(input_ids=ids, encoder_hidden_states=encoded, use_cache=False)


def _base_differences(
    model: GenRecBackbone, there: PromptLayout, info: dict[str, Any], layout: PromptLayout, *, width: int
) -> list[str]:
    base, problems = info["base_model"], []
    if there.base != layout.base:
        problems.append(f"its tokenizer has {there.base} tokens, the adapter was trained on {layout.base}")
    elif (there.mask_ids, there.eos_id, there.pad_id) != (layout.mask_ids, layout.eos_id, layout.pad_id):
        problems.append("its tokenizer has other ids for the mask, end or padding tokens")
    if model.config.d_model != width:
        problems.append(f"its width is {model.config.d_model}, the id rows have {width}")
    if model.config.model_type != base["type"]:
        problems.append(f"it is of type {model.config.model_type}, the adapter of {base['type']}")
    elif model.config.d_model == width and base.get("fingerprint") not in (None, fingerprint(model)):
        problems.append("its weights are others")
    return problems


def load_merged(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
) -> Loaded:
    """Load a merged directory with `transformers`' own classes.

    Args:
        quantization: of the linear layers; the tables of items and users stay as they are.

    Raises:
        ConfigError: not a merged directory, or files are lost, cut short or do not fit together.
    """
    info, tokenizer, vocab, layout = open_directory(folder, MERGED)
    quantizing = quantized(quantization, dtype=dtype or torch.float32, device=device)
    config = _config(folder, info)
    guard = quantization_guard(quantization, device) if quantization else readable(folder)
    with _without_tie_warning(), guard:
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantizing,
        )
    problems = [f"its weights have {key}: {listed(sorted(map(str, report[key])))}" for key in LOST if report[key]]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = [len(table.weight) for table in tables]
    if rows != [layout.vocab_size] * 2:
        problems.append(f"its tables have {rows} rows, {INFO_FILE} says {layout.vocab_size}")
    if problems:
        raise ConfigError([mended(folder, f"{folder}: {problem}") for problem in problems])
    return Loaded(model.eval() if quantization else model.eval().to(device), tokenizer, vocab, layout, info)


@contextmanager
def _without_tie_warning() -> Iterator[None]:
    """Leave out one warning: T5's configuration says in transformers 5 that the head is tied, whatever its file says.

    Loading a T5 with a head of its own is then warned of, with an advice that its config.json already follows
    (transformers 5.23, `T5Config.__post_init__` and `PreTrainedModel.tie_weights`).
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "so we will NOT tie them" not in record.getMessage()

    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


# --- going on ---------------------------------------------------------------------------------------------------------


def differences(model: GenRecBackbone | PeftModel, folder: Path) -> list[str]:
    """Why `model` cannot go on from an exported directory of its kind: other adapters, other tensors; empty if it can."""
    problems = []
    rows, (_, metadata) = id_tokens_of(model), tensor_shapes(folder / ROWS_FILE)
    if ("tied_scale" in metadata) != rows.tied:
        problems.append(f"{folder}: tie_item_rows was {'tied_scale' in metadata} there: set it so here")
    if isinstance(model, PeftModel):
        stored, _ = tensor_shapes(folder / ADAPTER_FILE)
        here = {
            name.replace(".default.", "."): list(getattr(value, "ds_shape", value.shape))
            for name, value in model.named_parameters()
            if ".default." in name and "id_tokens." not in name
        }
        theirs, ours = PeftConfig.from_pretrained(str(folder)), model.peft_config["default"]
        for key in ("r", "lora_alpha"):
            if getattr(theirs, key) != getattr(ours, key):
                problems.append(f"{folder}: {key} was {getattr(theirs, key)}, this run's is {getattr(ours, key)}")
        if set(theirs.target_modules) != set(ours.target_modules):
            problems.append(
                f"{folder}: adapters were on {sorted(theirs.target_modules)}, here {sorted(ours.target_modules)}"
            )
        other = [name for name in {**stored, **here} if stored.get(name) != here.get(name)]
        if other and not problems:
            problems.append(
                mended(folder, f"{folder / ADAPTER_FILE}: has other tensors than its configuration ({listed(other)})")
            )
    else:
        stored, _ = tensor_shapes(folder / WEIGHTS_FILE)
        here = {
            name: list(getattr(value, "ds_shape", value.shape))
            for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        }
        wanted = [name for name, _ in model.named_parameters() if not name.startswith("id_tokens.")]
        other = [name for name in {**stored, **dict.fromkeys(wanted)} if stored.get(name) != here.get(name)]
        if other:
            problems.append(f"{folder}: its backbone has other tensors ({listed(other)}): give the same --backbone")
    return problems


def restore(model: GenRecBackbone | PeftModel, folder: Path) -> None:
    """Copy adapters (or backbone) and rows of an exported directory into a model that has no `differences` from it."""
    tensors, (_, metadata) = load_file(folder / ROWS_FILE), tensor_shapes(folder / ROWS_FILE)
    rows = id_tokens_of(model)
    with torch.no_grad():
        rows.item_in.weight.copy_(tensors["item_in"])
        rows.user_in.weight.copy_(tensors["user_in"])
        if rows.item_out.scale is not None:
            rows.item_out.scale.fill_(float(metadata["tied_scale"]))
        else:
            rows.item_out.weight.copy_(tensors["item_out"])
    if isinstance(model, PeftModel):
        state: dict[str, Tensor] = load_file(folder / ADAPTER_FILE)
        # PEFT asks for what `modules_to_save` names as well.
        state |= {f"base_model.model.id_tokens.{name}": value for name, value in rows.state_dict().items()}
        set_peft_model_state_dict(model, state)
    else:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=False)
