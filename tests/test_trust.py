"""Models from strangers: what was changed, cut or added is refused with what differs, and no code of theirs ever runs."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import contents, recipe, train

from genrec_llm.backbone import load_backbone
from genrec_llm.directory import open_directory
from genrec_llm.errors import ConfigError, DataError
from genrec_llm.files import describe_files, read_json, write_json
from genrec_llm.recommender import Recommender

KINDS = ["adapter", "merged", "trained"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the three kinds of exported directories with hashed users, whose ids are known without a list."""
    folder = tmp_path_factory.mktemp("trust")
    base = tiny.save_backbone("t5-untied", folder / "base")
    options = ("--users", "hashed", "--user-buckets", "3")
    run = train(base, folder, folder / "run", *options)
    recipe("merge", "--run", run)
    full = train(base, folder, folder / "full", "--tuning", "full", *options)
    shutil.copytree(full / "trained", run / "trained")
    return folder


@pytest.fixture(params=KINDS)
def exported(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Path:
    """A copy of an exported directory, to be harmed."""
    return Path(shutil.copytree(home / "run" / request.param, tmp_path / "model"))


def copy_of(home: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "run" / kind, tmp_path / "model"))


def problems_of(folder: Path, **options: Any) -> list[str]:
    """Why the directory is refused; every problem has to name the directory and the mend."""
    before = contents(folder)
    with pytest.raises((ConfigError, DataError)) as caught:
        Recommender.from_pretrained(folder, device="cpu", **options)
    assert contents(folder) == before
    found = caught.value.problems
    assert len(set(found)) == len(found)
    for problem in found:
        assert str(folder) in problem and re.search(r"copy it again|give |leave |bring |this genrec_llm reads", problem)
        assert "\n" not in problem
    return found


