"""Faster forms of a T5 backbone's layers. Each computes what the layer of transformers in whose place it works computes.

`quicken` gives layers another `forward`; weights, their names and checkpoints stay what they are. Little is kept for the
backward pass: each kernel keeps its inputs and computes the rest again where that costs less than memory traffic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.models.mt5.modeling_mt5 import MT5Attention, MT5DenseGatedActDense, MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm

NORMS = (T5LayerNorm, MT5LayerNorm)
GATED = (T5DenseGatedActDense, MT5DenseGatedActDense)
ATTENTION = (T5Attention, MT5Attention)
STEPS = 2**16
"""Dropout probabilities are rounded to one in so many on a CPU."""


def quicken(model: nn.Module) -> None:
    """Let the layers of a T5-family model, and dropout anywhere in it, use the kernels of this module; others stay."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.forward = MethodType(_rms_norm, module)
        elif isinstance(module, GATED) and isinstance(module.act, NewGELUActivation):
            module.forward = MethodType(_gated_gelu, module)
        elif type(module) is nn.Dropout:
            module.forward = MethodType(_dropout, module)  # type: ignore[method-assign]
        elif isinstance(module, ATTENTION):
            crosses = module.is_decoder and not module.is_causal
            module.forward = MethodType(_cross_attention if crosses else _self_attention, module)
        elif isinstance(module, LoraLinear):
            module.forward = MethodType(_lora_linear, module)


# --- T5's norm --------------------------------------------------------------------------------------------------------


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """`T5LayerNorm.forward`: RMSNorm (Zhang and Sennrich, 2019), `[…, d_model]`."""
    if hidden_states.dtype != self.weight.dtype:
        stock: Tensor = type(self).forward(self, hidden_states)
        return stock
    if hidden_states.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
    normed: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
    return normed


class _RMSNorm(torch.autograd.Function):
    """In fp32 or bf16 on a CPU, where torch 2.13 has no fused kernel: keeps its input and one factor a token."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        factor = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = gradient * weight
            along = torch.linalg.vecdot(of_x, x).unsqueeze(-1).to(torch.float32).mul_(factor**3 / -x.shape[-1])
            of_x = (of_x * factor).addcmul_(x, along).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * (x * factor)).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return of_x, of_weight, None


# --- gated GELU -------------------------------------------------------------------------------------------------------


def _gated_gelu(self: Any, hidden_states: Tensor) -> Tensor:
    """`T5DenseGatedActDense.forward` with GELU's tanh approximation (Shazeer, 2020), `[…, d_model]`."""
    hidden_states = _GatedGelu.apply(self.wi_0(hidden_states), self.wi_1(hidden_states))
    hidden_states = self.dropout(hidden_states)
    if hidden_states.dtype != self.wo.weight.dtype and self.wo.weight.is_floating_point():
        hidden_states = hidden_states.to(self.wo.weight.dtype)  # where transformers keeps wo in fp32
    projected: Tensor = self.wo(hidden_states)
    return projected


