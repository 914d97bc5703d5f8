"""What leaves a run: the adapter directory, the merged directory, and the proof that they say the same.

Adapter: plain PEFT LoRA on the named base, the id rows beside it. Merged: a plain `transformers` checkpoint with the
vocabulary `base tokenizer | items | users`, whose bare `generate` returns the top N after a history. Formats: DESIGN,
"Formats".
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from genrec_llm import __version__
from genrec_llm.batching import as_tensors
from genrec_llm.card.page import write_card
from genrec_llm.decoding import generate_top_n, one_step_scores, top_items
from genrec_llm.directory import ADAPTER, FORMAT_VERSION, INFO_FILE, MERGED, ROWS_FILE, TRAINED, WEIGHTS_FILE
from genrec_llm.errors import ExportError
from genrec_llm.files import atomic_directory, describe_files, read_json, write_json
from genrec_llm.loading import Loaded, load_merged
from genrec_llm.model import GenRecBackbone, id_tokens_of, unwrapped
from genrec_llm.rows import embed_scale, head_scale
from genrec_llm.tasks import PromptLayout
from genrec_llm.vocab import IdVocab

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""How far scores of trained and merged weights may lie apart, as a share of the largest score: adapters beside a weight
round otherwise than added to it, once a layer; fp32 has 24 bits, bf16 has 8."""


def versions() -> dict[str, str]:
    """Versions of what a result depends on; this package need not be installed, it may run from a checkout."""
    names = ("torch", "transformers", "peft", "accelerate")
    return {"genrec-llm": __version__} | {name: importlib.metadata.version(name) for name in names}


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
    write_card(folder, content | {"files": describe_files(folder)})


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
        model and the one-step path of the trained one name the same item, or items that the trained one scores alike
        as far as `ROUNDING` lets one tell), `samples`, `n`.

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
    for key in ("forced_eos_token_id", "forced_bos_token_id", "task_specific_params", "_name_or_path"):
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
        tolerance = ROUNDING[backbone.dtype] * max(1.0, float(expected.abs().max()))
        parity = compare(load_merged(folder), batch, expected, n, tolerance)
        if parity["max_score_difference"] > tolerance or parity["top_n_agreement"] < 1.0:
            raise ExportError(
                f"{out}: the merged model does not say the same as the trained one ({parity}; tolerance "
                f"{tolerance:.3g}); nothing was written. Merge in float32"
            )
        write_card(folder, {**read_json(folder / INFO_FILE), "parity": parity})
    return parity


def _tokenizer_without_users(tokenizer: PreTrainedTokenizerBase, layout: PromptLayout) -> PreTrainedTokenizerBase:
    """The tokenizer with words up to `<user_unknown>`; words can be added to one, but not taken away."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["id"] < layout.vocab_size]
    tokenizer.backend_tokenizer.__setstate__(json.dumps(state).encode())
    return tokenizer


USER_ROWS = {
    "user_in": 0,
    "shared.weight": 0,
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "final_logits_bias": 1,
}
"""Tensors of exported directories whose last rows (along this axis) are the users'."""


def write_without_users(folder: Path, out: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Write those files of an adapter or merged directory that change when its known users are left out.

    Row 0 and the word of `<user_unknown>` stay, so that whoever asks without a user gets the same scores as before.

    Args:
        out: an existing folder; files that hold nothing of users are not written to it.
        info: genrec.json of `folder`.

    Returns:
        What genrec.json is without them.
    """
    layout = PromptLayout.from_dict(info["prompt"]).without_users()
    _tokenizer_without_users(AutoTokenizer.from_pretrained(folder), layout).save_pretrained(out)
    removed = sum(_rows_without_users(path, out / path.name, layout) for path in folder.glob("*.safetensors"))
    if info["kind"] == MERGED:
        write_json(out / "config.json", {**read_json(folder / "config.json"), "vocab_size": layout.vocab_size})
        generation_config(layout).save_pretrained(out)
        index = f"{WEIGHTS_FILE}.index.json"
        if (folder / index).is_file():
            shards = read_json(folder / index)
            shards["metadata"]["total_size"] -= removed
            write_json(out / index, shards)
    return {**info, "prompt": layout.to_dict()}


def _rows_without_users(path: Path, out: Path, layout: PromptLayout) -> int:
    """Write a file of tensors again without the rows of known users, if it has any; bytes of tensors left out."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: USER_ROWS.get(_last_names(name)) for name in file.keys()}  # noqa: SIM118
        if all(axis is None for axis in tensors.values()):
            return 0
        state, removed = {}, 0
        for name, axis in tensors.items():
            state[name] = value = file.get_tensor(name)
            if axis is not None:
                keep = layout.num_user_rows if name == "user_in" else layout.vocab_size
                state[name] = value.narrow(axis, 0, keep).contiguous().clone()
                removed += (value.numel() - state[name].numel()) * value.element_size()
    save_file(state, out, metadata)
    return removed


def _last_names(name: str) -> str:
    """`model.encoder.embed_tokens.weight` → `embed_tokens.weight`; a name without a module stays."""
    return ".".join(name.split(".")[-2:])


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


def compare(merged: Loaded, batch: dict[str, Tensor], expected: Tensor, n: int, tolerance: float) -> dict[str, float]:
    """Parity of a merged model with the scores `[batch, items]` of the model it came from; see `merge`."""
    n = min(n, merged.layout.num_items)
    scores = one_step_scores(merged.model, batch, merged.layout)
    generated, _ = generate_top_n(merged.model, batch, merged.layout, n)
    wanted, values = top_items(expected, n)
    reached = expected.gather(1, generated.clamp(min=0)).masked_fill(generated < 0, -math.inf)
    # Where no score is off by more than the tolerance, items that change places lie within two of it.
    same = (generated == wanted) | ((reached - values).abs() <= 2 * tolerance)
    return {
        "max_score_difference": float((scores - expected).abs().max()),
        "top_n_agreement": float(same.float().mean()),
        "samples": len(expected),
        "n": n,
    }
