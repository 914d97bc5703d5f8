"""The architecture of a backbone in numbers, from its configuration, and the published ones by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from genrec_llm.errors import ConfigError


def _t5(d_model: int, d_kv: int, d_ff: int, layers: int, heads: int, *, gated: bool) -> dict[str, Any]:
    return {
        "model_type": "t5", "d_model": d_model, "d_kv": d_kv, "d_ff": d_ff, "num_layers": layers, "num_heads": heads,
        "vocab_size": 32128, "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
    }  # fmt: skip


def _bart(d_model: int, layers: int, heads: int, d_ff: int) -> dict[str, Any]:
    return {
        "model_type": "bart", "d_model": d_model, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads, "encoder_ffn_dim": d_ff,
        "decoder_ffn_dim": d_ff, "vocab_size": 50265, "max_position_embeddings": 1024, "dropout": 0.1,
        "attention_dropout": 0.1, "activation_dropout": 0.1,
    }  # fmt: skip


_V1_1 = {
    "small": _t5(512, 64, 1024, 8, 6, gated=True),
    "base": _t5(768, 64, 2048, 12, 12, gated=True),
    "large": _t5(1024, 64, 2816, 24, 16, gated=True),
    "xl": _t5(2048, 64, 5120, 24, 32, gated=True),
    "xxl": _t5(4096, 64, 10240, 24, 64, gated=True),
}
_V1_0 = {
    "t5-small": _t5(512, 64, 2048, 6, 8, gated=False),
    "t5-base": _t5(768, 64, 3072, 12, 12, gated=False),
    "t5-large": _t5(1024, 64, 4096, 24, 16, gated=False),
    "t5-3b": _t5(1024, 128, 16384, 24, 32, gated=False),
    "t5-11b": _t5(1024, 128, 65536, 24, 128, gated=False),
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    **{f"google/flan-t5-{size}": geometry for size, geometry in _V1_1.items()},
    **{f"google/t5-v1_1-{size}": geometry for size, geometry in _V1_1.items()},
    **_V1_0,
    **{f"google-t5/{name}": geometry for name, geometry in _V1_0.items()},
    "facebook/bart-base": _bart(768, 6, 12, 3072),
    "facebook/bart-large": _bart(1024, 12, 16, 4096),
}
"""Published geometries, known without network: Raffel et al., 2020, section 3.7 (T5), the t5.1.1 release notes of
google-research/text-to-text-transfer-transformer and Chung et al., 2022 (Flan-T5 has T5 v1.1's), Lewis et al., 2020 (BART),
with the dropout of the config.json of each."""


@dataclass(frozen=True)
class Shape:
    """The architecture of a backbone.

    Args:
        family: "t5" (mT5 too) or "bart".
        encoder_layers, decoder_layers: blocks.
        d_model: width of the residual stream.
        inner: width of queries, keys and values: heads times their size.
        heads: of attention.
        d_ff: width of the feed-forward layers.
        vocab: rows of the embedding matrix.
        gated: two input projections in a feed-forward layer, one of which gates (T5 v1.1).
        gelu_new: the activation is the tanh approximation that transformers writes out in Python.
        own_head: a head that is not the embedding matrix.
        dropout, attention_dropout, activation_dropout: probabilities.
        positions: learned positions of a stack (BART), or 0.
    """

    family: Literal["t5", "bart"]
    encoder_layers: int
    decoder_layers: int
    d_model: int
    inner: int
    heads: int
    d_ff: int
    vocab: int
    gated: bool = False
    gelu_new: bool = False
    own_head: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    positions: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, own_head: bool | None = None) -> Shape:
        """From the keys of a `config.json`, or of `PreTrainedConfig.to_dict()`.

        Args:
            config: keys and values; absent ones have transformers' defaults.
            own_head: whether the checkpoint has a head of its own. By default what `tie_word_embeddings` says; a
                configuration that transformers 5 has loaded always says true, so tell it for one of those.

        Raises:
            ConfigError: not T5, mT5 or BART.
        """
        kind = config.get("model_type")
        if kind in ("t5", "mt5"):
            projection = config.get("feed_forward_proj", "gated-gelu" if kind == "mt5" else "relu")
            layers, dropout = config.get("num_layers", 6), config.get("dropout_rate", 0.1)
            heads = config.get("num_heads", 8)
            return cls(
                family="t5",
                encoder_layers=layers,
                decoder_layers=config.get("num_decoder_layers") or layers,
                d_model=config.get("d_model", 512),
                inner=heads * config.get("d_kv", 64),
                heads=heads,
                d_ff=config.get("d_ff", 2048),
                vocab=config.get("vocab_size", 32128),
                gated=projection.startswith("gated-"),
                gelu_new=projection == "gated-gelu",  # as T5Config reads it
                own_head=not config.get("tie_word_embeddings", True) if own_head is None else own_head,
                dropout=dropout,
                attention_dropout=dropout,
                activation_dropout=dropout,
            )
        if kind == "bart":
            d_model, d_ff = config.get("d_model", 1024), config.get("encoder_ffn_dim", 4096)
            return cls(
                family="bart",
                encoder_layers=config.get("encoder_layers", 12),
                decoder_layers=config.get("decoder_layers", 12),
                d_model=d_model,
                inner=d_model,
                heads=config.get("encoder_attention_heads", 16),
                d_ff=d_ff,
                vocab=config.get("vocab_size", 50265),
                dropout=config.get("dropout", 0.1),
                attention_dropout=config.get("attention_dropout", 0.0),
                activation_dropout=config.get("activation_dropout", 0.0),
                positions=config.get("max_position_embeddings", 1024) + 2,
            )
        raise ConfigError(f"backbone: type {kind!r} is not a supported seq2seq family: choose T5, mT5 or BART")

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Width in and out of each kind of linear layer, by the name that LoRA's targets use."""
        d, inner, ff = self.d_model, self.inner, self.d_ff
        if self.family == "bart":
            names = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (d, d))
            return {**names, "fc1": (d, ff), "fc2": (ff, d)}
        into = ("wi_0", "wi_1") if self.gated else ("wi",)
        attention = {"q": (d, inner), "k": (d, inner), "v": (d, inner), "o": (inner, d)}
        return attention | dict.fromkeys(into, (d, ff)) | {"wo": (ff, d)}

    @property
    def attention_names(self) -> tuple[str, str, str, str]:
        """Of the linear layers of attention: queries, keys, values, output."""
        return ("q_proj", "k_proj", "v_proj", "out_proj") if self.family == "bart" else ("q", "k", "v", "o")

    def occurrences(self, name: str) -> int:
        """How often a kind of linear layer stands in the model."""
        attentions = self.encoder_layers + 2 * self.decoder_layers
        return attentions if name in self.attention_names else self.encoder_layers + self.decoder_layers

    @property
    def feed_forward(self) -> int:
        """Matrix elements of a feed-forward layer."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    @property
    def linear_parameters(self) -> int:
        """Matrix elements of all blocks: what a quantised backbone holds in few bits."""
        return sum(
            width_in * width_out * self.occurrences(name) for name, (width_in, width_out) in self.linears.items()
        )

    @property
    def other_parameters(self) -> int:
        """Norms, biases and positions."""
        d = self.d_model
        if self.family == "t5":
            norms = 2 * self.encoder_layers + 3 * self.decoder_layers + 2
            return norms * d + 2 * 32 * self.heads  # 32 buckets of relative positions in each stack
        layers = self.encoder_layers + self.decoder_layers
        attentions = self.encoder_layers + 2 * self.decoder_layers
        norms = 2 * self.encoder_layers + 3 * self.decoder_layers + 2
        biases = attentions * 4 * d + layers * (self.d_ff + d)
        return norms * 2 * d + biases + 2 * self.positions * d

    @property
    def embedding_parameters(self) -> int:
        """The embedding matrix."""
        return self.vocab * self.d_model

    @property
    def head_parameters(self) -> int:
        """A head of its own, which no score of an item passes through and which is never trained."""
        return self.embedding_parameters if self.own_head else 0

    @property
    def parameters(self) -> int:
        """All of the backbone, id rows and LoRA aside."""
        return self.linear_parameters + self.other_parameters + self.embedding_parameters + self.head_parameters
