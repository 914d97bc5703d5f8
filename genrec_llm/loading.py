"""What comes back from an exported directory: its model, and the problems where its files do not fit together.

Every file is compared with what was exported before a library reads it: a lost, cut or changed one is named, and never
replaced in silence. Nothing is unpickled, and no code comes with a model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from genrec_llm.errors import ConfigError, DataError, listed
from genrec_llm.files import changed_files, read_json, sha256_file
from genrec_llm.model import (
    FAMILIES,
    GenRecBackbone,
    IdTokens,
    add_lora,
    gathered,
    id_tokens_of,
    load_backbone,
    prompt_layout,
)
from genrec_llm.tasks import PromptLayout
from genrec_llm.vocab import ITEMS_FILE, IdVocab

FORMAT_VERSION = 1
INFO_FILE = "genrec.json"
ROWS_FILE = "id_tokens.safetensors"
WEIGHTS_FILE = "model.safetensors"
ADAPTER, TRAINED, MERGED = "adapter", "trained", "merged"
"""Directory names in a run, and the `kind` in their genrec.json. "trained" is full tuning's state, not for sharing."""

LOADABLE = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py")
"""Endings of files that a library might load in place of those that were exported."""
_SAMPLE = 64
"""Values of each weight that the fingerprint reads."""


# --- the directory ----------------------------------------------------------------------------------------------------


def trained_directory(run: Path) -> Path:
    """The adapter (or full tuning's trained) directory of a finished run.

    Raises:
        ConfigError: the run has none.
    """
    for kind in (ADAPTER, TRAINED):
        if (run / kind).is_dir():
            return run / kind
    raise ConfigError(f"{run}: holds no finished model ({ADAPTER}/ or {TRAINED}/): finish its training first")


def read_info(folder: Path, *kinds: str) -> dict[str, Any]:
    """genrec.json of a directory.

    Raises:
        ConfigError: not a directory of one of `kinds`, or of another format version.
    """
    if not (folder / INFO_FILE).is_file():
        raise ConfigError(
            f"{folder}: no {INFO_FILE}: not a directory that genrec_llm exported, or the file was lost: "
            f"give one that has it ({', '.join(f'{kind}/' for kind in kinds)} of a run)"
        )
    try:
        info = read_json(folder / INFO_FILE)
    except DataError as error:
        raise ConfigError(_mended(folder, error)) from error
    if info.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{folder}: format version {info.get('format_version')}, this genrec_llm reads {FORMAT_VERSION}"
        )
    if info["kind"] not in kinds:
        raise ConfigError(f"{folder}: holds a model of kind {info['kind']!r}, expected {' or '.join(kinds)}")
    return info


