"""Top 20 of this toolkit beside transformers' beam search, by one merged model for the same users, in one run.

    python tools/bench_topn.py --data-dir ../shared/data --out docs/results/speed_cpu.json
    python tools/bench_topn.py --data-dir ../shared/data --shape micro --users 64

Arms: ours, `rank_recommender` with a `Recommender`, which scores all items in one pass; `generate` with 20 beams and
`prefix_allowed_tokens_fn`, a Python function that lists what a row may get (c); `generate` with 20 beams and a mask that is
one tensor (d), and the same in batches of like length, as ours are. All leave out the items of the history. Before
anything is timed the lists of all arms have to be the same, but for items with equal scores. Each arm has the best of a
few batch sizes, of which those that do not fit into memory are left out; the arms take turns, and the best of the blocks
counts. On a GPU, CUDA events stand in for CPU time.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_results import Meter, compare, processor, record, table
from bench_train import SHAPES, RivalT5, resized
from transformers import GenerationConfig
from transformers.utils import logging

from genrec_llm.args import DataArguments
from genrec_llm.batching import as_tensors
from genrec_llm.decoding import generate_top_n
from genrec_llm.directory import MERGED
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError, exits_cleanly
from genrec_llm.evaluation import EvalData, rank_recommender, user_batches
from genrec_llm.export import generation_config
from genrec_llm.loading import Loaded
from genrec_llm.out_of_memory import is_out_of_memory
from genrec_llm.processes import Processes
from genrec_llm.provenance import provenance
from genrec_llm.recommender import Recommender
from genrec_llm.tasks import IntArray

N = 20
"""Length of a list, and beams."""
OURS = "ours, one pass"
PREFIX = f"(c) generate, {N} beams, prefix_allowed_tokens_fn"
MASK = f"(d) generate, {N} beams, tensor mask"
MASK_BY_LENGTH = f"{MASK}, batches by length"
TIES = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""How far equal scores may lie apart, as a share of the largest: ours are fp32 in the head, those of `generate` are not."""
RIVALS = (PREFIX, MASK, MASK_BY_LENGTH)

Lists = IntArray
"""Item indices, best first, `[users, N]`."""


