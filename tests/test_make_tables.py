"""docs/accuracy.md holds what quality.json says: means and spreads of seeds, the best in bold, nothing from elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_tables
import numpy as np
import pytest
import tiny
from make_tables import (
    BEGIN,
    END,
    Pair,
    Row,
    check_kept,
    check_pairs,
    checked,
    lines_of,
    pair_of,
    put,
    put_pairs,
    read_pairs,
    row_of,
    tables,
    with_tables,
)

from genrec_llm.errors import ConfigError, DataError
from genrec_llm.evaluation import EvalReport, build_report, rank_recommender
from genrec_llm.files import read_json, write_json
from genrec_llm.metrics import ndcg

MADE = {"command": "recipes/evaluate.py --run runs/x", "commit": "abc", "hardware": "CPU"}


def row(model: str, seed: int | None, ndcg: float, **changes: Any) -> Row:
    return {
        "dataset": "toy", "split": "test", "model": model, "protocol": "seen removed", "seed": seed, "hr@5": 2 * ndcg,
        "ndcg@5": ndcg / 2, "hr@10": 3 * ndcg, "ndcg@10": ndcg, "users": 100, "candidates": 1000, **MADE, "trained": "abc",
        "seconds": 10.0,
    } | changes  # fmt: skip


ROWS = [
    row("rival", 0, 0.05),
    row("genrec-a", 0, 0.04),
    row("genrec-a", 1, 0.06),
    row("popularity", None, 0.01, seconds=None),
    row("genrec-a", 0, 0.02, protocol="seen kept"),
]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> None:
    own = ["--quality", folder / "results" / "quality.json", "--page", folder / "accuracy.md"]
    monkeypatch.setattr(sys, "argv", ["make_tables.py", *map(str, [*own, *arguments])])
    make_tables.main()


def test_a_table_has_mean_and_spread_of_the_seeds_and_the_best_in_bold() -> None:
    text = tables(ROWS, [], {"toy": "results/quality_toy.png"})
    rows = [line for line in text[text.index("### toy") :].splitlines() if line.startswith("| ")]
    # Seeds .04 and .06: mean .05, standard deviation .02 / sqrt(2).
    assert rows[1] == (
        "| genrec-a | **.1000 ± .0283** | **.0250 ± .0071** | **.1500 ± .0424** | **.0500 ± .0141** | 2 | 10 |"
    )
    assert (
        rows[2] == "| rival | **.1000** | **.0250** | **.1500** | **.0500** | 1 | 10 |"
    )  # equal as far as it is shown
    assert rows[3] == "| popularity | .0200 | .0050 | .0300 | .0100 | 1 | – |"
    assert text.index("test split, seen removed") < text.index("test split, seen kept")
    assert "100 users, full ranking of 1,000 items" in text and "results/quality_toy.png" in text
    assert [line.model for line in lines_of(ROWS[:4])] == ["genrec-a", "rival", "popularity"]


def test_the_summary_has_the_best_of_ours_beside_the_best_rival_by_each_ranking() -> None:
    rows = [
        *ROWS,
        row("genrec-a, history alone", 0, 0.045),
        row("rival, last items too", 0, 0.04),
        row("other", 0, 0.03),
        row("other, last items too", 0, 0.055),
        row("genrec-a", 0, 0.9, split="validation"),
        row("rival", 0, 0.8, split="validation"),
        row("genrec-a", 0, 0.02, dataset="lonely"),
    ]
    pair = Pair("toy", "test", "seen removed", "genrec-a", "rival", [0, 1], 0.01, 0.002, 0.018, 0.01, 100)
    other = replace(pair, rival="other, last items too", seeds=[0], mean=-0.005, low=-0.01, high=0.0)
    text = tables(rows, [other, replace(pair, protocol="seen kept"), pair], {})
    summary = [line for line in text.split("## lonely")[0].splitlines() if line.startswith("| ")]
    # "seen kept" has no rival, validation is not the test split, "lonely" has ours alone.
    assert summary[1:] == [
        "| toy, seen removed | .0500 (2) | rival .0500 (1) | +0.0100 [+0.0020, +0.0180], seeds 0 1 | "
        "other .0550 (1) | -0.0050 [-0.0100, +0.0000], seed 0 |"
    ]
    assert "| toy, seen removed | .0500 (2) | rival .0500 (1) | – | – | – |" in tables(ROWS, [], {}).splitlines()
    assert "In short" not in tables([row("genrec-a", 0, 0.1)], [], {})


def test_every_problem_of_the_rows_is_named_at_once() -> None:
    wrong = [
        row("a", 0, 0.1, split="train", users=0),
        {key: value for key, value in row("b", 0, 0.1).items() if key != "commit"} | {"more": 1},
        row("c", "zero", 0.1, **{"hr@5": 1.2}),  # type: ignore[arg-type]
        row("d", 0, 0.1, **{"hr@5": 0.5}),
        row("e", 0, 0.1, protocol="kept"),
    ]
    with pytest.raises(DataError) as refused:
        checked(wrong, Path("quality.json"))
    text = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == 8
    for part in ("row 1: split", "row 1: users", "row 2: no commit", "row 2: unknown key 'more'", "row 3: seed",
                 "row 3: hr@5", "row 4: hr@5 is above hr@10", "row 5: protocol"):  # fmt: skip
        assert part in text
    with pytest.raises(DataError, match="row 2: row 1 has its data set"):
        checked([row("a", 0, 0.1), row("a", 0, 0.2)], Path("q"))
    with pytest.raises(DataError, match="cannot be compared with row 1"):
        checked([row("a", 0, 0.1), row("b", 0, 0.1, users=99)], Path("q"))


def test_the_page_is_written_between_its_markers_and_check_sees_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality, page = tmp_path / "results" / "quality.json", tmp_path / "accuracy.md"
    write_json(quality, ROWS)
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    run(monkeypatch, tmp_path)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n\nAfter.\n") and "old" not in text and "genrec-a" in text
    assert "](results/quality_toy.png)" in text
    assert (tmp_path / "results" / "quality_toy.png").read_bytes().startswith(b"\x89PNG")
    run(monkeypatch, tmp_path, "--check")
    write_json(quality, [*ROWS, row("late", 0, 0.03)])
    with pytest.raises(SystemExit, match="is not what"):
        run(monkeypatch, tmp_path, "--check")
    with pytest.raises(ConfigError, match="put them in"):
        with_tables("# no markers", "x", page)


def test_rows_and_pairs_come_from_saved_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The difference is the mean over users of what the metric gives each of them."""
    data = tiny.eval_data(users=60, items=40, longest=8, split="test")

    class Noisy:
        def __init__(self, name: str, help_: float) -> None:
            self.name, self.help = name, help_

        def scores(self, histories: Any, users: Any) -> Any:
            scores = np.random.default_rng(len(users)).random((len(users), 40)).astype(np.float32)
            places = np.searchsorted(np.sort(data.users), users)
            scores[np.arange(len(users)), data.targets[np.argsort(data.users)[places]]] += self.help
            return scores

    reports = []
    for name, help_ in (("good", 0.5), ("poor", 0.0)):
        ranked = rank_recommender(Noisy(name, help_), data, exclude_seen=False)
        report = build_report(name, ranked, data, exclude_seen=False)
        report.save(tmp_path / name)
        reports.append(report)
    made = row_of(reports[0], "genrec", MADE, {"seed": 3, "seconds": 2.5, "commit": "earlier", "share": 1})
    assert made["protocol"] == "seen kept" and made["ndcg@10"] == reports[0].metrics["NDCG@10"].mean
    assert (made["seed"], made["seconds"], made["commit"], made["trained"]) == (3, 2.5, "abc", "earlier")
    assert checked([made], Path("q")) == [made]

    for name, model in (("good", "genrec"), ("poor", "SASRec")):
        run(monkeypatch, tmp_path, "add", "--report", tmp_path / name, "--model", model, "--seed", 3, "--seconds", 2.5,
            "--command", "x")  # fmt: skip
        run(monkeypatch, tmp_path, "add", "--report", tmp_path / name, "--model", model, "--seed", 3, "--command", "x")
    assert "in the place of another" not in capsys.readouterr().out  # the same figures again
    run(monkeypatch, tmp_path, "add", "--report", tmp_path / "poor", "--model", "genrec", "--seed", 3, "--command", "x")
    assert (
        f"another genrec, seed 3 (tiny, test, seen kept): NDCG@10 was {made['ndcg@10']:.4f}" in capsys.readouterr().out
    )
    run(monkeypatch, tmp_path, "add", "--report", tmp_path / "good", "--model", "genrec", "--seed", 3, "--command", "x")
    rows = read_json(tmp_path / "results" / "quality.json")
    assert [(each["model"], each["seconds"]) for each in rows] == [("genrec", None), ("SASRec", None)]
    kept = EvalReport.load(make_tables.kept_report(tmp_path / "results" / "quality.json", rows[1]))
    assert kept.name == "poor" and "MRR" not in kept.metrics
    check_kept(rows, tmp_path / "results" / "quality.json")
    with pytest.raises(DataError, match=r"SASRec_seed_3: quality\.json has no row of it: remove it"):
        check_kept(rows[:1], tmp_path / "results" / "quality.json")
    for _ in range(2):
        run(monkeypatch, tmp_path, "pair", tmp_path / "good", tmp_path / "poor", "--models", "genrec", "SASRec",
            "--seed", 3)  # fmt: skip
    (pair,) = read_json(tmp_path / "results" / "quality_pairs.json")
    assert pair["mean"] == pytest.approx(rows[0]["ndcg@10"] - rows[1]["ndcg@10"]) and pair["low"] > 0
    run(monkeypatch, tmp_path)
    assert f"- genrec - SASRec, seed 3: {pair['mean']:+.4f} [" in (tmp_path / "accuracy.md").read_text()
    put(tmp_path / "results" / "quality.json", [rows[0] | {"ndcg@10": rows[0]["ndcg@10"] + 1e-4}])
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path, "--check")
    said = capsys.readouterr().err
    assert "genrec_seed_3: ndcg@10 is" in said
    with pytest.raises(DataError, match=r"genrec - SASRec on tiny, test, seen kept: the rows give \+.*seeds \[3\]"):
        check_pairs(read_json(tmp_path / "results" / "quality.json"), [make_tables.Pair(**pair)], Path("p"))
    other = tiny.eval_data(users=60, items=40, longest=8, split="validation")
    theirs = build_report("v", rank_recommender(Noisy("v", 0.0), other, exclude_seen=False), other, exclude_seen=False)
    with pytest.raises(ConfigError, match="split is 'test' and 'validation'"):
        pair_of(reports[:1], [theirs], ["a", "b"], [])


