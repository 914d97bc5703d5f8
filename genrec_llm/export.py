"""What leaves a run: the adapter directory, the merged directory, and the proof that they say the same.

Adapter: plain PEFT LoRA on the named base, the id rows beside it. Merged: a plain `transformers` checkpoint with the
vocabulary `base tokenizer | items | users`, whose bare `generate` returns the top N. Formats: DESIGN, "Formats".
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from genrec_llm.batching import as_tensors
from genrec_llm.decoding import generate_top_n, one_step_scores, top_items
from genrec_llm.errors import ConfigError, ExportError
from genrec_llm.files import atomic_directory, read_json, write_json
from genrec_llm.model import (
    FAMILIES,
    GenRecBackbone,
    IdTokens,
    add_lora,
    id_tokens_of,
    load_backbone,
    unwrapped,
)
from genrec_llm.rows import embed_scale, head_scale
from genrec_llm.tasks import PromptLayout
from genrec_llm.vocab import IdVocab

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
ROWS_FILE = "id_tokens.safetensors"
WEIGHTS_FILE = "model.safetensors"
INFO_FILE = "genrec.json"
ADAPTER, TRAINED, MERGED = "adapter", "trained", "merged"
"""Directory names in a run, and the `kind` in their genrec.json. "trained" is full tuning's state, not for sharing."""


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("genrec-llm", "torch", "transformers", "peft", "accelerate")
    return {name: importlib.metadata.version(name) for name in names}


# --- writing ----------------------------------------------------------------------------------------------------------


def export_trained(
    checkpoint: Path,
    out: Path,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vocab: IdVocab,
    layout: PromptLayout,
    info: Mapping[str, Any],
) -> None:
    """Turn the tensors that `Trainer.save_model` wrote to `checkpoint` into an adapter (or, full tuning, trained) directory.

    Args:
        model: the trained model; only its kind and configuration are read, so that partitioned weights do not matter.
        tokenizer: with the id words.
        info: goes into genrec.json: base model, data, metrics, seed.

    Raises:
        ExportError: a tensor is missing or not finite, or the directory cannot be written.
    """
    lora = isinstance(model, PeftModel)
    rows = id_tokens_of(model)
    state = load_file(checkpoint / ("adapter_model.safetensors" if lora else WEIGHTS_FILE))
    trained_rows = {name.split("id_tokens.")[-1]: value for name, value in state.items() if "id_tokens." in name}
    rest = {name: value for name, value in state.items() if "id_tokens." not in name}
    bad = [name for name, value in state.items() if not value.numel() or not torch.isfinite(value).all()]
    if bad:
        raise ExportError(
            f"{checkpoint}: empty or not finite: {', '.join(bad)}; train again with a lower learning rate"
        )
    item_in = trained_rows["item_in.weight"].float()
    scale = trained_rows["item_out.scale"].float() if rows.tied else None
    tensors = {
        "item_in": item_in,
        "item_out": trained_rows["item_out.weight"].float() if scale is None else item_in * scale,
        "user_in": trained_rows["user_in.weight"].float(),
    }
    with atomic_directory(out) as folder:
        save_file(tensors, folder / ROWS_FILE, {} if scale is None else {"tied_scale": repr(float(scale))})
        if lora:
            save_file(rest, folder / "adapter_model.safetensors", {"format": "pt"})
            config = json.loads((checkpoint / "adapter_config.json").read_text())
            write_json(folder / "adapter_config.json", {**config, "modules_to_save": None})
        else:
            save_file(rest, folder / WEIGHTS_FILE, {"format": "pt"})
            unwrapped(model).config.save_pretrained(folder)
        _write_common(folder, ADAPTER if lora else TRAINED, tokenizer, vocab, layout, info)


def _write_common(
    folder: Path,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab: IdVocab,
    layout: PromptLayout,
    info: Mapping[str, Any],
) -> None:
    tokenizer.save_pretrained(folder)
    vocab.without_users().save_items(folder / "items.parquet")
    content = {
        "format_version": FORMAT_VERSION,
        **info,
        "kind": kind,
        "prompt": layout.to_dict(),
        "versions": versions(),
    }
    write_json(folder / INFO_FILE, content)
    (folder / "README.md").write_text(_card(kind, content, layout), encoding="utf-8")


