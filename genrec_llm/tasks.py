"""What the model reads and predicts: the prompt layout, the two tasks, and their seeded random draws.

Input `[user] item … item mask </s>`; every prediction has a short decoder prompt `[mask token, left neighbour]` and is
read at its last position. Masked-item examples (pretraining) hide items inside a history; next-item examples
(finetuning) put the mask after it. Both follow Cao & Liò, GenRec, 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from genrec_llm.errors import ConfigError

if TYPE_CHECKING:
    import datasets

    from genrec_llm.vocab import IdVocab

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Batch = dict[str, IntArray]
DecoderPrompt = Literal["last-item", "mask"]
IGNORED = -100
"""Label of a place that has no target; torch's cross-entropy leaves it out."""
LAST_ITEMS = 4
"""Items of a history that are also asked about alone, where they have a share in the ranking."""
LAST_ITEMS_DECAY = 0.85
"""What each of them weighs against the one after it."""


@dataclass(frozen=True)
class Sequences:
    """Item sequences of many users, one after the other in one array.

    Args:
        items: item indices, oldest first, `[interactions]`.
        offsets: where each user's sequence begins, and the end of the last, `[users + 1]`.
        users: user rows (0 = unknown), `[users]`.
    """

    items: IntArray
    offsets: IntArray
    users: IntArray

    @classmethod
    def encode(cls, split: datasets.Dataset, vocab: IdVocab, column: str) -> Sequences:
        """Encode the list column `items` or `history` of a split with the ids of `vocab`."""
        table = split.with_format("arrow")[:]
        lists = table.column(column).combine_chunks()
        return cls(
            items=vocab.encode_items(lists.flatten().to_pylist()),
            offsets=np.asarray(lists.offsets, dtype=np.int64) - int(lists.offsets[0].as_py()),
            users=np.array([vocab.user_row(raw) for raw in table.column("user").to_pylist()], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, user: int) -> IntArray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def __iter__(self) -> Iterator[IntArray]:
        return (self[user] for user in range(len(self)))

    def lengths(self) -> IntArray:
        """Items a user, `[users]`."""
        return np.diff(self.offsets)


def uniform(seed: int, epoch: int, example: IntArray, draw: int | IntArray) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) that depend on (seed, epoch, example, draw) alone, whoever asks and in whatever order.

    The finaliser of SplitMix64 (Steele et al., 2014) applied to each of the four in turn; `example` and `draw` broadcast.
    """

    def mix(state: npt.NDArray[np.uint64], word: Any) -> npt.NDArray[np.uint64]:
        state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    with np.errstate(over="ignore"):
        state = mix(np.zeros(1, dtype=np.uint64), seed)
        for word in (epoch, example, draw):
            state = mix(state, word)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


LAST_ITEMS_SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)
"""Shares of the last items that validation chooses from."""


def last_items_weights(share: float) -> tuple[float, ...]:
    """What the last item alone, the one before it, … weigh in a ranking, `share` together, each 0.85 of the one after."""
    weights = [LAST_ITEMS_DECAY**place for place in range(LAST_ITEMS)]
    return tuple(share * weight / sum(weights) for weight in weights) if share else ()


@dataclass(frozen=True)
class PromptLayout:
    """Everything that training, ranking and an exported model must agree on to turn a history into token ids.

    Args:
        base: size of the base tokenizer; items are `base + index`, user rows follow the items.
        num_items: items of the catalogue.
        num_user_rows: user rows, `<user_unknown>` included.
        mask_ids: token ids of `<extra_id_0>`, `<extra_id_1>`, … (T5) or of the one mask token (BART).
        eos_id, pad_id: token ids of the base tokenizer.
        user_token: whether the input begins with a user token.
        decoder_prompt: "last-item" puts the left neighbour of the mask behind the mask token; "mask" is the bare mask
            token of the paper's figure, for the ablation.
        max_history: most recent items of a history that are read.
        last_items_weights: what the distributions after the last item alone, the one before it alone, … weigh in a
            ranking, that after the whole history having the rest; empty where items are ranked by that one alone.
    """

    base: int
    num_items: int
    num_user_rows: int
    mask_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    user_token: bool = True
    decoder_prompt: DecoderPrompt = "last-item"
    max_history: int = 50
    last_items_weights: tuple[float, ...] = ()

    @property
    def first_user_id(self) -> int:
        """Token id of `<user_unknown>`; known users follow it."""
        return self.base + self.num_items

    @property
    def vocab_size(self) -> int:
        """Rows of the merged vocabulary: base tokenizer, items, users."""
        return self.base + self.num_items + self.num_user_rows

    def to_dict(self) -> dict[str, Any]:
        """As written to genrec.json."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptLayout:
        """From genrec.json."""
        lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))

    def without_users(self) -> PromptLayout:
        """The same prompt with `<user_unknown>` as the only user row."""
        return PromptLayout(**{**asdict(self), "num_user_rows": 1})

    def user_ids(self, rows: IntArray) -> IntArray:
        """Token ids of user rows."""
        return self.first_user_id + rows

    def tokens(self, items: IntArray, *, appended: bool) -> IntArray:
        """Tokens of the encoder's input for so many items, with a mask appended or put in place of items."""
        return items + int(self.user_token) + int(appended) + 1

    def encode(
        self,
        items: IntArray,
        lengths: IntArray,
        users: IntArray,
        masked: npt.NDArray[np.bool_] | None = None,
        *,
        targets: int = 1,
    ) -> Batch:
        """Token ids of a batch.

        Args:
            items: item indices, right-padded with anything, `[batch, longest]`.
            lengths: items that count, `[batch]`.
            users: user rows, `[batch]`.
            masked: items to hide, `[batch, longest]`; without it one mask is appended after each history.
            targets: places for hidden items of a row, at least as many as any row has.

        Returns:
            `input_ids` and `attention_mask` `[batch, tokens]`, `decoder_input_ids` `[batch, 1 or 2]`; with `masked`
            `decoder_input_ids` `[batch, targets, 1 or 2]`, a prompt for each hidden item, and `labels` `[batch, targets]`:
            their indices, `IGNORED` where a row has fewer.
        """
        batch, longest = items.shape
        position = np.arange(longest)
        inside = position < lengths[:, None]
        append = masked is None
        hidden = np.zeros_like(inside) if masked is None else masked & inside
        user_ids = self.user_ids(users)

        order = np.cumsum(hidden, axis=1) - 1
        tokens = np.where(hidden, np.take(self.mask_ids, np.maximum(order, 0)), self.base + items)
        start = int(self.user_token)
        width = start + longest + int(append) + 1
        input_ids = np.full((batch, width), self.pad_id, dtype=np.int64)
        if self.user_token:
            input_ids[:, 0] = user_ids
        input_ids[:, start : start + longest] = np.where(inside, tokens, self.pad_id)
        row = np.arange(batch)
        if append:
            input_ids[row, start + lengths] = self.mask_ids[0]
        ends = start + lengths + int(append)
        input_ids[row, ends] = self.eos_id
        encoded = {
            "input_ids": input_ids,
            "attention_mask": (np.arange(width) <= ends[:, None]).astype(np.int64),
        }

        # The left neighbour of a mask is the nearest visible item before it; without one, the user stands in.
        visible_upto = np.maximum.accumulate(np.where(inside & ~hidden, position, -1), axis=1)
        if masked is None:
            rows, mask_tokens = row, np.full(batch, self.mask_ids[0], dtype=np.int64)
            left = visible_upto[:, -1] if longest else np.full(batch, -1)
        else:
            rows, columns = np.nonzero(hidden)
            mask_tokens = np.take(self.mask_ids, order[rows, columns])
            left = np.where(columns > 0, visible_upto[rows, np.maximum(columns - 1, 0)], -1)
        prompt = mask_tokens[:, None]
        if self.decoder_prompt == "last-item":
            neighbour = items[rows, np.maximum(left, 0)] if longest else np.zeros(batch, dtype=np.int64)
            prompt = np.stack([mask_tokens, np.where(left >= 0, self.base + neighbour, user_ids[rows])], axis=1)
        if masked is None:
            return encoded | {"decoder_input_ids": prompt}
        prompts = np.full((batch, targets, prompt.shape[1]), self.pad_id, dtype=np.int64)
        labels = np.full((batch, targets), IGNORED, dtype=np.int64)
        prompts[rows, order[rows, columns]] = prompt
        labels[rows, order[rows, columns]] = items[rows, columns]
        return encoded | {"decoder_input_ids": prompts, "labels": labels}

    def encode_histories(self, histories: Sequence[IntArray], users: IntArray) -> Batch:
        """Token ids that ask for the item after each history (item indices, oldest first; may be empty)."""
        recent = [np.asarray(history, dtype=np.int64)[-self.max_history :] for history in histories]
        lengths = np.array([len(history) for history in recent], dtype=np.int64)
        items = np.zeros((len(recent), int(lengths.max(initial=0))), dtype=np.int64)
        for row, history in enumerate(recent):
            items[row, : len(history)] = history
        return self.encode(items, lengths, np.asarray(users, dtype=np.int64))

    def contexts(self, histories: Sequence[IntArray]) -> Iterator[tuple[list[IntArray], FloatArray]]:
        """What the items after each history are ranked from: the histories, then their last items alone, the last first.

        Yields:
            Histories to ask the model with, and the weights of its answers `[batch]`: they add up to one over all
            contexts, and are zero where a history has no such item.
        """
        lengths = np.array([min(len(history), self.max_history) for history in histories])
        places = np.arange(1, len(self.last_items_weights) + 1)
        weights = np.where(places[:, None] <= lengths, np.array(self.last_items_weights)[:, None], 0.0)
        weights *= sum(self.last_items_weights) / np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
        yield list(histories), 1 - weights.sum(axis=0)
        for place, weight in zip(places, weights, strict=True):
            yield [history[-place:][:1] if len(history) >= place else history for history in histories], weight

    def encode_contexts(self, histories: Sequence[IntArray], users: IntArray) -> tuple[Batch, FloatArray]:
        """As `encode_histories` of all `contexts`, those of a history together, and their weights `[batch, contexts]`."""
        asked, weights = zip(*self.contexts(histories), strict=True)
        flat = [context for contexts in zip(*asked, strict=True) for context in contexts]
        return self.encode_histories(flat, np.repeat(users, len(asked))), np.stack(weights, axis=1)


