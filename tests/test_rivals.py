"""The tool that trains the neural rivals, and their place beside a model of ours."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from genrec_llm.args import DataArguments
from genrec_llm.baselines import SequenceRecommender
from genrec_llm.baselines.neural import LastItemsToo, NeuralRecommender, user_order
from genrec_llm.encoded import load_data
from genrec_llm.evaluation import EvalReport, rank_recommender
from genrec_llm.files import read_json
from genrec_llm.metrics import ndcg
from genrec_llm.recommender import Recommender
from genrec_llm.rows import cooccurrence_and_vectors
from genrec_llm.runs import load_run_data
from genrec_llm.tasks import LAST_ITEMS_SHARES, last_items_weights
from genrec_llm.vectors import read_item_vectors, write_item_vectors

SMALL = ("--set", "epochs=2", "dim=8", "validate_every=1", "batch_size=32")
HGN, SASREC = ("_".join([rival, *SMALL[1:]]) for rival in ("hgn", "sasrec-softmax"))  # as reports name them


def rivals(*arguments: object) -> None:
    before = sys.argv
    sys.argv = ["rivals.py", *map(str, arguments)]
    try:
        runpy.run_path(str(tiny.REPOSITORY / "tools" / "rivals.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model of ours on a private log, a user-aware rival and one without users."""
    folder = tmp_path_factory.mktemp("rivals")
    tiny.save_backbone("t5-untied", folder / "base")
    tiny.train(folder / "base", folder, folder / "run", "--users", "none", "--last-items-share", "0.5")
    tiny.recipe("merge", "--run", folder / "run")
    data = ("--dataset", folder / "log.csv", "--items-file", folder / "items.csv")
    for rival in ("hgn", "sasrec-softmax"):
        rivals(*data, "--rival", rival, "--out", folder / "rivals", *SMALL)
    return folder


def test_rivals_are_ranked_beside_our_model_on_the_same_users(ground: Path) -> None:
    trained = sorted(path.parent for path in (ground / "rivals").rglob("rival.json"))
    assert [path.name for path in trained] == [f"{HGN}_seed=0", f"{SASREC}_seed=0"]
    tiny.recipe("evaluate", "--run", ground / "run", "--use_cpu", "--rivals", *trained)
    summary = read_json(ground / "run" / "evaluation" / "validation" / "report.json")
    assert {HGN, SASREC} < set(summary["differences"])
    assert summary["rivals"][HGN]["seed"] == 0 and "rivals.py" in summary["rivals"][HGN]["command"]
    for path, name in zip(trained, (HGN, SASREC), strict=True):
        beside = EvalReport.load(ground / "run" / "evaluation" / "validation" / name)
        alone = EvalReport.load(path / "validation")
        assert beside.ranks.better.tolist() == alone.ranks.better.tolist()  # user rows and all


def test_with_last_items_in_our_ranking_each_side_is_also_ranked_in_the_other_way(ground: Path) -> None:
    trained = sorted(path.parent for path in (ground / "rivals").rglob("rival.json"))
    tiny.recipe("evaluate", "--run", ground / "run", "--use_cpu", "--rivals", *trained)
    out = ground / "run" / "evaluation" / "validation"
    mixed = Recommender.from_pretrained(ground / "run" / "merged")
    layout, asked = mixed.layout, load_run_data(ground / "run").held_out("validation")

    def ranked(recommender: SequenceRecommender, users: np.ndarray) -> list[int]:
        return rank_recommender(recommender, replace(asked, users=users), exclude_seen=True).ranks.better.tolist()

    mixed.layout = replace(layout, last_items_weights=())
    assert EvalReport.load(out / "GenRec,_history_alone").ranks.better.tolist() == ranked(mixed, asked.users)
    hgn, users, histories = NeuralRecommender.load(trained[0]), user_order(len(asked.users)), list(asked.histories)
    mixtures = {
        share: LastItemsToo(hgn, replace(layout, last_items_weights=last_items_weights(share)))
        for share in LAST_ITEMS_SHARES
    }
    for too in mixtures.values():
        likely = sum(
            torch.from_numpy(hgn.scores(contexts, users)).softmax(dim=1) * torch.from_numpy(weights).float()[:, None]
            for contexts, weights in too.layout.contexts(histories)
        )
        found = torch.from_numpy(too.scores(histories, users)).softmax(dim=1)  # without a share: of the rival's own
        torch.testing.assert_close(found, likely, rtol=1e-4, atol=1e-8)
    of_share = {share: ranked(too, users) for share, too in mixtures.items()}
    assert len(set(map(tuple, of_share.values()))) == len(LAST_ITEMS_SHARES)
    chosen = read_json(out / "report.json")["rivals"][HGN]["last_items_share"]
    assert EvalReport.load(out / f"{HGN},_last_items_too").ranks.better.tolist() == of_share[chosen]
    shown = {path.parent.name: EvalReport.load(path.parent).protocol.max_history for path in out.glob("*/report.json")}
    assert {name: most for name, most in shown.items() if most} == {"GenRec": 50, "GenRec,_history_alone": 50}
    assert EvalReport.load(out / "GenRec").ranks.better.tolist() != ranked(mixed, asked.users)

    def best(split: str) -> float:
        data = replace(load_run_data(ground / "run").held_out(split), users=users)
        figures = {
            share: ndcg(rank_recommender(too, data, exclude_seen=True).ranks, 10).mean()
            for share, too in mixtures.items()
        }
        return max(figures, key=lambda share: float(figures[share]))

    assert chosen == best("validation") != best("test") and chosen != sum(layout.last_items_weights)
    tiny.recipe("evaluate", "--run", ground / "run", "--use_cpu", "--split", "test", "--rivals", trained[0])
    opened = read_json(ground / "run" / "evaluation" / "test" / "report.json")
    assert opened["rivals"][HGN]["last_items_share"] == chosen