def _card(kind: str, info: Mapping[str, Any], layout: PromptLayout) -> str:
    """A minimal card: what it is and how it is used."""
    base = info["base_model"]["name"]
    lines = [
        "---",
        "library_name: " + ("peft" if kind == ADAPTER else "transformers"),
        "tags: [recommendation, sequential-recommendation, genrec]",
        "---",
        f"# Sequential recommender on {base} ({kind})",
        "",
        f"{layout.num_items} items as new tokens; data set {info['data']['name']}; made with genrec_llm.",
        "",
    ]
    if kind == MERGED:
        lines += [
            "With `transformers` alone: `input_ids` are item tokens, oldest first, then the mask and the end; the decoder "
            "starts with the mask and the last item.",
            "",
            "```python",
            "import torch",
            "from transformers import AutoModelForSeq2SeqLM",
            "",
            'model = AutoModelForSeq2SeqLM.from_pretrained(".").eval()',
            f"base, mask, end = {layout.base}, {layout.mask_ids[0]}, {layout.eos_id}",
            "history = [0, 1, 2]  # indices of items.parquet, oldest first",
            f"user = [{layout.first_user_id}]" if layout.user_token else "user = []",
            "ids = torch.tensor([[*user, *(base + item for item in history), mask, end]])",
            "prompt = torch.tensor([[mask, base + history[-1]]])"
            if layout.decoder_prompt == "last-item"
            else "prompt = torch.tensor([[mask]])",
            "top = model.generate(ids, decoder_input_ids=prompt, num_beams=10, num_return_sequences=10)",
            "print((top[:, -1] - base).tolist())  # indices of items.parquet, best first",
            "```",
            "",
        ]
    return "\n".join(lines)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_info(folder: Path, *kinds: str) -> dict[str, Any]:
    """genrec.json of a directory.

    Raises:
        ConfigError: not a directory of one of `kinds`, or of another format version.
    """
    if not (folder / INFO_FILE).is_file():
        raise ConfigError(
            f"{folder}: no {INFO_FILE}: not a directory that genrec_llm exported; expected one of {kinds}"
        )
    info = read_json(folder / INFO_FILE)
    if info["format_version"] != FORMAT_VERSION:
        raise ConfigError(f"{folder}: format version {info['format_version']}, this genrec_llm reads {FORMAT_VERSION}")
    if info["kind"] not in kinds:
        raise ConfigError(f"{folder}: holds a model of kind {info['kind']!r}, expected {' or '.join(kinds)}")
    return info


def trained_directory(run: Path) -> Path:
    """The adapter (or full tuning's trained) directory of a finished run.

    Raises:
        ConfigError: the run has none.
    """
    for kind in (ADAPTER, TRAINED):
        if (run / kind / INFO_FILE).is_file():
            return run / kind
    raise ConfigError(f"{run}: holds no finished model ({ADAPTER}/ or {TRAINED}/): finish its training first")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: not readable ({error}): the file is missing or was cut short; copy it again"
        ) from error


