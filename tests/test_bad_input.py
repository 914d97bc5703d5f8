"""Mistakes that users make: each ends with exit code 2, names place and mend, and harms nothing that is there."""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import contents, recipe, tensors_and_words
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from genrec_llm import export
from genrec_llm.directory import INFO_FILE
from genrec_llm.files import describe_files, read_json, write_json
from genrec_llm.recommender import Recommender
from genrec_llm.runs import load_run_data
from genrec_llm.tokenizer import bare_tokenizer
from genrec_llm.vocab import IdVocab

Refused = Callable[..., list[str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a recipe that has to end with exit code 2; its problems, each of which must be told once and on one line."""

    def run(name: str, *arguments: object) -> list[str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            recipe(name, *arguments)
        assert ended.value.code == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        problems = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
        assert problems and len(set(problems)) == len(problems)
        return problems

    return run


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Every file below the folder, hidden and temporary ones too, is afterwards what it was before."""
    before = contents(folder)
    yield
    assert contents(folder) == before


def arguments(home: Path, out: Path, *more: object, backbone: str = "t5-untied", log: str = "log.csv") -> list[object]:
    return [
        "--dataset", home / log, "--backbone", home / backbone, "--output-dir", out, "--use_cpu", "--disable_tqdm",
        "true", "--max-steps", 2, "--global-batch-size", 32, "--lora-r", 2, "--lora-alpha", 4, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base checkpoints, two logs, and a finished, merged run of each stage."""
    folder = tmp_path_factory.mktemp("mistakes")
    tiny.save_log(folder / "log.csv")
    tiny.save_log(folder / "other.csv", seed=1)
    for kind in tiny.KINDS:
        tiny.save_backbone(kind, folder / kind)
    recipe("pretrain", *arguments(folder, folder / "pretrain"))
    recipe("finetune", *arguments(folder, folder / "finetune", "--from-run", folder / "pretrain"))
    recipe("finetune", *arguments(folder, folder / "full", "--tuning", "full"))
    for name in ("finetune", "full"):
        recipe("merge", "--run", folder / name)
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the finished finetuning run, to be harmed."""
    return Path(shutil.copytree(home / "finetune", tmp_path / "run"))


# --- the backbone ---------------------------------------------------------


def test_a_checkpoint_that_is_not_seq2seq(home: Path, tmp_path: Path, refused: Refused) -> None:
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=110, n_embd=16, n_layer=1, n_head=2)).save_pretrained(base)
    bare_tokenizer("t5").save_pretrained(base)
    with untouched(tmp_path):
        (problem,) = refused("pretrain", *arguments(home, tmp_path / "run", backbone=str(base)))
    assert str(base) in problem and "'gpt2'" in problem and "choose a checkpoint of t5, mt5, bart" in problem


def wider(folder: Path) -> Path:
    config = T5Config(vocab_size=108, d_model=24, d_kv=8, num_heads=2, d_ff=32, num_layers=1, num_decoder_layers=1)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    bare_tokenizer("t5").save_pretrained(folder)
    return folder


def longer_tokenizer(folder: Path) -> Path:
    tiny.save_backbone("t5-untied", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    return folder


def another_family(folder: Path) -> Path:
    return tiny.save_backbone("bart", folder)


def other_weights(folder: Path) -> Path:
    return tiny.save_backbone("t5-untied", folder, seed=5)


def other_head(folder: Path) -> Path:
    return tiny.save_backbone("t5-tied", folder)


def other_masks(folder: Path) -> Path:
    """As many tokens, but `<extra_id_0>` is another one."""
    tiny.save_backbone("t5-untied", folder)
    text = (folder / "tokenizer.json").read_text()
    text = text.replace("<extra_id_0>", "<x>").replace("<extra_id_1>", "<extra_id_0>").replace("<x>", "<extra_id_1>")
    (folder / "tokenizer.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (wider, ["its width is 24, the id rows have 16"]),
        (longer_tokenizer, ["its tokenizer has 105 tokens, the adapter was trained on 103"]),
        (another_family, ["its tokenizer has 4 tokens", "it is of type bart, the adapter of t5"]),
        (other_weights, ["its weights are others"]),
        (other_head, ["its weights are others"]),
        (other_masks, ["its tokenizer has other ids for the mask, end or padding tokens"]),
    ],
)
def test_an_adapter_put_on_another_base(
    run: Path, tmp_path: Path, refused: Refused, other: Callable[[Path], Path], words: list[str]
) -> None:
    base = other(tmp_path / "other")
    with untouched(tmp_path):
        problems = refused("merge", "--run", run, "--backbone", base)
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert f"{run / 'adapter'}: backbone '{base}' is not the one it was trained on" in problem and word in problem


def test_the_base_may_have_moved(run: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "t5-untied", tmp_path / "moved")
    merged = contents(run / "merged")["model.safetensors"]
    recipe("merge", "--run", run, "--backbone", tmp_path / "moved")
    assert contents(run / "merged")["model.safetensors"] == merged


def test_a_base_that_is_gone(run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    info = json.loads((run / "adapter" / "genrec.json").read_text())
    info["base_model"]["name"] = str(tmp_path / "gone")
    (run / "adapter" / "genrec.json").write_text(json.dumps(info))
    with untouched(tmp_path):
        problem, mend = refused("merge", "--run", run)
    assert str(tmp_path / "gone") in problem and "Give a checkpoint folder" in problem
    assert mend.startswith(f"{run / 'adapter'}: its adapter was trained on that one") and "--backbone" in mend


# --- run directories --------------------------------------------------------


def test_a_run_directory_of_another_data_set(run: Path, home: Path, tmp_path: Path, refused: Refused) -> None:
    with untouched(tmp_path):
        problems = refused("finetune", *arguments(home, run, "--from-run", home / "pretrain", log="other.csv"))
    assert len(problems) == 1, "the same users and items in another order: the ids are equal, the log is not"
    assert f"{run}: was made from log (fingerprint" in problems[0] and "choose another --output-dir" in problems[0]


def test_a_run_directory_that_differs_in_everything(run: Path, home: Path, tmp_path: Path, refused: Refused) -> None:
    tiny.save_log(tmp_path / "small.csv", users=20, items=10)
    with untouched(tmp_path):
        problems = refused(
            "pretrain",
            *arguments(
                home, run, "--lora-r", 3, "--decoder-prompt", "mask", backbone="bart", log=tmp_path / "small.csv"
            ),
        )
    expected = (
        "holds a finetune run",
        "fingerprint",
        "vocabulary",
        "backbone",
        "lora_r 2, now it is 3",
        "decoder_prompt",
        "from_run",
    )
    assert len(problems) == len(expected)
    assert all(word in problem for word, problem in zip(expected, problems, strict=True))


def test_going_on_from_a_run_with_other_adapters_tells_all_differences(
    home: Path, tmp_path: Path, refused: Refused
) -> None:
    more = ("--from-run", home / "pretrain", "--lora-r", 4, "--lora-alpha", 9, "--tie-item-rows", "false",
            "--lora-target-modules", "q", "k")  # fmt: skip
    with untouched(home):
        problems = refused("finetune", *arguments(home, tmp_path / "run", *more))
    assert len(problems) == 4 and all(f"{home / 'pretrain' / 'adapter'}: " in problem for problem in problems)
    text = " ".join(problems)
    for words in ("r was 2, this run's is 4", "lora_alpha was 4, this run's is 9", "tie_item_rows was True"):
        assert words in text
    assert "adapters were on ['q', 'v'], here ['k', 'q']" in text
    assert not (tmp_path / "run").exists()


def test_going_on_from_a_run_on_other_data_and_another_prompt(home: Path, tmp_path: Path, refused: Refused) -> None:
    tiny.save_log(tmp_path / "small.csv", users=20, items=10)
    more = ("--from-run", home / "pretrain", "--decoder-prompt", "mask", "--max-history", 7)
    problems = refused("finetune", *arguments(home, tmp_path / "run", *more, log=str(tmp_path / "small.csv")))
    text = "\n".join(problems)
    for words in ("another fingerprint", "another vocabulary", "num_items 30, this run's 10", "num_user_rows 41",
                  "decoder_prompt last-item, this run's mask", "max_history 50, this run's 7"):  # fmt: skip
        assert words in text
    assert all("give the same data and prompt settings as in pretraining" in problem for problem in problems)
    assert not (tmp_path / "run").exists()


def test_going_on_from_a_run_on_other_data_with_other_adapters_tells_all_at_once(
    home: Path, tmp_path: Path, refused: Refused
) -> None:
    more = ("--from-run", home / "pretrain", "--lora-r", 4)
    command = arguments(home, tmp_path / "run", *more, log="other.csv", backbone="t5-tied")
    text = "\n".join(refused("finetune", *command))
    for words in ("another fingerprint", "r was 2, this run's is 4", "weights are not those"):
        assert words in text


def test_going_on_from_a_run_on_another_backbone(home: Path, tmp_path: Path, refused: Refused) -> None:
    more = ("--from-run", home / "pretrain")
    (problem,) = refused("finetune", *arguments(home, tmp_path / "run", *more, backbone="t5-tied"))
    assert "t5-untied" in problem and "t5-tied" in problem and "give the same --backbone" in problem


def test_going_on_with_full_tuning_from_another_backbone(home: Path, tmp_path: Path, refused: Refused) -> None:
    more = ("--from-run", home / "full", "--tuning", "full")
    (problem,) = refused("finetune", *arguments(home, tmp_path / "run", *more, backbone="t5-tied"))
    assert "its backbone has other tensors" in problem and "wi_0" in problem
    assert not (tmp_path / "run").exists()


def test_going_on_with_full_tuning_from_adapters(home: Path, tmp_path: Path, refused: Refused) -> None:
    more = ("--from-run", home / "pretrain", "--tuning", "full")
    (problem,) = refused("finetune", *arguments(home, tmp_path / "run", *more))
    assert "holds a model of kind 'adapter', expected trained" in problem


@pytest.mark.parametrize("what", ["absent", "empty", "unfinished"])
def test_no_finished_run_to_go_on_from_merge_or_evaluate(
    home: Path, tmp_path: Path, refused: Refused, what: str
) -> None:
    folder = tmp_path / what
    if what != "absent":
        folder.mkdir()
    if what == "unfinished":
        shutil.copy(home / "finetune" / "run.json", folder)
        shutil.copytree(home / "finetune" / "checkpoint-2", folder / "checkpoint-2")
    with untouched(tmp_path):
        (merging,) = refused("merge", "--run", folder)
        (going_on,) = refused("finetune", *arguments(home, tmp_path / "run", "--from-run", folder))
        (evaluating,) = refused("evaluate", "--run", folder)
    assert merging == going_on == f"{folder}: holds no finished model (adapter/ or trained/): finish its training first"
    assert (
        evaluating == merging if what == "unfinished" else evaluating.startswith(f"{folder}: no run.json: give the run")
    )


def test_evaluating_a_merged_model_beside_no_run(home: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(home / "finetune" / "merged", tmp_path / "merged")
    with untouched(tmp_path):
        (problem,) = refused("evaluate", "--run", tmp_path)
    assert f"{tmp_path}: no run.json: give the run directory" in problem


def test_evaluating_the_merged_directory_in_place_of_its_run(home: Path, refused: Refused) -> None:
    (problem,) = refused("evaluate", "--run", home / "finetune" / "merged")
    assert problem.endswith(f"of a pretraining or finetuning, here {home / 'finetune'}")


def test_evaluating_a_merged_model_of_another_data_set(run: Path, home: Path, tmp_path: Path, refused: Refused) -> None:
    """As many users and items, with other names."""
    (tmp_path / "log.csv").write_text(re.sub(r",i(\d)", r",other\1", (home / "log.csv").read_text()))
    recipe("finetune", *arguments(home, tmp_path / "other", log=str(tmp_path / "log.csv")))
    recipe("merge", "--run", tmp_path / "other", "--output-dir", run / "merged")
    with untouched(tmp_path):
        problems = refused("evaluate", "--run", run)
    assert any(str(run / "merged") in problem for problem in problems)


def test_evaluating_a_merged_model_older_than_the_adapter(run: Path, home: Path, refused: Refused) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    recipe("finetune", *arguments(home, run, "--from-run", home / "pretrain", "--max-steps", 9))
    problems = refused("evaluate", "--run", run)
    assert any("merge" in problem for problem in problems)


def test_evaluating_after_the_data_has_changed(home: Path, tmp_path: Path, refused: Refused) -> None:
    log = tmp_path / "log.csv"
    shutil.copy(home / "log.csv", log)
    recipe("finetune", *arguments(home, tmp_path / "run", log=str(log)))
    recipe("merge", "--run", tmp_path / "run")
    log.write_text(log.read_text() + "u0,i99,9999999\n")
    with untouched(tmp_path):
        problems = refused("evaluate", "--run", tmp_path / "run", "--split", "test")
    assert [word in problem for word, problem in zip(("fingerprint", "vocabulary"), problems, strict=True)] == [
        True
    ] * 2
    assert all("bring the files back that it was trained on" in problem for problem in problems)
    log.unlink()
    problem, _ = refused("evaluate", "--run", tmp_path / "run")
    assert f"'{log}' is neither a file nor a named data set (there are movielens-100k" in problem


def test_going_on_from_a_checkpoint_with_other_settings(run: Path, home: Path, refused: Refused) -> None:
    changed = {
        "max_history": 7, "lora_target_modules": "q", "lora_dropout": 0.2, "dropout": 0.3, "row_init": "random",
        "item_vectors": "vectors.parquet", "backbone_revision": "other", "seed": 5, "global_batch_size": 8,
        "masks_per_sequence": 2, "last_item_probability": 0.5, "targets": "last", "user_dropout": 0.3, "learning_rate": 0.5,
        "rows_learning_rate": 0.5, "rows_weight_decay": 0.5, "weight_decay": 0.5, "warmup_steps": 3, "last_items_share": 0.5,
        "lr_scheduler_type": "constant", "num_train_epochs": 7, "max_steps": 9, "bf16": True, "optim": "sgd",
        "choose_last_items_share": True,
    }  # fmt: skip
    more = [word for name, value in changed.items() for word in (f"--{name}", value)]
    with untouched(run):
        problems = refused("finetune", *arguments(home, run, *more))
    assert [[f"with {name} " in problem for name in (*changed, "from_run")].count(True) for problem in problems] == [
        1
    ] * (len(changed) + 1)
    assert all("choose another --output-dir, or remove that run" in problem for problem in problems)


# --- arguments -----------------------------------------------------------


def test_fp16(home: Path, tmp_path: Path, refused: Refused) -> None:
    (problem,) = refused("pretrain", *arguments(home, tmp_path / "run", "--fp16"))
    assert problem.startswith("fp16: T5 overflows") and "use --bf16" in problem
    assert not (tmp_path / "run").exists()


def test_unknown_keys_of_a_yaml_file(home: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"dataset: {home / 'log.csv'}\nlearning_rat: 1.0e-3\nlora_rank: 8\n")
    with untouched(tmp_path):
        problems = refused("pretrain", "--config", path, "--output-dir", tmp_path / "run")
    assert len(problems) == 2 and all(str(path) in problem for problem in problems)
    assert "'learning_rat': did you mean learning_rate?" in problems[0] and "'lora_rank'" in problems[1]


def test_several_masks_for_bart(home: Path, tmp_path: Path, refused: Refused) -> None:
    (problem,) = refused("pretrain", *arguments(home, tmp_path / "run", "--masks-per-sequence", 2, backbone="bart"))
    assert "masks_per_sequence: 2 is not between 1 and 1" in problem and "choose a number in that range" in problem


def test_a_learning_rate_that_breaks_the_model_exports_nothing(home: Path, tmp_path: Path, refused: Refused) -> None:
    more = ("--learning-rate", "1e30", "--max-steps", 4, "--eval-strategy", "no", "--load-best-model-at-end", "false")
    (problem,) = refused("finetune", *arguments(home, tmp_path / "run", *more))
    assert problem.startswith("step ") and "the loss is NaN, infinite or " in problem
    assert "the last good checkpoint is none yet. Try a lower --learning-rate" in problem
    assert "the user rows " in problem and not re.search(r"\bu\d+\b", problem), "no raw user id"
    assert not (tmp_path / "run" / "adapter").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


# --- data ------------------------------------------------------------------


def test_all_problems_of_a_log_reach_the_recipe_at_once(home: Path, tmp_path: Path, refused: Refused) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    rows = ["u0,i1,5", "u0,i2,soon", ",i3,7", "u1,,8", "u1,i4,9", "u1,i4,9"]
    log.write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    items.write_text("item,title\ni1,One\ni1,Again\n")
    with untouched(tmp_path):
        problems = refused("pretrain", *arguments(home, tmp_path / "run", "--items-file", items, log=str(log)))
    text = "\n".join(problems)
    for words in ("line 4", "line 5", "'soon'", "equal to an earlier one in user, item and time", "repeated item"):
        assert words in text
    assert len(problems) == 5
    assert all(problem.startswith((f"{log}: ", f"{items}: ")) for problem in problems)
    log.write_text("customer,sku,timestamp\nu0,i1,5\n")
    problems = refused("pretrain", *arguments(home, tmp_path / "run", log=str(log)))
    assert [("--user-column" in p, "--item-column" in p) for p in problems] == [(True, False), (False, True)]


def test_users_with_too_little_and_a_core_that_leaves_nothing(home: Path, tmp_path: Path, refused: Refused) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\nu0,i1,1\nu0,i2,2\nu1,i1,1\n")
    (problem,) = refused("pretrain", *arguments(home, tmp_path / "run", log=str(log)))
    assert "'u0' has 2" in problem and "--k-core 3" in problem
    (problem,) = refused("pretrain", *arguments(home, tmp_path / "run", "--k-core", 3, log=str(log)))
    assert "--k-core 3 leaves none of 3 interactions; lower it" in problem


STRANGE = [
    " leading", "trailing ", "two  spaces", 'say "cheese"', "it's", "comma, and; semicolon", "ünïcode", "🎬🍿",
    "日本語", "x" * 300, "007", "1e5", "nan", "NULL", "None", "-1", "<item_3>", "</s>", "<extra_id_0>", "a\\b/c",
    "tab\there", "line\nbreak", "#hash", "%20", "e\u0301", "\u00e9",
]  # fmt: skip
"""Ids that are text all the same. The last two look alike and are two."""


def test_strange_ids_go_through_all_four_recipes_unchanged(home: Path, tmp_path: Path) -> None:
    log, titles = tmp_path / "strange.csv", {item: f"Title of {item!r}" for item in STRANGE}
    random = np.random.default_rng(0)
    with log.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        for user in STRANGE:
            chosen = random.permutation(STRANGE)[:8]
            writer.writerows([user, item, time] for time, item in enumerate([user, *chosen]))
    pd.DataFrame({"item": list(titles), "title": list(titles.values())}).to_parquet(tmp_path / "items.parquet")
    more = ("--items-file", tmp_path / "items.parquet")
    recipe("pretrain", *arguments(home, tmp_path / "pretrain", *more, log=str(log)))
    run = tmp_path / "finetune"
    recipe("finetune", *arguments(home, run, *more, "--from-run", tmp_path / "pretrain", log=str(log)))
    recipe("merge", "--run", run)
    recipe("evaluate", "--run", run)
    assert json.loads((run / "evaluation" / "validation" / "report.json").read_text())["generate"]["agreement"] == 1.0
    assert sorted(IdVocab.load(run).users) == sorted(STRANGE)
    for kind in ("adapter", "merged"):
        recommender = Recommender.from_pretrained(run / kind)
        everything = recommender.recommend(STRANGE, k=100, exclude_seen=False)
        assert {found.item: found.title for found in everything} == titles and len(everything) == len(STRANGE)
        assert {found.item for found in recommender.recommend(STRANGE[:5], k=100)} == set(STRANGE[5:])
    data = load_run_data(run)
    assert {data.vocab.user_row(user) for user in STRANGE} == set(range(1, 1 + len(STRANGE)))


# --- disks --------------------------------------------------------------


def full_disk_of_the_system(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_of_safetensors(*_: object, **__: object) -> None:
    """What safetensors 0.8 itself raises; it is no OSError."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FULL_DISKS = [full_disk_of_the_system, full_disk_of_safetensors]


@pytest.mark.parametrize("full_disk", FULL_DISKS)
def test_a_full_disk_while_the_adapter_is_saved(
    run: Path, home: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, full_disk
) -> None:
    cut_short(run / "adapter" / "id_tokens.safetensors")  # what is whole is not written again
    before = contents(run / "adapter")
    monkeypatch.setattr(export, "save_file", full_disk)
    (problem,) = refused("finetune", *arguments(home, run, "--from-run", home / "pretrain"))
    assert f"{run / 'adapter'}: could not be written (No space left on device)" in problem
    assert "untouched" in problem and "Free some space" in problem
    assert contents(run / "adapter") == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("full_disk", FULL_DISKS)
def test_a_full_disk_while_the_merged_model_is_saved(
    run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, full_disk
) -> None:
    monkeypatch.setattr(export, "save_torch_state_dict", full_disk)
    with untouched(tmp_path):
        (problem,) = refused("merge", "--run", run)
    assert f"{run / 'merged'}: could not be written (No space left on device)" in problem


def full_disk_of_torch(*_: object, **__: object) -> None:
    """What torch.save of torch 2.13 raises."""
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize(
    ("writer", "full_disk"),
    [("peft.peft_model.safe_save_file", full_disk_of_safetensors), ("torch.save", full_disk_of_torch)],
)
def test_a_full_disk_while_a_checkpoint_is_saved(
    home: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, writer: str, full_disk
) -> None:
    monkeypatch.setattr(writer, full_disk)
    (problem,) = refused("finetune", *arguments(home, tmp_path / "run"))
    assert "checkpoint-2: could not be written" in problem and "Free some space" in problem


@pytest.mark.parametrize("after", ["finetune", "merge"])
def test_what_was_interrupted_by_a_full_disk_can_be_done_again(
    run: Path, home: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, after: str
) -> None:
    command = arguments(home, run, "--from-run", home / "pretrain") if after == "finetune" else ["--run", run]
    before = tensors_and_words(run / "adapter"), tensors_and_words(run / "merged")
    if after == "finetune":
        cut_short(run / "adapter" / "id_tokens.safetensors")
    with monkeypatch.context() as patched:
        for name in ("save_file", "save_torch_state_dict"):
            patched.setattr(export, name, full_disk_of_the_system)
        refused(after, *command)
    recipe(after, *command)
    assert (tensors_and_words(run / "adapter"), tensors_and_words(run / "merged")) == before


# --- broken files --------------------------------------------------------------


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


ADAPTER_FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "id_tokens.safetensors",
    "genrec.json",
    "items.parquet",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("how", ["cut", "lost"])
def test_an_adapter_with_a_broken_file_is_not_merged(
    run: Path, tmp_path: Path, refused: Refused, name: str, how: str
) -> None:
    path = run / "adapter" / name
    path.unlink() if how == "lost" else cut_short(path)
    with untouched(tmp_path):
        (problem,) = refused("merge", "--run", run)
    assert str(run / "adapter") in problem and name in problem


def test_all_broken_files_are_told_at_once(run: Path, home: Path, tmp_path: Path, refused: Refused) -> None:
    (run / "adapter" / "tokenizer.json").unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors", "items.parquet"):
        cut_short(run / "adapter" / name)
    with untouched(tmp_path):
        merging = refused("merge", "--run", run)
        going_on = refused("finetune", *arguments(home, tmp_path / "next", "--from-run", run))
    assert merging == going_on and len(merging) == 4


MERGED_FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "genrec.json",
    "items.parquet",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("name", MERGED_FILES)
@pytest.mark.parametrize("how", ["cut", "lost"])
def test_a_merged_model_with_a_broken_file_is_not_evaluated(
    run: Path, tmp_path: Path, refused: Refused, name: str, how: str
) -> None:
    path = run / "merged" / name
    path.unlink() if how == "lost" else cut_short(path)
    with untouched(tmp_path):
        (problem,) = refused("evaluate", "--run", run)
    assert str(run / "merged") in problem and name in problem


def test_a_full_tuning_with_weights_cut_short_is_not_merged(home: Path, tmp_path: Path, refused: Refused) -> None:
    run = Path(shutil.copytree(home / "full", tmp_path / "run"))
    cut_short(run / "trained" / "model.safetensors")
    with untouched(tmp_path):
        (problem,) = refused("merge", "--run", run)
    assert str(run / "trained" / "model.safetensors") in problem and "copy it again" in problem


def test_a_model_of_a_later_format(run: Path, tmp_path: Path, refused: Refused) -> None:
    for kind in ("adapter", "merged"):
        info = json.loads((run / kind / "genrec.json").read_text())
        (run / kind / "genrec.json").write_text(json.dumps({**info, "format_version": 99}))
    with untouched(tmp_path):
        for name in ("merge", "evaluate"):
            (problem,) = refused(name, "--run", run)
            assert "format version 99, this genrec_llm reads 1" in problem


def test_rows_of_another_catalogue_beside_the_adapter(run: Path, home: Path, tmp_path: Path, refused: Refused) -> None:
    path = run / "adapter" / "id_tokens.safetensors"
    save_file({**load_file(path), "item_in": torch.zeros(7, 16)}, path, {"tied_scale": "1.0"})
    with untouched(tmp_path):
        assert str(path) in refused("merge", "--run", run)[0]
    info = read_json(path.parent / INFO_FILE)
    info["files"] |= describe_files(path.parent, without=[INFO_FILE, "README.md"])
    write_json(path.parent / INFO_FILE, info)
    with untouched(tmp_path):
        problems = refused("merge", "--run", run)
    assert any("item_in" in problem and "[7, 16]" in problem for problem in problems)
