"""What a data set gives away before anything is learnt: id order, repeats, ties, popularity, cold targets, duplicates.

Each rule here is a recommender that looks at numbers, not at items, and is ranked over the full catalogue as every other
one. A rule that does well says that part of any model's score may come from how the data was written down.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from genrec_llm.args import DataArguments
from genrec_llm.baselines import ItemKNN, Popularity, RecentRepeat, SequenceRecommender
from genrec_llm.data import Interactions
from genrec_llm.encoded import Data, encode_data
from genrec_llm.evaluation import EvalData, EvalReport, build_report, rank_recommender
from genrec_llm.metrics import Ranks, hit_rate, ndcg

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
NEAR, RECENT = 12, 20
"""So far the id rules look from an item, and so many items of the history they start from."""
SHUFFLES = 3
OURS = "ours (a seeded permutation)"
ALL = "all of these"

FOLD_OF_CHANCE = 3.0
"""An id rule below this multiple of chance is not spoken of: small samples reach that."""
REPEATED = 0.01
TIED = 0.05
SORTED_TIES = 0.6
"""Share of neighbours in a tie in ascending order of their ids above which the file is taken for sorted; half is chance."""
ORDER_WORTH = 0.05
"""Share of item-kNN's NDCG@10 that may be lost to a shuffle of ties without a warning."""
COLD = 0.01
DUPLICATED = 0.01

Start = Literal["largest", "last", "around last", "around largest", "all"]
Rows = list[tuple[str, ...]]
RULES: dict[Start, str] = {
    "largest": "largest id so far + 1, + 2, …",
    "last": "last id + 1, + 2, …",
    "around last": "nearest ids to the last",
    "around largest": "nearest ids to the largest",
    "all": ALL,
}