@dataclass(frozen=True)
class Bench:
    """A merged model, for the rivals as transformers has it, and the users whose lists are asked for."""

    recommender: Recommender
    stock: RivalT5
    data: EvalData

    @classmethod
    def build(cls, shape: str, data: Data, users: int, *, dtype: torch.dtype | None = None) -> Bench:
        """A model with random weights of a shape (bf16 on a GPU unless told), and a fixed sample of validation users."""
        model = resized(RivalT5, SHAPES[shape], data).to(dtype=dtype).eval()
        layout = SHAPES[shape].layout(data)
        model.generation_config = generation_config(layout)
        loaded = Loaded(model, None, data.vocab, layout, {"kind": MERGED})  # type: ignore[arg-type]  # no text is read
        stock = copy.deepcopy(model)  # before a Recommender gives its layers faster forms
        return cls(Recommender(loaded), stock, data.held_out("validation", sample=users))

    def batch(self, users: IntArray) -> dict[str, torch.Tensor]:
        """Token ids on the model's device."""
        encoded = self.recommender.layout.encode_histories(
            [self.data.histories[user] for user in users], self.data.users[users]
        )
        return {name: values.to(self.recommender.device) for name, values in as_tensors(encoded).items()}

    def in_batches(self, size: int, ask: Callable[[IntArray], Any], *, by_length: bool = False) -> Lists:
        """Lists of all users, `size` at a time, in the order of the data or of length."""
        everybody = np.arange(len(self.data.targets))
        if by_length:
            batches = user_batches(self.data, everybody, size)
        else:
            batches = np.array_split(everybody, -(-len(everybody) // size))
        found = [ask(users).cpu().numpy() for users in batches]
        return np.concatenate(found)[np.argsort(np.concatenate(batches))]

    # --- the arms -----------------------------------------------------------------------------------------------------

    def ours(self, size: int) -> Lists:
        """The one-step path, as validation and `genrec evaluate` use it."""
        processes = Processes(device=self.recommender.device)
        return rank_recommender(
            self.recommender, self.data, exclude_seen=True, k=N, batch_size=size, processes=processes
        ).top

    def mask(self, size: int) -> Lists:
        """`generate` with one tensor for all rows."""
        return self.in_batches(size, self._masked)

    def mask_by_length(self, size: int) -> Lists:
        """The same with little padding."""
        return self.in_batches(size, self._masked, by_length=True)

    def _masked(self, users: IntArray) -> Any:
        seen = [self.data.seen[user] for user in users]
        return generate_top_n(self.stock, self.batch(users), self.recommender.layout, N, seen)[0]

    def prefix(self, size: int) -> Lists:
        """`generate` with a Python function, and with nothing else that restricts what comes out."""
        model, layout = self.stock, self.recommender.layout
        items = np.arange(layout.base, layout.first_user_id)

        def ask(users: IntArray) -> torch.Tensor:
            allowed = [np.setdiff1d(items, layout.base + self.data.seen[user]).tolist() for user in users]
            found = model.generate(
                **self.batch(users), num_beams=N, num_return_sequences=N,
                prefix_allowed_tokens_fn=lambda row, sent: allowed[row],
            )  # fmt: skip
            return found[:, -1].view(len(users), N) - layout.base

        restricting = model.generation_config
        model.generation_config = GenerationConfig(
            max_new_tokens=1, decoder_start_token_id=layout.mask_ids[0], pad_token_id=layout.pad_id,
            eos_token_id=layout.eos_id,
        )  # fmt: skip
        try:
            with torch.inference_mode():
                return self.in_batches(size, ask)
        finally:
            model.generation_config = restricting

    @property
    def arms(self) -> dict[str, Callable[[int], Lists]]:
        """Name → function of the batch size."""
        return {OURS: self.ours, PREFIX: self.prefix, MASK: self.mask, MASK_BY_LENGTH: self.mask_by_length}

    def refuse_other_lists(self, lists: dict[str, Lists]) -> None:
        """Refuse to time arms that do not all say the same.

        Raises:
            ConfigError: a list differs from ours by more than items whose scores are equal as far as rounding goes.
        """
        everybody = np.arange(len(self.data.targets))
        scores = np.concatenate(
            [
                self.recommender.scores([self.data.histories[user] for user in users], self.data.users[users])
                for users in np.array_split(everybody, -(-len(everybody) // 64))
            ]
        )
        tolerance = TIES[self.recommender.model.dtype] * max(1.0, float(np.abs(scores).max()))
        wanted = np.take_along_axis(scores, lists[OURS], axis=1)
        problems = []
        for arm, found in lists.items():
            reached = np.take_along_axis(scores, np.clip(found, 0, scores.shape[1] - 1), axis=1)
            unlike = (found != lists[OURS]) & ((np.abs(reached - wanted) > tolerance) | (found < 0))
            seen = sum(bool(np.isin(found[user], self.data.seen[user]).any()) for user in everybody)
            repeats = sum(len(set(one.tolist())) < N for one in found)
            if unlike.any() or seen or repeats:
                problems.append(
                    f"{arm}: {int(unlike.any(axis=1).sum())} of {len(found)} lists are not those of {OURS}, {seen} hold "
                    f"items of the history, {repeats} hold an item twice; nothing was timed"
                )
        if problems:
            raise ConfigError(problems)


def timed(ask: Callable[[int], Lists], size: int) -> dict[str, float]:
    """Seconds of one arm for all users, by clock."""
    meter = Meter(torch.cuda.is_available())
    meter.start()
    ask(size)
    return meter.stop()


def best_size(ask: Callable[[int], Lists], sizes: Sequence[int]) -> int:
    """The batch size that takes the least time once memory is there for it and kernels are chosen.

    Raises:
        ConfigError: not even the smallest fits.
    """
    seconds: dict[int, float] = {}
    for size in sorted(set(sizes)):
        try:
            ask(size)
            seconds[size] = next(iter(timed(ask, size).values()))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
    if not seconds:
        raise ConfigError(f"--batches: {min(sizes)} users do not fit into memory: take fewer")
    return min(seconds, key=lambda size: seconds[size])


@exits_cleanly
def main() -> None:
    """Compare lists, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="amazon-beauty", help="as --dataset of the recipes")
    parser.add_argument("--data-dir", help="folder of the Beauty files")
    parser.add_argument("--out", type=Path, help="json file of results; rows of other benches in it stay")
    parser.add_argument("--shape", choices=SHAPES, default="flan-t5-small")
    parser.add_argument("--users", type=int, default=256, help="validation users, a fixed sample")
    parser.add_argument(
        "--prefix-users", type=int, help="so many of them for (c), whose Python function is slow; by default all"
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[8, 32, 128], help="batch sizes that each arm may choose from"
    )
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each arm, at least 3")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    problems = [f"--blocks: the best of {args.blocks} says little: at least 3"] if args.blocks < 3 else []
    few = args.users if args.prefix_users is None else args.prefix_users
    least = {"users": args.users, "prefix-users": few, "threads": args.threads}
    problems += [f"--{name}: at least 1" for name, value in least.items() if value < 1]
    if min(args.batches) < 1:
        problems.append("--batches: at least 1 each")
    if problems:
        raise ConfigError(problems)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # of `generate`, about settings that restrict nothing here
    data = load_data(DataArguments(dataset=args.dataset, data_dir=args.data_dir))
    if data.vocab.num_items < 2 * N:
        raise ConfigError(
            f"--dataset: {data.vocab.num_items} items are too few for lists of {N} without those of a history"
        )
    bench = Bench.build(args.shape, data, args.users)
    bench_of_few = replace(bench, data=data.held_out("validation", sample=min(few, args.users)))
    arms = bench.arms | {PREFIX: bench_of_few.prefix}
    users = dict.fromkeys(arms, len(bench.data.targets)) | {PREFIX: len(bench_of_few.data.targets)}
    smallest = min(args.batches)
    for asked, names in ((bench, (OURS, MASK, MASK_BY_LENGTH)), (bench_of_few, (OURS, PREFIX))):
        asked.refuse_other_lists({arm: asked.arms[arm](smallest) for arm in names})
    print(f"checked: the lists of all arms are the same for {users[OURS]} users, (c)'s for {users[PREFIX]}", flush=True)
    sizes = {}
    for arm, ask in arms.items():
        sizes[arm] = best_size(ask, args.batches)
        print(f"batch: {arm}: {sizes[arm]} users", flush=True)
    measured: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    for number in range(args.blocks):
        for arm, ask in arms.items():
            for clock, seconds in timed(ask, sizes[arm]).items():
                per_user = 1000 * seconds / users[arm]
                measured[arm].setdefault(f"{clock} ms a user", []).append(per_user)
            print(f"block {number + 1}: {arm}: {1000 / per_user:.1f} users/s", flush=True)
    name = f"top {N}, {args.shape}, {processor(args.threads)}"
    chosen = ", ".join(f"{size} ({arm})" for arm, size in sizes.items())
    counts = f"{users[OURS]} validation users" + f" ({users[PREFIX]} for (c))" * (users[PREFIX] < users[OURS])
    shape = f"{SHAPES[args.shape]}; {args.dataset}, {counts}; batch {chosen}"
    rows = compare(name, shape, measured, RIVALS, provenance())
    print(f"\n{name} ({shape}; best of {args.blocks})\n{table([vars(row) for row in rows])}")
    if args.out:
        record(args.out, rows)
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
