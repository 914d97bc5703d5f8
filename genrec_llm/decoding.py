"""Scores into lists and ranks; the top N by transformers' `generate`, and the one-step path that equals it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from genrec_llm.model import last_hidden
from genrec_llm.tasks import PromptLayout

NOTHING = -1
"""Stands in a top list where fewer items were eligible than asked for."""


MOST_SCORES = 2**26
"""Scores of one batch of users, 256 MiB in fp32: a larger catalogue is ranked for fewer users at a time."""


def users_at_once(num_items: int, most: int) -> int:
    """How many users are scored together: `most`, or what `MOST_SCORES` leaves room for; at least one."""
    return max(1, min(most, MOST_SCORES // num_items))


@torch.inference_mode()  # outside of which scores that were made inside may not be changed
def mask_seen_(scores: Tensor, histories: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    """Put -inf at each row's history items into scores `[batch, items]`, in place; the same tensor."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    columns = np.concatenate([np.empty(0, dtype=np.int64), *histories])
    place = (torch.from_numpy(rows).to(scores.device), torch.from_numpy(columns).to(scores.device))
    return scores.index_put_(place, torch.tensor(-torch.inf, dtype=scores.dtype, device=scores.device))


def rank_targets(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many items score above each target, and how many others score the same, int64 `[batch]` each.

    A target at -inf was masked as seen and can never be hit: every item counts as better. NaN, which no comparison
    orders, counts against the model in the same way.
    """
    of_target = scores.gather(1, targets[:, None])
    # Sums of bool are ten times as fast in 32 bits as in 64, on a CPU.
    better = scores.shape[1] - (scores <= of_target).sum(dim=1, dtype=torch.int32).long()
    tied = (scores == of_target).sum(dim=1, dtype=torch.int32).long() - 1
    unhittable = ~(of_target[:, 0] > -torch.inf)
    return better.masked_fill(unhittable, scores.shape[1]), tied.masked_fill(unhittable, 0)


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best items of each row and their scores, `[batch, k]` each; equal scores by lower index.

    Where fewer than `k` items are eligible (above -inf), the rest of the row is `NOTHING` at -inf.
    """
    kept, items = min(k, scores.shape[1]), scores.shape[1]
    values, chosen = scores.topk(min(kept + 1, items), dim=1)
    # Of items that are tied at the end of the list topk takes any, and it puts NaN first: those rows are looked at again.
    again = values[:, 0].isnan()
    if kept < items:
        again |= (values[:, kept - 1] == values[:, kept]) & ~torch.isneginf(values[:, kept])
    chosen, values = chosen[:, :kept], values[:, :kept]
    if again.any():
        chosen, values = chosen.clone(), values.clone()
        chosen[again], values[again] = _top_of_tied(scores[again], kept)
    chosen, order = chosen.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    found = chosen.gather(1, order).masked_fill(torch.isneginf(values), NOTHING)
    return F.pad(found, (0, k - kept), value=NOTHING), F.pad(values, (0, k - kept), value=-torch.inf)


def _top_of_tied(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Items and scores of each row's list in any order, `[batch, k]` each; ties at its end by lower index, NaN last."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > last, scores == last
    room = k - above.sum(dim=1, keepdim=True)  # for the tied items, lowest indices first
    chosen = (above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))).nonzero()[:, 1].view(-1, k)
    return chosen, scores.gather(1, chosen)


def item_rows(model: Any, layout: PromptLayout) -> Tensor:
    """Output rows of a merged `transformers` model, fp32 `[items, d_model]`: a view of its head where that is fp32."""
    return model.get_output_embeddings().weight[layout.base : layout.base + layout.num_items].detach().float()


@torch.inference_mode()
def one_step_scores(model: Any, batch: dict[str, Tensor], layout: PromptLayout, rows: Tensor | None = None) -> Tensor:
    """Scores of all items by a merged `transformers` model, fp32 `[batch, items]`: one pass, head over items alone.

    Args:
        rows: `item_rows(model, layout)`, for callers that score often: a bf16 head is then not turned into fp32 each time.
    """
    embed = model.get_input_embeddings()
    hidden = last_hidden(model, embed(batch["input_ids"]), batch["attention_mask"], embed(batch["decoder_input_ids"]))
    return F.linear(hidden.float(), item_rows(model, layout) if rows is None else rows)


Score = Callable[[Sequence[npt.NDArray[np.int64]], npt.NDArray[np.int64]], Tensor]
"""Asks a model for scores after histories of user rows, `[batch, items]`."""