def edit_info(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    info = read_json(folder / "genrec.json")
    change(info)
    write_json(folder / "genrec.json", info)


def list_again(folder: Path) -> None:
    """As somebody would who changes a file and its entry in genrec.json, too."""
    edit_info(folder, lambda info: info.update(files=describe_files(folder, without=["genrec.json", "README.md"])))


def edit_json(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


# --- files ----------------------------------------------------------------------------


def test_every_listed_file_is_compared_to_its_last_byte(exported: Path) -> None:
    assert len(Recommender.from_pretrained(exported).recommend(["i1"])) == 10
    for name in read_json(exported / "genrec.json")["files"]:
        whole = (exported / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for content, told in (
            (bytes(flipped), "was changed"),
            (whole[:-1], f"has {len(whole) - 1:,} bytes, {len(whole):,} were written"),
            (whole + b"\n", f"has {len(whole) + 1:,} bytes"),
            (None, "no such file"),
        ):
            (exported / name).unlink()
            if content is not None:
                (exported / name).write_bytes(content)
            (problem,) = problems_of(exported)
            assert str(exported / name) in problem and told in problem
        (exported / name).write_bytes(whole)
    assert len(Recommender.from_pretrained(exported).recommend(["i1"])) == 10


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "adapter_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.model", "spiece.model", "vocab.json", "added_tokens.json", "special_tokens_map.json",
        "chat_template.jinja", "users.parquet", "modeling.py", "custom_generate/generate.py", "tokenizer.pkl",
    ],
)  # fmt: skip
def test_files_that_a_library_might_read_but_no_export_wrote_are_refused(home: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(home, "merged", tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
    assert f"{folder / name}: is none of the exported files" in problems_of(folder)[0]


def test_what_belongs_to_a_repository_or_a_card_is_no_stranger(exported: Path) -> None:
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "plots/curve.png",
        ".cache/huggingface/download/config.json",
    ):
        (exported / name).parent.mkdir(parents=True, exist_ok=True)
        (exported / name).write_bytes(b"{}")
    assert len(Recommender.from_pretrained(exported).recommend(["i1"])) == 10


def test_links_into_a_cache_are_followed_and_compared(exported: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    exported.rename(blobs)
    exported.mkdir()
    for path in blobs.iterdir():
        (exported / path.name).symlink_to(path)
    assert len(Recommender.from_pretrained(exported).recommend(["i1"])) == 10
    (blobs / "items.parquet").write_bytes(b"another")
    assert "items.parquet" in problems_of(exported)[0]


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "plots/../../outside.json"])
def test_paths_that_lead_out_of_the_directory_are_refused_before_they_are_opened(
    home: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(home, "merged", tmp_path)
    (tmp_path / "outside.json").write_text("{}")
    edit_info(folder, lambda info: info["files"].update({name: {"bytes": 2, "sha256": "0" * 64}}))
    monkeypatch.setattr("genrec_llm.files.sha256_file", lambda path: pytest.fail(f"{path} was opened"))
    (problem,) = problems_of(folder)
    assert f"files has {name!r}, which is no path inside the directory" in problem


def test_each_file_is_read_for_its_hash_once(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    plain = hashlib.file_digest

    def noted(file: Any, digest: Any) -> Any:
        hashed.append(str(Path(file.name).relative_to(exported)))
        return plain(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    Recommender.from_pretrained(exported, device="cpu")
    assert sorted(hashed) == sorted(read_json(exported / "genrec.json")["files"])


def test_a_merged_model_brings_no_adapter_that_names_another_base(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, "merged", tmp_path)
    other = shutil.copytree(folder, tmp_path / "other")  # what transformers would load in its place, uncompared
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(home / "run" / "adapter" / name, folder / name)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    list_again(folder)
    (problem,) = problems_of(folder)
    assert "lists adapter_config.json, which only an adapter has" in problem


def test_a_file_that_is_taken_out_of_the_list_is_missed(exported: Path) -> None:
    listed = read_json(exported / "genrec.json")["files"]
    for lost in listed:
        rest = {name: entry for name, entry in listed.items() if name != lost}
        edit_info(exported, lambda info, rest=rest: info.update(files=rest))
        assert any(lost in problem for problem in problems_of(exported))
    edit_info(exported, lambda info: info.update(files={}))
    assert "does not list its files" in problems_of(exported)[0]


# --- genrec.json ------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[]", "3", "null", '"adapter"', "{}", '{"format_version": 1}', "{", ""])
def test_a_genrec_json_that_is_something_else_is_an_error_in_words(home: Path, tmp_path: Path, content: str) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    (folder / "genrec.json").write_text(content)
    assert "genrec.json" in problems_of(folder)[0] or "format version" in problems_of(folder)[0]


WRONG: list[tuple[str, Any]] = [
    (place, value)
    for place in (
        "kind", "base_model", "base_model.name", "base_model.type", "data", "data.name", "data.fingerprint",
        "data.vocabulary", "prompt", "user_mode", "user_buckets", "id_seed", "files", "prompt.base", "prompt.num_items",
        "prompt.num_user_rows", "prompt.mask_ids", "prompt.eos_id", "prompt.pad_id", "prompt.user_token",
        "prompt.decoder_prompt", "prompt.max_history", "prompt.last_items_weights",
    )
    for value in (None, 1.5, ["x"], {"x": 1}, -1, "x", True)
    # What is of the right type there, and is no lie that a directory could give away.
    if f"{place} {value}" not in {
        "data.name x", "data.fingerprint x", "base_model.name x", "id_seed -1", "prompt.user_token True",
    }
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), WRONG, ids=str)
def test_facts_of_another_type_or_that_cannot_be_are_refused_in_words(
    home: Path, tmp_path: Path, place: str, value: Any
) -> None:
    folder = copy_of(home, "adapter", tmp_path)

    def change(info: dict[str, Any]) -> None:
        *above, last = place.split(".")
        for key in above:
            info = info[key]
        info[last] = value

    edit_info(folder, change)
    assert problems_of(folder)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.0], [0.5, -0.1], [float("nan")], [1], [0.1] * 5], ids=str)
def test_weights_of_last_items_that_leave_nothing_to_the_history_are_refused(
    home: Path, tmp_path: Path, weights: list[float]
) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    edit_info(folder, lambda info: info["prompt"].update(last_items_weights=weights))
    assert "expected at most 4 numbers above 0 with a sum below 1" in problems_of(folder)[0]


