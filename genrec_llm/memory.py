"""The memory and time of a training before it is started: what fits, the largest batch that does, and which strategy.

Everything is computed from the architecture, nothing is fitted: weights and optimizer state from parameter counts,
activations from the tensors that autograd keeps of each layer, the peak as the worst of the moments of a step,
communication from what each strategy hands to its collectives. docs/estimate.md has the formulas in words, and how far
they are from measured runs. Needs neither torch nor transformers, and takes microseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from genrec_llm.errors import ConfigError
from genrec_llm.packing import MULTIPLE

Strategy = Literal["cpu", "single_gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
ONE_DEVICE = ("cpu", "single_gpu")
SPARSE_STRATEGIES = (*ONE_DEVICE, "ddp")
"""Where user rows can have sparse gradients."""
GIB = 2**30
FP32, BF16, INDEX = 4, 2, 8
USABLE = 0.92
"""Share of a GPU's memory that a run can fill; the rest goes to the CUDA context, NCCL, workspaces and fragments."""
ZERO3_LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered: stage3_max_live_parameters and stage3_max_reuse_distance of DeepSpeed 0.19."""
MOST_SCORES = 2**27
"""Scores of a micro-batch up to which the loss on a GPU makes all of them at once; beyond, as many at a time."""
MOST_SCORES_ON_CPU = 2**24
"""Scores of a micro-batch that the loss on a CPU makes at a time, in one tensor that stays (`item_loss`)."""
PADDING = 1.05
"""Tokens computed for each token that counts, with batches of like lengths."""
FILLING = 1.02
"""The same where examples share rows: what is left empty, and what a batch has above the mean."""
PARTS = ("weights", "id rows", "LoRA", "optimizer state", "gradients", "activations", "logits", "buffers", "temporary")


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
    def _attention_names(self) -> tuple[str, str, str, str]:
        return ("q_proj", "k_proj", "v_proj", "out_proj") if self.family == "bart" else ("q", "k", "v", "o")

    def occurrences(self, name: str) -> int:
        """How often a kind of linear layer stands in the model."""
        attentions = self.encoder_layers + 2 * self.decoder_layers
        return attentions if name in self._attention_names else self.encoder_layers + self.decoder_layers

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


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Args:
        items: of the catalogue.
        user_rows: rows of users, `<user_unknown>` included.
        examples: input rows that a device works on at once (the micro-batch).
        tied_rows: items are scored with their input rows.
        tuning: "lora" or "full".
        lora_r, lora_targets, lora_dropout: as in `ModelArguments`.
        strategy: one of `STRATEGIES`.
        processes: devices.
        accumulation: micro-batches a step.
        mean_length: tokens of an input row on average, user, mask and end among them.
        longest: tokens of the longest input row of a batch.
        targets: predictions an input row: masked items in pretraining, 1 in finetuning.
        prompt: tokens of a decoder prompt.
        bf16: bf16 autocast; the frozen backbone is held in bf16 then.
        quantization: of the frozen backbone's linear layers.
        optimizer_bytes: state of the optimizer for each trained element: 8 for AdamW, 2 for its 8-bit form.
        sparse_users: user rows have sparse gradients (`--sparse-user-rows`); their optimizer state is whole.
        packing: examples share rows of the encoder's input, where the backbone allows it.
        kernels: T5's layers have the forms of `kernels`.
    """

    items: int
    user_rows: int
    examples: int
    tied_rows: bool = True
    tuning: Literal["lora", "full"] = "lora"
    lora_r: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    strategy: Strategy = "single_gpu"
    processes: int = 1
    accumulation: int = 1
    mean_length: float = 24.0
    longest: int = 53
    targets: int = 1
    prompt: int = 2
    bf16: bool = False
    quantization: Literal["8bit", "4bit"] | None = None
    optimizer_bytes: float = 8.0
    sparse_users: bool = False
    packing: bool = True
    kernels: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name.replace('_', ' ')}: {getattr(self, name)} is not at least 1"
            for name in ("items", "user_rows", "examples", "processes", "accumulation", "longest", "targets", "prompt")
            if getattr(self, name) < 1
        ]
        if not 1 <= self.mean_length <= self.longest:
            problems.append(
                f"mean length: {self.mean_length:g} tokens is not between 1 and the longest, {self.longest}"
            )
        if self.strategy not in STRATEGIES:
            problems.append(f"strategy: {self.strategy!r} is none of {', '.join(STRATEGIES)}")
        if self.strategy in ONE_DEVICE and self.processes > 1:
            problems.append(f"strategy: {self.strategy} is for one process, not {self.processes}: take ddp")
        if self.quantization and self.tuning == "full":
            problems.append("quantization: a quantised backbone cannot be tuned in full: take LoRA")
        if self.sparse_users and self.strategy not in SPARSE_STRATEGIES:
            problems.append(f"sparse user rows: {self.strategy} has no sparse gradients: take ddp")
        if problems:
            raise ConfigError(problems)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed holds the optimizer, with fp32 masters beside bf16 copies."""
        return self.strategy.startswith("zero")

    @property
    def cpu(self) -> bool:
        """Whether it computes on a CPU."""
        return self.strategy == "cpu"

    @property
    def global_batch(self) -> int:
        """Examples a step."""
        return self.examples * self.processes * self.accumulation

    @property
    def touched_users(self) -> int:
        """User rows that a device's examples of a step touch, at most."""
        return min(self.examples * self.accumulation, self.user_rows)


