"""The audit finds what data gives away, measures it as the evaluator does, and keeps silent about honest data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genrec_llm import cli
from genrec_llm.args import DataArguments
from genrec_llm.audit import OURS, IdOrder, audit, numberings
from genrec_llm.data import Interactions, leave_last_two_out
from genrec_llm.encoded import encode_data, load_data
from genrec_llm.errors import DataError
from genrec_llm.sources import load_interactions


def interactions(rows: list[tuple[str, str]], times: list[float] | None = None) -> Interactions:
    log = pd.DataFrame(rows, columns=["user", "item"])
    return Interactions.from_log("toy", log if times is None else log.assign(timestamp=times))


def random_rows(users: int, items: int, length: int = 6, seed: int = 0) -> list[tuple[str, str]]:
    """Nobody repeats an item; nothing predicts the next one."""
    generator = np.random.default_rng(seed)
    return [(f"u{user}", f"{item}") for user in range(users) for item in generator.permutation(items)[:length]]


def renumbered(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Ids by first appearance over whole sequences, as the usual benchmark files have them."""
    numbers: dict[str, int] = {}
    return [(user, str(numbers.setdefault(item, len(numbers) + 1))) for user, item in rows]


def test_the_rules_recommend_the_numbers_that_they_say() -> None:
    order = np.array([4, 0, 3, 1, 2, 5])  # item 4 has the first number

    def ranked(start: str, history: list[int]) -> list[int]:
        rule = IdOrder.of(order, "toy", start)  # type: ignore[arg-type]
        (scores,) = rule.scores([np.array(history)], np.zeros(1, dtype=np.int64))
        return order.argsort()[np.argsort(-scores, kind="stable")[: (scores > 0).sum()]].tolist()

    # Items 1, 0 have the places 3, 1.
    assert ranked("largest", [1, 0]) == [4, 5]
    assert ranked("last", [1, 0]) == [2, 3, 4, 5]
    assert ranked("around last", [1, 0]) == [2, 0, 3, 4, 5]
    assert ranked("around largest", [1, 0]) == [4, 2, 5, 1, 0]
    assert ranked("all", [1, 0]) == [4, 2, 0, 3, 5, 1]
    assert ranked("all", [5]) == [4, 3, 2, 1, 0]  # there is no next one


def test_ids_by_first_appearance_are_found_out_and_permuted_ones_stay_at_chance() -> None:
    leaky = audit(interactions(renumbered(random_rows(400, 900))))
    by_rule = {finding.rule: finding.mean("HR@10") for finding in leaky.findings if "Id order" in finding.group}
    assert by_rule["raw id as a number: all of these"] > 0.2
    assert by_rule["raw id as a number: largest id so far + 1, + 2, …"] > 0.2
    assert by_rule[f"{OURS}: all of these"] < 4 * leaky.chance < 0.05
    assert sum("Ids give the next item away" in warning for warning in leaky.warnings) == 1
    cold = {entry["rule"]: entry for entry in leaky.cold}
    assert cold["raw id as a number: all of these: cold"]["HR@10"] > 0.5
    assert cold["popularity: cold"]["targets"] + cold["popularity: others"]["targets"] == 400

    generator = np.random.default_rng(1)
    other = dict(zip(map(str, range(900)), map(str, generator.permutation(900)), strict=True))
    rows = [(f"u{user}", other[item]) for user, item in random_rows(400, 900)]
    shuffled = [rows[6 * user + place] for user in generator.permutation(400) for place in range(6)]
    honest = audit(interactions(shuffled))
    theirs = [
        each for each in honest.findings if each.rule.startswith(("raw id", "sorted raw id"))
    ]  # not by appearance
    assert len(theirs) == 6 and all(each.mean("HR@10") < 4 * honest.chance for each in theirs)


def test_numberings_are_those_that_the_raw_ids_have() -> None:
    named = interactions([(user, item) for user in "uv" for item in ("tea", "mug", "pot")])
    data = encode_data(named, DataArguments(dataset="toy", users="none"))
    found = numberings(named, data)
    names = data.vocab.items["item"].to_numpy()
    assert names[found["first appearance"]].tolist() == ["tea", "mug", "pot"]
    assert names[found["sorted raw id"]].tolist() == ["mug", "pot", "tea"]
    assert "raw id as a number" not in found
    numbered = interactions([(user, item) for user in "uv" for item in ("b10", "b9", "b11")])
    data = encode_data(numbered, DataArguments(dataset="toy", users="none"))
    order = numberings(numbered, data)["raw id as a number"]
    assert data.vocab.items["item"].to_numpy()[order].tolist() == ["b9", "b10", "b11"]


def test_repeats_cold_targets_and_duplicates_are_counted_as_by_hand() -> None:
    sequences = {"u": "a b a b", "v": "a b a b", "w": "a b c a", "x": "b c a d", "y": "a c b e"}
    found = audit(interactions([(user, item) for user, items in sequences.items() for item in items.split()]))
    shares = found.shares
    assert shares["test targets in the user's own history"] == 3 / 5  # u, v: b; w: a
    assert shares["test targets in the user's own training part"] == 3 / 5
    assert shares["test targets in no training part (cold)"] == 2 / 5  # d, e
    # Training parts: ab, ab, ab, bc, ac. Last item to target: ab, ab, ca, ad, be.
    assert shares["test steps (last item to target) that are steps of a training part"] == 2 / 5
    assert shares["users whose whole sequence another user has too"] == 2 / 5
    assert shares["users whose training part another user has too"] == 3 / 5
    assert found.ties is None
    repeat = next(each for each in found.findings if each.rule.startswith("what the user had"))
    assert repeat.mean("HR@1") == pytest.approx(0.0) and repeat.mean("HR@5") > 3 / 5
    assert len([warning for warning in found.warnings if "Said above 1%" in warning]) == 3