class Task(Protocol):
    """Examples of one training stage; an example's content depends on (seed, epoch, example) alone."""

    lengths: IntArray
    """Tokens of the encoder's input, `[examples]`: what batches are balanced by."""

    def batch(self, epoch: int, examples: IntArray) -> Batch:
        """Token ids of the given examples as they are in `epoch`, with their `labels`."""
        ...

    def user_rows(self, examples: IntArray) -> IntArray:
        """Rows of the users whose histories the examples are made of."""
        ...


def _gather(sequences: Sequences, starts: IntArray, lengths: IntArray) -> IntArray:
    """Items `starts … starts + lengths` of the flat array as rows, `[batch, longest]`."""
    columns = np.arange(int(lengths.max(initial=0)))
    index = np.minimum(starts[:, None] + columns, len(sequences.items) - 1)
    return sequences.items[index]


def _drawn_users(sequences: Sequences, owner: IntArray, dropout: float, draws: npt.NDArray[np.float64]) -> IntArray:
    return np.where(draws < dropout, 0, sequences.users[owner])


class MaskedItem:
    """Pretraining: random items of a user's history are hidden.

    Args:
        sequences: training parts only.
        layout: how token ids are laid out.
        seed: of all draws.
        masks_per_sequence: items hidden in one sequence (at least one item stays visible).
        last_item_probability: how often the last item of the sequence is among the hidden ones by choice.
        user_dropout: how often `<user_unknown>` stands in for the user, so that new users are served.

    Raises:
        ConfigError: more masks than the backbone has mask tokens, a history of one item, or no user has two training
            items.
    """

    def __init__(
        self,
        sequences: Sequences,
        layout: PromptLayout,
        *,
        seed: int,
        masks_per_sequence: int = 1,
        last_item_probability: float = 0.0,
        user_dropout: float = 0.1,
    ) -> None:
        if not 1 <= masks_per_sequence <= len(layout.mask_ids):
            raise ConfigError(
                f"masks_per_sequence: {masks_per_sequence} is not between 1 and {len(layout.mask_ids)}, the mask tokens "
                "of this backbone (BART has one): choose a number in that range"
            )
        if layout.max_history < 2:
            raise ConfigError(
                f"max_history: of {layout.max_history} item none stays visible beside a mask: pretraining needs at least 2"
            )
        self.sequences, self.layout, self.seed = sequences, layout, seed
        self.masks_per_sequence, self.last_item_probability = masks_per_sequence, last_item_probability
        self.user_dropout = user_dropout
        self.owners = np.flatnonzero(sequences.lengths() >= 2)
        if not len(self.owners):
            raise ConfigError(
                "dataset: no user has two items in the training part, so nothing can be masked: more data"
            )
        self.shown = np.minimum(sequences.lengths()[self.owners], layout.max_history)
        self.lengths = layout.tokens(self.shown, appended=False)

    def user_rows(self, examples: IntArray) -> IntArray:
        """See `Task.user_rows`."""
        return self.sequences.users[self.owners[examples]]

    def batch(self, epoch: int, examples: IntArray) -> Batch:
        """See `Task.batch`. Of a sequence longer than the history length a random window is taken."""
        owner, lengths = self.owners[examples], self.shown[examples]
        spare = self.sequences.lengths()[owner] - lengths
        window = (uniform(self.seed, epoch, examples, 0) * (spare + 1)).astype(np.int64)
        items = _gather(self.sequences, self.sequences.offsets[owner] + window, lengths)
        users = _drawn_users(self.sequences, owner, self.user_dropout, uniform(self.seed, epoch, examples, 1))

        position = np.arange(items.shape[1])
        keys = uniform(self.seed, epoch, examples[:, None], position[None, :] + 3)
        keys[position >= lengths[:, None]] = 2.0
        last = uniform(self.seed, epoch, examples, 2) < self.last_item_probability
        keys[np.flatnonzero(last), lengths[last] - 1] = -1.0
        rank = keys.argsort(axis=1).argsort(axis=1)
        masked = rank < np.minimum(self.masks_per_sequence, lengths - 1)[:, None]
        return self.layout.encode(items, lengths, users, masked, targets=self.masks_per_sequence)