class _GatedGelu(torch.autograd.Function):
    """gelu(gate) × value, which keeps the two alone; transformers' form in Python keeps seven tensors of their size.

    In fp32 on a CPU, GELU's tanh form is written as what it equals, x · sigmoid(2√(2/π) (x + 0.044715 x³)): a few passes
    over memory, which are faster than torch 2.13's own kernels there.
    """

    SLOPE, CUBIC = 2 * (2 / math.pi) ** 0.5, 2 * (2 / math.pi) ** 0.5 * 0.044715

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        if not _passes_are_faster(gate):
            return F.gelu(gate, approximate="tanh").mul_(value)
        return _GatedGelu._sigmoid(gate).mul_(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        if not _passes_are_faster(gate):
            of_gate = torch.ops.aten.gelu_backward(gradient * value, gate, approximate="tanh")
            return of_gate, F.gelu(gate, approximate="tanh").mul_(gradient)
        sigmoid = _GatedGelu._sigmoid(gate)
        of_value = (gate * sigmoid).mul_(gradient)
        slope = torch.addcmul(gate.new_tensor(_GatedGelu.SLOPE), gate, gate, value=3 * _GatedGelu.CUBIC).mul_(gate)
        of_gate = slope.addcmul_(slope, sigmoid, value=-1).add_(1).mul_(sigmoid)
        return of_gate.mul_(gradient).mul_(value), of_value

    @staticmethod
    def _sigmoid(gate: Tensor) -> Tensor:
        """What GELU multiplies its argument with."""
        inner = torch.addcmul(gate.new_tensor(_GatedGelu.SLOPE), gate, gate, value=_GatedGelu.CUBIC)
        return inner.mul_(gate).sigmoid_()


def _passes_are_faster(gate: Tensor) -> bool:
    return gate.device.type == "cpu" and gate.dtype == torch.float32


# --- dropout ----------------------------------------------------------------------------------------------------------


def _dropout(self: Any, hidden_states: Tensor) -> Tensor:
    """`nn.Dropout.forward`."""
    return _dropped(hidden_states, self.p if self.training else 0.0)


def _dropped(x: Tensor, p: float) -> Tensor:
    """`F.dropout` of a model in training. Where torch compiles, it puts its own into a kernel with what is beside it."""
    if not 0 < p < 1 - 1 / STEPS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped: Tensor = _Dropout.apply(x, p)
    return dropped


class _Dropout(torch.autograd.Function):
    """On a CPU torch draws a number a value and keeps the mask in the values' type: here 64 random bits serve for four.

    They come from numpy's SFC64, which is faster than torch's generator and is seeded by a draw of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        seed = torch.empty(1, dtype=torch.int64).random_().numpy()[0]
        # In torch's own memory, the peak of which `tools/check_memory.py` holds against the estimate.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
        bits.numpy()[:] = np.random.SFC64(seed).random_raw(len(bits)).view(np.int64)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
        ctx.save_for_backward(bits)
        ctx.dropped = round(p * STEPS)
        return _kept(x, bits, ctx.dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _kept(gradient, ctx.saved_tensors[0], ctx.dropped), None


def _kept(x: Tensor, bits: Tensor, dropped: int) -> Tensor:
    """What random bits leave of `x`, scaled. A product with bools would convert them one by one, at five times the cost."""
    kept = torch.ge(bits, dropped - STEPS // 2, out=torch.empty_like(bits, dtype=x.dtype))
    return torch.addcmul(x.new_zeros(()), x, kept, value=1 / (1 - dropped / STEPS), out=kept)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _lora_linear(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's `Linear.forward` with one adapter without dropout, `[…, in] → […, out]`."""
    factors = _factors(self)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if (
        factors is None
        or len(factors.adapters) != 1
        or x.dtype != factors.weight.dtype
        or x.dtype != (torch.get_autocast_dtype(device) if autocast else factors.adapters[0][0].dtype)
    ):
        stock: Tensor = type(self).forward(self, x, *args, **kwargs)
        return stock
    ((down, up, scaling),) = factors.adapters
    with torch.autocast(device, enabled=False):
        found: Tensor = _LoraLinear.apply(x.flatten(0, -2), factors.weight, down.to(x.dtype), scaling * up.to(x.dtype))
    return found.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + (x Aᵀ) Bᵀ with a frozen W, where both products go into one sum, forward and backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        narrow = x @ down.t()
        ctx.save_for_backward(x, weight, down, up, narrow)
        return (x @ weight.t()).addmm_(narrow, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, narrow = ctx.saved_tensors
        of_narrow = gradient @ up
        of_x = (gradient @ weight).addmm_(of_narrow, down) if ctx.needs_input_grad[0] else None
        return of_x, None, of_narrow.t() @ x, gradient.t() @ narrow


# --- self-attention ---------------------------------------------------------------------------------------------------


def _self_attention(
    self: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, None]:
    """`T5Attention.forward` of a stack's own tokens, `[rows, tokens, d_model]`.

    The first layer puts the mask into the position bias that the stack hands on to the others, once for all of them.

    Args:
        mask: which tokens a token sees, `[rows, 1, tokens, tokens]` or `[rows, 1, 1, tokens]`.
        position_bias: of the first layer, `[rows, heads, tokens, tokens]`.
    """
    if _continues(kwargs) or mask is None or mask.dtype != torch.bool or key_value_states is not None:
        stock: tuple[Tensor, Tensor, None] = type(self).forward(
            self, hidden_states, mask, key_value_states, position_bias, **kwargs
        )
        return stock
    rows, tokens, _ = hidden_states.shape
    query, key, value = (
        part(hidden_states).view(rows, tokens, self.n_heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v)
    )
    if position_bias is None:
        bias = self.compute_bias(tokens, tokens, device=mask.device)
        position_bias = bias.to(query.dtype).where(mask, torch.finfo(query.dtype).min)
    dropout = self.dropout if self.training else 0.0
    if query.device.type == "cpu":
        # torch's own kernel has no dropout there, and for rows of this length is slower than these products.
        scores = torch.baddbmm(position_bias.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
        found = torch.bmm(_dropped(scores.softmax(dim=-1), dropout), value.flatten(0, 1)).view_as(query)
    else:
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=position_bias, dropout_p=dropout, scale=1.0)
    return self.o(found.transpose(1, 2).reshape(rows, tokens, -1)), position_bias, None


def _continues(kwargs: dict[str, Any]) -> bool:
    """Whether tokens were decoded before these; transformers names what it keeps of them `cache` from 5.24 on."""
    return any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))