@dataclass(frozen=True)
class Hardware:
    """What it runs on. The speeds are assumptions unless measured; every time computed from them is a prediction.

    Args:
        name: as printed.
        memory: bytes of one device.
        tflops: peak of one device in the precision trained in, 10^12 operations a second.
        utilisation: share of the peak that training reaches.
        node_bandwidth: bytes a second that a device sends to others of its node, as collectives reach it.
        network_bandwidth: bytes a second that leave a node, all its adapters together.
        per_node: devices of a node.
    """

    name: str
    memory: int
    tflops: float
    utilisation: float = 0.40
    node_bandwidth: float = 300e9
    network_bandwidth: float = 320e9
    per_node: int = 8

    def bandwidth(self, processes: int) -> float:
        """Bytes a second of a ring through all devices.

        Each device's bytes cross its link within the node; those of a node's rings together cross each border between
        nodes once for every device's worth of bytes.
        """
        if processes <= self.per_node:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.network_bandwidth)


HARDWARE: dict[str, Hardware] = {
    "h100": Hardware("H100 SXM 80 GB", 80 * 10**9, 989.0),
    "h200": Hardware("H200 SXM 141 GB", 141 * 10**9, 989.0),
    "a100": Hardware("A100 SXM 80 GB", 80 * 10**9, 312.0, node_bandwidth=200e9, network_bandwidth=160e9),
}
"""Data sheets: memory, dense bf16 peak. 40 % of it is assumed. Within a node two thirds of NVLink's 450 (A100: 300) GB/s a
direction; between nodes 80 % of eight 400 (A100: 200) Gb/s adapters."""


# --- what is trained --------------------------------------------------------------------------------------------------


def lora_targets(shape: Shape, run: Run) -> tuple[str, ...]:
    """Names of the linear layers that get adapters.

    Raises:
        ConfigError: the backbone has no layer of such a name.
    """
    names = run.lora_targets or (("q_proj", "v_proj") if shape.family == "bart" else ("q", "v"))
    unknown = [name for name in names if name not in shape.linears]
    if unknown:
        raise ConfigError(
            [f"lora_target_modules: no layer {name!r}: there are {', '.join(shape.linears)}" for name in unknown]
        )
    return tuple(names)


def lora_parameters(shape: Shape, run: Run) -> int:
    """Elements of all adapters; none in full tuning."""
    if run.tuning == "full":
        return 0
    return sum(run.lora_r * sum(shape.linears[name]) * shape.occurrences(name) for name in lora_targets(shape, run))


def row_parameters(shape: Shape, run: Run) -> int:
    """Elements of the id rows."""
    return ((1 if run.tied_rows else 2) * run.items + run.user_rows) * shape.d_model + int(run.tied_rows)


def trained_parameters(shape: Shape, run: Run) -> int:
    """Elements that have a gradient."""
    backbone = shape.parameters - shape.head_parameters if run.tuning == "full" else 0
    return backbone + lora_parameters(shape, run) + row_parameters(shape, run)


def dense_parameters(shape: Shape, run: Run) -> int:
    """Elements that have a dense gradient."""
    return trained_parameters(shape, run) - (run.user_rows * shape.d_model if run.sparse_users else 0)


# --- how it is computed -----------------------------------------------------------------------------------------------


def packs(shape: Shape, run: Run) -> bool:
    """Whether examples share rows of tokens: where positions are relative."""
    return run.packing and shape.family == "t5"


def quickened(shape: Shape, run: Run) -> bool:
    """Whether layers have the forms of `kernels`, which are T5's."""
    return run.kernels and shape.family == "t5"


def absorbs(shape: Shape, run: Run) -> bool:
    """Whether cross-attention makes no keys and values: their layers are plain products."""
    key, value = shape._attention_names[1:3]
    noisy = run.tuning == "lora" and run.lora_dropout and {key, value} & set(lora_targets(shape, run))
    return quickened(shape, run) and not noisy and not run.quantization


def encoder_rows(shape: Shape, run: Run) -> tuple[int, int]:
    """Rows of the encoder's input, and tokens of a row.

    Packed rows are as long as `Packing.fitting` makes them: they hold the longest example, and two of those of the mean.
    Padded ones are those of the longest examples, since one such batch comes.
    """
    if not packs(shape, run):
        return run.examples, run.longest
    length = math.ceil(max(run.longest, 2 * run.mean_length) / MULTIPLE) * MULTIPLE
    return math.ceil(FILLING * run.examples * run.mean_length / length), length


# --- activations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one micro-batch, and those that are live for a moment only."""

    encoder: float
    decoder: float
    encoder_temporary: float
    decoder_temporary: float
    cached_weights: float
    """bf16 copies of fp32 weights that autocast makes and the backward pass needs."""