def restore(model: GenRecBackbone | PeftModel, folder: Path) -> None:
    """Continue from an exported directory: copy its adapters (or backbone) and rows into `model`.

    Raises:
        ConfigError: rank, alpha, targets, rows or prompt differ from what `model` has; all differences at once.
    """
    lora = isinstance(model, PeftModel)
    read_info(folder, ADAPTER if lora else TRAINED)
    tensors, metadata = _read_tensors(folder / ROWS_FILE)
    rows, tied = id_tokens_of(model), "tied_scale" in metadata
    problems = []
    for name, table in (("item_in", rows.item_in), ("user_in", rows.user_in)):
        if tensors[name].shape != (table.num_embeddings, table.embedding_dim):
            problems.append(f"{folder}: {name} is {list(tensors[name].shape)}, this run's {list(table.weight.shape)}")
    if tied != rows.tied:
        problems.append(f"{folder}: tie_item_rows was {tied} there: set it so here")
    if lora:
        theirs, ours = PeftConfig.from_pretrained(str(folder)), model.peft_config["default"]
        for key in ("r", "lora_alpha"):
            if getattr(theirs, key) != getattr(ours, key):
                problems.append(f"{folder}: {key} was {getattr(theirs, key)}, this run's is {getattr(ours, key)}")
        if set(theirs.target_modules) != set(ours.target_modules):
            problems.append(
                f"{folder}: adapters were on {sorted(theirs.target_modules)}, here {sorted(ours.target_modules)}"
            )
    if problems:
        raise ConfigError(problems)
    with torch.no_grad():
        rows.item_in.weight.copy_(tensors["item_in"])
        rows.user_in.weight.copy_(tensors["user_in"])
        if rows.item_out.scale is not None:
            rows.item_out.scale.fill_(float(metadata["tied_scale"]))
        else:
            rows.item_out.weight.copy_(tensors["item_out"])
    if lora:
        state, _ = _read_tensors(folder / "adapter_model.safetensors")
        # PEFT asks for what `modules_to_save` names as well.
        state |= {f"base_model.model.id_tokens.{name}": value for name, value in rows.state_dict().items()}
        set_peft_model_state_dict(model, state)
    else:
        state, _ = _read_tensors(folder / WEIGHTS_FILE)
        model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class Loaded:
    """A model from an exported directory, with what its ids mean."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    vocab: IdVocab
    layout: PromptLayout
    info: dict[str, Any]


def _identity(folder: Path) -> tuple[PreTrainedTokenizerBase, IdVocab, PromptLayout]:
    layout = PromptLayout.from_dict(read_json(folder / INFO_FILE)["prompt"])
    return AutoTokenizer.from_pretrained(folder), IdVocab.load(folder), layout


def load_trained(folder: Path, *, backbone: str | None = None, dtype: torch.dtype = torch.float32) -> Loaded:
    """Load an adapter directory on its freshly loaded base, or full tuning's trained directory.

    Args:
        backbone: where the base is now, when it is not where the adapter says.

    Raises:
        ConfigError: the base has another vocabulary or width than the one trained on, or files are cut short.
    """
    info = read_info(folder, ADAPTER, TRAINED)
    tokenizer, vocab, layout = _identity(folder)
    tensors, metadata = _read_tensors(folder / ROWS_FILE)
    base_name = backbone or info["base_model"]["name"]
    if info["kind"] == ADAPTER:
        model, base_tokenizer = load_backbone(base_name, revision=info["base_model"]["revision"], dtype=dtype)
        problems = []
        if len(base_tokenizer) != layout.base:
            problems.append(f"its tokenizer has {len(base_tokenizer)} tokens, the adapter was trained on {layout.base}")
        if model.config.d_model != tensors["item_in"].shape[1]:
            problems.append(f"its width is {model.config.d_model}, the id rows have {tensors['item_in'].shape[1]}")
        if model.config.model_type != info["base_model"]["type"]:
            problems.append(f"it is of type {model.config.model_type}, the adapter of {info['base_model']['type']}")
        if problems:
            raise ConfigError(
                [f"{folder}: backbone {base_name!r} is not the one it was trained on: {p}" for p in problems]
            )
    else:
        config = AutoConfig.from_pretrained(folder)
        model = FAMILIES[config.model_type][0](config).to(dtype)
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
    restore(whole, folder)
    return Loaded(whole.eval(), tokenizer, vocab, layout, info)


def load_merged(folder: Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """Load a merged directory with `transformers`' own classes."""
    info = read_info(folder, MERGED)
    tokenizer, vocab, layout = _identity(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    return Loaded(model, tokenizer, vocab, layout, info)


# --- merging ----------------------------------------------------------------------------------------------------------


def merged_state(model: GenRecBackbone, layout: PromptLayout) -> dict[str, Tensor]:
    """Weights of the plain checkpoint: rows of items and users behind the base tokenizer's, adapters already merged.

    A scale that the backbone applies around its tables (T5's d^-0.5 before a tied head, BART's embedding scale) is
    folded, since the merged model's head and embedding are untied and unscaled for all rows alike.
    """
    rows, dtype = model.id_tokens, model.dtype
    base_in = model.get_input_embeddings().weight[: layout.base]
    base_out = model.get_output_embeddings().weight[: layout.base]
    scale = embed_scale(model)
    embedding = torch.cat([base_in, (rows.item_in.weight / scale).to(dtype), (rows.user_in.weight / scale).to(dtype)])
    head = torch.cat(
        [
            base_out * head_scale(model),
            rows.item_out.rows().to(dtype),
            torch.zeros_like(rows.user_in.weight, dtype=dtype),
        ]
    )
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("id_tokens.") and not name.endswith("embed_tokens.weight")
    }
    state["lm_head.weight"] = head
    if model.config.model_type == "bart":
        for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
            state[f"model.{name}.weight"] = embedding.clone()
        bias = torch.full((1, layout.vocab_size), -1e4, dtype=dtype)
        bias[:, layout.base : layout.base + layout.num_items] = 0.0
        state["final_logits_bias"] = bias
    else:
        state["shared.weight"] = embedding
    return {name: value.detach().contiguous() for name, value in state.items()}