# --- cross-attention of a short prompt --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedStates:
    """An encoder's states as they were computed, several examples in a row.

    Args:
        rows: `[rows, row length, d_model]`.
        segments: where the tokens of each example are in the flattened rows, `[examples, longest]` for each class of
            length; -1 beyond an example's end.
    """

    rows: Tensor
    segments: tuple[Tensor, ...]

    def of_examples(self, states: Tensor) -> list[Tensor]:
        """States `[rows, row length, width]` as `[examples, longest, width]` a class; beyond an example's end stand any."""
        flat = states.flatten(0, 1)
        return [flat[segment.clamp(min=0)] for segment in self.segments]

    @cached_property
    def states(self) -> list[Tensor]:
        """Of the examples, as `of_examples`: one gradient of them for all layers."""
        return self.of_examples(self.rows)

    @cached_property
    def masks(self) -> list[Tensor]:
        """Which of them there are, `[examples, 1, 1, longest]` a class; a place without an example sees any, not none.

        A softmax over nothing is no number in some of torch's kernels, and what is no number survives a label left out.
        """
        return [((segment >= 0) | (segment[:, :1] < 0))[:, None, None] for segment in self.segments]


def _cross_attention(
    self: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    packed: PackedStates | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, None]:
    """`T5Attention.forward` of a prompt's few queries, `[examples, prompt, d_model]`, over the states of its example.

    Args:
        mask: which states a query sees, `[examples, 1, prompt, tokens]`.
        key_value_states: `[examples, tokens, d_model]`.
        packed: stands for both of them where several examples share a row.
    """
    if _continues(kwargs) or mask is None or mask.dtype != torch.bool or key_value_states is None:
        if packed is not None:
            raise ValueError("packed states need a boolean mask and no cache")
        stock: tuple[Tensor, Tensor | None, None] = type(self).forward(
            self, hidden_states, mask, key_value_states, position_bias, **kwargs
        )
        return stock
    query = self.q(hidden_states).view(*hidden_states.shape[:2], self.n_heads, -1)
    dropout = self.dropout if self.training else 0.0
    masks = [mask] if packed is None else packed.masks
    key, value = _factors(self.k), _factors(self.v)
    if key is not None and value is not None:
        states = [key_value_states] if packed is None else packed.states
        attend = partial(_absorbed, states=states, masks=masks, key=key, value=value, dropout=dropout)
        if _computes_again(query):
            found = checkpoint(attend, query, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            found = attend(query)
    else:
        keys, values = (
            [part(key_value_states)] if packed is None else packed.of_examples(part(packed.rows))
            for part in (self.k, self.v)
        )
        queries = query.split([len(mask) for mask in masks])
        found = torch.cat([_attention(*each, dropout) for each in zip(queries, keys, values, masks, strict=True)])
    return self.o(found.flatten(2)), position_bias, None


def _computes_again(query: Tensor) -> bool:
    """Whether attention keeps its arguments alone for the backward pass: the rest would be most of a GPU's step."""
    return query.is_cuda and torch.is_grad_enabled()


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """T5's attention, `[examples, prompt, heads, size]`, over keys and values `[examples, tokens, heads × size]`."""
    shape = (*keys.shape[:2], query.shape[2], -1)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2),
        attn_mask=mask, dropout_p=dropout, scale=1.0,
    ).transpose(1, 2)  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """A linear layer as products: x Wᵀ + Σ s (x Aᵀ) Bᵀ.

    Args:
        weight: W `[heads × size, d_model]`.
        adapters: (A `[r, d_model]`, B `[heads × size, r]`, s) of each LoRA adapter.
    """

    weight: Tensor
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()

    def to_states(self, query: Tensor) -> Tensor:
        """q W of each head, `[heads, queries, size] → [heads, queries, d_model]`."""
        heads, _, size = query.shape
        wanted = torch.bmm(query, self.weight.view(heads, size, -1))
        for down, up, scaling in self.adapters:
            wanted = wanted + scaling * (torch.bmm(query.to(up.dtype), up.view(heads, size, -1)) @ down)
        return wanted.to(query.dtype)

    def of_states(self, states: Tensor) -> Tensor:
        """x Wᵀ of each head, `[heads, queries, d_model] → [heads, queries, size]`."""
        heads = len(states)
        found = torch.bmm(states, self.weight.view(heads, -1, states.shape[-1]).transpose(1, 2))
        for down, up, scaling in self.adapters:
            narrow = states.to(down.dtype) @ down.t()
            found = found + scaling * torch.bmm(narrow, up.view(heads, -1, up.shape[-1]).transpose(1, 2))
        return found.to(states.dtype)


