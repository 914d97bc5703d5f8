"""Cross-entropy of targets among all items, in memory that a large catalogue does not outgrow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from genrec_llm.memory import MOST_SCORES, scores_at_once
from genrec_llm.tasks import IGNORED


def item_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, others: tuple[Tensor, ...] = ()
) -> Tensor:
    """Summed cross-entropy of `labels` under the scores `hidden @ weight.T`, in fp32.

    On a GPU, up to `MOST_SCORES` scores this is `torch.nn.functional.cross_entropy`, which keeps three tensors of them.
    Beyond, and on a CPU always, it goes over slices of targets with one tensor of scores, and makes the gradients on the
    way: as many products as the plain way, and nobody needs the weight again in the backward pass, where ZeRO-3 would
    have to gather it anew. On a CPU it takes less time than the plain way, most of whose time goes into fresh
    memory.

    torch 2.13's `linear_cross_entropy` does the same, but has no label smoothing in slices.

    Args:
        hidden: fp32 `[targets, d_model]`.
        weight: rows of the items, `[items, d_model]`, of any floating type.
        labels: item indices, int64 `[targets]`; `IGNORED` for a target that counts for nothing.
        label_smoothing: share of the target's probability that is spread over all rows (Szegedy et al., 2016).
        others: frozen rows, `[rows, d_model]` each, that compete with the items, as base tokens do in an ordinary head.
    """
    rows = sum(len(table) for table in (weight, *others))
    most = scores_at_once(rows, hidden.shape[1]) if hidden.is_cpu else MOST_SCORES
    if hidden.is_cpu or len(hidden) * len(weight) > most:
        return _in_slices(hidden, weight, labels, label_smoothing, most, others)
    scores = torch.cat([F.linear(hidden, rows.float()) for rows in (weight, *others)], dim=1)
    return F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)


@torch.compiler.disable  # its loop and its buffers are not for tracing
def _in_slices(
    hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, most: int, others: tuple[Tensor, ...]
) -> Tensor:
    loss: Tensor = _SlicedLoss.apply(hidden, weight, labels, smoothing, most, others)
    return loss


class _SlicedLoss(torch.autograd.Function):
    """`item_loss` over slices of targets. The gradients are there after the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        smoothing: float,
        most: int,
        others: tuple[Tensor, ...],
    ) -> Tensor:
        rows, *frozen = tables = [table.float() for table in (weight, *others)]
        sizes = [len(table) for table in tables]
        width = sum(sizes)
        counts = labels != IGNORED
        places = labels.where(counts, 0)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_rows = None if not ctx.needs_input_grad[1] else (torch.empty_like if len(hidden) else torch.zeros_like)(rows)
        loss = hidden.new_zeros(())
        size = max(1, most // width)
        buffer = hidden.new_empty(min(size, len(hidden)), width)
        for start in range(0, len(hidden), size):
            slice_ = slice(start, start + size)
            states, counted, place = hidden[slice_], counts[slice_], places[slice_].unsqueeze(1)
            scores = buffer[: len(states)]
            of_items, *of_others = parts = scores.split(sizes, dim=1)
            for part, table in zip(parts, tables, strict=True):
                torch.mm(states, table.T, out=part)
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
                scores.sub_((counted * (smoothing / width)).unsqueeze(1))
            scores.scatter_add_(1, place, (counted * (smoothing - 1)).to(scores.dtype).unsqueeze(1))
            if to_hidden is not None:
                torch.mm(of_items, rows, out=to_hidden[slice_])
                for part, table in zip(of_others, frozen, strict=True):
                    to_hidden[slice_].addmm_(part, table)
            if to_rows is not None:
                torch.addmm(to_rows, of_items.T, states, beta=float(start > 0), out=to_rows)  # the first one writes
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
        return to_hidden, to_rows, None, None, None, None