class NextItem:
    """Finetuning: a mask stands after the history.

    Args:
        sequences: training parts only.
        layout: how token ids are laid out.
        seed: of all draws.
        targets: "all" makes an example of every prefix; "last" one a user, the last item of the training part.
        user_dropout: as in `MaskedItem`.

    Raises:
        ConfigError: no user has two training items.
    """

    def __init__(
        self,
        sequences: Sequences,
        layout: PromptLayout,
        *,
        seed: int,
        targets: Literal["all", "last"] = "all",
        user_dropout: float = 0.1,
    ) -> None:
        self.sequences, self.layout, self.seed, self.user_dropout = sequences, layout, seed, user_dropout
        # Targets stand at the positions 1, 2, … of a sequence. Which one an example has is looked up in arrays of users.
        self.positions = np.maximum(sequences.lengths() - 1, 0)
        examples = self.positions if targets == "all" else np.minimum(self.positions, 1)
        self.ends = np.cumsum(examples)
        if not self.ends.any():
            raise ConfigError("dataset: no user has two items in the training part, so there is no target: more data")
        ends = np.repeat(self.positions - self.ends, examples) + np.arange(1, self.ends[-1] + 1)
        self.lengths = layout.tokens(np.minimum(ends, layout.max_history), appended=True)

    def _owners(self, examples: IntArray) -> IntArray:
        return np.searchsorted(self.ends, examples, side="right")

    def user_rows(self, examples: IntArray) -> IntArray:
        """See `Task.user_rows`."""
        return self.sequences.users[self._owners(examples)]

    def batch(self, epoch: int, examples: IntArray) -> Batch:
        """See `Task.batch`."""
        owner = self._owners(examples)
        end = self.positions[owner] - self.ends[owner] + examples + 1
        lengths = np.minimum(end, self.layout.max_history)
        target = self.sequences.offsets[owner] + end
        items = _gather(self.sequences, target - lengths, lengths)
        users = _drawn_users(self.sequences, owner, self.user_dropout, uniform(self.seed, epoch, examples, 1))
        encoded = self.layout.encode(items, lengths, users)
        return encoded | {"labels": self.sequences.items[target]}