@dataclass(frozen=True)
class IdOrder:
    """Recommends by numbers alone: the ids that come after, or lie near, those of the history.

    Attributes:
        at: item index of each place in the numbering, int64 [items].
        place: place of each item index in the numbering, int64 [items].
        start: one of `RULES`. "all" is largest + 1, last + 1, then the neighbours of the history's items, the nearest of
            all first, those of the latest item before the others'.
        name: of the numbering and the rule.
    """

    at: NDArray[np.int64]
    place: NDArray[np.int64]
    start: Start
    name: str

    @classmethod
    def of(cls, order: NDArray[np.int64], numbering: str, start: Start) -> IdOrder:
        """From the item indices in the order of their numbers."""
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return cls(order, place, start, f"{numbering}: {RULES[start]}")

    def _places(self, history: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places to recommend, best first, some beyond the catalogue or several times."""
        places = self.place[history]
        last, largest, steps = places[-1], places.max(), np.arange(1, NEAR + 1)
        around = np.column_stack([steps, -steps]).ravel()
        if self.start == "all":
            recent = places[::-1][:RECENT]
            near = np.concatenate([(recent[:, None] + [step, -step]).ravel() for step in steps[:3]])
            return np.concatenate([[largest + 1, last + 1], near, last + around])
        start = largest if "largest" in self.start else last
        return start + (around if "around" in self.start else steps)

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        scores = np.zeros((len(histories), len(self.at)), dtype=np.float32)
        for row, history in zip(scores, histories, strict=True):
            places = self._places(history)
            places = places[(places >= 0) & (places < len(self.at))][::-1]
            row[self.at[places]] = 1 / np.arange(
                len(places), 0, -1
            )  # a place named twice keeps its first, highest score
        return scores


@dataclass(frozen=True)
class Finding:
    """One rule and what it reaches on the test targets."""

    group: str
    rule: str
    report: EvalReport

    def mean(self, metric: str) -> float:
        """Of one metric over the users."""
        return self.report.metrics[metric].mean

    def to_json(self) -> dict[str, Any]:
        """Group, rule and the report with its intervals."""
        return {"group": self.group, "rule": self.rule, **self.report.to_json()}


@dataclass(frozen=True)
class Ties:
    """What the order within equal times decides; shares of interactions, targets and pairs.

    Attributes:
        interactions: those whose time a neighbour of the same user has too.
        targets: test targets whose time the item before has too: which of them is the target, the file decided.
        ascending: neighbours in a tie whose ids ascend, of those that differ; None where there is no tie.
        kept, shuffled: NDCG@10 of the item-kNN on the log as it is, and with ties shuffled (each seed's); None without ties.
    """

    interactions: float
    targets: float
    ascending: float | None
    kept: float | None
    shuffled: list[float]


@dataclass(frozen=True)
class Audit:
    """Everything that was found about a data set.

    Attributes:
        ties: None where the data set has no times.
        chance: HR@10 of a random order of the unseen items.
        shares: of the test targets, or of users, by what they are.
        cold: HR@10 and NDCG@10 on targets that are in no training part, and on the others, by rule.
        warnings: what a reader of scores on this data has to know; each says which threshold it crossed.
    """

    dataset: str
    fingerprint: str
    users: int
    items: int
    interactions: int
    chance: float
    findings: list[Finding]
    shares: dict[str, float]
    cold: list[dict[str, Any]]
    ties: Ties | None
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        return {
            **{name: getattr(self, name) for name in ("dataset", "fingerprint", "users", "items", "interactions")},
            "split": "test",
            "chance_hr@10": self.chance,
            "findings": [finding.to_json() for finding in self.findings],
            "shares": self.shares,
            "cold": self.cold,
            "ties": None if self.ties is None else asdict(self.ties),
            "warnings": self.warnings,
        }

    def tables(self) -> Iterator[tuple[str, Rows]]:
        """Title and rows of each table for a person; the first row is the header."""
        for group in dict.fromkeys(finding.group for finding in self.findings):
            rows: Rows = [("", *METRICS)]
            for finding in self.findings:
                if finding.group == group:
                    rows.append((finding.rule, *(f"{finding.mean(metric):.4f}" for metric in METRICS)))
            yield group, rows
        rows = [("", "targets", "HR@10", "NDCG@10")]
        for entry in self.cold:
            rows.append((entry["rule"], f"{entry['targets']:,}", f"{entry['HR@10']:.4f}", f"{entry['NDCG@10']:.4f}"))
        yield "Targets that are in no training part (cold), apart from the others", rows
        yield "Shares", [("", ""), *((name, f"{share:.2%}") for name, share in self.shares.items())]
        if self.ties is None:
            return
        rows = [("", ""), ("interactions with the time of a neighbour", f"{self.ties.interactions:.2%}"),
                ("test targets with the time of the item before", f"{self.ties.targets:.2%}")]  # fmt: skip
        if self.ties.ascending is not None and self.ties.kept is not None:
            shuffled = ", ".join(f"{value:.4f}" for value in self.ties.shuffled)
            rows += [("neighbours in a tie whose ids ascend (chance: half)", f"{self.ties.ascending:.2%}"),
                     ("item-kNN, NDCG@10, ties in file order", f"{self.ties.kept:.4f}"),
                     ("item-kNN, NDCG@10, ties shuffled", shuffled)]  # fmt: skip
        yield "Ties: what is decided by the order of the file alone", rows


def audit(interactions: Interactions) -> Audit:
    """Rank every rule on the test targets of a leave-last-two-out split. Nothing is chosen by it, and nothing is trained.

    Raises:
        DataError: users have fewer than 3 interactions.
    """
    arguments = DataArguments(dataset=interactions.name, users="none")
    data = encode_data(interactions, arguments)
    held_out = replace(data.held_out("test"), max_history=None)  # the rules see all of it
    jobs: list[tuple[str, str, SequenceRecommender, bool]] = []
    for number, (numbering, order) in enumerate(numberings(interactions, data).items()):
        starts: list[Start] = ["all"] if number else list(RULES)  # in full for the ids as they come
        for start in starts:
            rule = IdOrder.of(order, numbering, start)
            jobs.append(("Id order, seen items removed", rule.name, rule, True))
    popularity, knn = Popularity(held_out.item_counts), _item_knn(data)
    repeat = RecentRepeat(data.vocab.num_items)
    jobs += [
        ("Seen items removed", "popularity", popularity, True),
        ("Seen items removed", "item-kNN, sequential (for comparison)", knn, True),
        ("Seen items kept", "popularity", popularity, False),
        ("Seen items kept", "what the user had, most recent first", repeat, False),
        ("Seen items kept", "item-kNN, sequential (for comparison)", knn, False),
    ]
    findings = [
        Finding(group, rule, _ranked(recommender, held_out, exclude_seen=exclude_seen))
        for group, rule, recommender, exclude_seen in tqdm(jobs, desc="rules", leave=False)
    ]
    eligible = [len(held_out.item_counts) - len(np.unique(seen)) for seen in held_out.seen]
    found = Audit(
        dataset=interactions.name,
        fingerprint=interactions.fingerprint(),
        users=len(held_out.targets),
        items=data.vocab.num_items,
        interactions=len(interactions.frame),
        chance=float(np.minimum(1.0, 10 / np.maximum(eligible, 1)).mean()),
        findings=findings,
        shares=_shares(interactions, data, held_out),
        cold=_cold(findings, held_out),
        ties=_ties(interactions, data, arguments, _of(findings, "item-kNN, sequential (for comparison)")),
        warnings=[],
    )
    found.warnings.extend(_warnings(found))
    return found


def numberings(interactions: Interactions, data: Data) -> dict[str, NDArray[np.int64]]:
    """Item indices in the order of each numbering that ids may come from, int64 [items] each.

    By the number in the raw id, where each has one; by first appearance, users one after another; by sorted raw id as
    text; and as this toolkit numbers them. One that repeats an earlier one is left out.
    """
    raw = data.vocab.items["item"].tolist()
    digits = [re.findall(r"\d+", item) for item in raw]
    found: dict[str, NDArray[np.int64]] = {}
    if all(digits):
        numbers = [int(each[-1]) for each in digits]
        found["raw id as a number"] = np.array(sorted(range(len(raw)), key=numbers.__getitem__), dtype=np.int64)
    appeared = data.vocab.encode_items(interactions.frame["item"].unique().tolist())
    cold = np.setdiff1d(np.arange(len(raw)), appeared)
    found["first appearance"] = np.concatenate([appeared, cold])
    found["sorted raw id"] = np.array(sorted(range(len(raw)), key=raw.__getitem__), dtype=np.int64)
    found[OURS] = np.arange(len(raw))
    kept: dict[str, NDArray[np.int64]] = {}
    for name, order in found.items():
        if not any(np.array_equal(order, other) for other in kept.values()):
            kept[name] = order
    return kept


def _ranked(recommender: SequenceRecommender, held_out: EvalData, *, exclude_seen: bool) -> EvalReport:
    ranked = rank_recommender(recommender, held_out, exclude_seen=exclude_seen)
    return build_report(recommender.name, ranked, held_out, exclude_seen=exclude_seen)


def _item_knn(data: Data) -> ItemKNN:
    return ItemKNN.fit(data.train, data.vocab.num_items)


def _of(findings: Sequence[Finding], rule: str) -> Finding:
    return next(finding for finding in findings if finding.rule == rule)


def _best_id_rule(findings: Sequence[Finding]) -> Finding | None:
    """Of the numberings that the data set comes with; None where those are ours already."""
    theirs = [each for each in findings if each.group.startswith("Id order") and not each.rule.startswith(OURS)]
    return max(theirs, key=lambda finding: finding.mean("HR@10"), default=None)


def _shares(interactions: Interactions, data: Data, held_out: EvalData) -> dict[str, float]:
    """What the test targets, and the users, are."""
    targets, items = held_out.targets, data.vocab.num_items
    users = range(len(targets))
    before = [held_out.histories[user] for user in users]
    training = [data.train[user] for user in users]
    pairs = np.concatenate([part[:-1] * items + part[1:] for part in training])
    last = np.array([history[-1] for history in before])
    sequences = Counter(map(tuple, interactions.sequences().values()))
    trained = Counter(part.tobytes() for part in training)
    return {
        "test targets in the user's own history": float(np.mean([targets[u] in before[u] for u in users])),
        "test targets in the user's own training part": float(np.mean([targets[u] in training[u] for u in users])),
        "test steps (last item to target) that are steps of a training part": float(
            np.isin(last * items + targets, pairs).mean()
        ),
        "test targets in no training part (cold)": float((held_out.item_counts[targets] == 0).mean()),
        "users whose whole sequence another user has too": _repeated(sequences),
        "users whose training part another user has too": _repeated(trained),
    }


def _repeated(counts: Counter[Any]) -> float:
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


def _cold(findings: Sequence[Finding], held_out: EvalData) -> list[dict[str, Any]]:
    """Popularity, item-kNN and the best id rule, on cold targets and on the others, seen items removed."""
    cold = held_out.item_counts[held_out.targets] == 0
    chosen = [finding for finding in findings if finding.group == "Seen items removed"]
    best = _best_id_rule(findings)
    entries = []
    for finding in [*chosen, *([best] if best else [])]:
        for name, part in (("cold", cold), ("others", ~cold)):
            ranks = finding.report.ranks
            apart = Ranks(ranks.better[part], ranks.tied[part], ranks.candidates)
            means = [float(values.mean()) if part.any() else 0.0 for values in (hit_rate(apart, 10), ndcg(apart, 10))]
            entries.append({"rule": f"{finding.rule}: {name}", "targets": int(part.sum()),
                            "HR@10": means[0], "NDCG@10": means[1]})  # fmt: skip
    return entries


def _ties(interactions: Interactions, data: Data, arguments: DataArguments, knn: Finding) -> Ties | None:
    frame = interactions.frame
    if "timestamp" not in frame:
        return None
    users, times = frame["user"].to_numpy(), frame["timestamp"].to_numpy()
    with_next = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.append(with_next, False) | np.append(False, with_next)
    with_before = np.append(False, with_next)
    targets = float(with_before[interactions.from_end == 1].mean())
    if not with_next.any():
        return Ties(0.0, targets, None, None, [])
    numbering, order = next(iter(numberings(interactions, data).items()))
    if numbering == "first appearance":  # ids without numbers: a file that was sorted was sorted by their text
        order = numberings(interactions, data).get("sorted raw id", order)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    steps = np.diff(place[data.vocab.encode_items(frame["item"].tolist())])[with_next]
    shuffled = []
    for seed in range(SHUFFLES):
        other = encode_data(interactions.shuffled_ties(seed), arguments)
        report = _ranked(_item_knn(other), other.held_out("test"), exclude_seen=True)
        shuffled.append(report.metrics["NDCG@10"].mean)
    ascending = float((steps > 0).sum() / max(1, (steps != 0).sum()))
    return Ties(float(tied.mean()), targets, ascending, knn.mean("NDCG@10"), shuffled)


def _warnings(found: Audit) -> list[str]:
    warnings = []
    popularity, best = _of(found.findings, "popularity"), _best_id_rule(found.findings)
    if best is not None:
        value, floor = best.report.metrics["HR@10"], popularity.mean("HR@10")
        if value.low > max(floor, FOLD_OF_CHANCE * found.chance):
            fold = f"{value.mean / floor:.1f} times popularity's" if floor else "where popularity has none"
            warnings.append(
                f"Ids give the next item away: “{best.rule}” learns nothing and reaches HR@10 {value.mean:.4f}, {fold} "
                f"({floor:.4f}). A model that reads ids as text or digits, or numbers them so, can use that. This toolkit "
                "numbers items by a seeded permutation. (Said when a rule's lower bound is above popularity and above "
                f"{FOLD_OF_CHANCE:g} times chance.)"
            )
    ours = [each for each in found.findings if each.rule.startswith(OURS)]
    for finding in ours:
        if finding.report.metrics["HR@10"].low > FOLD_OF_CHANCE * found.chance:
            warnings.append(
                f"The permuted ids are above chance: HR@10 {finding.mean('HR@10'):.4f}, chance {found.chance:.4f}. That "
                "should not be: please report it."
            )
    share = found.shares["test targets in the user's own history"]
    if share > REPEATED:
        warnings.append(
            f"{share:.2%} of the test targets are in the user's history: with seen items removed no model can hit them, and "
            "with seen items kept a list of the history does well. Report both, and say which. (Said above "
            f"{REPEATED:.0%}.)"
        )
    ties = found.ties
    if ties is not None and ties.targets > TIED:
        warnings.append(
            f"{ties.targets:.2%} of the test targets have the time of the item before: which of them is the target, the "
            "order of the file decided. Train and measure with --shuffle-ties SEED too. (Said above "
            f"{TIED:.0%}.)"
        )
    if ties is not None and ties.ascending is not None and abs(ties.ascending - 0.5) > SORTED_TIES - 0.5:
        warnings.append(
            f"Within ties the file is sorted: ids ascend in {ties.ascending:.2%} of the steps; in a random order in half. "
            f"(Said above {SORTED_TIES:.0%} or below {1 - SORTED_TIES:.0%}.)"
        )
    if ties is not None and ties.kept:
        lost = 1 - float(np.mean(ties.shuffled)) / ties.kept
        if lost > ORDER_WORTH:
            warnings.append(
                f"The order within ties is worth {lost:.1%} of an item-kNN's NDCG@10 ({ties.kept:.4f}, shuffled "
                f"{np.mean(ties.shuffled):.4f}); of a model's it may be as much. (Said above {ORDER_WORTH:.0%}.)"
            )
    share = found.shares["test targets in no training part (cold)"]
    if share > COLD:
        warnings.append(
            f"{share:.2%} of the test targets are in no training part: a model without text can reach them by chance alone. "
            f"Measure them apart. (Said above {COLD:.0%}.)"
        )
    share = found.shares["users whose whole sequence another user has too"]
    if share > DUPLICATED:
        warnings.append(
            f"{share:.2%} of the users have a sequence that another user has too: their test targets stand in the data "
            f"twice. (Said above {DUPLICATED:.0%}.)"
        )
    return warnings
