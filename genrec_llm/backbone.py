"""A backbone and its tokenizer from a checkpoint, quantised or not, or from nothing: still without id tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from genrec_llm.errors import ConfigError
from genrec_llm.model import FAMILIES, GenRecBackbone
from genrec_llm.tokenizer import bare_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
Quantization = Literal["8bit", "4bit"]
LAST_PROJECTIONS = (".o", ".wo", ".out_proj", ".fc2")
"""Of attention and feed-forward blocks: what they add to the residual stream comes out of these layers."""
NAMED_SIZES: dict[str, PreTrainedConfig] = {
    "t5-micro": T5Config(d_model=64, d_kv=32, num_heads=2, d_ff=256, num_layers=2, num_decoder_layers=1),
    "t5-mini": T5Config(d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=1, num_decoder_layers=1),
    "bart-micro": BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=256, decoder_ffn_dim=256, max_position_embeddings=1024,
    ),
}  # fmt: skip
"""Geometries for training from nothing (`--backbone-init random --tuning full`); their tokenizer holds only masks."""


def _load_config(name: str, revision: str | None) -> PreTrainedConfig:
    if name in NAMED_SIZES:
        raise ConfigError(f"backbone: {name!r} is a geometry without weights: add --backbone-init random --tuning full")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backbone: {name!r} is neither a folder with a config.json nor a model that the Hub answers for "
            f"({str(error).splitlines()[0]}). Give a checkpoint folder, a Hub name such as google/flan-t5-small, or, "
            f"with --backbone-init random, one of {', '.join(NAMED_SIZES)}"
        ) from error
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"backbone: {name!r} is of type {config.model_type!r}, which is not a supported seq2seq family: "
            f"choose a checkpoint of {', '.join(FAMILIES)} (T5, T5 v1.1, Flan-T5 and BART among them)"
        )
    return config


def quantized(kind: Quantization | None, *, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a backbone's linear layers; none without a `kind`.

    "4bit" is nf4 with its block scales quantised too, as in QLoRA (Dettmers et al., 2023). The head stays as it is, and
    so do embeddings, norms and T5's `wo` layers, which transformers leaves out.

    Args:
        dtype: of what is not quantised, and of the sums.
        device: where the layers are quantised and stay.

    Raises:
        ConfigError: bitsandbytes is absent, or there is no such kind.
    """
    if kind is None:
        return {}
    if kind not in get_args(Quantization):
        raise ConfigError(f"quantization: {kind!r} is none of {', '.join(get_args(Quantization))}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"quantization: {kind} needs bitsandbytes, which does not load here ({error}): "
            "pip install 'genrec-llm[quant]', or leave quantization out"
        ) from error
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head"],
    )
    # bitsandbytes 0.50 logs each call of an 8-bit layer whose input is not fp16 (autograd/_functions.py).
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": config, "device_map": {"": device}}


def ready_to_train(model: GenRecBackbone) -> None:
    """Mend what goes wrong in layers of bitsandbytes 0.50 when a quantised backbone is trained, validated and saved."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # A validation on a CPU with AVX512-BF16 would repack the weights for a kernel that has no gradient, and leave
            # them so: what lies below would learn nothing from then on (`Linear4bit.forward`, `matmul_4bit`).
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, Linear4bit | Linear8bitLt):
            module.register_state_dict_post_hook(_without_scales)


def _without_scales(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Leave scales out of checkpoints: DeepSpeed leaves out the frozen weights, and 8-bit layers refuse scales alone."""
    for name in [
        name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in ("weight", "bias")
    ]:
        del state[name]


def pinned_revision(name: str, revision: str | None) -> str | None:
    """The commit that a checkpoint on the Hub is at, since a branch may move on; of anything else `revision` as it is."""
    if Path(name).is_dir() or name in NAMED_SIZES:
        return revision
    try:
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None) or revision
    except OSError:  # `load_backbone` says what is wrong with it
        return revision


def damaged_shards(name: str, revision: str | None) -> list[tuple[Path, str]]:
    """Weights files of a checkpoint that were cut short or overwritten, each with what safetensors says of it."""
    folder = Path(cached_file(name, "config.json", revision=revision)).parent
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            found.append((file, str(error)))
    return found


def load_backbone(
    name: str,
    *,
    init: str = "pretrained",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
    **quantization: Any,
) -> tuple[GenRecBackbone, PreTrainedTokenizerBase]:
    """Load a backbone and its tokenizer, both still without id tokens.

    Args:
        name: checkpoint folder, Hub name, or with `init="random"` also one of `NAMED_SIZES`.
        init: "pretrained" or "random" (the checkpoint's geometry, or a named one, with fresh weights).
        revision: branch, tag or commit on the Hub.
        dtype: of the backbone's weights.
        dropout: replaces the checkpoint's dropout probability.
        quantization: from `quantized`.

    Raises:
        ConfigError: not found, not of a supported family, or without tokenizer or safetensors weights.
    """
    if init == "random" and name in NAMED_SIZES:
        config = AutoConfig.for_model(**NAMED_SIZES[name].to_dict())
        tokenizer: PreTrainedTokenizerBase = bare_tokenizer(config.model_type)
        config.vocab_size, config.pad_token_id, config.eos_token_id = len(tokenizer), 0, 1
    else:
        config = _load_config(name, revision)
        # transformers 5 makes an empty tokenizer for a T5 folder that has none, and says nothing.
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
            raise ConfigError(
                f"backbone: {name!r} has no tokenizer that loads: add one of {', '.join(TOKENIZER_FILES)}"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"backbone: {name!r} has no tokenizer that loads ({error}): add its files") from error
    if dropout is not None:
        setattr(config, "dropout_rate" if "t5" in config.model_type else "dropout", dropout)
    own_head, tied_head, _ = FAMILIES[config.model_type]
    if init == "random":
        model = own_head(config).to(dtype)
        start_quiet(model)
        return model, tokenizer
    options = {"config": config, "revision": revision, "dtype": dtype, "use_safetensors": True, **quantization}
    options["attn_implementation"] = "sdpa"  # `last_hidden` gives masks as it takes them
    try:
        model, info = own_head.from_pretrained(name, output_loading_info=True, **options)
        if own_head is not tied_head and "lm_head.weight" in info["missing_keys"]:
            model = tied_head.from_pretrained(name, **options)
    except SafetensorError as error:
        raise ConfigError(
            [
                f"backbone: {file} is damaged ({reason}): fetch it again"
                for file, reason in damaged_shards(name, revision)
            ]
            or f"backbone: the weights of {name!r} are damaged ({error}): fetch them again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"backbone: {name!r} has no weights that load: {str(error).splitlines()[0]}. Pickled weights "
            "(pytorch_model.bin) are not read: give a checkpoint or revision with safetensors, or turn it into one "
            "yourself, with from_pretrained and save_pretrained of transformers, if you trust it"
        ) from error
    return model, tokenizer


def start_quiet(model: nn.Module) -> None:
    """Zero the last projection of every attention and feed-forward block, in place, so that fresh blocks begin silent.

    A fresh model then scores by the row of the item before the mask, which first rows from co-occurrence are made for;
    random blocks drown it out, and training takes many epochs to find it again. So begin residual branches in Fixup
    (Zhang et al., 2019).
    """
    for name, module in model.named_modules():
        if name.endswith(LAST_PROJECTIONS) and isinstance(module, nn.Linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