def activations(shape: Shape, run: Run) -> Activations:
    """What a forward pass leaves for the backward pass.

    Counted per token and layer, from the operations of `modeling_t5.py` and `modeling_bart.py` of transformers 5, from what
    the functions of `kernels` save, and from the formulas of autograd: a product keeps both factors, a frozen linear layer
    keeps nothing, one that is trained keeps its input, and so on.
    """
    full, d, inner, ff, heads = run.tuning == "full", shape.d_model, shape.inner, shape.d_ff, shape.heads
    quick, packed, absorbed = quickened(shape, run), packs(shape, run), absorbs(shape, run)
    relative = shape.family == "t5"  # positions are a bias of the scores
    act = BF16 if run.bf16 else FP32
    residual = FP32 if full else act  # under autocast fp32 weights keep the residual stream in fp32
    # Of dropout: native_dropout keeps bool on a GPU, `kernels` random bits on a CPU, the CPU's own its factors.
    mask = 1 if not run.cpu else 2 if quick else act
    targets = () if full else lora_targets(shape, run)

    def dropped(width: int, probability: float) -> float:
        return mask * width if probability else 0

    if quick:
        norm = residual * d + FP32
    elif relative:
        # x.float().pow(2) keeps a copy where x is not fp32; x * rsqrt keeps x; weight * normed keeps normed if trained.
        norm = residual * d + (FP32 * d if residual != FP32 else 0) + (FP32 * d if full else 0) + FP32
    else:
        norm = residual * d + 2 * FP32

    # Autocast casts, and LoRA's dropout draws, for each linear layer anew; the LoRA layer of `kernels` does neither.
    alone = (run.bf16 and (full or not quick)) or bool(targets and run.lora_dropout)
    noise = (1 if not run.cpu else 2 if run.kernels else FP32) if targets and run.lora_dropout else 0

    def read_by(*names: str, layers: int = 1) -> float:
        """Of a token that linear layers read, in as many blocks: inputs of the trained ones, those of LoRA's A and B."""
        trained = [name for name in names if full or name in targets]
        if not trained:
            return 0
        narrow = 0 if full else act * run.lora_r * len(trained) * layers
        return (noise + act) * shape.linears[trained[0]][0] * (len(trained) * layers if alone else 1) + narrow

    query, key, value, out = shape._attention_names
    kept_scores = 3 if shape.attention_dropout else 1  # their softmax, the factors of dropout, the product of both

    def self_attention(tokens: float, length: float) -> float:
        """Of tokens that look at those of their row, `length` of them."""
        if not quick:
            return attention(tokens, tokens, length, masks=heads if relative else 1, bias=full and relative)
        if run.cpu:
            scores = (
                (2 * act + mask if shape.attention_dropout else act) * heads * length
            )  # softmax, mask, what is left
            return (3 * act * inner + scores + read_by(out)) * tokens
        return attention(tokens, tokens, length, masks=0)

    def attention(queries: float, keys: float, length: float, *, masks: int, bias: bool = False) -> float:
        """Of `queries` tokens that look at `keys` tokens, `length` of them at a time.

        Args:
            masks: heads that have an additive mask of their own, as with T5's bias.
            bias: that mask has a gradient.
        """
        # Where no fused attention is possible: on a CPU with dropout or a trained bias. Written out it computes in fp32.
        if run.cpu and (shape.attention_dropout or bias):
            scores = FP32 * kept_scores * heads * length
            return FP32 * inner * (queries + 2 * keys) + (scores + read_by(out)) * queries
        # Else the output, which the next layer may share, and for each head a sum of exponentials.
        ended = read_by(out) + act * inner if targets and alone else max(read_by(out), act * inner)
        return act * inner * (queries + 2 * keys) + (act * masks * length + ended + FP32 * heads) * queries

    into = tuple(name for name in shape.linears if name.startswith("wi") or name == "fc1")
    if quick and shape.gelu_new:
        feed: float = 2 * act * ff
    elif shape.gelu_new:
        # Six factors: x³, x/2, tanh, 1 + tanh, gelu, gate. CUDA's autocast computes pow, and what follows, in fp32.
        feed = 6 * act * ff if run.cpu or not run.bf16 else (4 * FP32 + 2 * BF16) * ff
    else:
        feed = (3 if shape.gated else 1) * act * ff
    feed += dropped(ff, shape.activation_dropout) + read_by(*into)
    if not full or not relative or shape.activation_dropout or shape.gated or run.bf16:  # else ReLU's own
        feed += read_by("wo" if relative else "fc2")
    sublayer = norm + dropped(d, shape.dropout)
    ends = norm + dropped(d, shape.dropout) * (2 if relative else 1)
    ends += 26 if full else 18  # ids and marks of `embed`

    rows, length = encoder_rows(shape, run)
    read = float(rows * length)  # encoder tokens
    prompts = run.targets * run.prompt  # decoder tokens of an example, which attend to each other
    asked, seen = float(run.examples * prompts), float(run.examples * run.longest)
    encoder = shape.encoder_layers * (
        read * (2 * sublayer + feed + read_by(query, key, value))
        + (self_attention(read, length) if relative else attention(read, read, length, masks=0))
    )
    decoder = shape.decoder_layers * (
        asked * (3 * sublayer + feed + read_by(query, key, value) + read_by(query)) + self_attention(asked, prompts)
    )
    if quick and not run.cpu:  # the mask with the bias in it, which all layers share
        encoder, decoder = encoder + act * heads * length * read, decoder + act * heads * prompts * asked
    inside = 0.0
    if absorbed:
        score = act if run.cpu else FP32  # CUDA's autocast has its softmax in fp32
        weights = score * kept_scores * heads * run.longest + run.longest  # and a mask
        states = act * heads * d * (1 + int(full or value in targets))  # a query as the states are; what it has seen
        narrow = act * heads * run.lora_r * len({key, value} & set(targets))
        inside = asked * (weights + states + narrow + (act * inner if full or key in targets else 0))
        # On a CPU autocast casts the states for both products of each layer; a GPU keeps but the inputs.
        cast = run.cpu and residual != act
        decoder += seen * (2 * act * d * shape.decoder_layers if cast else residual * d)
        decoder += shape.decoder_layers * asked * read_by(out)
        decoder += shape.decoder_layers * (inside if run.cpu else asked * act * inner)
    else:
        projected = read if quick and packed else seen  # keys and values are made of packed rows, then gathered
        decoder += projected * read_by(key, value, layers=shape.decoder_layers)
        decoder += shape.decoder_layers * attention(
            asked, seen, run.longest, masks=heads if relative and not quick else 1
        )
        decoder += 2 * INDEX * seen * shape.decoder_layers if quick and packed else 0
    decoder += INDEX * seen if packed else 0
    # The states that are scored, before and after the scale.
    decoder += asked * residual * d + run.examples * run.targets * FP32 * d
    encoder, decoder = encoder + read * ends, decoder + asked * ends
    # Going back through a layer: the gradient of its output and of its two widest tensors, before those are released.
    wide = 2 * act * ff + 3 * residual * d
    of_scores = 2 * FP32 * heads * length if run.cpu and (shape.attention_dropout or (full and relative)) else 0
    encoder_temporary = read * max(wide, 3 * residual * d + of_scores - feed)  # by attention's turn those are released
    if absorbed:  # a gradient of the states from each use; then what is inside is released, or was made again on a GPU
        decoder_temporary = 2 * residual * d * seen - asked * feed + (-inside if run.cpu else inside)
    else:
        decoder_temporary = (act * inner + 2 * residual * d) * seen + asked * wide
    decoder_temporary = max(asked * wide, decoder_temporary)
    cached = BF16 * (shape.linear_parameters if full else lora_parameters(shape, run)) if run.bf16 else 0
    return Activations(encoder, decoder, encoder_temporary, decoder_temporary, cached)


