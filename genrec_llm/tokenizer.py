"""The tokenizer's side of id tokens: their words, the masks, and the layout of a prompt."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from genrec_llm.errors import ConfigError
from genrec_llm.tasks import DecoderPrompt, PromptLayout, last_items_weights
from genrec_llm.vocab import IdVocab


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