def test_what_has_ended_is_not_run_again_and_the_table_has_every_run(
    ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (ground / "rivals").rglob("rival.json")}
    data = ("--dataset", ground / "log.csv", "--items-file", ground / "items.csv")
    rivals(*data, "--rival", "hgn", "--out", ground / "rivals", *SMALL)
    with pytest.raises(SystemExit):
        rivals(*data, "--rival", "hgn", "--out", ground / "rivals", *SMALL, "--keep-seen")
    assert "trained with another keep_seen" in capsys.readouterr().err
    rivals("--table", "--out", ground / "rivals")
    assert {path: path.stat().st_mtime_ns for path in (ground / "rivals").rglob("rival.json")} == kept
    shown = capsys.readouterr().out
    assert "epoch" not in shown.split("|")[0] and "| hgn_epochs=2" in shown and "| sasrec-softmax_epochs=2" in shown


def test_a_rival_begins_with_the_rows_that_ours_would(ground: Path, tmp_path: Path) -> None:
    """One step at a rate of nothing, so that the first rows are what is left."""
    items = [f"i{number}" for number in range(30)]
    write_item_vectors(tmp_path / "vectors.parquet", items, np.random.default_rng(0).random((30, 5), dtype=np.float32))
    data = ("--dataset", ground / "log.csv", "--items-file", ground / "items.csv")
    rivals(*data, "--rival", "sasrec-softmax", "--out", tmp_path / "out", "--item-vectors", tmp_path / "vectors.parquet",
           "--set", "first_rows=cooccurrence+vectors", "learning_rate=1e-30", "dim=8", "epochs=1")  # fmt: skip
    (folder,) = (path.parent for path in (tmp_path / "out").rglob("rival.json"))
    found = load_file(folder / "rival.safetensors")["items.weight"][:-1]
    read = load_data(DataArguments(dataset=str(ground / "log.csv"), items_file=str(ground / "items.csv"), users="none"))
    vectors = read_item_vectors(tmp_path / "vectors.parquet", read.vocab)
    torch.testing.assert_close(found, F.normalize(cooccurrence_and_vectors(read.train, vectors, 8, seed=0)) / 8**0.5)


def test_rivals_of_other_data_and_folders_without_one_are_refused(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_log(tmp_path / "other.csv", users=40, seed=1)
    rivals("--dataset", tmp_path / "other.csv", "--rival", "hgn", "--out", tmp_path / "rivals", *SMALL)
    (other,) = (path.parent for path in (tmp_path / "rivals").rglob("rival.json"))
    with pytest.raises(SystemExit):
        tiny.recipe("evaluate", "--run", ground / "run", "--use_cpu", "--rivals", other, tmp_path)
    error = capsys.readouterr().err
    assert "another fingerprint and vocabulary" in error and f"{tmp_path} has no rival.json" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rival", "gru4rec", "--dataset", "x.csv"), "gru4rec"),
        (("--rival", "hgn", "--dataset", "x.csv", "--set", "dropout"), "NAME=VALUE"),
        (("--rival", "hgn", "--dataset", "x.csv", "--set", "droput=0.1"), "droput"),
        (("--rival", "hgn", "--dataset", "x.csv", "--set", "seed=1,2"), "--set seed: give --seed"),
        (("--rival", "hgn", "--dataset", "x.csv", "--max-history", "3"), "--max_history: rivals have no such thing"),
        (("--table",), "no such folder"),
        (("--rival", "hgn", "--dataset", "x.csv", "--set", "dim=8", "dim=16"), "--set dim: all its values in one"),
        (("--rival", "hgn", "--dataset", "x.csv", "--set", "first_rows=cooccurrence+vectors"), "--item-vectors"),
        ((), "--rival"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        rivals(*arguments, "--out", tmp_path / "out")
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())