def test_a_pair_of_several_seeds_is_of_the_mean_of_each_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.eval_data(users=60, items=40, longest=8, split="test")

    class Noise:
        name = "noise"

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def scores(self, histories: Any, users: Any) -> Any:
            return np.random.default_rng((self.seed, *users)).random((len(users), 40)).astype(np.float32)

    reports = [build_report("noise", rank_recommender(Noise(seed), data, exclude_seen=False), data, exclude_seen=False)
               for seed in range(4)]  # fmt: skip
    ours, rivals = reports[:2], reports[2:]
    pair = pair_of(ours, rivals, ["genrec", "SASRec"], [0, 1])
    each = [[ndcg(report.ranks, 10) for report in reports] for reports in (ours, rivals)]
    assert pair.mean == pytest.approx(np.mean(each[0]) - np.mean(each[1]), abs=1e-12)
    alone = [pair_of([a], [b], ["genrec", "SASRec"], [0]) for a, b in zip(ours, rivals, strict=True)]
    assert pair.high - pair.low < min(one.high - one.low for one in alone)  # noise of seeds is averaged away
    quality = tmp_path / "quality.json"
    put_pairs(quality, [pair])
    for seeds in ([0], [5], [1, 5]):  # those of the other seeds may be gone
        put_pairs(quality, [replace(alone[0], seeds=seeds)])
        assert read_pairs(make_tables.pairs_beside(quality)) == [pair]
        assert "quality_pairs.json has it of seeds [0, 1], which are not all here" in capsys.readouterr().out
    more = replace(alone[0], seeds=[0, 1, 2])
    put_pairs(quality, [more])
    assert read_pairs(make_tables.pairs_beside(quality)) == [more]
    assert "- genrec - SASRec, seeds 0 1: " in tables(
        [row("genrec", 0, 0.1)], [replace(pair, dataset="toy", protocol="seen removed")], {}
    )