def merge(
    trained: Loaded, out: Path, *, without_users: bool = False, samples: int = 64, n: int = 20
) -> dict[str, float]:
    """Write the merged directory, load it again with plain `transformers`, and compare the two models.

    Args:
        trained: from `load_trained`, whose adapters are merged in place.
        without_users: leave the rows of known users out.
        samples: seeded random histories that are compared.
        n: length of the compared lists.

    Returns:
        The parity: `max_score_difference`, `top_n_agreement` (share of positions where the bare `generate` of the merged
        model and the one-step path of the trained one name the same item, or items whose scores differ by less than the
        largest difference), `samples`, `n`.

    Raises:
        ExportError: parity is above tolerance, or the directory cannot be written.
    """
    layout, model = trained.layout, trained.model
    if without_users:
        layout = layout.without_users()
        rows = id_tokens_of(model)
        rows.user_in = nn.Embedding.from_pretrained(rows.user_in.weight[:1].detach().clone())
    batch = sample_batch(layout, samples)
    with torch.no_grad():
        expected = model(**batch).logits
    backbone = model.merge_and_unload() if isinstance(model, PeftModel) else unwrapped(model)
    state = merged_state(backbone, layout)
    config = {
        **backbone.config.to_dict(),
        "architectures": [type(backbone).__mro__[2].__name__],
        "vocab_size": layout.vocab_size,
        "tie_word_embeddings": False,
        "decoder_start_token_id": layout.mask_ids[0],
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    if "t5" in backbone.config.model_type:
        config["scale_decoder_outputs"] = False
    for key in ("forced_eos_token_id", "forced_bos_token_id", "task_specific_params"):
        config.pop(key, None)
    words = trained.tokenizer
    if without_users:
        words = _tokenizer_without_users(words, layout)
    with atomic_directory(out) as folder:
        save_torch_state_dict(state, folder, max_shard_size="5GB")
        write_json(folder / "config.json", config)
        generation_config(layout).save_pretrained(folder)
        info = {key: value for key, value in trained.info.items() if key not in ("kind", "prompt", "versions")}
        _write_common(folder, MERGED, words, trained.vocab, layout, info)
        parity = compare(load_merged(folder), batch, expected, n)
        tolerance = 1e-3 if backbone.dtype == torch.float32 else 0.05
        largest = float(expected.abs().max())
        if parity["max_score_difference"] > tolerance * max(1.0, largest) or parity["top_n_agreement"] < 1.0:
            raise ExportError(
                f"{out}: the merged model does not say the same as the trained one ({parity}; tolerance "
                f"{tolerance:g} of the largest score {largest:.3g}); nothing was written. Merge in float32"
            )
        write_json(folder / INFO_FILE, {**read_json(folder / INFO_FILE), "parity": parity})
    return parity


def _tokenizer_without_users(tokenizer: PreTrainedTokenizerBase, layout: PromptLayout) -> PreTrainedTokenizerBase:
    """The tokenizer with words up to `<user_unknown>`; words can be added to one, but not taken away."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["id"] < layout.vocab_size]
    tokenizer.backend_tokenizer.__setstate__(json.dumps(state).encode())
    return tokenizer


def sample_batch(layout: PromptLayout, samples: int) -> dict[str, Tensor]:
    """Token ids of seeded random histories of all lengths up to the longest that is read."""
    random = np.random.default_rng(0)
    lengths = np.linspace(1, layout.max_history, samples).round().astype(np.int64)
    histories = [random.integers(0, layout.num_items, length) for length in lengths]
    users = random.integers(0, layout.num_user_rows, samples)
    return as_tensors(layout.encode_histories(histories, users))


def generation_config(layout: PromptLayout) -> GenerationConfig:
    """A bare `generate(ids, decoder_input_ids=prompt, num_beams=N, num_return_sequences=N)` then gives the top N."""
    items = range(layout.base, layout.base + layout.num_items)
    return GenerationConfig(
        max_new_tokens=1,
        decoder_start_token_id=layout.mask_ids[0],
        pad_token_id=layout.pad_id,
        eos_token_id=layout.eos_id,
        suppress_tokens=[token for token in range(layout.vocab_size) if token not in items],
    )


def compare(merged: Loaded, batch: dict[str, Tensor], expected: Tensor, n: int) -> dict[str, float]:
    """Parity of a merged model with the scores `[batch, items]` of the model it came from; see `merge`."""
    n = min(n, merged.layout.num_items)
    scores = one_step_scores(merged.model, batch, merged.layout)
    difference = float((scores - expected).abs().max())
    generated, _ = generate_top_n(merged.model, batch, merged.layout, n)
    wanted, values = top_items(expected, n)
    reached = expected.gather(1, generated.clamp(min=0)).masked_fill(generated < 0, -math.inf)
    agreement = float(((generated == wanted) | ((reached - values).abs() <= 2 * difference)).float().mean())
    return {
        "max_score_difference": difference,
        "top_n_agreement": agreement,
        "samples": len(expected),
        "n": n,
    }
