"""Model cards: true to the files of the run, valid metadata, and code blocks that do what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from tiny import ITEMS, USERS, contents, recipe, train

from genrec_llm import provenance as provenance_module
from genrec_llm.card.origins import base_licence, is_hub_name
from genrec_llm.card.page import model_card, refresh_cards
from genrec_llm.checkpoints import MANIFEST, write_manifest
from genrec_llm.directory import open_directory
from genrec_llm.errors import ConfigError
from genrec_llm.files import read_json
from genrec_llm.loading import load_merged, load_trained
from genrec_llm.recommender import Recommender
from genrec_llm.trainer import GenRecTrainer

VARIANTS = {
    "t5-tied": ("t5-tied",),
    "t5-untied": ("t5-untied",),
    "bart": ("bart",),
    "bare-mask": ("t5-tied", "--decoder-prompt", "mask"),
    "no-users": ("t5-untied", "--users", "none"),
    "mixed": ("t5-tied", "--last-items-share", "0.5"),
    "mixed-bart": ("bart", "--decoder-prompt", "mask", "--last-items-share", "0.3"),
    "two-tables": ("bart", "--tie-item-rows", "false", "--users", "none", "--decoder-prompt", "mask"),
}
"""Name of a run → its backbone and what it is trained with beyond the defaults."""
HISTORY = (0, 1, 2)
"""Item indices that every card shows."""

BLOCKS_WITHOUT_GENREC = """
import contextlib, io, json, os, re, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "genrec_llm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
answers = {}
for folder in sys.argv[1:]:
    os.chdir(folder)
    blocks = re.findall("```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)
    assert sum("genrec_llm" in block for block in blocks) == 1
    space, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            if "genrec_llm" not in block:
                exec(block, space)
    answers[folder] = [space["best"], [str(item) for item in space["items"].loc[space["best"], "item"]], printed.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base checkpoints."""
    folder = tmp_path_factory.mktemp("card")
    for kind in tiny.KINDS:
        tiny.save_backbone(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Path]:
    """Finished and merged runs, one a variant; two went on from a pretraining; none is evaluated."""
    before = train(home / "t5-tied", home, home / "pretrain", "--seed", 3, "--masks-per-sequence", 2, stage="pretrain")
    made = {}
    for name, (kind, *arguments) in VARIANTS.items():
        given = [*arguments, *(["--from-run", before] if name in ("t5-tied", "mixed") else [])]
        made[name] = train(home / kind, home, home / "runs" / name, *given)
        recipe("merge", "--run", made[name])
    recipe("merge", "--run", made["t5-untied"], "--without-users", "--output-dir", made["t5-untied"] / "public")
    return made


@pytest.fixture(scope="module")
def evaluated(runs: dict[str, Path], home: Path) -> Path:
    """A copy of the run of tied T5, evaluated on validation, then twice on test."""
    run = home / "evaluated"
    shutil.copytree(runs["t5-tied"], run)
    for split in ("validation", "test", "test"):
        recipe("evaluate", "--run", run, "--split", split)
    return run


def info_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "genrec.json").read_text())


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def ranking(folder: Path) -> list[int]:
    """All items, best first, by the one-step scores of the model itself."""
    loaded = load_merged(folder) if info_of(folder)["kind"] == "merged" else load_trained(folder)
    scores = Recommender(loaded).scores([np.array(HISTORY)], np.zeros(1, dtype=np.int64))[0]
    return np.argsort(-scores, kind="stable").tolist()


# --- code blocks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_cards(runs: dict[str, Path], home: Path) -> dict[str, Path]:
    """Folders with nothing but a card meant for others, by kind.

    `home/cache` stands in for the Hub: base and models are found by name alone, far from their folders.
    """
    run, made = runs["t5-untied"], {}
    for name, folder in (
        ("tiny-t5", home / "t5-untied"),
        *((f"shop-{kind}", run / kind) for kind in ("adapter", "merged")),
    ):
        cached = home / "cache" / f"models--acme--{name}"
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        for ref in ("main", "v1"):
            (cached / "refs" / ref).write_text("0" * 40)
    for kind in ("adapter", "merged"):
        info = info_of(run / kind)
        info["base_model"] |= {"name": "acme/tiny-t5", "revision": "v1"}
        made[kind] = home / "elsewhere" / kind
        made[kind].mkdir(parents=True)
        (made[kind] / "README.md").write_text(model_card(run / kind, info, repo_id=f"acme/shop-{kind}"))
    return made


@pytest.fixture(scope="module")
def two_items(home: Path) -> Path:
    """The merged model of a catalogue of two items."""
    log = home / "two.csv"
    log.write_text("user,item\n" + "".join(f"u{user},i{item}\n" for user in range(4) for item in (0, 1, 0, 1)))
    recipe(
        "finetune", "--dataset", log, "--backbone", home / "t5-tied", "--output-dir", home / "two", "--use_cpu",
        "--disable_tqdm", "true", "--max-steps", 1, "--global-batch-size", 4,
    )  # fmt: skip
    recipe("merge", "--run", home / "two")
    return home / "two" / "merged"


@pytest.fixture(scope="module")
def answers(runs: dict[str, Path], hub_cards: dict[str, Path], two_items: Path, home: Path) -> dict[Path, Any]:
    """What the blocks of each card gave where genrec_llm cannot be imported: items, their raw ids, what was printed."""
    folders = [run / kind for run in runs.values() for kind in ("adapter", "merged")]
    folders += [runs["t5-untied"] / "public", two_items, *hub_cards.values()]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS_WITHOUT_GENREC, *map(str, folders)], capture_output=True, text=True, timeout=200,
        check=False, env={**tiny.environment(), "HF_HUB_CACHE": str(home / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder): answer for folder, answer in json.loads(done.stdout.splitlines()[-1]).items()}


def test_blocks_without_genrec_llm_give_the_top_of_the_model(runs: dict[str, Path], answers: dict[Path, Any]) -> None:
    folders = [run / kind for run in runs.values() for kind in ("adapter", "merged")]
    assert len({tuple(answers[folder][0]) for folder in folders}) == len(VARIANTS), "they are different models"
    for folder in [*folders, runs["t5-untied"] / "public"]:
        best, raw, printed = answers[folder]
        assert best == ranking(folder)[:10], folder
        recommender = Recommender.from_pretrained(folder)
        history = [recommender.vocab.item_id(index) for index in HISTORY]
        assert raw == [found.item for found in recommender.recommend(history, k=10, exclude_seen=False)]
        assert printed.startswith(f"{best}\n")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_blocks_of_a_card_on_the_hub_read_the_repository(
    runs: dict[str, Path], hub_cards: dict[str, Path], answers: dict[Path, Any], home: Path, kind: str
) -> None:
    assert answers[hub_cards[kind]][0] == ranking(runs["t5-untied"] / kind)[:10]
    card = card_of(hub_cards[kind])
    assert f'Recommender.from_pretrained("acme/shop-{kind}")' in card
    assert str(home) not in card and '"."' not in card


def test_the_card_of_a_tiny_catalogue_asks_for_no_more_items_than_there_are(
    two_items: Path, answers: dict[Path, Any]
) -> None:
    assert "history = [0, 1]  #" in card_of(two_items) and "num_beams=2, num_return_sequences=2)" in card_of(two_items)
    assert sorted(answers[two_items][0]) == [0, 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_block_with_genrec_llm_prints_the_best_items_that_are_not_in_the_history(
    runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("adapter", "merged"):
        folder = runs[name] / kind
        _, _, vocab, _ = open_directory(folder, kind)
        expected = [vocab.item_id(item) for item in ranking(folder) if item not in HISTORY][:10]
        monkeypatch.chdir(folder)
        capsys.readouterr()
        exec(re.findall("```python\n(.*?)```", card_of(folder), re.DOTALL)[0], {})
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == expected


# --- facts of training ------------------------------------------------------------------------------------------------


def test_the_facts_of_both_stages_are_in_the_model_in_order(runs: dict[str, Path]) -> None:
    for kind in ("adapter", "merged"):
        info = info_of(runs["t5-tied"] / kind)
        assert [(stage["stage"], stage["settings"]["seed"]) for stage in info["training"]] == [
            ("pretrain", 3),
            ("finetune", 0),
        ]
        first, last = info["training"]
        assert (first["settings"]["masks_per_sequence"], last["settings"]["targets"]) == (2, "all")
        assert "targets" not in first["settings"] and "masks_per_sequence" not in last["settings"]
        assert last["best_validation"] == info["metrics"]["validation_ndcg@10"]
        assert last["launch"]["world_size"] == 1 and last["seconds"] > 0 and last["lora_targets"] == ["q", "v"]
        card = card_of(runs["t5-tied"] / kind)
        assert "|  | pretrain | finetune |" in card and "masked items: 2 hidden a history" in card
    assert len(info_of(runs["bart"] / "adapter")["training"]) == 1


def test_the_facts_of_the_data_are_those_of_the_log(runs: dict[str, Path], home: Path) -> None:
    lines = (home / "log.csv").read_text().splitlines()[1:]
    data = info_of(runs["bart"] / "merged")["data"]
    assert (data["users"], data["items"], data["interactions"]) == (USERS, ITEMS, len(lines))
    by_user: dict[str, list[str]] = {}
    for user, item, _ in (line.split(",") for line in lines):
        by_user.setdefault(user, []).append(item)
    trained = {item for items in by_user.values() for item in items[:-2]}
    assert data["items_without_training_interactions"] == ITEMS - len(trained)
    assert (data["public"], data["text_columns"], data["k_core"]) == (False, ["title"], 0)
    assert f"| interactions | {len(lines):,} |" in card_of(runs["bart"] / "merged")


def test_no_path_user_id_or_command_goes_with_a_model(home: Path, tmp_path: Path) -> None:
    run = train("t5-micro", home, home / "nothing", "--backbone-init", "random", "--tuning", "full", "--max-steps", 2)
    recipe("merge", "--run", run)
    recipe("evaluate", "--run", run)
    for name in ("genrec.json", "README.md"):
        text = (run / "merged" / name).read_text()
        assert not [word for word in (str(home), "private.example", "recipes/evaluate", "log.csv") if word in text]
    card = model_card(run / "merged", info_of(run / "merged"), repo_id="acme/shop")
    assert "from random weights; no base model" in card and ModelCard(card).data.base_model is None


def test_the_commit_is_never_that_of_a_checkout_that_it_was_only_installed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        named = ("-c", "user.name=me", "-c", "user.email=me@shop.example")
        done = subprocess.run(["git", *named, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    installed = tmp_path / "site-packages" / "genrec_llm" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    (tmp_path / "shop.py").write_text("")
    git("init")
    git("add", "shop.py")
    git("commit", "-m", "the shop's own")
    monkeypatch.delenv("GENREC_COMMIT", raising=False)
    monkeypatch.setattr(provenance_module, "__file__", str(installed))
    assert provenance_module.git_commit() is None
    monkeypatch.setenv("GENREC_COMMIT", "said")
    assert provenance_module.git_commit() == "said"
    git("add", ".")
    git("commit", "-m", "and this project")
    assert provenance_module.git_commit() == git("rev-parse", "HEAD")
    installed.write_text("changed")
    assert provenance_module.git_commit() == git("rev-parse", "HEAD") + "+changes"


def test_hours_count_all_sessions_of_a_run(home: Path) -> None:
    steps = ("--eval-strategy", "no", "--load-best-model-at-end", "false", "--save-strategy", "steps", "--save-steps", 2,
             "--max-steps", 4, "--save-total-limit", 9)  # fmt: skip
    run = train(home / "t5-tied", home, home / "sessions", *steps)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-4")
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    clock = state["stateful_callbacks"]["TrainingClock"]["attributes"]
    assert 0 < clock["seconds"] < 60
    clock["seconds"] = 7200.0
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(run / "checkpoint-2", read_json(run / "checkpoint-2" / MANIFEST)["launch"])
    train(home / "t5-tied", home, run, *steps)
    (stage,) = info_of(run / "adapter")["training"]
    assert 7200 <= stage["seconds"] < 7260 and stage["steps"] == 4
    assert json.loads((run / "run.json").read_text())["finished"]["seconds"] == stage["seconds"]
    assert "| time | 2.0 h |" in card_of(run / "adapter")


def test_a_checkpoint_that_knows_no_hours_is_gone_on_from(home: Path) -> None:
    steps = ("--eval-strategy", "no", "--load-best-model-at-end", "false", "--save-strategy", "steps", "--save-steps", 2,
             "--max-steps", 4, "--save-total-limit", 9)  # fmt: skip
    run = train(home / "t5-tied", home, home / "older", *steps)
    shutil.rmtree(run / "checkpoint-4")
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["TrainingClock"]
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(run / "checkpoint-2", read_json(run / "checkpoint-2" / MANIFEST)["launch"])
    train(home / "t5-tied", home, run, *steps)
    assert info_of(run / "adapter")["training"][0]["seconds"] > 0


def test_the_earlier_stage_is_remembered_as_it_was_when_training_began(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(home / "bart", home, home / "first", stage="pretrain")
    plain = GenRecTrainer.train

    def removed_meanwhile(self: GenRecTrainer, *arguments: Any, **options: Any) -> Any:
        shutil.rmtree(before)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(GenRecTrainer, "train", removed_meanwhile)
    run = train(home / "bart", home, home / "second", "--from-run", before)
    assert [stage["stage"] for stage in info_of(run / "adapter")["training"]] == ["pretrain", "finetune"]


def test_a_run_finished_before_cards_is_exported_again_by_its_command(home: Path) -> None:
    run = train(home / "bart", home, home / "old")
    facts = json.loads((run / "run.json").read_text())
    del facts["finished"]["epochs"], facts["lora_targets"]
    facts["finished"]["seconds"] = 4321.0
    facts["data"] = {name: facts["data"][name] for name in ("name", "fingerprint", "vocabulary")}
    (run / "run.json").write_text(json.dumps(facts))
    train(home / "bart", home, run)
    info = info_of(run / "adapter")
    assert (info["training"][0]["seconds"], info["training"][0]["epochs"], info["data"]["users"]) == (
        4321.0,
        1.0,
        USERS,
    )
    assert facts["time"] == info["training"][0]["time"]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_before_an_evaluation_the_card_says_so_and_has_no_figures(runs: dict[str, Path]) -> None:
    for kind in ("adapter", "merged"):
        card = card_of(runs["bart"] / kind)
        assert "No evaluation was run on this model" in card and "model-index" not in card
        assert "popularity |" not in card and not re.search(r"HR@5 \|", card)
        best = info_of(runs["bart"] / kind)["metrics"]["validation_ndcg@10"]
        assert f"had NDCG@10 {best:.4f} on the validation split; picked by it, that figure flatters." in card


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_after_an_evaluation_both_cards_have_the_figures_of_the_reports(evaluated: Path, kind: str) -> None:
    card = card_of(evaluated / kind)
    assert card == model_card(evaluated / kind, info_of(evaluated / kind))
    results = ModelCard(card).data.eval_results
    assert {result.dataset_split for result in results} == {"test", "validation"}
    for split in ("test", "validation"):
        written = json.loads((evaluated / "evaluation" / split / "report.json").read_text())
        section = card.split(f"### {split.capitalize()} split\n")[1].split("\n### ")[0].split("\n## ")[0]
        for metric in ("HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR"):
            cells = [report["metrics"][metric] for report in written["reports"]]
            texts = [f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]" for cell in cells]
            assert f"| {metric} | {' | '.join(texts)} |" in section
            (mine,) = (one for one in results if one.dataset_split == split and one.metric_name == metric)
            assert mine.metric_value == pytest.approx(cells[0]["mean"], abs=1e-6)
        for rival, both in written["differences"].items():
            assert f"- Against {rival}, same users: NDCG@10 {both['NDCG@10']['mean']:+.4f}" in section
    test, validation = card.split("### Validation split")
    assert "had been opened 2 times for this run" in test and "had been opened" not in validation
    assert "No evaluation was run" not in card


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_directory_with_a_renewed_card_still_loads(evaluated: Path, kind: str) -> None:
    assert open_directory(evaluated / kind, kind)[0]["evaluation"].keys() == {"test", "validation"}
    assert ranking(evaluated / kind) == ranking(evaluated / "merged")


def test_pictures_of_the_run_are_copied_and_every_link_leads_somewhere(evaluated: Path) -> None:
    drawn = contents(evaluated / "plots")
    assert drawn
    for kind in ("adapter", "merged"):
        assert contents(evaluated / kind / "plots") == drawn
        links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card_of(evaluated / kind))
        assert sorted(links) == sorted(f"plots/{name}" for name in drawn)


def test_merging_again_after_an_evaluation_keeps_its_figures(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    recipe("merge", "--run", run)
    assert info_of(run / "merged")["evaluation"] == info_of(evaluated / "merged")["evaluation"]
    refresh_cards(run)
    assert contents(run / "merged") == contents(evaluated / "merged")
    assert contents(run / "adapter") == contents(evaluated / "adapter")


def test_figures_that_came_with_an_adapter_stay_with_it_when_it_is_merged(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "adapter", tmp_path / "adapter")  # as `genrec pull` lays it down: no reports beside it
    recipe("merge", "--run", tmp_path)
    assert contents(tmp_path / "adapter") == contents(evaluated / "adapter")
    assert info_of(tmp_path / "merged")["evaluation"] == info_of(evaluated / "merged")["evaluation"]
    assert "### Test split" in card_of(tmp_path / "merged")


def test_reports_on_an_earlier_model_of_the_directory_are_left_out(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    report = run / "evaluation" / "test" / "report.json"
    written = json.loads(report.read_text())
    written["model"]["rows_sha256"] = "0" * 64
    report.write_text(json.dumps(written))
    refresh_cards(run)
    for kind in ("adapter", "merged"):
        assert info_of(run / kind)["evaluation"].keys() == {"validation"}
        assert "### Test split" not in card_of(run / kind)
        shown = {path.name for path in (run / kind / "plots").iterdir()}
        assert {"metrics_validation.png", "ranks_validation.png"} < shown
        assert not {"metrics_test.png", "ranks_test.png"} & shown and "_test.png" not in card_of(run / kind)


def test_a_model_without_users_claims_the_figures_for_which_all_users_were_unknown(evaluated: Path) -> None:
    recipe("merge", "--run", evaluated, "--without-users", "--output-dir", evaluated / "public")
    card = card_of(evaluated / "public")
    assert f"- Rows for {USERS} known users were measured; this model has none. Its own figures take every user" in card
    (unknown,) = (
        report
        for report in info_of(evaluated / "public")["evaluation"]["test"]["reports"]
        if report["name"].endswith("users unknown")
    )
    claimed = {
        result.metric_name: result.metric_value
        for result in ModelCard(card).data.eval_results
        if result.dataset_split == "test"
    }
    assert claimed["NDCG@10"] == pytest.approx(unknown["metrics"]["NDCG@10"]["mean"], abs=1e-6)
    head = next(line for line in card.splitlines() if "with rows of known users" in line and line.startswith("|"))
    own = head.split("|").index(" this model ")
    row = next(line for line in card.splitlines() if line.startswith("| NDCG@10 "))
    assert row.split("|")[own].strip().startswith(f"{unknown['metrics']['NDCG@10']['mean']:.4f}")
    assert "every user is `<user_unknown>`" in card
    assert f"Rows of {USERS} users of the training data are included" in card_of(evaluated / "merged")


def test_weights_of_another_precision_than_the_measured_ones_are_told(evaluated: Path, tmp_path: Path) -> None:
    recipe("merge", "--run", evaluated, "--dtype", "bfloat16", "--output-dir", tmp_path / "merged")
    assert "This checkpoint holds bfloat16 weights, whose own figures were not measured." in card_of(
        tmp_path / "merged"
    )
    assert "bfloat16" not in card_of(evaluated / "merged")


# --- metadata, licences, what is unknown ------------------------------------------------------------------------------


def test_the_front_matter_names_library_base_and_how_they_are_related(runs: dict[str, Path]) -> None:
    for kind, library, relation in (("adapter", "peft", "adapter"), ("merged", "transformers", "finetune")):
        info = info_of(runs["t5-untied"] / kind)
        info["base_model"]["name"] = "google/flan-t5-small"
        data = ModelCard(model_card(runs["t5-untied"] / kind, info, repo_id="acme/shop")).data
        assert (data.library_name, data.base_model, data.base_model_relation) == (
            library,
            "google/flan-t5-small",
            relation,
        )
        assert data.license is None and data.pipeline_tag is None and "recommendation" in data.tags


def test_a_base_that_nobody_else_has_is_refused_in_a_card_for_others(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs["bart"] / "adapter"
    info = info_of(folder)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (info["base_model"]["name"], "models/mine", "./mine", "mine", "~/mine"):
        info["base_model"]["name"] = name
        with pytest.raises(ConfigError) as refused:
            model_card(folder, info, repo_id="acme/shop")
        (problem,) = refused.value.problems
        assert repr(name) in problem and "--base-model org/name" in problem
        assert "base_model:" not in model_card(folder, info)
    info["base_model"]["name"] = "facebook/bart-base"
    assert "base_model: facebook/bart-base" in model_card(folder, info, repo_id="acme/shop")


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        *(
            (name, "apache-2.0")
            for name in ("google/flan-t5-xl", "google/t5-v1_1-base", "google/mt5-small", "t5-small")
        ),
        *((name, "apache-2.0") for name in ("google-t5/t5-base", "facebook/bart-base", "facebook/bart-large")),
        *(
            (name, None)
            for name in ("facebook/bart-large-cnn", "acme/flan-t5-xl", "t5-micro", "google/gemma-2b", "/a/t5-small")
        ),
    ],
)
def test_licences_of_bases_are_stated_where_known(runs: dict[str, Path], name: str, licence: str | None) -> None:
    assert base_licence(name) == licence
    info = info_of(runs["t5-untied"] / "adapter")
    info["base_model"]["name"] = name
    expected = f"- Base model: `{name}`: {licence or 'not known: see the base’s own card'}."
    assert expected in model_card(runs["t5-untied"] / "adapter", info)


@pytest.mark.parametrize(
    ("name", "words", "license_name"),
    [
        ("movielens-100k", ("no redistribution", "Harper"), "movielens-terms"),
        (
            "movielens-100k-ties-shuffled-7",
            ("no redistribution", "Harper", "MovieLens-100K, ties shuffled (seed 7)"),
            "movielens-terms",
        ),
        ("amazon-beauty", ("state no licence", "McAuley"), None),
        ("amazon-beauty-without-last-1", ("McAuley", "(2014, 5-core), without the last of each history"), None),
        ("amazon-sports", ("state no licence", "He, J. McAuley"), None),
        ("yelp", ("academic", "Yelp"), "yelp-dataset-terms"),
    ],
)
def test_terms_of_public_data_are_stated(
    runs: dict[str, Path], name: str, words: tuple[str, ...], license_name: str | None
) -> None:
    folder = runs["bart"] / "merged"
    info = info_of(folder)
    info["data"] |= {"name": name, "public": True}
    card = model_card(folder, info)
    assert all(word in card for word in words)
    assert getattr(ModelCard(card).data, "license_name", None) == license_name
    info["data"]["public"] = False  # a file of that name
    card = model_card(folder, info)
    assert (
        "licence stated by whoever shares it" in card and "Harper" not in card and "license" not in card.split("---")[1]
    )


def test_what_is_not_known_is_said_to_be_unknown(runs: dict[str, Path]) -> None:
    folder = runs["bart"] / "merged"
    info = info_of(folder)
    for name in ("training", "seed", "id_seed", "parity"):
        del info[name]
    info["data"] = {name: info["data"][name] for name in ("name", "fingerprint", "vocabulary")}
    card = model_card(folder, info)
    assert "How it was trained was not recorded." in card and "| users | not recorded |" in card
    assert "An unrecorded number of its items" in card and "None" not in card


def test_odd_names_and_titles_break_neither_table_nor_code(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(runs["bart"] / "merged", folder)
    _, _, vocab, _ = open_directory(folder, "merged")
    items = vocab.items.copy()
    items.loc[0, "item"] = 'a "quoted" \\ id'
    items.loc[0, "title"] = "two\nlines | and a pipe"
    dataclasses.replace(vocab, items=items).save_items(folder / "items.parquet")
    info = info_of(folder)
    info["data"]["name"] = "a|b\nc"
    card = model_card(folder, info)
    first = card.split("```python\n")[1].split("```")[0]
    compile(first, "card", "exec")
    assert 'a \\"quoted\\" \\\\ id' in first and "# two lines \\| and a pipe;" in first
    assert "| data set | a\\|b c (a file of the trainer's own) |" in card


def test_names_of_the_hub_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(is_hub_name, ("google/flan-t5-small", "acme/mine", "t5-small")))
    assert not any(map(is_hub_name, (str(tmp_path), "./a", "a/b/c", "mine", "", "t5-micro")))
    os.makedirs("acme/mine")
    assert not is_hub_name("acme/mine")
