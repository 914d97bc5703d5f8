"""The backbone with its own rows for items and users, and LoRA around it.

The new rows live outside the backbone's matrices: `resize_token_embeddings` is never called, the backbone's rows and
head stay as they were pretrained. The one place that knows how each backbone family is loaded and embedded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    MT5ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils.hub import cached_file, extract_commit_hash

from genrec_llm.errors import ConfigError
from genrec_llm.item_loss import item_loss
from genrec_llm.kernels import PackedStates
from genrec_llm.tasks import IGNORED, DecoderPrompt, PromptLayout, last_items_weights
from genrec_llm.vocab import IdVocab

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
Quantization = Literal["8bit", "4bit"]
UNTIED_KEYS = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}


class ItemHead(nn.Module):
    """Scores of all items for the decoder's last hidden state; the item rows of the output side.

    Args:
        weight: output rows `[items, d_model]`; the input rows' own parameter when the two sides are tied.
        scale: initial factor between tied rows and scores, learned; None when the rows are not tied.
    """

    def __init__(self, weight: nn.Parameter, scale: float | None) -> None:
        super().__init__()
        self.weight = weight
        self.scale = None if scale is None else nn.Parameter(torch.tensor([scale]))

    def rows(self) -> Tensor:
        """Output rows with the scale folded in, fp32 `[items, d_model]`."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale.float()

    def forward(self, hidden: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """Scores `[targets, items]` in fp32 of `hidden` `[targets, d_model]`: in bf16 nearly every user has ties.

        With `labels` their summed cross-entropy instead, which needs not all scores at once; see `item_loss`.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            if self.scale is not None:
                hidden = hidden * self.scale.float()
            if labels is not None:
                return item_loss(hidden, self.weight, labels, label_smoothing=label_smoothing)
            return F.linear(hidden, self.weight.float())


class IdTokens(nn.Module):
    """The trainable rows of the new tokens: items and users going in, items coming out. Users are never predicted.

    Each table is a module of its own, called through its forward, so that ZeRO-3 gathers it when it is needed.

    Args:
        item_in: `[items, d_model]`.
        user_in: `[user rows, d_model]`; row 0 is `<user_unknown>`.
        item_out: `[items, d_model]`, or None to score with the input rows.
        scale: see `ItemHead`; used with `item_out=None`.
    """

    def __init__(self, item_in: Tensor, user_in: Tensor, item_out: Tensor | None, scale: float = 1.0) -> None:
        super().__init__()
        self.item_in = nn.Embedding.from_pretrained(item_in, freeze=False)
        self.user_in = nn.Embedding.from_pretrained(user_in, freeze=False)
        if item_out is None:
            self.item_out = ItemHead(self.item_in.weight, scale)
        else:
            self.item_out = ItemHead(nn.Parameter(item_out), None)

    @property
    def tied(self) -> bool:
        """Whether items are scored with their input rows."""
        return self.item_out.scale is not None


class GenRecBackbone(PreTrainedModel):
    """Mixin for a seq2seq class of transformers: reads ids beyond the base vocabulary from `IdTokens`, predicts items."""

    accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch here, as the Trainer expects
    id_tokens: IdTokens
    id_base: int
    packs: bool = True
    """Whether positions are relative, so that several examples of a row do not notice each other."""
    label_smoothing: float = 0.0
    """Share of the target's probability that the loss spreads over all items (Szegedy et al., 2016)."""

    def add_id_tokens(self, id_tokens: IdTokens, base: int) -> None:
        """Attach the rows; token ids from `base` (the size of the base tokenizer) on are items, then users."""
        self.id_tokens, self.id_base = id_tokens, base

    def embed(self, ids: Tensor, users: Tensor | None = None) -> Tensor:
        """Input embeddings of token ids, `[…] → […, d_model]`, in the backbone's dtype.

        Args:
            users: what stands for a user token at each place, `[…, d_model]`; by default user rows are looked up at every
                place.
        """
        index = ids - self.id_base
        embedded = self.get_input_embeddings()(ids.masked_fill(index >= 0, 0))
        item_in, user_in = self.id_tokens.item_in, self.id_tokens.user_in
        num_items, num_users = item_in.num_embeddings, user_in.num_embeddings
        items = item_in(index.clamp(0, num_items - 1))
        known = user_in((index - num_items).clamp(0, num_users - 1)) if users is None else users
        new = torch.where((index < num_items).unsqueeze(-1), items, known)
        return torch.where((index >= 0).unsqueeze(-1), new.to(embedded.dtype), embedded)

    @torch.compiler.disable  # which has no sparse gradients (torch 2.13)
    def first_users(self, first_ids: Tensor) -> Tensor:
        """Rows of the users that examples begin with, `[examples] → [examples, d_model]`: all that a sparse gradient holds.

        A prompt names no other user than its input. `embed` by itself looks up users at other tokens too, clamped to the
        first or last one, which a sparse gradient would touch.
        """
        rows: Tensor = self.id_tokens.user_in(first_ids - self.id_base - self.id_tokens.item_in.num_embeddings)
        return rows

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        segments: tuple[Tensor, ...] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused_by_peft: None,
    ) -> Seq2SeqLMOutput:
        """Score every item at the last position of every decoder prompt.

        Args:
            input_ids, attention_mask: `[rows, tokens]`.
            decoder_input_ids: prompts, `[examples, prompt]`, or `[examples, targets, prompt]` where an example has several
                targets.
            labels: item indices (not token ids), `[examples]` or `[examples, targets]`; those of -100 are left out.
            segments: where the tokens of each example are in packed rows, `[examples, longest]` for each class of length,
                see `Packing.pack`; None where each row is an example.
            num_items_in_batch: targets of the whole global batch; by default those given here.

        Returns:
            With labels the summed cross-entropy (see `label_smoothing`) over `num_items_in_batch`; without, `logits`
            `[examples × targets, items]` in fp32.
        """
        # One look-up for inputs and prompts: each would leave a gradient of whole tables.
        ids = torch.cat([input_ids.flatten(), decoder_input_ids.flatten()])
        users = None
        if self.id_tokens.user_in.sparse and torch.is_grad_enabled():
            examples = torch.arange(len(decoder_input_ids), device=ids.device)
            if segments is None:
                firsts, owners = input_ids[:, 0], examples.repeat_interleave(input_ids.shape[1])
            else:
                firsts = input_ids.flatten()[torch.cat([segment[:, 0] for segment in segments]).clamp(min=0)]
                owners = (attention_mask - 1).clamp(min=0).flatten()
            owners = torch.cat([owners, examples.repeat_interleave(decoder_input_ids[0].numel())])
            users = self.first_users(firsts)[owners]
        inputs, prompts = self.embed(ids, users).split([input_ids.numel(), decoder_input_ids.numel()])
        hidden = last_hidden(
            self,
            inputs.view(*input_ids.shape, -1),
            attention_mask,
            prompts.view(*decoder_input_ids.shape, -1),
            segments,
        )
        labels = None if labels is None else labels.flatten()
        found = self.id_tokens.item_out(hidden, labels, self.label_smoothing)
        if labels is None:
            return Seq2SeqLMOutput(logits=found)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return Seq2SeqLMOutput(loss=found / count)