# --- the memory of a device -------------------------------------------------------------------------------------------


def _frozen_bytes(shape: Shape, run: Run) -> float:
    """Of the backbone's weights that are not trained, on one device that holds them all."""
    if run.tuning == "full":
        return (BF16 if run.deepspeed and run.bf16 else FP32) * shape.head_parameters
    plain = _width(run)
    linear = float(plain * shape.linear_parameters)
    if run.quantization:
        left = 0
        if shape.family == "t5":  # transformers leaves `wo` of a quantised T5 as it is
            left = shape.occurrences("wo") * shape.d_model * shape.d_ff
        # nf4: a byte of scale for each 64, and a scale of these for each 256; 8 bits: a scale for each row
        few = 1.0 + FP32 / shape.d_model if run.quantization == "8bit" else 0.5 + 1 / 64 + FP32 / (64 * 256)
        linear = few * (shape.linear_parameters - left) + plain * left
    rest = shape.other_parameters + shape.embedding_parameters + shape.head_parameters
    buffer = FP32 * shape.vocab if shape.family == "bart" else 0  # final_logits_bias
    return linear + plain * rest + buffer


def _trained_size(run: Run) -> int:
    """Bytes of a trained weight as it computes, and of its gradient: DeepSpeed casts the module to bf16."""
    return BF16 if run.deepspeed and run.bf16 else FP32


def _width(run: Run) -> int:
    """Bytes of a weight that is held in the precision computed in."""
    return BF16 if run.bf16 else FP32


def _block_bytes(shape: Shape, run: Run) -> float:
    """Weights of the largest block, a decoder layer, as FSDP gathers it."""
    matrices = 8 * shape.d_model * shape.inner + shape.feed_forward
    return _width(run) * matrices


