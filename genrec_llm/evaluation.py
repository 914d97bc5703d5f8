"""Full ranking of every target, and its report: metrics with intervals, comparisons, files."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genrec_llm.baselines import ItemKNN, SequenceRecommender
from genrec_llm.decoding import mask_seen_, rank_targets, top_items, users_at_once
from genrec_llm.errors import ConfigError
from genrec_llm.files import atomic_file, read_json, write_json, writing
from genrec_llm.metrics import (
    Interval,
    PairedDifference,
    Ranks,
    bootstrap_intervals,
    coverage,
    hit_rate,
    list_ranks,
    ndcg,
    novelty,
    paired_difference,
    reciprocal_rank,
)
from genrec_llm.processes import ALONE, Processes

CUTOFFS = (1, 5, 10, 20)
LIST_CUTOFF = 10  # coverage and novelty look at this many items of a list
WITHOUT_USERS = ", users unknown"
"""Ends the name of the report on a model that is asked as if it knew no user."""
HISTORY_ALONE = ", history alone"
"""Ends that of one whose last items have a share in its ranking, where they have none."""
LAST_ITEMS_TOO = ", last items too"
"""Ends that of a rival where they have one."""
MOST_SCORES_AT_ONCE = 2**29
"""Scores in memory, 2 GiB in fp32, up to which several batches are ranked at once on a CPU."""
HEADLINE = ("HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR")


@dataclass(frozen=True)
class EvalData:
    """The users of a split, what they had and what they went on to; entry u of each belongs to user u.

    Attributes:
        users: user rows, int64 [users].
        histories: item indices of each user before the target, oldest first, not truncated.
        seen: items of each user that are removed from the ranking when seen items are excluded.
        targets: item index of each user's next item, int64 [users].
        num_items: size of the catalogue, all of which is ranked.
        item_counts: training interactions of each item, int64 [items].
        split: "validation" or "test".
        dataset: name of the data set.
        fingerprint: of the data, so that reports on different data are not compared.
        max_history: how many of the last items a recommender is shown; None for all. Recorded only.

    Raises:
        ValueError: the fields do not belong together; all reasons at once.
    """

    users: NDArray[np.int64]
    histories: Sequence[NDArray[np.int64]]
    seen: Sequence[NDArray[np.int64]]
    targets: NDArray[np.int64]
    num_items: int
    item_counts: NDArray[np.int64]
    split: str
    dataset: str
    fingerprint: str = ""
    max_history: int | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("users", "histories", "seen", "targets")}
        problems = []
        if len(set(lengths.values())) > 1:
            problems.append(f"one entry a user is needed in each of {lengths}")
        if len(self.targets) == 0:
            problems.append("no users")
        elif self.targets.min() < 0 or self.targets.max() >= self.num_items:
            problems.append(f"targets must be item indices below num_items={self.num_items}")
        if len(self.item_counts) != self.num_items:
            problems.append(f"item_counts has {len(self.item_counts)} entries for {self.num_items} items")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class RankedUsers:
    """What ranking a split gives: the targets' ranks and the lists, int64 [users, k], -1 for nothing."""

    ranks: Ranks
    top: NDArray[np.int64]


