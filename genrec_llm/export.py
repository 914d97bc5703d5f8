"""What leaves a run: the adapter directory, the merged directory, and the proof that they say the same.

Adapter: plain PEFT LoRA on the named base, the id rows beside it. Merged: a plain `transformers` checkpoint with the
vocabulary `base tokenizer | items | users`, whose bare `generate` returns the top N. Formats: DESIGN, "Formats".
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from genrec_llm.batching import as_tensors
from genrec_llm.decoding import generate_top_n, one_step_scores, top_items
from genrec_llm.errors import ExportError
from genrec_llm.files import atomic_directory, describe_files, read_json, write_json
from genrec_llm.loading import (
    ADAPTER,
    FORMAT_VERSION,
    INFO_FILE,
    MERGED,
    ROWS_FILE,
    TRAINED,
    WEIGHTS_FILE,
    Loaded,
    load_merged,
)
from genrec_llm.model import GenRecBackbone, id_tokens_of, unwrapped
from genrec_llm.rows import embed_scale, head_scale
from genrec_llm.tasks import PromptLayout
from genrec_llm.vocab import IdVocab

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""How far scores of trained and merged weights may lie apart, as a share of the largest score: adapters beside a weight
round otherwise than added to it, once a layer; fp32 has 24 bits, bf16 has 8."""


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
    write_json(folder / INFO_FILE, content | {"files": describe_files(folder)})
    (folder / "README.md").write_text(_card(kind, content, layout), encoding="utf-8")


def _card(kind: str, info: Mapping[str, Any], layout: PromptLayout) -> str:
    """A minimal card: what it is and how it is used."""
    base = info["base_model"]["name"]
    history, beams = list(range(min(3, layout.num_items))), min(10, layout.num_items)
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
            f"history = {history}  # indices of items.parquet, oldest first",
            f"user = [{layout.first_user_id}]" if layout.user_token else "user = []",
            "ids = torch.tensor([[*user, *(base + item for item in history), mask, end]])",
            "prompt = torch.tensor([[mask, base + history[-1]]])"
            if layout.decoder_prompt == "last-item"
            else "prompt = torch.tensor([[mask]])",
            f"top = model.generate(ids, decoder_input_ids=prompt, num_beams={beams}, num_return_sequences={beams})",
            "print((top[:, -1] - base).tolist())  # indices of items.parquet, best first",
            "```",
            "",
        ]
    return "\n".join(lines)


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