def _factors(linear: nn.Module) -> Factors | None:
    """None where a layer is no such product: quantised, or with dropout before its adapter.

    Under ZeRO-3 DeepSpeed makes a weight whole when it is read in a forward pass.
    """
    base = linear.base_layer if isinstance(linear, LoraLinear) else linear
    if type(base) is not nn.Linear or base.bias is not None or not base.weight.numel():
        return None
    if base is linear or linear.disable_adapters or linear.merged:
        return Factors(base.weight)
    names = linear.active_adapters
    if linear.training and not all(isinstance(linear.lora_dropout[name], nn.Identity) for name in names):
        return None
    return Factors(
        base.weight,
        tuple((linear.lora_A[name].weight, linear.lora_B[name].weight, linear.scaling[name]) for name in names),
    )


def _absorbed(
    query: Tensor, states: Sequence[Tensor], masks: Sequence[Tensor], key: Factors, value: Factors, dropout: float
) -> Tensor:
    """Attention without keys and values: with few queries to many states the matrices are cheaper on the queries' side.

    q · (W h) = (Wᵀ q) · h before the softmax, and Σ a (W h) = W (Σ a h) after it.

    Args:
        query: `[examples, prompt, heads, size]`.
        states, masks: `[examples, tokens, d_model]` and which of them a query sees, of one class of examples after another.

    Returns:
        `[examples, prompt, heads, size]`.
    """
    examples, prompt, heads, size = query.shape
    by_head = query.view(-1, heads, size).transpose(0, 1)
    wanted = key.to_states(by_head).transpose(0, 1).reshape(examples, prompt * heads, -1)
    seen = []
    for each, known, mask in zip(wanted.split([len(mask) for mask in masks]), states, masks, strict=True):
        scores = torch.bmm(each, known.transpose(1, 2)).view(len(mask), prompt, heads, -1)
        scores = scores.masked_fill(~mask.transpose(1, 2), torch.finfo(scores.dtype).min)
        weights = _dropped(scores.softmax(dim=-1), dropout).flatten(1, 2).to(known.dtype)
        seen.append(torch.bmm(weights, known))
    by_head = torch.cat(seen).view(examples * prompt, heads, -1).transpose(0, 1)
    return value.of_states(by_head).transpose(0, 1).reshape(examples, prompt, heads, size)