def rank_recommender(
    recommender: SequenceRecommender,
    data: EvalData,
    *,
    exclude_seen: bool,
    k: int = 20,
    batch_size: int = 512,
    processes: Processes = ALONE,
) -> RankedUsers:
    """Rank every user's target once against the whole catalogue; every process gets all ranks and lists.

    Scores are never held for more than a few batches. Which users are in a batch depends on the data and `batch_size`
    alone, so that any number of processes gives what one gives, to the last digit.

    Args:
        exclude_seen: remove the items of `data.seen` first; a target among them then counts as never hit.
        k: length of the lists kept.
        batch_size: users scored at a time, fewer where the catalogue is very large; ranks depend on it only where
            rounding decides between two scores.
        processes: that share the batches. They call `recommender.scores` from `processes.threads` threads.

    Raises:
        ValueError: the recommender's scores are not [users, items], or hold NaN.
    """

    def rank_batch(users: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        found = recommender.scores([data.histories[user] for user in users], data.users[users])
        scores = torch.from_numpy(found).to(processes.device)
        if scores.shape != (len(users), data.num_items) or scores.isnan().any():
            raise ValueError(
                f"{recommender.name}: scores {tuple(scores.shape)} with {int(scores.isnan().sum())} NaN, "
                f"needed ({len(users)}, {data.num_items}) without"
            )
        if exclude_seen:  # in a copy: a recommender may hand out the same array again
            scores = mask_seen_(scores.clone(), [data.seen[user] for user in users])
        better, tied = rank_targets(scores, torch.from_numpy(data.targets[users]).to(scores.device))
        return better.cpu().numpy(), tied.cpu().numpy(), top_items(scores, k)[0].cpu().numpy()

    better, tied, top = each_user(rank_batch, data, recommender.name, batch_size, processes)
    return RankedUsers(Ranks(better, tied, data.num_items), top)


def each_user(
    work: Callable[[NDArray[np.int64]], tuple[NDArray[Any], ...]],
    data: EvalData,
    name: str,
    batch_size: int,
    processes: Processes = ALONE,
) -> tuple[NDArray[Any], ...]:
    """What `work` finds for batches of users, each array `[users in the batch, …]`, as `[users, …]` in the order of `data`.

    Args:
        name: of the progress bar.
        batch_size, processes: see `rank_recommender`.
    """
    batch_size = users_at_once(data.num_items, batch_size)
    batches = user_batches(data, np.arange(len(data.targets)), batch_size)
    at_once = max(1, MOST_SCORES_AT_ONCE // (batch_size * data.num_items))
    found = processes.map(work, batches, name=name, at_once=at_once)
    places = np.argsort(np.concatenate(batches))
    return tuple(np.concatenate(parts)[places] for parts in zip(*found, strict=True))


def user_batches(data: EvalData, asked: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Places in `asked` (users of `data`) that are scored together, of like length, the longest histories first.

    At most `batch_size` each. They follow from the data and `batch_size` alone.
    """
    shown = data.max_history or sys.maxsize
    lengths = np.array([min(len(data.histories[user]), shown) for user in asked])
    return np.array_split(np.argsort(-lengths, kind="stable"), -(-len(asked) // batch_size))


@contextmanager
def fitted_item_knn(
    train: Iterable[NDArray[np.int64]], num_items: int, folder: Path, processes: Processes
) -> Iterator[ItemKNN]:
    """An item-kNN that the first process fits, in all of them; they share its memory, through a file, within the block.

    Args:
        train: item indices of each training user.
        folder: an existing one that all processes see; the file is gone when the block ends.

    Raises:
        ExportError: the file cannot be written.
    """
    shared = folder / ".item-knn.tmp"
    try:
        with processes.step():
            fitted = ItemKNN.fit(train, num_items) if processes.first else None
            if fitted and processes.count > 1:
                with writing(shared):
                    shared.mkdir(exist_ok=True)
                    fitted.save(shared)
        with processes.step():
            opened = fitted or ItemKNN.open(shared)
        yield opened
    finally:
        if processes.first:
            shutil.rmtree(shared, ignore_errors=True)


@dataclass(frozen=True)
class EvalProtocol:
    """What two reports must share to be comparable; `max_history` alone may differ, it is the recommender's.

    Attributes:
        users: how many are ranked.
        candidates: how many items each target is ranked against, before seen ones are removed.
    """

    dataset: str
    fingerprint: str
    split: str
    exclude_seen: bool
    users: int
    candidates: int
    max_history: int | None

    def __str__(self) -> str:
        seen = "removed" if self.exclude_seen else "kept"
        return (
            f"{self.dataset}, {self.split}: {self.users:,} users, full ranking of {self.candidates:,} items, "
            f"seen items {seen}"
        )


@dataclass(frozen=True)
class EvalReport:
    """How good one recommender is on one split.

    Attributes:
        name: of the recommender.
        metrics: HR@K and NDCG@K for K = 1, 5, 10, 20, MRR, novelty@10 (bits) with 95 % intervals over
            users, and coverage@10, which is no mean over users and has no interval (NaN).
        user_rows: int64 [users]; numbers of the users' tokens, 0 without one, never raw ids.
        ranks: of each user, in the same order.
    """

    name: str
    protocol: EvalProtocol
    metrics: dict[str, Interval]
    user_rows: NDArray[np.int64]
    ranks: Ranks

    def compare(self, baseline: EvalReport) -> dict[str, PairedDifference]:
        """This report minus `baseline` for the same users: HR@10 and NDCG@10.

        Raises:
            ConfigError: the two were not made under the same protocol or for the same users.
        """
        check_comparable([self, baseline])
        return {
            "HR@10": paired_difference(hit_rate(self.ranks, 10), hit_rate(baseline.ranks, 10)),
            "NDCG@10": paired_difference(ndcg(self.ranks, 10), ndcg(baseline.ranks, 10)),
        }

    def first_places(self, k: int = CUTOFFS[-1]) -> EvalReport:
        """What the first `k` places of the lists tell: a few kilobytes on disk, for comparisons with runs that are gone.

        HR and NDCG up to `k`, novelty and coverage stay; MRR, which looks further, is left out, and a target behind
        these places counts as one that could not be recommended.
        """
        behind, candidates = self.ranks.better >= k, self.ranks.candidates
        better, tied = np.where(behind, candidates, self.ranks.better), np.where(behind, 0, self.ranks.tied)
        metrics = {name: interval for name, interval in self.metrics.items() if name != "MRR"}
        metrics = {name: interval for name, interval in metrics.items() if int(name.split("@")[1]) <= k}
        return replace(self, metrics=metrics, ranks=Ranks(better, tied, candidates))

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-user ranks, ready for `json.dumps`; NaN becomes null."""
        return {
            "name": self.name,
            "protocol": asdict(self.protocol),
            "metrics": {
                name: {key: None if math.isnan(value) else value for key, value in asdict(interval).items()}
                for name, interval in self.metrics.items()
            },
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `ranks.parquet` (user_row, better, tied), then `report.json`; each is whole or not there.

        Raises:
            ExportError: the directory cannot be written.
        """
        import pyarrow
        import pyarrow.parquet

        columns = {"user_row": self.user_rows, "better": self.ranks.better, "tied": self.ranks.tied}
        with atomic_file(Path(directory) / "ranks.parquet") as temporary:
            pyarrow.parquet.write_table(
                pyarrow.table(columns),
                temporary,
                compression="zstd",
                use_dictionary=["better", "tied"],
                column_encoding={"user_row": "DELTA_BINARY_PACKED"},
            )
        write_json(Path(directory) / "report.json", self.to_json())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> EvalReport:
        """Read what `save` wrote, for comparisons between runs.

        Raises:
            DataError: `report.json` is absent or broken.
        """
        import pyarrow.parquet

        report = read_json(Path(directory) / "report.json")
        protocol = EvalProtocol(**report["protocol"])
        metrics = {
            name: Interval(**{key: math.nan if value is None else value for key, value in interval.items()})
            for name, interval in report["metrics"].items()
        }
        table = pyarrow.parquet.read_table(Path(directory) / "ranks.parquet")
        user_rows, better, tied = (table[name].to_numpy() for name in ("user_row", "better", "tied"))
        return cls(report["name"], protocol, metrics, user_rows, Ranks(better, tied, protocol.candidates))


def build_report(name: str, ranked: RankedUsers, data: EvalData, *, exclude_seen: bool, seed: int = 0) -> EvalReport:
    """Metrics and intervals of a ranked split.

    Args:
        exclude_seen: as it was when the split was ranked.
        seed: of the bootstrap.
    """
    ranks, top = ranked.ranks, ranked.top[:, :LIST_CUTOFF]
    columns = {f"HR@{k}": hit_rate(ranks, k) for k in CUTOFFS}
    columns |= {f"NDCG@{k}": ndcg(ranks, k) for k in CUTOFFS}
    columns |= {"MRR": reciprocal_rank(ranks), f"novelty@{LIST_CUTOFF}": novelty(top, data.item_counts)}
    metrics = bootstrap_intervals(columns, seed=seed)
    metrics[f"coverage@{LIST_CUTOFF}"] = Interval(coverage(top, data.num_items), math.nan, math.nan)
    protocol = EvalProtocol(
        dataset=data.dataset,
        fingerprint=data.fingerprint,
        split=data.split,
        exclude_seen=exclude_seen,
        users=len(data.users),
        candidates=data.num_items,
        max_history=data.max_history,
    )
    return EvalReport(name, protocol, metrics, data.users, ranks)


def check_comparable(reports: Sequence[EvalReport]) -> None:
    """Refuse reports that do not share a protocol and its users.

    Whole data with a fingerprint has its users in one order, whatever tokens models give them; without, the tokens tell.

    Raises:
        ConfigError: what differs.
    """
    first = reports[0]
    problems = []
    for other in reports[1:]:
        names = f"{first.name!r} and {other.name!r} cannot be compared"
        mine, theirs = asdict(first.protocol), asdict(other.protocol)
        differing = [key for key in mine if key != "max_history" and mine[key] != theirs[key]]
        if "dataset" in differing:  # then the rest follows
            differing = ["dataset"]
        problems += [f"{names}: {key} is {mine[key]!r} and {theirs[key]!r}" for key in differing]
        if not differing and not _same_users(first.user_rows, other.user_rows, numbered=not mine["fingerprint"]):
            problems.append(f"{names}: their users differ or come in another order")
    if problems:
        raise ConfigError([f"{problem}. Evaluate both on the same split and protocol." for problem in problems])


def _same_users(mine: NDArray[np.int64], theirs: NDArray[np.int64], *, numbered: bool) -> bool:
    """Whether tokens may be those of the same users; of models with one for each, `numbered` alike or not."""
    if numbered:
        return np.array_equal(mine, theirs)
    each = all(rows.min() > 0 and len(np.unique(rows)) == len(rows) for rows in (mine, theirs))
    return not each or np.array_equal(np.sort(mine), np.sort(theirs))


def markdown(reports: Sequence[EvalReport]) -> str:
    """A table of several reports, one a column, one metric that all have a row, each with its 95 % interval.

    Raises:
        ConfigError: the reports were not made under the same protocol.
    """
    check_comparable(reports)

    def cell(interval: Interval) -> str:
        bounds = "" if math.isnan(interval.low) else f" [{interval.low:.4f}, {interval.high:.4f}]"
        return f"{interval.mean:.4f}{bounds}"

    rows = [["", *(report.name for report in reports)], ["---", *("---:" for _ in reports)]]
    shared = [name for name in reports[0].metrics if all(name in report.metrics for report in reports)]
    rows += [[name, *(cell(report.metrics[name]) for report in reports)] for name in shared]
    rows.append(["history shown", *(str(report.protocol.max_history or "all") for report in reports)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{reports[0].protocol}; 95 % bootstrap intervals over users.\n\n{table}\n"


@dataclass(frozen=True)
class GeneratedLists:
    """What `generate` returned for a sample of users, beside the one-step lists of the same users.

    Attributes:
        agreement: share of users whose two lists are the same, items with equal scores in any order.
        users: how many were asked.
        hit_rate, ndcg: HR@10 and NDCG@10 of the generated lists.
    """

    agreement: float
    users: int
    hit_rate: float
    ndcg: float

    @classmethod
    def compare(
        cls,
        generated: NDArray[np.int64],
        one_step: NDArray[np.int64],
        scores: NDArray[np.float32],
        targets: NDArray[np.int64],
    ) -> GeneratedLists:
        """Compare lists [users, k]; `scores` [users, k] are the one-step scores of the *generated* items, best first.

        A generated list is the same if it has the same items and their one-step scores never rise by more than rounding.
        """
        same_items = (np.sort(generated, axis=1) == np.sort(one_step, axis=1)).all(axis=1)
        scores = np.maximum(scores, np.finfo(np.float32).min)  # missing places: -inf has no differences
        falling = (np.diff(scores, axis=1) <= 1e-4 * np.maximum(1.0, np.abs(scores[:, 1:]))).all(axis=1)
        ranks = list_ranks(generated.tolist(), targets.tolist(), k=LIST_CUTOFF)
        return cls(
            agreement=float((same_items & falling).mean()),
            users=len(targets),
            hit_rate=float(hit_rate(ranks, LIST_CUTOFF).mean()),
            ndcg=float(ndcg(ranks, LIST_CUTOFF).mean()),
        )


def record_opening(path: str | os.PathLike[str], facts: dict[str, Any]) -> int:
    """Note in a json-lines file that the test split is opened now; how many times it has been opened."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)


def _beside_training(model: Mapping[str, Any], ours: EvalReport) -> list[str]:
    """One line: NDCG@10 on the quantised weights of training and on those merged; none where the two do not compare."""
    trained_on = model.get("trained_on")
    if trained_on is None or ours.protocol.split != "validation" or not ours.protocol.exclude_seen:
        return []
    before, after, users = (
        trained_on["validation_ndcg@10"],
        ours.metrics["NDCG@10"].mean,
        trained_on["validation_users"],
    )
    sampled = f" for {users:,} sampled users" if 0 < users < ours.protocol.users else ""
    return [
        f"Validation NDCG@10 on the {trained_on['quantization']} weights of training{sampled} {before:.4f}, merged into "
        f"{model['weights']} {after:.4f} ({after - before:+.4f})."
    ]


def write_summary(
    directory: str | os.PathLike[str],
    ours: EvalReport,
    rivals: Sequence[EvalReport],
    generated: GeneratedLists,
    facts: dict[str, Any],
) -> str:
    """Write `report.json`, `report.md` and one folder of ranks a recommender; returns the text of report.md.

    Args:
        facts: what made the numbers: command, commit, hardware, versions, and the model: with `trained_on` (see
            `card.facts.quantized_training`) the validation that training measured is shown beside this one.

    Raises:
        ConfigError: the reports were not made under the same protocol.
        ExportError: the directory cannot be written.
    """
    folder = Path(directory)
    differences = {rival.name: ours.compare(rival) for rival in rivals}
    lines = [
        markdown([ours, *rivals]),
        *(
            f"{ours.name} - {name}: " + ", ".join(f"{metric} {difference}" for metric, difference in both.items())
            for name, both in differences.items()
        ),
        "",
        f"`generate` (beam search over items) for {generated.users:,} users: the one-step list in "
        f"{generated.agreement:.2%}; HR@10 {generated.hit_rate:.4f}, NDCG@10 {generated.ndcg:.4f} of its lists.",
        *_beside_training(facts.get("model", {}), ours),
        "",
    ]
    text = "\n".join(lines)
    for report in (ours, *rivals):
        report.save(folder / report.name.replace(" ", "_"))
    with atomic_file(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(
        folder / "report.json",
        {
            **facts,
            "reports": [report.to_json() for report in (ours, *rivals)],
            "differences": {
                name: {metric: asdict(d) for metric, d in both.items()} for name, both in differences.items()
            },
            "generate": asdict(generated),
        },
    )
    return text