def test_ties_are_counted_and_what_their_order_is_worth_is_measured() -> None:
    generator = np.random.default_rng(0)
    rows, times = [], []
    for user in range(200):
        for day in range(4):
            start = int(generator.integers(60)) * 10
            chosen = start + np.sort(
                generator.permutation(10)[:3]
            )  # within a day in the order of ids, as Amazon's files
            rows += [(f"u{user}", f"{item}") for item in chosen]
            times += [float(day)] * 3
    found = audit(interactions(rows, times))
    assert found.ties is not None
    assert found.ties.interactions == found.ties.targets == found.ties.ascending == 1.0
    assert found.ties.kept is not None and np.mean(found.ties.shuffled) < 0.95 * found.ties.kept
    text = " ".join(found.warnings)
    assert "100.00% of the test targets have the time" in text and "Within ties the file is sorted" in text
    assert "is worth" in text

    apart = audit(interactions(rows, list(np.arange(len(rows), dtype=float))))
    assert apart.ties is not None and apart.ties.interactions == 0.0 and "ties" not in " ".join(apart.warnings)


def test_shuffled_ties_move_within_equal_times_alone() -> None:
    log = interactions([("u", item) for item in "abcdefgh"] + [("v", "a")], [1, 1, 1, 1, 1, 2, 3, 3, 1])
    orders = {tuple(log.shuffled_ties(seed).sequences()["u"]) for seed in range(20)}
    assert len(orders) > 10
    for order in orders:
        assert set(order[:5]) == set("abcde") and order[5] == "f" and set(order[6:]) == {"g", "h"}
    assert log.shuffled_ties(3).fingerprint() == log.shuffled_ties(3).fingerprint() != log.fingerprint()
    assert log.shuffled_ties(3).name == "toy-ties-shuffled-3"  # tables tell the two apart
    with pytest.raises(DataError, match="0 or more"):
        log.shuffled_ties(-1)
    with pytest.raises(DataError, match="has no times"):
        interactions([("u", "a")]).shuffled_ties(0)


def test_without_the_last_the_test_target_is_the_validation_target_of_the_whole() -> None:
    log = interactions([(user, item) for user in "uv" for item in f"abcde{user}"])
    whole, earlier = leave_last_two_out(log), leave_last_two_out(log.without_last(1))
    assert earlier["test"][:] == whole["validation"][:]
    assert [items[:-1] for items in whole["train"]["items"]] == earlier["train"]["items"][:]
    assert log.without_last(1).name == "toy-without-last-1"
    assert set(log.without_last(1).catalogue["item"]) == set("abcdeuv")
    assert log.without_last(2).sequences()["u"] == list("abcd")
    with pytest.raises(DataError, match="1 or more"):
        log.without_last(-1)


def test_the_flag_leaves_out_the_last_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("u a b c d e\nv b c d e a\n")
    whole, earlier = (
        load_data(DataArguments(dataset=str(tmp_path / "log.txt"), users="none", without_last=count))
        for count in (0, 1)
    )
    assert earlier.vocabulary == whole.vocabulary and earlier.fingerprint != whole.fingerprint
    assert earlier.name == "log-without-last-1"
    np.testing.assert_array_equal(earlier.held_out("test").targets, whole.held_out("validation").targets)


def test_the_verb_prints_tables_and_warnings_and_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "shop.txt"
    rows = renumbered(random_rows(60, 200))
    log.write_text("".join(f"u{u} {' '.join(item for user, item in rows if user == f'u{u}')}\n" for u in range(60)))
    monkeypatch.setattr(sys, "argv", ["genrec", "audit", str(log), "--out", str(tmp_path / "audit.json")])
    cli.main()
    printed = capsys.readouterr().out
    assert "shop: 60 users" in printed and "Ties: the data set has no times" in printed
    assert "warning: Ids give the next item away" in printed
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["ties"] is None and len(written["warnings"]) == printed.count("warning: ")
    metrics = written["findings"][0]["metrics"]["HR@10"]
    assert metrics["low"] <= metrics["mean"] <= metrics["high"]

    monkeypatch.setattr(sys, "argv", ["genrec", "audit", str(log), "--shuffle-ties", "1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"), [("amazon-beauty", (0.0558, 0.0507)), ("amazon-sports", (0.0467, 0.0443))]
)
def test_the_benchmark_files_give_away_what_is_known(
    shared_data: Path, name: str, expected: tuple[float, float]
) -> None:
    found = audit(load_interactions(name, data_dir=shared_data))
    rule = next(each for each in found.findings if each.rule == "raw id as a number: all of these")
    assert (round(rule.mean("HR@5"), 4), round(rule.mean("NDCG@5"), 4)) == expected
    ours = next(each for each in found.findings if each.rule.startswith(OURS))
    assert ours.report.metrics["HR@10"].low <= found.chance <= ours.report.metrics["HR@10"].high