def moments(shape: Shape, run: Run) -> dict[str, dict[str, float]]:
    """Bytes of each part of `PARTS` on one device, at the moments of a step when memory can be fullest.

    "loss": scores, their softmax and its gradient, all activations; where the scores are too many to be held at once, the
    first gradient of item rows is made with them. "head": that gradient and the one of the scores, all activations.
    "decoder": the first layer on the way back. "encoder": the decoder's gradients are there and its activations gone.
    "embedding": all gradients. "update": the optimizer's step.
    """
    n, size, full = run.processes, _trained_size(run), run.tuning == "full"
    kept = activations(shape, run)
    rows, lora = row_parameters(shape, run), lora_parameters(shape, run)
    trained = trained_parameters(shape, run)
    backbone = trained - rows - lora
    part = n if run.strategy in ("zero3", "zero3_offload", "fsdp2") else 1
    offload = run.strategy == "zero3_offload"
    on_device = 0 if offload else 1
    frozen = _frozen_bytes(shape, run)
    static = {
        "weights": on_device * (frozen + size * backbone) / part,
        "id rows": on_device * size * rows / part,
        "LoRA": on_device * size * lora / part,
        "optimizer state": on_device
        * (run.optimizer_bytes + (FP32 if run.deepspeed else 0))
        * trained
        / (n if run.deepspeed or run.strategy == "fsdp2" else 1),
    }
    everything = frozen + size * trained
    bucket = 2 * size * shape.d_model**2  # reduce_bucket_size auto is d_model², twice for overlap_comm
    if run.strategy == "ddp":
        static["buffers"] = float(FP32 * dense_parameters(shape, run))  # DDP's buckets are copies of the gradients
    elif run.strategy in ("zero1", "zero2"):
        static["buffers"] = float(bucket)
    elif run.strategy in ("zero3", "zero3_offload"):
        static["buffers"] = bucket + min(everything, ZERO3_LIVE * size)
    elif run.strategy == "fsdp2":
        root = _width(run) * (shape.embedding_parameters + shape.head_parameters + rows)
        static["buffers"] = root + 2 * _block_bytes(shape, run)

    scores = run.examples * run.targets * run.items
    # Whole ones with their softmax and its gradient; slices are turned into the gradient where they are.
    most = MOST_SCORES_ON_CPU if run.cpu else MOST_SCORES
    sliced = run.cpu or scores > most
    at_loss, at_head = (FP32 * min(scores, most), 0) if sliced else (3 * FP32 * scores, FP32 * scores)
    items, users = size * run.items * shape.d_model, size * run.user_rows * shape.d_model
    pair = FP32 * shape.d_model + INDEX  # a user row's gradient and its index
    mine = shared = updating = 0  # of sparse gradients: a device's, the sum of all devices', and the copies on the way
    if run.sparse_users:
        users = 0
        mine = pair * run.touched_users
        shared = pair * min(run.processes * run.touched_users, run.user_rows)
        gathered = pair * run.processes * run.touched_users if run.processes > 1 else 0
        updating = max(mine + gathered, 2 * shared)  # both moments of the rows
    words = size * shape.embedding_parameters if full else 0
    gradients = float(size * dense_parameters(shape, run))
    partitioned = run.strategy in ("zero2", "zero3", "zero3_offload", "fsdp2")
    ended = gradients / n if partitioned else gradients
    if offload:
        ended = 0.0
    before = ended + mine if run.accumulation > 1 else 0.0  # of the micro-batches before
    share = shape.decoder_layers / (shape.encoder_layers + shape.decoder_layers)
    per_decoder = FP32 * (backbone - shape.embedding_parameters if full else lora) * share / (n if partitioned else 1)
    tables = items * (1 if run.tied_rows else 2) + users + words
    # Tables are looked up once. Where scores use one too it has a second gradient, and autograd (torch 2.13) writes the
    # sum into a third: after the gradient of users, before that of words.
    sums = 2 * items if run.tied_rows else 0
    if run.accumulation > 1:  # each gradient is added to that of the micro-batches before as soon as it is there
        at_scores = items if run.tied_rows else 0
        embedding = max(at_scores + users, at_scores + sums, items, words)
    else:
        embedding = max(0, sums - words)
    stored = kept.encoder + kept.decoder + kept.cached_weights
    changing = {
        "loss": {
            "activations": stored,
            "gradients": before + (FP32 * run.items * shape.d_model if sliced else 0.0),
            "logits": float(at_loss),
        },
        "head": {
            "activations": stored,
            "gradients": before + items,
            "logits": float(at_head),
        },
        "decoder": {
            "activations": stored,
            "gradients": before + items,
            "temporary": kept.decoder_temporary,
        },
        "encoder": {
            "activations": kept.encoder + kept.cached_weights,
            "gradients": before + items if run.accumulation > 1 else items + per_decoder,
            "temporary": kept.encoder_temporary,
        },
        "embedding": {
            "activations": kept.cached_weights,
            "gradients": min(gradients, ended + tables) + mine,
            "temporary": float(embedding),
        },
        "update": {
            "gradients": ended + shared,
            "temporary": FP32 * trained / n if run.deepspeed and not offload else float(updating),
        },
    }
    return {name: dict.fromkeys(PARTS, 0.0) | static | parts for name, parts in changing.items()}