def test_a_pair_has_the_rows_of_its_seeds() -> None:
    pair = make_tables.Pair("toy", "test", "seen removed", "genrec-a", "popularity", [0, 1], 0.04, 0.0, 0.1, 0.5, 100)
    check_pairs(ROWS, [pair], Path("p"))  # a model without a seed stands beside each
    with pytest.raises(DataError, match="the rows miss this pair"):
        check_pairs(ROWS, [replace(pair, rival="rival")], Path("p"))
    with pytest.raises(DataError, match=r"the rows give \+0\.0400 for this pair \(\+0\.0410"):
        check_pairs(ROWS, [replace(pair, mean=0.041)], Path("p"))


def test_a_row_that_is_wrong_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    put(path, ROWS[:1])
    before = path.read_bytes()
    with pytest.raises(DataError):
        put(path, [row("x", 0, 2.0)])
    assert path.read_bytes() == before


def test_the_accuracy_page_is_what_its_rows_give() -> None:
    quality, page = tiny.REPOSITORY / "docs" / "results" / "quality.json", tiny.REPOSITORY / "docs" / "accuracy.md"
    if not quality.is_file():
        assert not page.is_file() or BEGIN not in page.read_text(), "tables without the rows that they are made from"
        return
    make_tables.write(page, quality, check=True)


@pytest.mark.slow
def test_rows_of_a_real_run(tmp_path: Path) -> None:
    tiny.save_backbone("t5-untied", tmp_path / "base")
    finetuned = tiny.train(tmp_path / "base", tmp_path, tmp_path / "run")
    tiny.run([sys.executable, "recipes/merge.py", "--run", str(finetuned)])
    for more in ([], ["--keep-seen"]):
        tiny.run([sys.executable, "recipes/evaluate.py", "--run", str(finetuned), "--use_cpu", *more])
    rows = checked([row for row, _ in make_tables.rows_of_run(finetuned, "genrec")], Path("q"))
    ours = {each["protocol"]: each for each in rows if each["model"] == "genrec"}
    assert set(ours) == {"seen removed", "seen kept"} and ours["seen kept"]["seed"] == 0
    assert all(each["seconds"] > 0 and "evaluate.py" in each["command"] for each in ours.values())
    others = {each["model"] for each in rows} - {"genrec"}
    assert others == {"popularity", "item-kNN", "recent repeat"}