def last_hidden(
    model: Any, inputs: Tensor, attention_mask: Tensor, prompts: Tensor, segments: tuple[Tensor, ...] | None = None
) -> Tensor:
    """The decoder's state at the end of every prompt, `[examples × targets, d_model]`: one pass, however rows are laid out.

    Args:
        model: a seq2seq model with attention of type "sdpa".
        inputs: embeddings of the encoder's input, `[rows, tokens, d_model]`.
        prompts: embeddings of the decoder prompts, `[examples, prompt, d_model]` or `[examples, targets, prompt, d_model]`.
        attention_mask, segments: see `GenRecBackbone.forward`; more than one class needs layers that `quicken` has seen.
    """
    whose = attention_mask
    own = whose.bool()[:, None, None] if segments is None else whose[:, None, :, None] == whose[:, None, None, :]
    encoded = states = model.get_encoder()(inputs_embeds=inputs, attention_mask=own).last_hidden_state
    known, packed = own, {}
    if segments is not None:
        packed["packed"] = every = PackedStates(encoded, segments)
        # All, where there is one class. Made before the layers: those that are computed again must find them made.
        states, known = every.states[0], every.masks[0]
    length = prompts.shape[-2]
    prompts = prompts.flatten(1, -2)
    place = torch.arange(prompts.shape[1], device=prompts.device)
    # Each token of the decoder sees those before it in its own prompt: several prompts of an example do not meet.
    before = (place[:, None] >= place) & (place[:, None] // length == place // length)
    decoded = model.get_decoder()(
        inputs_embeds=prompts,
        attention_mask=before[None, None].expand(len(prompts), -1, -1, -1),
        encoder_hidden_states=states,
        encoder_attention_mask=known.expand(-1, -1, len(place), -1),
        use_cache=False,
        **packed,
    )
    hidden: Tensor = decoded.last_hidden_state[:, length - 1 :: length]
    return hidden.flatten(0, 1)


class GenRecT5(GenRecBackbone, T5ForConditionalGeneration):
    """T5 v1.0: head tied to the input embedding."""


class GenRecUntiedT5(GenRecBackbone, T5ForConditionalGeneration):
    """T5 v1.1 and Flan-T5: a head of their own, which transformers 5 would tie to the input embedding at load."""

    _tied_weights_keys = UNTIED_KEYS


class GenRecMT5(GenRecBackbone, MT5ForConditionalGeneration):
    """mT5 with a tied head."""


class GenRecUntiedMT5(GenRecBackbone, MT5ForConditionalGeneration):
    """mT5 as published: a head of its own."""

    _tied_weights_keys = UNTIED_KEYS


class GenRecBart(GenRecBackbone, BartForConditionalGeneration):
    """BART: absolute positions, one mask token."""

    packs = False


LAST_PROJECTIONS = (".o", ".wo", ".out_proj", ".fc2")
"""Of attention and feed-forward blocks: what they add to the residual stream comes out of these layers."""

FAMILIES: dict[str, tuple[type[GenRecBackbone], type[GenRecBackbone], list[str]]] = {
    "t5": (GenRecUntiedT5, GenRecT5, ["q", "v"]),
    "mt5": (GenRecUntiedMT5, GenRecMT5, ["q", "v"]),
    "bart": (GenRecBart, GenRecBart, ["q_proj", "v_proj"]),
}
"""Model type → (class for a checkpoint with a head of its own, class for one without, default LoRA targets)."""

NAMED_SIZES: dict[str, PreTrainedConfig] = {
    "t5-micro": T5Config(d_model=64, d_kv=32, num_heads=2, d_ff=256, num_layers=2, num_decoder_layers=1),
    "t5-mini": T5Config(d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=1, num_decoder_layers=1),
    "bart-micro": BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=256, decoder_ffn_dim=256, max_position_embeddings=1024,
    ),
}  # fmt: skip
"""Geometries for training from nothing (`--backbone-init random --tuning full`); their tokenizer holds only masks."""


