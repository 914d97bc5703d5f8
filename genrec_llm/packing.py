"""Several examples in one row of tokens, so that rows of a fixed length are filled and no token is padding.

Exact for backbones whose positions are relative (T5): attention stays within an example (`attention_mask` says whose a
token is), and a row's position differences within an example are the example's own. Krell et al., 2021.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from genrec_llm.tasks import IGNORED, Batch, IntArray

MULTIPLE = 8
"""Row lengths are multiples of it where that costs little, as the attention kernels of GPUs want their masks."""
SHORTEST_RANGE = 64
"""Row lengths are looked for up to this one, or twice the longest example where that is more."""
TOLERANCE = 1.01
"""The shortest row length is taken that needs at most so many times the tokens of the best: attention costs its square."""


def best_fit(lengths: IntArray, row_length: int, rows: int = 0) -> tuple[IntArray, int]:
    """The row that each example goes into: the fullest one with room for it, the longest examples first.

    Args:
        lengths: tokens of each example, at most `row_length`, `[examples]`.
        rows: that there are to begin with; more are added where they are full.

    Returns:
        Rows `[examples]`, and how many there are.
    """
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    by_room[row_length] = list(range(rows - 1, -1, -1))
    some = 1 << row_length if rows else 0  # bit r: there is a row with room for r tokens
    found = np.empty(len(lengths), dtype=np.int64)
    for place in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[place])
        if fitting := some >> need:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            some ^= 0 if by_room[room] else 1 << room
        else:
            room, row, rows = row_length, rows, rows + 1
        found[place] = row
        by_room[room - need].append(row)
        some |= 1 << room - need
    return found, rows


@dataclass(frozen=True)
class Packing:
    """Shapes of packed batches.

    Args:
        row_length: tokens of a row.
        rows: of a batch; a batch that they do not hold has more.
        classes: examples of like length, the longest first: how many there are, and tokens of the longest of them.
    """

    row_length: int
    rows: int
    classes: tuple[tuple[int, int], ...]

    @classmethod
    def fitting(cls, batches: Iterable[IntArray], *, most_classes: int = 1) -> Packing:
        """Shapes that hold all of some batches, with next to no padding.

        Args:
            batches: tokens of the examples of each, `[examples]`.
            most_classes: of length.
        """
        known = list(batches)
        longest = max(int(lengths.max()) for lengths in known)
        rows = {
            length: max(best_fit(lengths, length)[1] for lengths in known)
            for length in range(longest, max(SHORTEST_RANGE, 2 * longest) + 1)
        }
        fewest = min(length * count for length, count in rows.items())
        good = [length for length, count in rows.items() if length * count <= TOLERANCE * fewest]
        row_length = min(good, key=lambda length: (length % MULTIPLE > 0, length))
        return cls(row_length, rows[row_length], _classes(known, most_classes))

    def pack(self, batch: Batch) -> dict[str, Any]:
        """Lay the rows of an encoded batch (see `PromptLayout.encode`) into packed ones.

        Returns:
            `input_ids` `[rows, row length]`; `attention_mask` of that shape: 1 + the example that a token belongs to, 0
            where there is none; `segments`, a tuple of `[examples, longest]` for each class: where the tokens of each
            example are in the flattened rows, -1 beyond its end; `decoder_input_ids` and `labels` of the examples, now the
            longest first. Places without an example have no label.
        """
        longest_first = np.argsort(-batch["attention_mask"].sum(axis=1), kind="stable")
        batch = {name: values[longest_first] for name, values in batch.items()}
        inside = batch["attention_mask"] > 0
        lengths = inside.sum(axis=1)
        row, rows = best_fit(lengths, self.row_length, self.rows)
        order = np.argsort(row, kind="stable")
        ends = np.cumsum(lengths[order])
        first_of_row = np.searchsorted(row[order], row[order])
        begins = ends - lengths[order]
        start = np.empty_like(begins)
        start[order] = row[order] * self.row_length + begins - begins[first_of_row]

        places = start[:, None] + np.arange(inside.shape[1])
        input_ids = np.full(rows * self.row_length, batch["input_ids"].min())  # any token that there is
        owner = np.zeros_like(input_ids)
        input_ids[places[inside]] = batch["input_ids"][inside]
        owner[places[inside]] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        missing = max(0, sum(examples for examples, _ in self.classes) - len(lengths))
        lengths = np.concatenate([lengths, np.zeros(missing, dtype=lengths.dtype)])
        places = _lengthened(np.where(inside, places, -1), missing, -1)
        segments, begin = [], 0
        for number, (examples, longest) in enumerate(self.classes):
            end = begin + examples if number + 1 < len(self.classes) else len(lengths)
            width = max(longest, int(lengths[begin]))
            segment = np.full((end - begin, width), -1)
            segment[:, : places.shape[1]] = places[begin:end, :width]
            segments.append(segment)
            begin = end
        packed = batch | {
            "input_ids": input_ids.reshape(rows, self.row_length),
            "attention_mask": owner.reshape(rows, self.row_length),
            "segments": tuple(segments),
        }
        packed["decoder_input_ids"] = _lengthened(batch["decoder_input_ids"], missing, batch["input_ids"].min())
        if "labels" in batch:
            packed["labels"] = _lengthened(batch["labels"], missing, IGNORED)
        return packed


def _classes(batches: Sequence[IntArray], most: int) -> tuple[tuple[int, int], ...]:
    """Classes of length that hold all batches with the fewest places in all, as few as do it."""
    examples = max(map(len, batches))
    longest = np.max([np.pad(np.sort(lengths)[::-1], (0, examples - len(lengths))) for lengths in batches], axis=0)
    steps = np.flatnonzero(np.diff(longest)) + 1  # a class begins where the length changes

    def shapes(begins: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        edges = (0, *begins, examples)
        return tuple((end - begin, int(longest[begin])) for begin, end in pairwise(edges))

    ways = (begins for count in range(most) for begins in combinations(steps.tolist(), count))
    return min(map(shapes, ways), key=lambda classes: sum(examples * length for examples, length in classes))


def _lengthened(values: IntArray, missing: int, value: int) -> IntArray:
    return np.concatenate([values, np.full((missing, *values.shape[1:]), value)])