# --- communication and time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device hands to collectives in a step: the whole tensor each time, not its share."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    def sent(self, processes: int) -> float:
        """Bytes that a device sends by ring algorithms (Patarasuk and Yuan, 2009)."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (processes - 1) / processes


def traffic(shape: Shape, run: Run) -> Traffic:
    """What the strategy communicates in a step, all micro-batches together.

    DDP reduces all dense gradients in fp32, once a step; sparse ones of user rows are gathered as (index, row) pairs, as
    many of each device as of the one that has the most. DeepSpeed's ZeRO-1 and -2 all-reduce them too (each process then
    keeps its part) and gather the updated weights; ZeRO-2 reduces in each micro-batch. ZeRO-3 gathers all weights that
    compute, once where they are few enough to stay (`ZERO3_LIVE`), else again for the backward pass, which is then an upper
    bound; FSDP2 gathers the blocks twice and the rest once.
    """
    if run.processes == 1:
        return Traffic()
    size, trained = _trained_size(run), trained_parameters(shape, run)
    if run.strategy == "ddp":
        pairs = run.processes * run.touched_users * (FP32 * shape.d_model + INDEX) if run.sparse_users else 0
        return Traffic(all_reduce=FP32 * dense_parameters(shape, run), all_gather=pairs)
    if run.strategy in ("zero1", "zero2"):
        times = run.accumulation if run.strategy == "zero2" else 1
        return Traffic(all_reduce=size * trained * times, all_gather=size * trained)
    rows, lora = row_parameters(shape, run), lora_parameters(shape, run)
    positions = 2 * shape.positions * shape.d_model
    if run.strategy == "fsdp2":  # the root's weights stay gathered from the forward to the backward pass
        width = _width(run)
        # fully_shard splits rows and pads them to a multiple of the devices: the r rows of A to 64 of them, for one.
        padding = sum(
            (-run.lora_r % run.processes) * shape.linears[name][0] * shape.occurrences(name)
            for name in (lora_targets(shape, run) if run.tuning == "lora" else ())
        )
        root = width * (shape.embedding_parameters + shape.head_parameters + positions + rows)
        blocks = width * (shape.linear_parameters + shape.other_parameters - positions + lora + padding)
        return Traffic(
            all_gather=(2 * blocks + root) * run.accumulation,
            reduce_scatter=FP32 * (trained + padding) * run.accumulation,
        )
    used = replace(shape, own_head=False)  # a head that no score passes through is never gathered
    words: float = (size if run.tuning == "full" else _width(run)) * shape.embedding_parameters
    backbone: float = size * used.parameters if run.tuning == "full" else _frozen_bytes(used, run)
    whole: float = backbone + size * (lora + rows)
    if used.parameters + lora + rows > ZERO3_LIVE:
        # Nothing lasts to its next use: a table is read where tokens are looked up, that of items by scores, and by the
        # gradient of each use. A frozen table has none.
        tables = run.items * shape.d_model * (1 if run.tied_rows else 2)
        users = run.user_rows * shape.d_model
        looked_up = size * (4 * tables + 2 * users) + (2 if run.tuning == "full" else 1) * words
        whole = 2 * (whole - size * rows - words) + looked_up
    return Traffic(all_gather=whole * run.accumulation, reduce_scatter=size * trained * run.accumulation)


def operations(shape: Shape, run: Run, length: float | None = None) -> float:
    """Floating-point operations of a training step for one input row of `length` tokens (by default the mean).

    Two for each product of a matrix element and a token going forward, two for the gradient that goes on, two more for
    the gradient of a weight that is trained.
    """
    read = run.mean_length if length is None else length
    packed, absorbed = packs(shape, run), absorbs(shape, run)
    asked = run.targets * run.prompt
    seen = run.longest if packed else read  # states as cross-attention has them
    projected = 0 if absorbed else read if quickened(shape, run) else seen  # keys and values are made of
    d, inner = shape.d_model, shape.inner
    attention = 4 * d * inner
    encoder = shape.encoder_layers * (attention + shape.feed_forward) * read
    cross = attention if absorbed else 2 * d * inner  # of a query: its states are narrowed where it absorbs
    decoder = shape.decoder_layers * ((attention + cross + shape.feed_forward) * asked + 2 * d * inner * projected)
    pairs = shape.encoder_layers * read * (encoder_rows(shape, run)[1] if packed else read)
    pairs += shape.decoder_layers * asked * asked
    crossing = shape.decoder_layers * asked * seen * (shape.heads * d if absorbed else inner)
    passes = 3 if run.tuning == "full" else 2
    again = 0.0
    if absorbed and not run.cpu:  # its forward pass is computed a second time
        again = 2.0 * shape.decoder_layers * 2 * d * inner * asked + 4.0 * crossing
    head = 3 * 2.0 * run.targets * run.items * d
    lora = 0.0
    if run.tuning == "lora":
        tokens = shape.encoder_layers * read + shape.decoder_layers * (2 * asked + (projected or asked)) / 1.5
        layers = shape.encoder_layers + 2 * shape.decoder_layers
        lora = 3 * 2.0 * lora_parameters(shape, run) / layers * tokens
    return passes * 2.0 * (encoder + decoder) + 3 * 4.0 * (inner * pairs + crossing) + again + head + lora


@dataclass(frozen=True)
class Estimate:
    """What a run will take on each device. Times are predictions from assumed or given speeds.

    Args:
        shape, run, hardware: what it is of; `hardware` None on a machine whose speed nobody knows.
        moment: of the step when memory is fullest, one of `moments`.
        parts: bytes by part at that moment.
        largest: bytes by part, each at its own fullest moment.
        traffic: what goes through collectives in a step.
        epoch_steps: steps of an epoch, or None where the number of examples is not known.
    """

    shape: Shape
    run: Run
    hardware: Hardware | None
    moment: str
    parts: dict[str, float]
    largest: dict[str, float]
    traffic: Traffic
    epoch_steps: int | None = None

    @property
    def total(self) -> float:
        """Peak bytes on a device."""
        return sum(self.parts.values())

    @property
    def capacity(self) -> float | None:
        """Bytes of a device that a run can fill."""
        return None if self.hardware is None else USABLE * self.hardware.memory

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within `capacity`; None where that is not known."""
        return None if self.capacity is None else self.total <= self.capacity

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return self.traffic.sent(self.run.processes)

    @property
    def compute_seconds(self) -> float | None:
        """Arithmetic of a step; None where the speed is not known."""
        if self.hardware is None or not self.hardware.tflops:
            return None
        rows = self.run.examples * self.run.accumulation
        speed = self.hardware.tflops * 1e12 * self.hardware.utilisation
        more = FILLING if packs(self.shape, self.run) else PADDING
        return operations(self.shape, self.run) * more * rows / speed

    @property
    def communication_seconds(self) -> float:
        """Of a step, if nothing of it is hidden behind arithmetic."""
        return 0.0 if self.hardware is None else self.sent / self.hardware.bandwidth(self.run.processes)

    @property
    def step_seconds(self) -> float | None:
        """Of a step, communication behind arithmetic."""
        return None if self.compute_seconds is None else self.compute_seconds + self.communication_seconds

    @property
    def epoch_seconds(self) -> float | None:
        """Of an epoch."""
        if self.step_seconds is None or self.epoch_steps is None:
            return None
        return self.step_seconds * self.epoch_steps

    def to_dict(self) -> dict[str, Any]:
        """As `genrec estimate --json` prints it; bytes and seconds."""
        return {
            "strategy": self.run.strategy,
            "processes": self.run.processes,
            "examples_per_device": self.run.examples,
            "accumulation": self.run.accumulation,
            "global_batch_size": self.run.global_batch,
            "trained_parameters": trained_parameters(self.shape, self.run),
            "parameters": self.shape.parameters
            + lora_parameters(self.shape, self.run)
            + row_parameters(self.shape, self.run),
            "peak_bytes": round(self.total),
            "moment": self.moment,
            "bytes_at_the_peak": {name: round(value) for name, value in self.parts.items()},
            "largest_bytes": {name: round(value) for name, value in self.largest.items()},
            "usable_bytes": None if self.capacity is None else round(self.capacity),
            "fits": self.fits,
            "sent_bytes_per_step": round(self.sent),
            "predicted_compute_seconds": self.compute_seconds,
            "predicted_communication_seconds": self.communication_seconds,
            "predicted_step_seconds": self.step_seconds,
            "steps_per_epoch": self.epoch_steps,
            "predicted_epoch_seconds": self.epoch_seconds,
        }


