"""Sharing on the Hub: what leaves, what stays home, and that what comes back is the same model."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants, save_torch_state_dict
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import ITEMS, KINDS, USERS, contents, recipe, train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from genrec_llm import privacy
from genrec_llm.directory import check_files
from genrec_llm.errors import GenRecError
from genrec_llm.files import describe_files, read_json, write_json
from genrec_llm.hub import FILES, local_directory, pull, push
from genrec_llm.privacy import problems_inside, redacted
from genrec_llm.recommender import Recommender

EMAIL = "person{}@private.example"


def scores(folder: Path) -> torch.Tensor:
    """Scores of all items after a few histories of an unknown user, `[histories, items]`."""
    histories = [np.array([3]), np.array([1, 2, 3]), np.arange(20)]
    return Recommender.from_pretrained(folder, device="cpu").score_tensor(histories, np.zeros(3, dtype=np.int64))


def relist(folder: Path) -> None:
    """Make genrec.json list the files as they are now."""
    names = {name: entry for name, entry in describe_files(folder, without=["genrec.json", "README.md"]).items()}
    write_json(folder / "genrec.json", {**read_json(folder / "genrec.json"), "files": names})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged run of each family, trained on local base checkpoints, of users who are e-mail addresses."""
    folder = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        run = train(tiny.save_backbone(kind, folder / kind), folder, folder / "runs" / kind)
        recipe("merge", "--run", run)
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A run to be harmed."""
    return Path(shutil.copytree(home / "runs" / "t5-tied", tmp_path / "run"))


@pytest.fixture
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub but for the base checkpoints; this process is logged in there and has an empty cache."""
    with FakeHub() as server:
        for kind in KINDS:
            server.add_model(f"base/{kind}", home / kind)
        fake_hub.use(monkeypatch, server, tmp_path / "hf")
        yield server


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries take no time."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def refused(function: object, *arguments: object, **options: object) -> str:
    with pytest.raises(GenRecError) as caught:
        function(*arguments, **options)  # type: ignore[operator]
    return str(caught.value)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["adapter", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_scores_as_before_and_knows_no_user(
    hub: FakeHub, home: Path, tmp_path: Path, kind: str, what: str
) -> None:
    folder = home / "runs" / kind / what
    before, whole = contents(folder), read_json(folder / "genrec.json")
    pushed = push(folder, "me/model", base_model=f"base/{kind}")
    assert contents(folder) == before
    assert pushed.url == f"{hub.url}/me/model" and pushed.commit == hub.repositories["me/model"].branches["main"]
    pulled = pull("me/model", output_dir=tmp_path / "copy")
    assert pulled.commit == pushed.commit
    assert pushed.files == {name: len(content) for name, content in contents(pulled.folder).items()}
    assert not any(path.is_symlink() for path in pulled.folder.rglob("*"))

    torch.testing.assert_close(scores(pulled.folder), scores(folder), rtol=0, atol=0)
    info = read_json(pulled.folder / "genrec.json")
    assert info["base_model"]["name"] == f"base/{kind}"
    assert whole["prompt"]["num_user_rows"] == 1 + USERS and info["prompt"] == whole["prompt"] | {"num_user_rows": 1}
    tokenizer, rows = AutoTokenizer.from_pretrained(pulled.folder), info["prompt"]["base"] + ITEMS + 1
    assert (
        len(tokenizer) == rows and "<user_unknown>" in tokenizer.get_vocab() and "<user_0>" not in tokenizer.get_vocab()
    )
    weights = "id_tokens.safetensors" if what == "adapter" else "model.safetensors"
    shapes = {name: tuple(value.shape) for name, value in load_file(pulled.folder / weights).items()}
    shorter = {name: tuple(value.shape) for name, value in load_file(folder / weights).items()}
    for name, shape in shorter.items():  # whatever was as long as all tokens or all users, is not any more
        shorter[name] = tuple({rows + USERS: rows, 1 + USERS: 1}.get(length, length) for length in shape)
    assert shapes == shorter and sum(rows in shape or shape[0] == 1 for shape in shapes.values())
    if what == "merged":
        settings = read_json(pulled.folder / "generation_config.json")
        assert read_json(pulled.folder / "config.json")["vocab_size"] == rows
        assert settings["suppress_tokens"] == [*range(info["prompt"]["base"]), rows - 1]


def test_users_go_along_if_asked_for(hub: FakeHub, home: Path) -> None:
    folder = home / "runs" / "bart" / "adapter"
    push(folder, "me/model", base_model="base/bart", with_users=True)
    there, here = local_directory("me/model"), load_file(folder / "id_tokens.safetensors")
    assert (
        torch.equal(load_file(there / "id_tokens.safetensors")["user_in"], here["user_in"]) and len(here["user_in"]) > 1
    )
    assert f"<user_{USERS - 1}>" in AutoTokenizer.from_pretrained(there).get_vocab()


def shard(folder: Path, size: str) -> int:
    """Write a merged directory's weights in shards of at most that size; how many there are."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(state, folder, max_shard_size=size)
    relist(folder)
    return len(list(folder.glob("model-*.safetensors")))


def test_shards(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    folder = run / "merged"
    expected = scores(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other" / "merged"))
    many, few = shard(folder, "4KB"), shard(other, "12KB")
    assert many > few > 1
    push(folder, "me/model", base_model="base/t5-tied")
    torch.testing.assert_close(scores(pull("me/model").folder), expected, rtol=0, atol=0)
    index = json.loads(hub.repositories["me/model"].files()["model.safetensors.index.json"])
    held = {name: load_file(local_directory("me/model") / name) for name in set(index["weight_map"].values())}
    assert {name: file for file, state in held.items() for name in state} == index["weight_map"]
    bytes_held = sum(value.nbytes for state in held.values() for value in state.values())
    assert index["metadata"]["total_size"] == bytes_held

    push(other, "me/model", base_model="base/t5-tied")  # fewer shards: the earlier ones are gone
    files = hub.repositories["me/model"].files()
    assert len([name for name in files if name.startswith("model-")]) == few and ".gitattributes" in files
    torch.testing.assert_close(scores(pull("me/model").folder), expected, rtol=0, atol=0)


def test_peft_and_transformers_alone_read_what_was_pushed(hub: FakeHub, home: Path) -> None:
    run = home / "runs" / "t5-untied"
    push(run / "adapter", "me/adapter", base_model="base/t5-untied")
    push(run / "merged", "me/merged", base_model="base/t5-untied")
    lora = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained("base/t5-untied"), "me/adapter")
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): value for name, value in lora.state_dict().items() if "lora_" in name}
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
    merged = AutoModelForSeq2SeqLM.from_pretrained("me/merged").state_dict()
    there = load_file(run / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], value[: len(merged[name])]) for name, value in there.items())


def test_a_revision_is_a_branch_of_its_own(hub: FakeHub, run: Path) -> None:
    first = push(run / "adapter", "me/model", base_model="base/t5-tied")
    second = push(run / "merged", "me/model", revision="try/2", base_model="base/t5-tied")
    branches = hub.repositories["me/model"].branches
    assert branches == {"main": first.commit, "try/2": second.commit} and second.url.endswith("me/model/tree/try/2")
    assert read_json(local_directory("me/model") / "genrec.json")["kind"] == "adapter"
    assert read_json(local_directory("me/model", revision="try/2") / "genrec.json")["kind"] == "merged"
    assert pull("me/model", revision=first.commit).folder.name == first.commit
    assert "no revision 'gone'" in refused(pull, "me/model", revision="gone")
    assert "which has none" in refused(local_directory, run, revision="main")
    assert local_directory(run) == run


def test_a_private_model_is_for_those_with_a_token(
    hub: FakeHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run / "merged", "me/model", private=True, base_model="base/t5-tied")
    assert hub.repositories["me/model"].private
    assert pull("me/model").commit
    fake_hub.use(monkeypatch, hub, tmp_path / "stranger", token=None)
    assert "hf auth login" in refused(pull, "me/model")
    assert "hf auth login" in refused(push, run / "merged", "me/model", base_model="base/t5-tied")
    fake_hub.use(monkeypatch, hub, tmp_path / "forger", token="hf_" + "x" * 34)
    assert "hf auth login" in refused(push, run / "merged", "me/model", base_model="base/t5-tied")


def test_a_pulled_copy_takes_no_other_ones_place(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    run = home / "runs" / "t5-tied"
    pushed = push(run / "adapter", "me/model", base_model="base/t5-tied")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds something else" in refused(pull, "me/model", output_dir=tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}
    assert pull("me/model", output_dir=tmp_path / "new").commit == pushed.commit
    before = contents(tmp_path / "new")
    assert (
        pull("me/model", output_dir=tmp_path / "new").commit == pushed.commit and contents(tmp_path / "new") == before
    )
    push(run / "merged", "me/model", base_model="base/t5-tied")
    assert "holds something else" in refused(pull, "me/model", output_dir=tmp_path / "new")
    assert contents(tmp_path / "new") == before


def test_what_is_in_the_cache_needs_no_network(hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = push(run / "merged", "me/model", base_model="base/t5-tied")
    folder = local_directory("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    assert local_directory("me/model") == folder and pull("me/model").commit == pushed.commit
    assert "HF_HUB_OFFLINE" in refused(local_directory, "me/another")
    assert "HF_HUB_OFFLINE" in refused(push, run / "merged", "me/model", base_model="base/t5-tied")
    assert hub.requests == []


def test_what_is_no_model_of_ours(hub: FakeHub, tmp_path: Path) -> None:
    assert "holds no model of genrec_llm" in refused(pull, "base/bart")
    assert "no model on the Hub" in refused(pull, "me/nothing")
    for name in ("no-folder", "/nowhere/else", "a/b/c", "./a/b", "../a"):
        assert f"{name}: no such folder, and no name" in refused(local_directory, name)


def test_files_that_were_changed_on_the_hub_are_refused(hub: FakeHub, run: Path) -> None:
    push(run / "merged", "me/model", base_model="base/t5-tied")
    repository = hub.repositories["me/model"]
    weights = bytearray(repository.files()["model.safetensors"])
    weights[-1] ^= 1
    repository.commit({**repository.files(), "model.safetensors": bytes(weights), "model.py": b"raise SystemExit"})
    assert "model.safetensors: was changed" in refused(pull, "me/model")
    assert not (local_directory("me/model") / "model.py").exists()  # code is not even fetched


# --- a bad line -------------------------------------------------------------------------------------------------------


def whole(hub: FakeHub, tmp_path: Path) -> list[str]:
    """The kinds that the main branch has shown, one a commit; each has to be a whole model."""
    repository, kinds = hub.repositories["me/model"], []
    for number, sha in enumerate(repository.history[1:]):  # the first is the Hub's own: .gitattributes
        folder = repository.save(tmp_path / f"shown-{len(kinds)}-{number}-{sha[:8]}", sha)
        info = read_json(folder / "genrec.json")
        check_files(folder, info)
        assert {*info["files"], "genrec.json", "README.md", ".gitattributes"} == {
            name for name in repository.files(sha) if not name.startswith("plots/")
        }
        kinds.append(info["kind"])
    return kinds


def test_an_upload_cut_anywhere_shows_no_half_model(hub: FakeHub, home: Path, tmp_path: Path, hasty: None) -> None:
    run = home / "runs" / "t5-tied"
    lengths = {}  # of an upload, after an earlier model and without one
    for earlier in (True, False):
        hub.repositories.pop("me/model", None)
        if earlier:
            push(run / "adapter", "me/model", base_model="base/t5-tied")
        before = hub.received
        push(run / "merged", "me/model", base_model="base/t5-tied")
        lengths[earlier] = hub.received - before
    draw = random.Random(0)
    for earlier in (True, False, True, False, True):
        place = draw.randrange(lengths[earlier])
        hub.repositories.pop("me/model")
        if earlier:
            push(run / "adapter", "me/model", base_model="base/t5-tied")
        hub.cut(place)
        told = refused(push, run / "merged", "me/model", base_model="base/t5-tied")
        assert "connection to the Hub broke" in told and "Run the same command again" in told
        assert whole(hub, tmp_path / f"cut-{place}") == ["adapter"] * earlier
        arrived = set(hub.repositories["me/model"].objects)
        hub.mend()
        hub.forget()
        push(run / "merged", "me/model", base_model="base/t5-tied")
        assert whole(hub, tmp_path / f"again-{place}") == ["adapter"] * earlier + ["merged"]
        assert not arrived & {path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "PUT"}
    assert scores(pull("me/model").folder).equal(scores(run / "merged"))


def test_a_short_break_is_not_even_noticed(hub: FakeHub, run: Path, tmp_path: Path, hasty: None) -> None:
    hub.cut(500, times=2)
    push(run / "merged", "me/model", base_model="base/t5-tied")
    assert hub.cuts == 0 and whole(hub, tmp_path) == ["merged"]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: FakeHub, run: Path, tmp_path: Path, hasty: None) -> None:
    hub.lose_answer()
    pushed = push(run / "merged", "me/model", base_model="base/t5-tied")
    assert hub.lost_answers == 0 and whole(hub, tmp_path) == ["merged"]
    assert pushed.commit == hub.repositories["me/model"].branches["main"]


def test_the_hub_is_gone(hub: FakeHub, run: Path, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "connection to the Hub broke" in refused(push, run / "merged", "me/model", base_model="base/t5-tied")


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(hub: FakeHub, run: Path, home: Path) -> None:
    (run / "adapter" / "plots").mkdir(exist_ok=True)
    (run / "adapter" / "plots" / "loss.png").write_bytes(PNG)
    dry = push(run / "adapter", "me/model", base_model="base/t5-tied", dry_run=True)
    assert (
        dry.files["plots/loss.png"] == len(PNG)
        and dry.commit is None
        and dry.url == f"{hub.url}/me/model"
        and hub.requests == []
    )
    assert dry.files == push(run / "adapter", "me/model", base_model="base/t5-tied").files
    assert {path.name for path in run.iterdir()} == {path.name for path in (home / "runs" / "t5-tied").iterdir()}


def test_a_base_that_nobody_else_has(hub: FakeHub, run: Path, home: Path) -> None:
    for what in ("adapter", "merged"):
        told = refused(push, run / what, "me/model", dry_run=True)
        assert repr(str(home / "t5-tied")) in told and "--base-model org/name" in told
    assert "no name of a model" in refused(push, run / "adapter", "me/model", base_model=str(home), dry_run=True)
    for what in ("adapter", "merged"):
        assert "base model: base/gone" in refused(push, run / what, "me/model", base_model="base/gone")
        info = read_json(run / what / "genrec.json")
        info["base_model"]["name"] = "runs/backbone"  # a folder of where it was trained, which looks like a name
        write_json(run / what / "genrec.json", info)
        assert "base model: runs/backbone" in refused(push, run / what, "me/model")
    assert hub.writes == []


def test_a_moved_base_is_not_asked_for_the_revision_of_the_first_one(hub: FakeHub, run: Path) -> None:
    for name, base in (("genrec.json", "base_model"), ("adapter_config.json", None)):
        content = read_json(run / "adapter" / name)
        (content[base] if base else content)["revision"] = "v1"
        write_json(run / "adapter" / name, content)
    relist(run / "adapter")
    moved = Recommender.from_pretrained(run / "adapter", backbone="base/t5-tied", device="cpu")
    assert moved.recommend(["i1"]) == Recommender.from_pretrained(run / "adapter", device="cpu").recommend(["i1"])


def test_what_is_sent_as_it_is_is_hashed_once(hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    plain = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, digest: hashed.append(Path(file.name).name) or plain(file, digest)
    )
    push(run / "adapter", "me/model", base_model="base/t5-tied", dry_run=True)
    assert [hashed.count(name) for name in ("adapter_model.safetensors", "items.parquet")] == [1, 1]


def test_what_is_not_for_sharing(hub: FakeHub, home: Path, run: Path, tmp_path: Path) -> None:
    full = train(
        "t5-micro", home, tmp_path / "full", "--tuning", "full", "--backbone-init", "random", "--users", "none"
    )
    assert "push its merged/" in refused(push, full / "trained", "me/model")
    recipe("merge", "--run", full)
    assert "leave it out" in refused(push, full / "merged", "me/model", base_model="base/bart", dry_run=True)
    push(full / "merged", "me/full")
    assert read_json(local_directory("me/full") / "genrec.json")["base_model"]["name"] == "t5-micro"

    (run / "merged" / "notes.txt").write_text("mine")
    (run / "merged" / "more").mkdir()
    (run / "merged" / "more" / "users.csv").write_text("mine")
    told = refused(push, run / "merged", "me/model", base_model="base/t5-tied")
    assert "notes.txt: is none of the files" in told and "users.csv: is none of the files" in told
    (run / "adapter" / "items.parquet").write_bytes(b"")
    assert "items.parquet: has 0 bytes" in refused(push, run / "adapter", "me/model", base_model="base/t5-tied")
    assert set(hub.repositories) == {*(f"base/{kind}" for kind in KINDS), "me/full"}


def test_a_repository_that_is_something_else(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    told = refused(push, run / "merged", "base/bart", base_model="base/t5-tied")
    assert "base/bart: holds something that is no model of genrec_llm" in told
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "LICENSE").write_text("free")
    hub.add_model("me/prepared", tmp_path / "prepared")
    assert "is public already" in refused(push, run / "merged", "me/prepared", private=True, base_model="base/t5-tied")
    push(run / "merged", "me/prepared", base_model="base/t5-tied")
    assert hub.repositories["me/prepared"].files()["LICENSE"] == b"free"
    for name in ("me", "me/two/three", "me/-bad-", "me/a--b", ""):
        assert "give org/name" in refused(push, run / "merged", name, base_model="base/t5-tied", dry_run=True)


# --- what stays home --------------------------------------------------------------------------------------------------

SECRET = "correct-horse-battery-staple"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x20tEXt"


def plant_json(folder: Path, text: str) -> None:
    escaped = "".join(f"\\u{ord(character):04x}" for character in text)
    (folder / "config.json").write_text(f'{{"a": ["{escaped}"]}}')


def plant_cell(folder: Path, text: str) -> None:
    pq.write_table(pa.table({"item": ["i1", "i2"], "title": [None, f"by {text}"]}), folder / "items.parquet")


def plant_metadata(folder: Path, text: str) -> None:
    pq.write_table(pa.table({"item": ["i1"]}).replace_schema_metadata({"by": text}), folder / "items.parquet")


def plant_tensor(folder: Path, text: str) -> None:
    save_file({f"user.{text}": torch.zeros(2)}, folder / "id_tokens.safetensors")


def plant_weights(folder: Path, text: str) -> None:
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file({"w": content}, folder / "model.safetensors")


def plant_picture(folder: Path, text: str) -> None:
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(PNG + text.encode() + b"\0\0")


def plant_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"# A model\n\nby {text}.\n")


PLACES = (plant_json, plant_cell, plant_metadata, plant_tensor, plant_weights, plant_picture, plant_card)


@pytest.mark.parametrize("plant", PLACES, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("what", ["user", "secret", "token"])
def test_planted_and_found(tmp_path: Path, plant: object, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", SECRET)
    text = {"user": EMAIL.format(7), "secret": SECRET, "token": "hf_" + "a1" * 17}[what]
    arguments = {"user_ids": {EMAIL.format(number) for number in range(1000)}, "known": {"i1"}, "token": None}
    (tmp_path / "README.md").write_text("# A model\n")
    assert problems_inside(tmp_path, **arguments) == []
    plant(tmp_path, text)  # type: ignore[operator]
    problems = problems_inside(tmp_path, **arguments)
    expected = {"user": "raw ids of 1 user (", "secret": "the value of SHOP_PASSWORD", "token": "a token of the Hub"}
    (name,) = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} - {"README.md"} or {"README.md"}
    assert any(problem.startswith(f"{name}: holds {expected[what]}") for problem in problems)
    assert text not in " ".join(problems)


def test_ids_that_look_like_other_text(tmp_path: Path) -> None:
    users = {"wonder", "100234", "user_12", "U-77aa", "shorty", "i1", "ab", "A2SUAM1J3GNN3B"}
    innocent = {
        "model": {"vocab": [["▁a", 0.0], ["wonder", -1.0]], "merges": ["wonder"]},
        "added_tokens": [{"id": 100234, "content": "<user_12>"}, {"id": 5, "content": "<item_100234>"}],
        "sha256": ["ab100234U-77aa", "U-77aaff"],
        "text": "what a wonder, 100234 of them",
    }
    arguments = {"user_ids": users, "known": {"i1", "shorty"}, "token": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(innocent))
    pq.write_table(pa.table({"item": ["i1", "shorty"]}), tmp_path / "items.parquet")
    (tmp_path / "README.md").write_text("![ndcg](plots/ndcg@10.png) a wonder of 100234 users, ndcg@10.json\n")
    assert problems_inside(tmp_path, **arguments) == []
    pq.write_table(
        pa.table({"index": range(100_235), "item": [f"i{number}" for number in range(100_235)]}), tmp_path / "x.parquet"
    )
    assert problems_inside(tmp_path, **arguments) == []
    for guilty in ("wonder", "100234", "by U-77aa!", "xA2SUAM1J3GNN3Bx"):
        (tmp_path / "config.json").write_text(json.dumps({"author": guilty}))
        assert problems_inside(tmp_path, **arguments) == ["config.json: holds raw ids of 1 user (author)"]


def test_addresses_paths_and_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "genrec.json").write_text(json.dumps({"by": "someone@shop.example", "at": f"{Path.home()}/runs/x"}))
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    (tmp_path / "items.parquet").write_bytes(b"PAR")
    problems = problems_inside(tmp_path, user_ids=[], known=[], token=None)
    assert problems[:2] == [
        "genrec.json: holds an e-mail address (by)",
        "genrec.json: holds a path of this machine (at)",
    ]
    assert [problem.split(" (")[0] for problem in problems[2:]] == [
        "items.parquet: holds something that is not a .parquet file",
        "model.safetensors: holds something that is not a .safetensors file",
    ]


def test_a_finding_stops_the_push(hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_API_KEY", SECRET)
    items = pd.read_parquet(run / "merged" / "items.parquet")
    schema = pq.read_schema(run / "merged" / "items.parquet").metadata
    items.loc[3, "title"] = f"bought by {EMAIL.format(3)} with {SECRET}"
    pq.write_table(
        pa.Table.from_pandas(items, preserve_index=False).replace_schema_metadata(schema),
        run / "merged" / "items.parquet",
    )
    relist(run / "merged")
    told = refused(push, run / "merged", "me/model", base_model="base/t5-tied")
    assert "items.parquet: holds raw ids of 1 user (column title, row 3)" in told
    assert "items.parquet: holds the value of SHOP_API_KEY" in told
    assert SECRET not in told and "private.example" not in told and hub.writes == []


def test_the_login_is_looked_for_beside_a_token_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "get_token", lambda: "login of the shop")
    (tmp_path / "README.md").write_text("login of the shop\n\nanother login\n")
    found = problems_inside(tmp_path, user_ids=[], known=[], token="another login")
    assert found == [
        "README.md: holds the value of the Hub token (line 1)",
        "README.md: holds the value of the given token (line 3)",
    ]


def test_paths_of_this_machine_are_cut_to_their_last_name(hub: FakeHub, run: Path) -> None:
    info = read_json(run / "merged" / "genrec.json")
    info["data"]["name"] = "/srv/secret/../shops/log.csv"
    info["note"] = ["--dataset=/srv/shops/log.csv", "~/shops/log.csv", "see https://example.org/a/b"]
    write_json(run / "merged" / "genrec.json", info)
    push(run / "merged", "me/model", base_model="base/t5-tied")
    there = json.loads(hub.repositories["me/model"].files()["genrec.json"])
    assert there["note"] == ["--dataset=log.csv", "log.csv", "see https://example.org/a/b"]
    assert not any(b"/srv" in content or b"/shops/" in content for content in hub.bodies)


# --- the recipes ------------------------------------------------------------------------------------------------------


def searched(content: bytes) -> Iterator[bytes]:
    """Bytes as they are, and with base64 lines of a commit undone."""
    import base64

    yield content
    for found in re.findall(rb'"content": "([A-Za-z0-9+/=]+)"', content):
        yield base64.b64decode(found)


def test_a_recipe_pushes_its_adapter_and_nothing_private(
    hub: FakeHub,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_hub.use(monkeypatch, hub, tmp_path / "hf", token=None)
    monkeypatch.setenv("SHOP_SECRET", SECRET)
    hub.forget()
    caplog.set_level("DEBUG")
    out = train(
        "base/t5-tied", home, tmp_path / "run", "--push_to_hub", "--hub_model_id", "me/model", "--hub_token", TOKEN,
        "--hub_private_repo", "--hub_revision", "first",
    )  # fmt: skip
    printed = capfd.readouterr()
    assert f"to {hub.url}/me/model/tree/first (commit " in printed.out
    repository = hub.repositories["me/model"]
    assert repository.private and len(repository.history) == 2  # the Hub's own commit, and one: no checkpoints
    assert {path for path in repository.files("first")} >= {"genrec.json", "id_tokens.safetensors", "README.md"}
    assert not any("checkpoint" in path or "optimizer" in path for path in repository.files("first"))
    assert (
        len(load_file(pull_as(monkeypatch, hub, tmp_path, "me/model", "first") / "id_tokens.safetensors")["user_in"])
        == 1
    )

    (base,) = hub.repositories["base/t5-tied"].history[-1:]  # pinned, though no revision was given
    for name, entry in (("genrec.json", "base_model"), ("adapter_config.json", "")):
        content = json.loads(repository.files("first")[name])
        assert (content[entry] if entry else content)["revision"] == base

    sent = [piece for body in hub.bodies for piece in searched(body)]
    texts = [
        printed.out,
        printed.err,
        caplog.text,
        (out / "run.json").read_text(),
        (out / "log_history.json").read_text(),
    ]
    items = pd.read_parquet(local_directory("me/model", revision="first") / "items.parquet").to_csv()
    assert any(b'"<item_0>"' in piece for piece in sent)  # the search sees what was sent,
    assert "--hub_token" in texts[3] and "me/model" in texts[3]  # and the command as it was written down
    read = [*sent, *repository.files("first").values(), *(text.encode() for text in [*texts, items])]
    for private in ("private.example", SECRET, TOKEN):
        assert not any(private.encode() in piece for piece in read)


def pull_as(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tmp_path: Path, name: str, revision: str) -> Path:
    fake_hub.use(monkeypatch, hub, tmp_path / "hf")
    return pull(name, revision=revision).folder


def test_merge_pushes_the_merged_model(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe("merge", "--run", run, "--push-to-hub", "--hub-model-id", "me/model")
    assert "--base-model org/name" in capsys.readouterr().err and hub.writes == []
    before = contents(run)
    with pytest.raises(SystemExit):
        recipe("merge", "--run", run, "--push-to-hub", "--hub-model-id", "me/model", "--base-model", "base/gone")
    assert "base model: base/gone" in capsys.readouterr().err and contents(run) == before
    recipe(
        "merge", "--run", run, "--push-to-hub", "--hub-model-id", "me/model", "--base-model", "base/t5-tied",
        "--hub-private-repo",
    )  # fmt: skip
    assert f"{hub.url}/me/model (commit " in capsys.readouterr().out
    assert hub.repositories["me/model"].private
    assert scores(local_directory("me/model")).equal(scores(run / "merged"))


def test_what_would_be_refused_at_the_end_is_refused_at_the_start(
    hub: FakeHub, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(base: object, *arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            train(base, home, tmp_path / "run", "--push_to_hub", *arguments)
        assert ended.value.code == 2 and not (tmp_path / "run").exists()
        return capsys.readouterr().err

    to = ("--hub_model_id", "me/model")
    assert "--hub-model-id org/name" in told("base/t5-tied")
    assert "leave it at end" in told("base/t5-tied", *to, "--hub_strategy", "every_save")
    assert "genrec push" in told(home / "t5-tied", *to) and "--base-model org/name" in told(home / "t5-tied", *to)
    assert "leaves no adapter" in told("base/t5-tied", *to, "--tuning", "full")
    assert "holds something" in told("base/t5-tied", "--hub_model_id", "base/bart")
    assert "give org/name" in told("base/t5-tied", "--hub_model_id", "model")
    fake_hub.use(monkeypatch, hub, tmp_path / "hf", token=None)
    assert "hf auth login" in told("base/t5-tied", *to)
    assert hub.writes == []


def test_a_push_that_fails_leaves_the_adapter_and_says_how_to_send_it(
    hub: FakeHub, home: Path, tmp_path: Path, hasty: None, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.cut(0)
    with pytest.raises(SystemExit):
        train("base/t5-tied", home, tmp_path / "run", "--push_to_hub", "--hub_model_id", "me/model")
    told = capsys.readouterr().err
    assert f"genrec push {tmp_path / 'run' / 'adapter'} me/model" in told and "is whole" in told
    hub.mend()
    push(tmp_path / "run" / "adapter", "me/model")
    assert scores(local_directory("me/model")).equal(scores(tmp_path / "run" / "adapter"))


def test_a_command_is_written_down_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    command = ["x.py", "--hub_token", "abc", "--hub-token=def", "--seed", "1", f"--data={SECRET}/log", "hf_" + "b" * 34]
    assert redacted(command) == "x.py --hub_token '***' '--hub-token=***' --seed 1 '--data=***/log' '***'"


def test_the_fake_hub_runs_by_hand(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, fake_hub.__file__, "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
    assert re.match(r"HF_ENDPOINT=http://127.0.0.1:\d+ HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_\w+$", line)


def test_only_what_a_model_needs_is_ever_shared() -> None:
    assert not [name for name in FILES if name.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
