"""The networks of the neural rivals: SASRec, BERT4Rec, Caser and HGN, in compact forms on torch's own layers.

Each turns a history into one vector and scores every item by its product with an output row. What differs beside the
network is what one example is: SASRec predicts the item after every place of a sequence, BERT4Rec hidden items, Caser and
HGN the next few items after a short window.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_llm.item_loss import item_loss
from genrec_llm.tasks import Sequences

IntArray = NDArray[np.int64]
Loss = Literal["softmax", "bce", "bpr"]
ROW_STD = 0.02
"""Standard deviation of fresh rows, as in BERT4Rec and S3-Rec."""
FORM = 4
"""Of these networks: weights of another form are not read. To be raised with what they compute."""


def right_aligned(sequences: Sequence[IntArray], width: int, fill: int) -> Tensor:
    """The last `width` items of each sequence at the right end of a row, `fill` before them, int64 `[sequences, width]`."""
    rows = np.full((len(sequences), width), fill, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        if len(recent := sequence[-width:]):
            row[-len(recent) :] = recent
    return torch.from_numpy(rows)


class Network(nn.Module):
    """What the four have in common: rows of items, output rows, and the three losses.

    Args:
        num_items: of the catalogue; index `num_items` is padding.
        dim: width of item rows.
        loss: "softmax" over all items; "bce", binary cross-entropy of the target plus that of `negatives` random items on
            average; "bpr", the target against one random item (Rendle et al., 2009).
        negatives: random items a target, drawn uniformly. The authors leave out what the user had; on Amazon Beauty that
            would be one in a thousand of them, on MovieLens-100K one in sixteen.
    """

    def __init__(self, num_items: int, dim: int, *, loss: Loss, negatives: int) -> None:
        super().__init__()
        self.num_items, self.loss_kind, self.negatives = num_items, loss, negatives
        self.scale = 1.0
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=num_items)
        nn.init.normal_(self.items.weight, std=ROW_STD)
        with torch.no_grad():
            self.items.weight[num_items] = 0.0

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Output rows `[items, state]` and biases `[items]`, or None; by default the input rows without biases."""
        return self.items.weight[: self.num_items], None

    @abstractmethod
    def examples(self, train: Sequences) -> int:
        """How many examples an epoch has."""

    @abstractmethod
    def states_and_targets(
        self, train: Sequences, examples: IntArray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """States `[targets, state]` of some of an epoch's examples, and the items they are to find, int64 `[targets]`."""

    @abstractmethod
    def last_states(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """States from which the item after each history is scored, `[histories, state]`."""

    def loss(self, train: Sequences, examples: IntArray, generator: np.random.Generator) -> Tensor:
        """Mean loss over the targets of some of an epoch's examples."""
        states, targets = self.states_and_targets(train, examples, generator)
        weight, bias = self.output()
        if self.loss_kind == "softmax":
            if bias is not None:  # one more direction, along which every state is one
                states = F.pad(states, (0, 1), value=1.0)
                weight = torch.cat([weight, bias[:, None]], dim=1)
            return item_loss(states, weight, targets) / len(targets)
        drawn = torch.from_numpy(generator.integers(self.num_items, size=(len(targets), self.negatives)))
        asked = torch.cat([targets[:, None], drawn], dim=1)
        scores = torch.einsum("nd,nkd->nk", states, F.embedding(asked, weight))
        if bias is not None:
            scores = scores + bias[asked]
        if self.loss_kind == "bpr":
            return F.softplus(scores[:, 1:] - scores[:, :1]).mean()
        return F.softplus(-scores[:, 0]).mean() + F.softplus(scores[:, 1:]).mean()

    @torch.inference_mode()
    def scores(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """Scores of every item, fp32 `[histories, items]`."""
        weight, bias = self.output()
        return F.linear(self.last_states(histories, users), weight, bias)


class _Transformer(Network):
    """Item and position rows under torch's encoder; rows are padded on the left, so that places count from the end.

    Norms stand before each part of a layer and at the end, as in SASRec; BERT4Rec's authors have them behind.

    Args:
        scale: of item rows on their way in, and of fresh position rows; SASRec's authors multiply rows of items by the
            square root of their width, so that the layers do not drown them out.
        entry: what the sum of item and position rows goes through first; BERT4Rec has a norm there.
    """

    def __init__(
        self, num_items: int, *, dim: int, layers: int, heads: int, dropout: float, max_history: int,
        activation: str, scale: float, entry: nn.Module, loss: Loss, negatives: int, extra_tokens: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(num_items + extra_tokens, dim, loss=loss, negatives=negatives)
        self.scale, self.entry = scale, entry
        self.num_items, self.max_history = num_items, max_history
        self.padding = num_items + extra_tokens
        self.places = nn.Embedding(max_history, dim)
        nn.init.normal_(self.places.weight, std=ROW_STD * scale)
        each = [
            nn.TransformerEncoderLayer(
                dim, heads, dim_feedforward=dim * (4 if activation == "gelu" else 1), dropout=dropout,
                activation=activation, batch_first=True, norm_first=True,
            )
            for _ in range(layers)
        ]  # fmt: skip
        self.encoder = nn.TransformerEncoder(each[0], 1, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.encoder.layers, self.encoder.num_layers = nn.ModuleList(each), layers  # torch would copy the first one
        self.dropout = nn.Dropout(dropout)

    def encode(self, tokens: Tensor, *, causal: bool) -> Tensor:
        """States of every place of rows padded on the left, `[rows, width] → [rows, width, dim]`."""
        width = tokens.shape[1]
        places = torch.arange(self.max_history - width, self.max_history)
        hidden = self.dropout(self.entry(self.items(tokens) * self.scale + self.places(places)))
        padding = tokens == self.padding
        seen = ~padding[:, None, :].expand(-1, width, -1)
        if causal:
            seen = seen & torch.ones(width, width, dtype=torch.bool).tril()
        # A padded place has to see something, or its softmax is no number; nobody reads what comes of it.
        seen = seen | torch.eye(width, dtype=torch.bool)
        heads = self.encoder.layers[0].self_attn.num_heads
        states: Tensor = self.encoder(hidden, mask=~seen.repeat_interleave(heads, dim=0))
        return states


def of_like_length(lengths: IntArray, most: int) -> Iterator[tuple[IntArray, int]]:
    """Places in `lengths` of like length, and the width that holds them: rows are never padded to more than twice theirs."""
    lengths = np.minimum(lengths, most)
    classes = np.ceil(np.log2(np.maximum(lengths, 4)))
    for each in np.unique(classes):
        chosen = np.flatnonzero(classes == each)
        yield chosen, int(lengths[chosen].max())


class SASRec(_Transformer):
    """Self-attentive sequential recommendation (Kang & McAuley, 2018), with its own loss (bce) or the whole softmax."""

    def __init__(
        self, num_items: int, *, dim: int, layers: int, heads: int, dropout: float, max_history: int, loss: Loss,
        negatives: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(
            num_items, dim=dim, layers=layers, heads=heads, dropout=dropout, max_history=max_history,
            activation="relu", scale=dim**0.5, entry=nn.Identity(), loss=loss, negatives=negatives,
        )  # fmt: skip

    def examples(self, train: Sequences) -> int:
        """A sequence of two items or more is an example."""
        return int((train.lengths() > 1).sum())

    def states_and_targets(
        self, train: Sequences, examples: IntArray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Every place of a sequence but the last, and the item after it."""
        sequences = [train[user] for user in np.flatnonzero(train.lengths() > 1)[examples]]
        states, targets = [], []
        for chosen, width in of_like_length(np.array([len(s) - 1 for s in sequences]), self.max_history):
            rows = right_aligned([sequences[place] for place in chosen], width + 1, self.padding)
            real = rows[:, :-1] != self.padding
            states.append(self.encode(rows[:, :-1], causal=True)[real])
            targets.append(rows[:, 1:][real])
        return torch.cat(states), torch.cat(targets)

    def last_states(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """At the last item."""
        width = max(1, min(self.max_history, max(map(len, histories))))
        return self.encode(right_aligned(histories, width, self.padding), causal=True)[:, -1]


class BERT4Rec(_Transformer):
    """Bidirectional encoder that finds hidden items (Sun et al., 2019); softmax over all items.

    Args:
        mask_probability: of an item to be hidden. One sequence in `LAST_ONLY` has its last item hidden instead, which is
            what ranking asks for.
    """

    LAST_ONLY = 4

    def __init__(
        self, num_items: int, *, dim: int, layers: int, heads: int, dropout: float, max_history: int,
        mask_probability: float,
    ) -> None:  # fmt: skip
        super().__init__(
            num_items, dim=dim, layers=layers, heads=heads, dropout=dropout, max_history=max_history,
            activation="gelu", scale=1.0, entry=nn.LayerNorm(dim), loss="softmax", negatives=0, extra_tokens=1,
        )  # fmt: skip
        self.mask, self.mask_probability = num_items, mask_probability
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias = nn.Parameter(torch.zeros(num_items))

    def output(self) -> tuple[Tensor, Tensor | None]:
        """The input rows, and a bias an item."""
        return self.items.weight[: self.num_items], self.bias

    def examples(self, train: Sequences) -> int:
        """A sequence is an example."""
        return len(train)

    def states_and_targets(
        self, train: Sequences, examples: IntArray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Hidden places of each sequence, at least one, and their items."""
        sequences = [train[user] for user in examples]
        states, targets = [], []
        for chosen, width in of_like_length(np.array(list(map(len, sequences))), self.max_history):
            rows = right_aligned([sequences[place] for place in chosen], width, self.padding)
            draws = torch.from_numpy(generator.random(rows.shape))
            real = rows != self.padding
            hidden = (draws < self.mask_probability) & real
            last = torch.from_numpy(generator.integers(self.LAST_ONLY, size=len(rows)) == 0)
            hidden[last] = False
            hidden[:, -1] |= ~hidden.any(dim=1)
            states.append(self.head(self.encode(rows.masked_fill(hidden, self.mask), causal=False)[hidden]))
            targets.append(rows[hidden])
        return torch.cat(states), torch.cat(targets)

    def last_states(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """At a mask behind the history."""
        masked = [np.append(history, self.mask) for history in histories]
        width = min(self.max_history, max(map(len, masked)))
        rows = right_aligned(masked, width, self.padding)
        states: Tensor = self.head(self.encode(rows, causal=False)[:, -1])
        return states


class _Window(Network):
    """The next few items after a window of the last `window` ones, for one user.

    Args:
        window: items that are read (L).
        ahead: items that are to be found (T).
        num_users: user rows; row 0 is an unknown user.
    """

    def __init__(
        self, num_items: int, num_users: int, *, dim: int, window: int, ahead: int, loss: Loss, negatives: int
    ) -> None:
        super().__init__(num_items, dim, loss=loss, negatives=negatives)
        self.window, self.ahead = window, ahead
        self.users = nn.Embedding(num_users, dim)
        nn.init.normal_(self.users.weight, std=ROW_STD)
        self.placed: tuple[IntArray, IntArray] | None = None

    @abstractmethod
    def states(self, items: Tensor, users: Tensor) -> Tensor:
        """`[rows, window]` items, padded on the left, and `[rows]` users → `[rows, state]`."""

    def _places(self, train: Sequences) -> tuple[IntArray, IntArray]:
        """Owner of each example, and the place of its first target in the flat array."""
        if self.placed is None:
            lengths = train.lengths()
            owner = np.repeat(np.arange(len(train)), np.maximum(lengths - 1, 0))
            first = np.concatenate(
                [np.arange(a + 1, b) for a, b in zip(train.offsets, train.offsets[1:], strict=False)]
            )
            self.placed = owner, first.astype(np.int64)
        return self.placed

    def examples(self, train: Sequences) -> int:
        """Every place of a sequence but the first is the first target of an example."""
        return len(self._places(train)[0])

    def states_and_targets(
        self, train: Sequences, examples: IntArray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """A state for each of an example's targets: those of its `ahead` next items that its sequence still has."""
        owner, first = (places[examples] for places in self._places(train))
        before = first[:, None] + np.arange(-self.window, 0)
        items = np.where(before >= train.offsets[owner][:, None], train.items[np.maximum(before, 0)], self.num_items)
        after = first[:, None] + np.arange(self.ahead)
        there = after < train.offsets[owner + 1][:, None]
        rows, columns = np.nonzero(there)
        states = self.states(torch.from_numpy(items), torch.from_numpy(train.users[owner]))
        return states[torch.from_numpy(rows)], torch.from_numpy(train.items[after[rows, columns]])

    def last_states(self, histories: Sequence[IntArray], users: IntArray) -> Tensor:
        """After the last items."""
        return self.states(right_aligned(histories, self.window, self.num_items), torch.from_numpy(users))


class Caser(_Window):
    """Convolutional sequence embedding (Tang & Wang, 2018): filters along and across a window, and the user's own row.

    Args:
        across: vertical filters (n_v), which weigh the places of the window.
        along: horizontal filters of each height (n_h), which look at some items in a row.
    """

    def __init__(
        self, num_items: int, num_users: int, *, dim: int, window: int, ahead: int, dropout: float, negatives: int,
        across: int = 4, along: int = 16, loss: Loss = "bce",
    ) -> None:  # fmt: skip
        super().__init__(num_items, num_users, dim=dim, window=window, ahead=ahead, loss=loss, negatives=negatives)
        self.across = nn.Conv2d(1, across, (window, 1))
        self.along = nn.ModuleList(nn.Conv2d(1, along, (height, dim)) for height in range(1, window + 1))
        self.joined = nn.Linear(across * dim + along * window, dim)
        self.dropout = nn.Dropout(dropout)
        self.rows = nn.Embedding(num_items, 2 * dim)
        nn.init.normal_(self.rows.weight, std=ROW_STD)
        self.bias = nn.Parameter(torch.zeros(num_items))

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Rows of their own for what the window says and for the user, and a bias an item."""
        return self.rows.weight, self.bias

    def states(self, items: Tensor, users: Tensor) -> Tensor:
        """See `_Window.states`; the window's part and the user's beside each other."""
        image = self.items(items).unsqueeze(1)
        across = self.across(image).flatten(1)
        along = [F.relu(layer(image)).squeeze(3).amax(dim=2) for layer in self.along]
        seen = F.relu(self.joined(self.dropout(torch.cat([across, *along], dim=1))))
        return torch.cat([seen, self.users(users)], dim=1)


class HGN(_Window):
    """Hierarchical gating network (Ma et al., 2019): which features and which items of the window matter to the user."""

    def __init__(
        self, num_items: int, num_users: int, *, dim: int, window: int, ahead: int, dropout: float = 0.0,
        negatives: int = 1, loss: Loss = "bpr",
    ) -> None:  # fmt: skip
        super().__init__(num_items, num_users, dim=dim, window=window, ahead=ahead, loss=loss, negatives=negatives)
        self.of_item, self.of_user = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.instance = nn.Linear(dim, 1, bias=False)
        self.user_places = nn.Linear(dim, window, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.rows = nn.Embedding(num_items, dim)
        nn.init.normal_(self.rows.weight, std=ROW_STD)
        self.bias = nn.Parameter(torch.zeros(num_items))

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Rows of their own, and a bias an item."""
        return self.rows.weight, self.bias

    def states(self, items: Tensor, users: Tensor) -> Tensor:
        """See `_Window.states`: user, gated window, and the plain sum of the window's items, which one product scores."""
        seen, user = self.items(items), self.users(users)
        gated = seen * torch.sigmoid(self.of_item(seen) + self.of_user(user).unsqueeze(1))
        weight = torch.sigmoid(self.instance(gated).squeeze(2) + self.user_places(user))
        weight = weight * (items != self.num_items)
        union = (gated * weight.unsqueeze(2)).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1e-8)
        return user + self.dropout(union) + self.dropout(seen.sum(dim=1))