def check_files(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a directory that is not as it was exported: files lost, cut short, changed, or weights and code put there.

    Args:
        info: its genrec.json.

    Raises:
        ConfigError: every such file.
    """
    listed = info.get("files", {})
    problems = changed_files(folder, listed) if listed else [f"{folder / INFO_FILE}: does not list its files"]
    problems += [
        f"{path}: is none of the exported files"
        for path in sorted(folder.iterdir())
        if path.name not in listed and path.name.endswith(LOADABLE)
    ]
    if problems:
        raise ConfigError([_mended(folder, problem) for problem in problems])


def _mended(folder: Path, problem: object) -> str:
    return f"{problem}; copy it again, or make {folder} anew"


def _shapes(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of a file's tensors and its metadata; no tensor is read."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _check_together(
    folder: Path, kind: str, tokenizer: PreTrainedTokenizerBase, vocab: IdVocab, layout: PromptLayout
) -> None:
    """Refuse files that are whole, but of another catalogue than genrec.json."""
    problems = []
    if vocab.num_items != layout.num_items:
        problems.append(f"{ITEMS_FILE} has {vocab.num_items} items, {INFO_FILE} says {layout.num_items}")
    if len(tokenizer) != layout.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, {INFO_FILE} says {layout.vocab_size}")
    if kind != MERGED:
        shapes, _ = _shapes(folder / ROWS_FILE)
        width = shapes.get("item_in", [0, 0])[-1]
        rows = {"item_in": layout.num_items, "item_out": layout.num_items, "user_in": layout.num_user_rows}
        problems += [
            f"{name} in {ROWS_FILE} is {shapes.get(name, 'absent')}, by {INFO_FILE} it is {[count, width]}"
            for name, count in rows.items()
            if shapes.get(name) != [count, width]
        ]
    if problems:
        raise ConfigError(
            [f"{folder}: {problem}: its files come from several models; copy it again" for problem in problems]
        )


def open_directory(folder: Path, *kinds: str) -> tuple[dict[str, Any], PreTrainedTokenizerBase, IdVocab, PromptLayout]:
    """Everything of a directory but its weights: genrec.json, tokenizer, items and prompt, all checked.

    Raises:
        ConfigError: not a directory of one of `kinds`, or files are lost, cut short or do not fit together.
    """
    info = read_info(folder, *kinds)
    check_files(folder, info)
    tokenizer, vocab = AutoTokenizer.from_pretrained(folder), IdVocab.load(folder)
    layout = PromptLayout.from_dict(info["prompt"])
    _check_together(folder, info["kind"], tokenizer, vocab, layout)
    return info, tokenizer, vocab, layout


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


def load_trained(folder: Path, *, backbone: str | None = None, dtype: torch.dtype = torch.float32) -> Loaded:
    """Load an adapter directory on its freshly loaded base, or full tuning's trained directory.

    Args:
        backbone: where the base is now, when it is not where the adapter says.

    Raises:
        ConfigError: the base is another one than the one trained on, or files are lost, cut short or do not fit together.
    """
    info, tokenizer, vocab, layout = open_directory(folder, ADAPTER, TRAINED)
    tensors, metadata = load_file(folder / ROWS_FILE), _shapes(folder / ROWS_FILE)[1]
    base_name, revision = backbone or info["base_model"]["name"], info["base_model"]["revision"]
    if info["kind"] == ADAPTER:
        model, base_tokenizer = load_backbone(base_name, revision=revision, dtype=dtype)
        there = prompt_layout(base_tokenizer, vocab, max_history=layout.max_history)
        problems = _base_differences(model, there, info, layout, width=tensors["item_in"].shape[1])
        if problems:
            raise ConfigError(
                [f"{folder}: backbone {base_name!r} is not the one it was trained on: {p}" for p in problems]
            )
    else:
        config = AutoConfig.from_pretrained(folder)
        own_head, tied_head, _ = FAMILIES[config.model_type]
        has_head = "lm_head.weight" in _shapes(folder / WEIGHTS_FILE)[0]
        model = (own_head if has_head else tied_head)(config).to(dtype)
    item_out = None if "tied_scale" in metadata else tensors["item_out"]
    model.add_id_tokens(IdTokens(tensors["item_in"], tensors["user_in"], item_out), layout.base)
    whole: GenRecBackbone | PeftModel = model
    if info["kind"] == ADAPTER:
        lora = PeftConfig.from_pretrained(str(folder))
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
    return Loaded(whole.eval(), tokenizer, vocab, layout, info | {"rows_sha256": sha256_file(folder / ROWS_FILE)})


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


def load_merged(folder: Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """Load a merged directory with `transformers`' own classes.

    Raises:
        ConfigError: not a merged directory, or files are lost, cut short or do not fit together.
    """
    info, tokenizer, vocab, layout = open_directory(folder, MERGED)
    with _without_tie_warning():
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    return Loaded(model, tokenizer, vocab, layout, info)


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
    rows, (_, metadata) = id_tokens_of(model), _shapes(folder / ROWS_FILE)
    if ("tied_scale" in metadata) != rows.tied:
        problems.append(f"{folder}: tie_item_rows was {'tied_scale' in metadata} there: set it so here")
    if isinstance(model, PeftModel):
        theirs, ours = PeftConfig.from_pretrained(str(folder)), model.peft_config["default"]
        for key in ("r", "lora_alpha"):
            if getattr(theirs, key) != getattr(ours, key):
                problems.append(f"{folder}: {key} was {getattr(theirs, key)}, this run's is {getattr(ours, key)}")
        if set(theirs.target_modules) != set(ours.target_modules):
            problems.append(
                f"{folder}: adapters were on {sorted(theirs.target_modules)}, here {sorted(ours.target_modules)}"
            )
    else:
        stored, _ = _shapes(folder / WEIGHTS_FILE)
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
    tensors, (_, metadata) = load_file(folder / ROWS_FILE), _shapes(folder / ROWS_FILE)
    rows = id_tokens_of(model)
    with torch.no_grad():
        rows.item_in.weight.copy_(tensors["item_in"])
        rows.user_in.weight.copy_(tensors["user_in"])
        if rows.item_out.scale is not None:
            rows.item_out.scale.fill_(float(metadata["tied_scale"]))
        else:
            rows.item_out.weight.copy_(tensors["item_out"])
    if isinstance(model, PeftModel):
        state: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
        # PEFT asks for what `modules_to_save` names as well.
        state |= {f"base_model.model.id_tokens.{name}": value for name, value in rows.state_dict().items()}
        set_peft_model_state_dict(model, state)
    else:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=False)