def estimate(shape: Shape, run: Run, hardware: Hardware | None = None, *, examples: int | None = None) -> Estimate:
    """Memory, communication and time of a run.

    Args:
        examples: of an epoch.

    Raises:
        ConfigError: LoRA targets that the backbone has not.
    """
    at = moments(shape, run)
    moment = max(at, key=lambda name: sum(at[name].values()))
    largest = {part: max(parts[part] for parts in at.values()) for part in PARTS}
    steps = None if examples is None else -(-examples // run.global_batch)
    return Estimate(shape, run, hardware, moment, at[moment], largest, traffic(shape, run), steps)


def largest_batch(shape: Shape, run: Run, capacity: float) -> int:
    """The most examples of a device at once whose peak is within `capacity` bytes; 0 where not even one is."""

    def fits(examples: int) -> bool:
        return estimate(shape, replace(run, examples=examples)).total <= capacity

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def by_strategy(
    shape: Shape, run: Run, hardware: Hardware | None = None, *, examples: int | None = None
) -> dict[str, Estimate]:
    """The same run under each strategy that its number of devices allows."""
    names = [run.strategy] if run.cpu else [ONE_DEVICE[1]] if run.processes == 1 else STRATEGIES[2:]
    if run.sparse_users:
        names = [name for name in names if name in SPARSE_STRATEGIES]
    return {
        name: estimate(shape, replace(run, strategy=name), hardware, examples=examples)  # type: ignore[arg-type]
        for name in names
    }


def recommended(estimates: Mapping[str, Estimate]) -> str | None:
    """The first strategy that fits; `STRATEGIES` has them in order of what they cost in time and complexity."""
    return next((name for name in STRATEGIES if name in estimates and estimates[name].fits is not False), None)


@dataclass(frozen=True)
class Scaling:
    """Predicted efficiency of many devices: the step of one, over the same step of each among many."""

    processes: int
    sent: float
    communication_seconds: float
    efficiency: float


def predicted_scaling(
    shape: Shape,
    run: Run,
    hardware: Hardware,
    *,
    processes: Sequence[int] = (8, 64),
    step_seconds: float | None = None,
    imbalance: float = 0.01,
) -> list[Scaling]:
    """Weak scaling at `run.examples` a device: communication is added to the step, none of it hidden.

    Args:
        run: as under the strategy on many devices.
        step_seconds: a measured step of one device; without it, predicted from `hardware`.
        imbalance: how much longer the slowest device computes than the mean, when examples are dealt by length.

    Raises:
        ConfigError: neither a measured step nor a speed to predict one from.
    """
    alone = step_seconds
    if alone is None:
        alone = estimate(shape, replace(run, processes=1, strategy="single_gpu"), hardware).compute_seconds
    if not alone:
        raise ConfigError("step seconds: give a measured step of one device, or --tflops to predict one from")
    found = []
    for count in processes:
        many = replace(run, processes=count)
        sent = traffic(shape, many).sent(count)
        seconds = sent / hardware.bandwidth(count)
        found.append(Scaling(count, sent, seconds, alone / (alone * (1 + imbalance) + seconds)))
    return found


# --- from what is at hand ---------------------------------------------------------------------------------------------


def estimate_run(
    config: Mapping[str, Any],
    model_args: Any,
    training_args: Any,
    *,
    items: int,
    user_rows: int,
    longest: int,
    mean_length: float | None = None,
    strategy: str,
    processes: int,
    own_head: bool | None = None,
    targets: int = 1,
    hardware: Hardware | None = None,
    examples: int | None = None,
) -> Estimate:
    """The estimate of a run from the arguments that it is started with; quick enough for an `except` block.

    Args:
        config: `model.config.to_dict()`, or a `config.json`.
        model_args, training_args: `ModelArguments` and `GenRecTrainingArguments`.
        longest: tokens of the longest input row; the mean is taken to be as long where it is not given.
        own_head: whether the backbone's head is not its embedding matrix; see `Shape.from_config`.
        targets: predictions an input row.
        examples: of an epoch.
    """
    shape = Shape.from_config(config, own_head=own_head)
    if model_args.dropout is not None:
        shape = replace(shape, dropout=model_args.dropout)
        if shape.family == "t5":
            shape = replace(shape, attention_dropout=model_args.dropout, activation_dropout=model_args.dropout)
    accumulation = training_args.gradient_accumulation_steps
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    run = Run(
        items=items,
        user_rows=user_rows,
        examples=-(-training_args.global_batch_size // (processes * accumulation)),
        tied_rows=model_args.tie_item_rows,
        tuning=model_args.tuning,
        lora_r=model_args.lora_r,
        lora_targets=tuple(model_args.lora_target_modules) if model_args.lora_target_modules else None,
        lora_dropout=model_args.lora_dropout,
        strategy=strategy,  # type: ignore[arg-type]  # its __post_init__ checks it
        processes=processes,
        accumulation=accumulation,
        mean_length=longest if mean_length is None else mean_length,
        longest=longest,
        targets=targets,
        prompt=2 if model_args.decoder_prompt == "last-item" else 1,
        bf16=training_args.bf16,
        quantization=model_args.quantization,
        optimizer_bytes=0.0 if optimizer == "sgd" else 2.0 if "8bit" in optimizer else 8.0,
        sparse_users=training_args.sparse_user_rows,
        packing=training_args.packing,
        kernels=training_args.kernels,
    )
    return estimate(shape, run, hardware, examples=examples)


def read_geometry(
    name: str, *, init: str = "pretrained", revision: str | None = None
) -> tuple[dict[str, Any], bool | None]:
    """A backbone's configuration and whether its head is its own: of a folder, a published name, a named size, the Hub.

    Raises:
        ConfigError: it is none of these, or the Hub does not answer.
    """
    own_head = True if init == "random" else None  # fresh T5 weights get one; BART never has
    if (Path(name) / "config.json").is_file():
        try:
            return json.loads((Path(name) / "config.json").read_text(encoding="utf-8")), own_head
        except ValueError as error:
            raise ConfigError(f"backbone: {name}/config.json is not readable as json: {error}") from error
    if name in GEOMETRIES:
        return GEOMETRIES[name], own_head
    from transformers import PreTrainedConfig

    from genrec_llm.model import NAMED_SIZES, bare_tokenizer

    if name in NAMED_SIZES:
        config = NAMED_SIZES[name].to_dict()
        return config | {"vocab_size": len(bare_tokenizer(config["model_type"]))}, True
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backbone: {name!r} is neither a folder with a config.json, nor a geometry known here, nor a model that the "
            f"Hub answers for ({str(error).splitlines()[0]}). Known: {', '.join([*NAMED_SIZES, *GEOMETRIES])}"
        ) from error
    return config, own_head