def mixed_scores(
    score: Score,
    layout: PromptLayout,
    histories: Sequence[npt.NDArray[np.int64]],
    users: npt.NDArray[np.int64],
) -> Tensor:
    """Scores that items are ranked by after each history, fp32 `[batch, items]`.

    They are the model's, or the log-probability of an item in the mixture over `layout.contexts`: one softmax over one
    vector says badly that the next item is near the last one or near the one before it.

    Args:
        score: asks the model for scores `[batch, items]`; called as often whatever the histories are.
        users: user rows, `[batch]`.
    """
    if not layout.last_items_weights:
        return score(histories, users)
    return next(mixtures(score, layout, [sum(layout.last_items_weights)], histories, users))


def mixtures(
    score: Score,
    layout: PromptLayout,
    shares: Sequence[float],
    histories: Sequence[npt.NDArray[np.int64]],
    users: npt.NDArray[np.int64],
) -> Iterator[Tensor]:
    """Log-probabilities of items after each history, one mixture for each share of the last items, fp32 `[batch, items]`.

    The model is asked once for all of them. See `mixed_scores`.

    Args:
        layout: with weights of the last items, of which only the proportions count.
        shares: of at least 0 and less than 1.
    """
    (whole, left), *last = layout.contexts(histories)
    has_items = torch.from_numpy(left < 1)[:, None]  # a history without any is ranked as a whole
    likely = score(whole, users).float().log_softmax(dim=1)
    alone = torch.full_like(likely, -torch.inf)
    for asked, weights in last:
        weight = torch.from_numpy(weights / sum(layout.last_items_weights)).to(likely).log()[:, None]
        torch.logaddexp(alone, score(asked, users).float().log_softmax(dim=1).add_(weight), out=alone)
    for share in shares:
        mixed = likely + has_items.to(likely) * math.log1p(-share)
        yield torch.logaddexp(mixed, alone + math.log(share), out=mixed) if share else mixed


class _MixContexts(LogitsProcessor):
    """Puts the mixture of what `layout.contexts` of a history say into the rows of each, a row a beam."""

    def __init__(self, weights: Tensor) -> None:
        self.log_weights = weights.log()[:, :, None, None]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        users, contexts = self.log_weights.shape[:2]
        likely = scores.log_softmax(dim=1).view(users, contexts, -1, scores.shape[1])
        mixed = (likely + self.log_weights.to(likely)).logsumexp(dim=1, keepdim=True)
        return mixed.expand_as(likely).reshape(scores.shape)  # type: ignore[return-value]


class _ExcludeItems(LogitsProcessor):
    """Sets -inf at given token ids of each user; `generate` has a row a context and beam."""

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = scores.shape[0] // self.allowed.shape[0]
        return scores.masked_fill(~self.allowed.repeat_interleave(rows, dim=0), -torch.inf)  # type: ignore[return-value]


@torch.inference_mode()
def generate_top_n(
    model: Any,
    batch: dict[str, Tensor],
    layout: PromptLayout,
    n: int,
    exclude: Sequence[npt.NDArray[np.int64]] | None = None,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Top items by beam search over one new token, `[users, n]` items and their log-probabilities.

    Args:
        model: a merged model; its `generation_config` restricts tokens to items.
        batch: a row a user or, with `weights`, a context: of `layout.encode_contexts`.
        exclude: item indices each user must not get, such as the history.
        weights: `[users, contexts]`, of `layout.encode_contexts`: the list is that of the mixture.

    Rows with fewer than `n` eligible items end in `NOTHING`.
    """
    contexts = 1 if weights is None else weights.shape[1]
    users = len(batch["input_ids"]) // contexts
    beams = min(n, layout.num_items)
    processors = LogitsProcessorList()
    if weights is not None and contexts > 1:
        processors.append(_MixContexts(weights))
    if exclude is not None:
        allowed = torch.zeros(users, model.config.vocab_size, device=batch["input_ids"].device)
        allowed[:, layout.base : layout.base + layout.num_items] = 1.0
        allowed = mask_seen_(allowed, [layout.base + np.asarray(items) for items in exclude])
        processors.append(_ExcludeItems(allowed > 0))
    found = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=1,
        logits_processor=processors,
        return_dict_in_generate=True,
        output_scores=True,
    )
    items = found.sequences[:, -1] - layout.base
    if beams == 1:  # greedy search, which scores no sequences
        values = found.scores[0].float().log_softmax(dim=1).gather(1, found.sequences[:, -1:])
    else:
        values = found.sequences_scores
    # Each context of a user has found the same list.
    items, values = (found.view(users, contexts, beams)[:, 0] for found in (items, values))
    outside = (items < 0) | (items >= layout.num_items) | ~torch.isfinite(values) | (values < -1e8)
    items, values = items.masked_fill(outside, NOTHING), values.masked_fill(outside, -torch.inf)
    return F.pad(items, (0, n - beams), value=NOTHING), F.pad(values, (0, n - beams), value=-torch.inf)