def bare_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """A tokenizer without words, for a backbone that has read none: special tokens and masks only."""
    masks = ["<mask>"] if model_type == "bart" else [f"<extra_id_{index}>" for index in range(100)]
    names = ["<pad>", "</s>", "<unk>", *masks]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>" if model_type == "bart" else None,
        additional_special_tokens=masks,
    )


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


def add_id_words(tokenizer: PreTrainedTokenizerBase, vocab: IdVocab) -> None:
    """Add one word an item and one a user row, in that order, so that text gives the ids used in training.

    Raises:
        ConfigError: the tokenizer already knows such words (it belongs to a model that has id tokens).
    """
    base = len(tokenizer)
    words = [*vocab.item_tokens, *vocab.user_tokens]
    tokenizer.add_tokens([AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in words])
    # As the model reads it, whatever the family's own form is (BART's begins with <s>).
    end = (str(tokenizer.eos_token), tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    ends = tokenizer.convert_tokens_to_ids([words[0], words[-1]])
    if ends != [base, base + len(words) - 1]:
        raise ConfigError(
            "backbone: its tokenizer already has item or user tokens: give the base checkpoint that the earlier model "
            "was trained from, not that model"
        )


def mask_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """Token ids of `<extra_id_0>`, `<extra_id_1>`, … (T5), or of the one mask token, None where there is none."""
    words = tokenizer.get_vocab()
    sentinels = [f"<extra_id_{index}>" for index in range(len(words)) if f"<extra_id_{index}>" in words]
    return tuple(words[word] for word in sentinels) or (tokenizer.mask_token_id,)


def prompt_layout(
    tokenizer: PreTrainedTokenizerBase,
    vocab: IdVocab,
    *,
    max_history: int,
    decoder_prompt: DecoderPrompt = "last-item",
    last_items_share: float = 0.0,
) -> PromptLayout:
    """The layout of token ids for a base tokenizer (before `add_id_words`) and a catalogue."""
    masks = mask_ids(tokenizer)
    if masks == (None,) or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ConfigError("backbone: its tokenizer lacks a mask (<extra_id_0> or <mask>), end or padding token")
    return PromptLayout(
        base=len(tokenizer),
        num_items=vocab.num_items,
        num_user_rows=vocab.num_user_rows,
        mask_ids=masks,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        user_token=vocab.user_mode != "none",
        decoder_prompt=decoder_prompt,
        max_history=max_history,
        last_items_weights=last_items_weights(last_items_share),
    )


@contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """Make parameters that ZeRO-3 has partitioned at load whole for reading; nothing to do otherwise."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield
    else:
        yield


def add_lora(
    model: GenRecBackbone,
    *,
    r: int,
    alpha: int,
    dropout: float,
    targets: list[str] | None,
    base_name: str,
    revision: str | None,
) -> PeftModel:
    """Freeze the backbone and wrap it: LoRA adapters and the id rows are what trains.

    `id_tokens` is named in `modules_to_save`, so that checkpoints, resume and ZeRO's gathering carry it. PEFT's wrapper
    would keep an untrained second copy of the rows; it is replaced by an empty one.
    """
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or FAMILIES[model.config.model_type][2],
        modules_to_save=["id_tokens"],
        base_model_name_or_path=base_name,
        revision=revision,
    )
    peft_model = get_peft_model(model, config)
    wrapper = peft_model.base_model.model.id_tokens
    empty = torch.empty(0, model.config.d_model)
    wrapper.original_module = IdTokens(empty, empty.clone(), None).requires_grad_(False)
    return peft_model


def unwrapped(model: nn.Module) -> GenRecBackbone:
    """The `GenRecBackbone` inside a PeftModel (or the model itself)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, GenRecBackbone):
        raise TypeError(f"not a GenRec model: {type(inner).__name__}")
    return inner


def id_tokens_of(model: nn.Module) -> IdTokens:
    """The trained rows of a model, behind PEFT's wrapper or not."""
    rows: Any = unwrapped(model).id_tokens
    return rows.modules_to_save["default"] if isinstance(rows, ModulesToSaveWrapper) else rows
