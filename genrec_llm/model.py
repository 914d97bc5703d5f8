"""The backbone with its own rows for items and users, and LoRA around it.

The new rows live outside the backbone's matrices: `resize_token_embeddings` is never called, the backbone's rows and
head stay as they were pretrained. The one place that knows how each backbone family is embedded and adapted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartForConditionalGeneration,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import Seq2SeqLMOutput

from genrec_llm.item_loss import item_loss
from genrec_llm.kernels import PackedStates
from genrec_llm.tasks import IGNORED

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


FAMILIES: dict[str, tuple[type[GenRecBackbone], type[GenRecBackbone], list[str]]] = {
    "t5": (GenRecUntiedT5, GenRecT5, ["q", "v"]),
    "mt5": (GenRecUntiedMT5, GenRecMT5, ["q", "v"]),
    "bart": (GenRecBart, GenRecBart, ["q_proj", "v_proj"]),
}
"""Model type → (class for a checkpoint with a head of its own, class for one without, default LoRA targets)."""


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
