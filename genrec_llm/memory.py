"""The memory of a device while it trains: what autograd keeps, and each part at the moments of a step."""

from __future__ import annotations

from dataclasses import dataclass

from genrec_llm.shape import Shape
from genrec_llm.workload import (
    BF16,
    FP32,
    INDEX,
    Run,
    absorbs,
    dense_parameters,
    encoder_rows,
    lora_parameters,
    lora_targets,
    packs,
    quickened,
    row_parameters,
    trained_parameters,
    trained_size,
    weight_size,
)

ZERO3_LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered: stage3_max_live_parameters and stage3_max_reuse_distance of DeepSpeed 0.19."""
MOST_SCORES = 2**27
"""Scores of a micro-batch up to which the loss on a GPU makes all of them at once; beyond, as many at a time."""
MOST_SCORES_ON_CPU = 2**24
"""Scores of a micro-batch that the loss on a CPU makes at a time at most, in one tensor that stays (`item_loss`)."""
PARTS = ("weights", "id rows", "LoRA", "optimizer state", "gradients", "activations", "logits", "buffers", "temporary")


def scores_at_once(rows: int, width: int) -> int:
    """Scores that the loss on a CPU makes at a time: as many as `rows` of `width` have numbers, which caches hold best.

    With fewer, the rows would pass through the caches more often than the scores; fewer than 2^18 are not worth a slice.
    """
    return min(MOST_SCORES_ON_CPU, max(2**18, rows * width))


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

    query, key, value, out = shape.attention_names
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


# --- the moments of a step --------------------------------------------------------------------------------------------


def frozen_bytes(shape: Shape, run: Run) -> float:
    """Of the backbone's weights that are not trained, on one device that holds them all."""
    if run.tuning == "full":
        return (BF16 if run.deepspeed and run.bf16 else FP32) * shape.head_parameters
    plain = weight_size(run)
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


def _block_bytes(shape: Shape, run: Run) -> float:
    """Weights of the largest block, a decoder layer, as FSDP gathers it."""
    matrices = 8 * shape.d_model * shape.inner + shape.feed_forward
    return weight_size(run) * matrices


def moments(shape: Shape, run: Run) -> dict[str, dict[str, float]]:
    """Bytes of each part of `PARTS` on one device, at the moments of a step when memory can be fullest.

    "loss": scores, their softmax and its gradient, all activations; where the scores are too many to be held at once, the
    first gradient of item rows is made with them. "head": that gradient and the one of the scores, all activations.
    "decoder": the first layer on the way back. "encoder": the decoder's gradients are there and its activations gone.
    "embedding": all gradients. "update": the optimizer's step.
    """
    n, size, full = run.processes, trained_size(run), run.tuning == "full"
    kept = activations(shape, run)
    rows, lora = row_parameters(shape, run), lora_parameters(shape, run)
    trained = trained_parameters(shape, run)
    backbone = trained - rows - lora
    part = n if run.strategy in ("zero3", "zero3_offload", "fsdp2") else 1
    offload = run.strategy == "zero3_offload"
    on_device = 0 if offload else 1
    frozen = frozen_bytes(shape, run)
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
        root = weight_size(run) * (shape.embedding_parameters + shape.head_parameters + rows)
        static["buffers"] = root + 2 * _block_bytes(shape, run)

    scores = run.examples * run.targets * run.items
    # Whole ones with their softmax and its gradient; slices are turned into the gradient where they are.
    most = scores_at_once(run.items, shape.d_model) if run.cpu else MOST_SCORES
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
    # sum into a third, or into the first where slices have made that: after the gradient of users, before that of words.
    sums = (1 if sliced else 2) * items if run.tied_rows else 0
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
