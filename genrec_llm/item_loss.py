"""Cross-entropy of targets among all items, in memory that a large catalogue does not outgrow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from genrec_llm.memory import MOST_SCORES
from genrec_llm.tasks import IGNORED


def item_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy of `labels` under the scores `hidden @ weight.T`, in fp32.

    Up to `MOST_SCORES` scores this is `torch.nn.functional.cross_entropy`, which keeps three tensors of them. Beyond, it
    goes over slices of targets with one tensor of `MOST_SCORES`, and makes the gradients on the way: as many products as
    the plain way, and nobody needs the weight again in the backward pass, where ZeRO-3 would have to gather it anew.

    torch 2.13's `linear_cross_entropy` does the same, but has no label smoothing in slices.

    Args:
        hidden: fp32 `[targets, d_model]`.
        weight: rows of the items, `[items, d_model]`, of any floating type.
        labels: item indices, int64 `[targets]`; `IGNORED` for a target that counts for nothing.
        label_smoothing: share of the target's probability that is spread over all items (Szegedy et al., 2016).
    """
    if len(hidden) * len(weight) > MOST_SCORES:
        return _in_slices(hidden, weight, labels, label_smoothing)
    scores = F.linear(hidden, weight.float())
    return F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)


@torch.compiler.disable  # its loop and its buffers are not for tracing
def _in_slices(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    loss: Tensor = _SlicedLoss.apply(hidden, weight, labels, smoothing)
    return loss


class _SlicedLoss(torch.autograd.Function):
    """`item_loss` over slices of targets. The gradients are there after the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        rows, items = weight.float(), len(weight)
        counts = labels != IGNORED
        places = labels.where(counts, 0)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_rows = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros(())
        size = max(1, MOST_SCORES // items)
        buffer = hidden.new_empty(min(size, len(hidden)), items)
        for start in range(0, len(hidden), size):
            slice_ = slice(start, start + size)
            states, counted, place = hidden[slice_], counts[slice_], places[slice_].unsqueeze(1)
            scores = torch.mm(states, rows.T, out=buffer[: len(states)])
            wanted = scores.gather(1, place).squeeze(1) * (1 - smoothing)
            if smoothing:
                wanted += scores.mean(dim=1) * smoothing
            highest = scores.amax(dim=1, keepdim=True)
            total = scores.sub_(highest).exp_().sum(dim=1)
            each = highest.squeeze(1) + total.log() - wanted
            loss += each.where(counted, 0).sum()
            if to_hidden is None and to_rows is None:
                continue
            # d loss / d score: the softmax, less what the target's distribution has there.
            scores.mul_((counted / total).unsqueeze(1))
            if smoothing:
                scores.sub_((counted * (smoothing / items)).unsqueeze(1))
            scores.scatter_add_(1, place, (counted * (smoothing - 1)).to(scores.dtype).unsqueeze(1))
            if to_hidden is not None:
                torch.mm(scores, rows, out=to_hidden[slice_])
            if to_rows is not None:
                torch.addmm(to_rows, scores.T, states, beta=float(start > 0), out=to_rows)  # the first one writes
        ctx.save_for_backward(to_hidden, to_rows)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In place, without a second copy of the table: a second backward pass is refused by autograd, which counts changes.
        to_hidden, to_rows = ctx.saved_tensors
        to_hidden = None if to_hidden is None else to_hidden.mul_(factor)
        to_rows = None if to_rows is None else to_rows.mul_(factor).to(ctx.dtype)
        return to_hidden, to_rows, None, None