def test_a_model_of_an_earlier_release_is_read(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    edit_info(folder, lambda info: info["prompt"].pop("last_items_weights"))
    assert open_directory(folder, "adapter")[3].last_items_weights == ()


def test_all_wrong_facts_are_told_at_once(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    edit_info(folder, lambda info: info.update(user_mode=3, data={"name": "x"}, prompt={"base": "many"}))
    told = " ".join(problems_of(folder))
    for place in ("user_mode is 3, expected str", "data.fingerprint is not there", "data.vocabulary", "prompt is"):
        assert place in told


def shift(info: dict[str, Any], **by: int) -> None:
    for key, value in by.items():
        info["prompt"][key] += value


@pytest.mark.parametrize(
    "by",
    [
        {"base": 1, "num_items": -1}, {"base": -1, "num_user_rows": 1}, {"num_items": 1, "num_user_rows": -1},
        {"num_items": 1}, {"num_user_rows": 1}, {"base": 1}, {"eos_id": 1}, {"pad_id": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_prompt_that_does_not_fit_the_tokenizer_is_refused(exported: Path, by: dict[str, int]) -> None:
    edit_info(exported, lambda info: shift(info, **by))
    assert any("tokenizer" in problem or "items" in problem for problem in problems_of(exported))


def test_other_masks_are_refused(exported: Path) -> None:
    edit_info(exported, lambda info: info["prompt"]["mask_ids"].reverse())
    assert "other ids for the mask, end or padding tokens" in problems_of(exported)[0]


def test_items_in_another_order_are_not_those_that_were_trained_on(exported: Path) -> None:
    path = exported / "items.parquet"
    table = pyarrow.parquet.read_table(path)
    order = np.r_[1, 0, 2 : table.num_rows]
    swapped = table.set_column(table.column_names.index("item"), "item", table["item"].take(order))
    pyarrow.parquet.write_table(swapped, path)
    list_again(exported)
    assert "items.parquet has other items than those that data.vocabulary" in problems_of(exported)[0]


# --- weights --------------------------------------------------------------------------------


def test_an_adapter_says_the_same_base_in_both_of_its_files(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/another", revision="v2")
    list_again(folder)
    problems = problems_of(folder)
    assert "base_model_name_or_path is 'org/another', genrec.json says" in problems[0]
    assert "revision is 'v2', genrec.json says None" in problems[1]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"use_rslora": True}, "use_rslora is True, expected False"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"rank_pattern": {"q": 8}}, "rank_pattern is"),
        ({"modules_to_save": ["shared"]}, "modules_to_save is"),
        ({"layers_to_transform": [0]}, "layers_to_transform is"),
        ({"target_modules": "all-linear"}, "'all-linear', expected a number from 1 on and a list"),
        ({"r": "two"}, "r is 'two'"),
        ({"r": 0}, "adapter_config.json"),
        ({"r": 4}, "has other tensors than its configuration"),
        ({"target_modules": ["q", "k", "v"]}, "has other tensors than its configuration"),
        ({"peft_type": "IA3"}, "peft_type is"),
        ({"peft_type": "NO_SUCH"}, "adapter_config.json: cannot be loaded"),
        ({"peft_type": None}, "adapter_config.json"),
    ],
    ids=str,
)
def test_adapters_of_another_make_are_refused_with_what_differs(
    home: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    edit_json(folder / "adapter_config.json", **values)
    list_again(folder)
    assert told in problems_of(folder)[0].replace(str(folder) + "/", "")


def test_prompt_tuning_is_no_adapter_of_ours(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, "adapter", tmp_path)
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "SEQ_2_SEQ_LM"},
    )
    list_again(folder)
    assert "peft_type is" in problems_of(folder)[0] and "expected LORA" in problems_of(folder)[0]


@pytest.mark.parametrize(("kind", "name"), [("adapter", "adapter_model.safetensors"), ("trained", "model.safetensors"),
                                            ("merged", "model.safetensors")])  # fmt: skip
def test_weights_that_are_absent_are_never_filled_at_random(home: Path, tmp_path: Path, kind: str, name: str) -> None:
    folder = copy_of(home, kind, tmp_path)
    tensors = load_file(folder / name)
    lost = next(key for key in tensors if ".q." in key and key.endswith("weight"))
    save_file({key: value for key, value in tensors.items() if key != lost}, folder / name, {"format": "pt"})
    list_again(folder)
    assert lost in problems_of(folder)[0]


@pytest.mark.parametrize(("kind", "name"), [("adapter", "id_tokens.safetensors"), ("merged", "model.safetensors")])
def test_tables_of_another_size_are_refused(home: Path, tmp_path: Path, kind: str, name: str) -> None:
    folder = copy_of(home, kind, tmp_path)
    tensors = load_file(folder / name)
    for key in ("item_in", "item_out", "shared.weight", "lm_head.weight"):
        if key in tensors:
            tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, folder / name, {"format": "pt"})
    if kind == "merged":
        edit_json(folder / "config.json", vocab_size=len(tensors["shared.weight"]))
    list_again(folder)
    assert any("item_in" in problem or "its tables have" in problem for problem in problems_of(folder))


def test_files_that_are_listed_but_no_safetensors_are_an_error_in_words(exported: Path) -> None:
    for path in exported.glob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(b"\x00" * 64)
        list_again(exported)
        assert path.name in problems_of(exported)[0] or "cannot be loaded" in problems_of(exported)[0]
        path.write_bytes(whole)


# --- code -------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "executed")


def planted(mark: Path) -> str:
    """A module that writes a file when it is imported."""
    return f"from pathlib import Path\nPath({str(mark)!r}).write_text('executed')\n"


def test_the_traps_of_these_tests_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "unpickled")))
    exec(planted(tmp_path / "imported"))
    assert (tmp_path / "unpickled").read_text() == (tmp_path / "imported").read_text() == "executed"


AUTO_MAP = {
    "AutoConfig": "planted.Planted",
    "AutoModel": "planted.Planted",
    "AutoModelForSeq2SeqLM": "planted.Planted",
    "AutoTokenizer": ["planted.Planted", "planted.Planted"],
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [*((kind, "tokenizer_config.json") for kind in KINDS), ("merged", "config.json"), ("trained", "config.json")],
)
@pytest.mark.parametrize("known", [True, False], ids=["known-type", "unknown-type"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not-listed"])
def test_code_beside_a_model_is_refused_and_not_run(
    home: Path, tmp_path: Path, kind: str, place: str, known: bool, listed: bool
) -> None:
    exported, mark = copy_of(home, kind, tmp_path), tmp_path / "mark"
    (exported / "planted.py").write_text(planted(mark))
    strange = {} if known else {"model_type": "planted", "tokenizer_class": "Planted"}
    edit_json(exported / place, auto_map=AUTO_MAP, **strange)
    if listed:
        list_again(exported)
    problems = problems_of(exported)
    assert not mark.exists()
    if listed:
        assert any(f"{exported / place}: has auto_map, the name of code to run" in problem for problem in problems)
    else:
        assert len(problems) == 2 and "planted.py: is none of the exported files" in problems[1]


@pytest.mark.parametrize("known", [True, False], ids=["known-type", "unknown-type"])
def test_code_beside_a_base_is_not_run(home: Path, tmp_path: Path, known: bool) -> None:
    base = Path(shutil.copytree(home / "base", tmp_path / "base"))
    mark = tmp_path / "mark"
    (base / "planted.py").write_text(planted(mark))
    strange = {} if known else {"model_type": "planted", "tokenizer_class": "Planted"}
    for name in ("config.json", "tokenizer_config.json"):
        edit_json(base / name, auto_map=AUTO_MAP, **strange)
    if known:
        load_backbone(str(base))
    else:
        with pytest.raises(ConfigError, match="backbone"):
            load_backbone(str(base))
    assert not mark.exists()


def test_pickled_weights_are_never_read(home: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("adapter", "merged"):
        folder = Path(shutil.copytree(home / "run" / name, tmp_path / name))
        for stored in folder.glob("*model.safetensors"):
            stored.unlink()
        for trap in ("pytorch_model.bin", "adapter_model.bin"):
            (folder / trap).write_bytes(pickle.dumps(Trap(mark)))
        list_again(folder)
        assert "adapter_model.safetensors" in problems_of(folder)[0] or "cannot be loaded" in problems_of(folder)[0]
    base = Path(shutil.copytree(home / "base", tmp_path / "base"))
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    load_backbone(str(base))  # its safetensors are read
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        load_backbone(str(base))
    (problem,) = caught.value.problems
    assert "Pickled weights (pytorch_model.bin) are not read: give a checkpoint or revision with safetensors" in problem
    torch.save({"shared.weight": torch.zeros(2, 2)}, base / "pytorch_model.bin")  # without a trap it is refused, too
    with pytest.raises(ConfigError, match="Pickled weights"):
        load_backbone(str(base))
    assert not mark.exists()


def test_a_base_changed_in_one_weight_is_not_the_one_trained_on(home: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(home / "base", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["shared.weight"] += 1.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    folder = home / "run" / "adapter"
    with pytest.raises(ConfigError, match="is not the one it was trained on: its weights are others"):
        Recommender.from_pretrained(folder, backbone=str(base))
    assert json.loads((folder / "genrec.json").read_text())["base_model"]["fingerprint"]
