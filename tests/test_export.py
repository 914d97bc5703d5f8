"""The adapter and merged directories: their files, the parity that guards them, plain PEFT and transformers on them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ITEMS, RANK, USERS, contents, recipe, train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from genrec_llm import export
from genrec_llm.backbone import load_backbone
from genrec_llm.batching import as_tensors
from genrec_llm.decoding import one_step_scores
from genrec_llm.directory import FORMAT_VERSION, trained_directory
from genrec_llm.loading import Loaded, fingerprint, load_merged, load_trained
from genrec_llm.model import GenRecBackbone
from genrec_llm.recommender import Recommender
from genrec_llm.sources import load_interactions
from genrec_llm.tasks import PromptLayout
from genrec_llm.vocab import IdVocab

WIDTH = 16
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
ADAPTER_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "id_tokens.safetensors",
    "genrec.json", "items.parquet", "README.md", *TOKENIZER_FILES,
}  # fmt: skip
MERGED_FILES = {
    "model.safetensors", "config.json", "generation_config.json", "genrec.json", "items.parquet", "README.md",
    *TOKENIZER_FILES,
}  # fmt: skip
VARIANTS = {
    "untied-rows": ("t5-untied", "--tie-item-rows", "false"),
    "bare-mask": ("t5-tied", "--decoder-prompt", "mask"),
    "no-users": ("t5-untied", "--users", "none"),
    "hashed-users": ("bart", "--users", "hashed", "--user-buckets", "5"),
    "full": ("t5-tied", "--tuning", "full"),
    "full-bart": ("bart", "--tuning", "full", "--tie-item-rows", "false"),
}
"""Name of a run → its backbone and what it is trained with beyond the defaults."""
ROUNDING = 1e-5
"""fp32 sums of a few hundred terms in another order, on scores of about 1."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base checkpoints."""
    folder = tmp_path_factory.mktemp("export")
    for kind in tiny.KINDS:
        tiny.save_backbone(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Path]:
    """Finished and merged runs, one a backbone and one a variant."""
    made = {kind: train(home / kind, home, home / "runs" / kind) for kind in tiny.KINDS}
    for name, (kind, *arguments) in VARIANTS.items():
        made[name] = train(home / kind, home, home / "runs" / name, *arguments)
    for run in made.values():
        recipe("merge", "--run", run)
    recipe("merge", "--run", made["t5-untied"], "--without-users", "--output-dir", made["t5-untied"] / "public")
    return made


@pytest.fixture(params=tiny.KINDS)
def run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


def base_of(run: Path) -> Path:
    return Path(json.loads((run / "run.json").read_text())["arguments"]["model"]["backbone"])


def layout_of(folder: Path) -> PromptLayout:
    return PromptLayout.from_dict(json.loads((folder / "genrec.json").read_text())["prompt"])


def sample_scores(loaded: Loaded, *, users: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    """One-step scores of four fixed histories."""
    random = np.random.default_rng(1)
    histories = [random.integers(0, loaded.layout.num_items, length) for length in (0, 1, 4, 9)]
    batch = as_tensors(loaded.layout.encode_histories(histories, np.array(users)))
    if loaded.info["kind"] == "merged":
        return one_step_scores(loaded.model, batch, loaded.layout)
    with torch.no_grad():
        return loaded.model(**batch).logits


# --- the adapter directory --------------------------------------------


def test_the_adapter_directory_has_the_files_of_the_format_and_no_other(run: Path) -> None:
    assert set(contents(run / "adapter")) == ADAPTER_FILES


def test_the_adapter_is_lora_alone_and_plain_peft_reads_it_on_the_stock_class(run: Path) -> None:
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert (config["r"], config["peft_type"], config["task_type"]) == (RANK, "LORA", "SEQ_2_SEQ_LM")
    assert config["base_model_name_or_path"] == str(base_of(run))
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert stored and all("lora_" in name for name in stored)
    assert all(value.any() for value in stored.values()), "an adapter that never trained"
    stock = AutoModelForSeq2SeqLM.from_pretrained(base_of(run))
    assert type(stock).__module__.startswith("transformers.")
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(stock, run / "adapter"))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize("name", ["t5-tied", "bart", "untied-rows", "no-users", "hashed-users"])
def test_the_rows_have_the_shapes_of_the_format(runs: dict[str, Path], name: str) -> None:
    rows = load_file(runs[name] / "adapter" / "id_tokens.safetensors")
    users = {"no-users": 1, "hashed-users": 1 + 5}.get(name, 1 + USERS)
    shapes = {"item_in": (ITEMS, WIDTH), "item_out": (ITEMS, WIDTH), "user_in": (users, WIDTH)}
    assert {key: tuple(value.shape) for key, value in rows.items()} == shapes
    assert all(value.dtype == torch.float32 for value in rows.values())
    with safe_open(runs[name] / "adapter" / "id_tokens.safetensors", "pt") as file:
        scale = (file.metadata() or {}).get("tied_scale")
    ratio = rows["item_out"] / rows["item_in"]
    if name == "untied-rows":
        assert scale is None and ratio.std() > 1e-3, "rows of their own have moved apart"
    else:
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(scale)), rtol=1e-5, atol=0)


def test_genrec_json_says_what_the_model_is_made_from(runs: dict[str, Path], home: Path) -> None:
    data = load_interactions(str(home / "log.csv"), items_path=str(home / "items.csv"))
    for name, kind in (("t5-untied", "adapter"), ("bart", "adapter"), ("full", "trained"), ("t5-untied", "merged")):
        info = json.loads((runs[name] / kind / "genrec.json").read_text())
        assert (info["format_version"], info["kind"], info["stage"]) == (FORMAT_VERSION, kind, "finetune")
        model_type = "bart" if name == "bart" else "t5"
        print_of_base = None if kind == "trained" else fingerprint(load_backbone(str(base_of(runs[name])))[0])
        assert info["base_model"] == {
            "name": str(base_of(runs[name])), "revision": None, "type": model_type, "fingerprint": print_of_base,
        }  # fmt: skip
        assert info["data"]["name"] == "log" and info["data"]["fingerprint"] == data.fingerprint()
        assert len(info["data"]["vocabulary"]) == 64
        assert (info["seed"], info["id_seed"], info["user_mode"], info["user_buckets"]) == (0, 0, "each", 0)
        assert 0 < info["metrics"]["validation_ndcg@10"] <= 1
        assert set(info["versions"]) == {"genrec-llm", "torch", "transformers", "peft", "accelerate"}
        base = AutoTokenizer.from_pretrained(base_of(runs[name]))
        layout = layout_of(runs[name] / kind)
        assert (layout.base, layout.num_items, layout.num_user_rows) == (len(base), ITEMS, 1 + USERS)
        mask = "<mask>" if name == "bart" else "<extra_id_0>"
        assert layout.mask_ids[0] == base.convert_tokens_to_ids(mask)
    assert {"max_score_difference", "top_n_agreement", "samples", "n"} == set(info["parity"])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_fingerprint_of_a_base_is_one_in_bf16_and_fp32_and_changes_with_any_weight(home: Path, kind: str) -> None:
    model, _ = load_backbone(str(home / kind))
    found = fingerprint(model)
    assert found == fingerprint(load_backbone(str(home / kind), dtype=torch.bfloat16)[0])
    for weight in model.parameters():
        before = weight.detach().clone()
        weight.data *= 1.02
        assert fingerprint(model) != found or not before.any()
        weight.data.copy_(before)
    assert fingerprint(model) == found


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_items_are_those_of_the_run_with_their_titles(runs: dict[str, Path], kind: str) -> None:
    there = IdVocab.load(runs["t5-tied"] / kind).items
    at_home = IdVocab.load(runs["t5-tied"]).items
    assert there.equals(at_home) and len(there) == ITEMS
    titles = dict(zip(there["item"], there["title"], strict=True))
    assert titles["i3"] == 'Item, "3"' and titles["i7"] is None and titles["cold"] == "Never seen"


def raw_ids(folder: Path) -> list[str]:
    """Files below a folder that hold an e-mail address, as bytes or inside a parquet column."""
    found = []
    for name, content in contents(folder).items():
        text = content.decode("utf-8", errors="replace")
        if name.endswith(".parquet"):
            table = pyarrow.parquet.read_table(folder / name)
            text += str(table.to_pydict()) + str(table.schema.metadata)
        if "private.example" in text or "person1" in text:
            found.append(name)
    return found


def test_no_raw_user_id_leaves_the_run_directory(runs: dict[str, Path]) -> None:
    assert raw_ids(runs["t5-tied"]) == ["users.parquet"], "the search finds them where they have to be"
    for run in runs.values():
        for kind in ("adapter", "trained", "merged", "public"):
            assert not raw_ids(run / kind)
            assert not (run / kind / "users.parquet").exists()


# --- the merged directory -----------------------------------------------


def test_the_merged_directory_has_the_files_of_the_format_and_no_other(runs: dict[str, Path]) -> None:
    assert all(set(contents(run / "merged")) == MERGED_FILES for run in runs.values())
    assert not [path for run in runs.values() for path in run.iterdir() if path.name.startswith(".")]


def test_the_configuration_of_the_merged_model_is_the_contract(run: Path) -> None:
    config = json.loads((run / "merged" / "config.json").read_text())
    generation = json.loads((run / "merged" / "generation_config.json").read_text())
    layout = layout_of(run / "merged")
    mask = layout.mask_ids[0]
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == layout.vocab_size == layout.base + ITEMS + 1 + USERS
    assert config["decoder_start_token_id"] == generation["decoder_start_token_id"] == mask
    assert config["architectures"] == [
        "BartForConditionalGeneration" if run.name == "bart" else "T5ForConditionalGeneration"
    ]
    if run.name == "bart":
        assert "forced_eos_token_id" not in config and "forced_eos_token_id" not in generation
    else:
        assert config["scale_decoder_outputs"] is False
    assert generation["max_new_tokens"] == 1
    items = set(range(layout.base, layout.base + ITEMS))
    assert set(generation["suppress_tokens"]) == set(range(layout.vocab_size)) - items


def test_the_merged_tables_are_the_base_then_items_then_users(run: Path) -> None:
    """The base's own rows bit for bit; of the tied T5 v1.0 the head with its d^-0.5 folded in."""
    merged, rows = (load_file(run / name) for name in ("merged/model.safetensors", "adapter/id_tokens.safetensors"))
    base, layout = load_file(base_of(run) / "model.safetensors"), layout_of(run / "merged")
    bart = run.name == "bart"
    shared = "model.shared.weight" if bart else "shared.weight"
    embedding, head = merged[shared], merged["lm_head.weight"]
    base_head = base["lm_head.weight"] if run.name == "t5-untied" else base[shared]
    items = slice(layout.base, layout.base + ITEMS)
    embed_scale, head_scale = (WIDTH**0.5 if bart else 1.0), (WIDTH**-0.5 if run.name == "t5-tied" else 1.0)
    assert embedding.shape == head.shape == (layout.vocab_size, WIDTH)
    assert torch.equal(embedding[: layout.base], base[shared][: layout.base])
    torch.testing.assert_close(head[: layout.base], base_head[: layout.base] * head_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(embedding[items] * embed_scale, rows["item_in"], rtol=1e-6, atol=0)
    torch.testing.assert_close(embedding[items.stop :] * embed_scale, rows["user_in"], rtol=1e-6, atol=0)
    torch.testing.assert_close(head[items], rows["item_out"], rtol=1e-6, atol=0)
    assert not head[items.stop :].any(), "users are never predicted"


def test_bart_keeps_its_three_tables_and_a_bias_against_what_is_no_item(runs: dict[str, Path]) -> None:
    merged, layout = load_file(runs["bart"] / "merged" / "model.safetensors"), layout_of(runs["bart"] / "merged")
    tables = [merged[f"model.{name}.weight"] for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])
    expected = torch.full((1, layout.vocab_size), -1e4)
    expected[:, layout.base : layout.base + ITEMS] = 0
    assert torch.equal(merged["final_logits_bias"], expected)


@pytest.mark.parametrize("name", [*tiny.KINDS, *VARIANTS])
def test_transformers_fills_no_table_of_the_merged_model_at_random(runs: dict[str, Path], name: str) -> None:
    folder = runs[name] / "merged"
    stored = load_file(folder / "model.safetensors")
    torch.manual_seed(1234)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    in_memory = dict(model.state_dict())
    assert all(torch.equal(in_memory[key], value) for key, value in stored.items())
    tables = (key for key in in_memory.keys() - stored.keys())
    shared = model.get_input_embeddings().weight
    assert all(in_memory[key].data_ptr() == shared.data_ptr() for key in tables), "a table that no file filled"


@pytest.mark.parametrize("name", [*tiny.KINDS, *VARIANTS])
def test_merged_scores_are_those_of_the_trained_model(runs: dict[str, Path], name: str) -> None:
    """An own comparison, beside the parity that merging checks itself; rows of users count too."""
    trained, merged = load_trained(trained_directory(runs[name])), load_merged(runs[name] / "merged")
    users = (0, 0, 0, 0) if name == "no-users" else (0, 1, 2, 5)
    difference = (sample_scores(trained, users=users) - sample_scores(merged, users=users)).abs().max()
    assert difference <= ROUNDING * max(1.0, float(sample_scores(trained, users=users).abs().max())) * 10
    parity = json.loads((runs[name] / "merged" / "genrec.json").read_text())["parity"]
    assert parity["top_n_agreement"] == 1.0 and parity["samples"] == 64 and parity["n"] == 20


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_text_becomes_the_token_ids_of_training(run: Path, kind: str) -> None:
    tokenizer, layout = AutoTokenizer.from_pretrained(run / kind), layout_of(run / kind)
    assert len(tokenizer) == layout.vocab_size
    history, user = np.array([1, 11, 0, ITEMS - 1]), np.array([7])
    encoded = layout.encode_histories([history], user)
    mask = tokenizer.convert_ids_to_tokens(layout.mask_ids[0])
    text = "<user_6>" + " ".join(f"<item_{item}>" for item in history) + mask
    assert tokenizer(text)["input_ids"] == encoded["input_ids"][0].tolist()
    prompt = tokenizer(f"{mask}<item_{ITEMS - 1}>", add_special_tokens=False)["input_ids"]
    assert prompt == encoded["decoder_input_ids"][0].tolist()


def test_without_users_the_tokenizer_and_the_tables_end_at_the_unknown_user(runs: dict[str, Path]) -> None:
    whole, public = runs["t5-untied"] / "merged", runs["t5-untied"] / "public"
    layout, weights = layout_of(public), load_file(public / "model.safetensors")
    assert layout.num_user_rows == 1 and layout.vocab_size == layout.base + ITEMS + 1
    assert weights["shared.weight"].shape == weights["lm_head.weight"].shape == (layout.vocab_size, WIDTH)
    tokenizer = AutoTokenizer.from_pretrained(public)
    assert len(tokenizer) == layout.vocab_size
    assert tokenizer("<user_unknown><item_0>", add_special_tokens=False)["input_ids"] == [
        layout.first_user_id,
        layout.base,
    ]
    assert "<user_0>" not in tokenizer.get_vocab()
    assert not [name for name, content in contents(public).items() if b"<user_0>" in content]
    known = sample_scores(load_merged(whole), users=(0, 0, 0, 0))
    torch.testing.assert_close(sample_scores(load_merged(public), users=(0, 0, 0, 0)), known)
    history, served = [np.array([3])], Recommender.from_pretrained(public)
    assert np.array_equal(served.scores(history, np.array([4])), served.scores(history, np.array([0])))


def test_full_tuning_leaves_a_trained_directory_and_merges(runs: dict[str, Path]) -> None:
    for name in ("full", "full-bart"):
        trained, base = runs[name] / "trained", load_file(base_of(runs[name]) / "model.safetensors")
        assert not (runs[name] / "adapter").exists()
        assert set(contents(trained)) == (ADAPTER_FILES | {"model.safetensors", "config.json"}) - {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        state = load_file(trained / "model.safetensors")
        moved = [key for key, value in state.items() if key in base and not torch.equal(value, base[key])]
        assert len(moved) > len(state) / 2, "the backbone has been trained"
        merged = load_file(runs[name] / "merged" / "model.safetensors")
        inner = [key for key in moved if "embed" not in key and "shared" not in key and "lm_head" not in key]
        assert inner and all(torch.equal(merged[key], state[key]) for key in inner)


def test_a_backbone_trained_from_nothing_is_merged(home: Path) -> None:
    arguments = ("--backbone-init", "random", "--tuning", "full", "--max-steps", 2)
    run = train("t5-micro", home, home / "runs" / "from-nothing", *arguments)
    recipe("merge", "--run", run)
    trained, merged = load_trained(run / "trained"), load_merged(run / "merged")
    torch.testing.assert_close(sample_scores(trained), sample_scores(merged), rtol=1e-4, atol=1e-4)


def test_bf16_weights_pass_the_tolerance_of_bf16(runs: dict[str, Path], tmp_path: Path) -> None:
    for kind in tiny.KINDS:
        recipe("merge", "--run", runs[kind], "--dtype", "bfloat16", "--output-dir", tmp_path / kind)
        weights = load_file(tmp_path / kind / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.bfloat16}
        assert load_merged(tmp_path / kind).model.dtype == torch.bfloat16
        parity = json.loads((tmp_path / kind / "genrec.json").read_text())["parity"]
        assert 0 < parity["max_score_difference"] < 0.05 * 5, "bf16 has 8 bits: 1/256 a rounding"


# --- the parity check ----------------------------------------------------


def corrupt_head(state: dict[str, torch.Tensor], layout: PromptLayout) -> None:
    state["lm_head.weight"][layout.base + 3, 0] += 0.1


def swap_head_rows(state: dict[str, torch.Tensor], layout: PromptLayout) -> None:
    places = [layout.base + 3, layout.base + 4]
    state["lm_head.weight"][places] = state["lm_head.weight"][places[::-1]]


def corrupt_embedding(state: dict[str, torch.Tensor], layout: PromptLayout) -> None:
    (name,) = (name for name in state if name.endswith("shared.weight"))
    state[name][layout.base + 3] *= -1
    for copy in ("encoder", "decoder"):
        if f"model.{copy}.embed_tokens.weight" in state:
            state[f"model.{copy}.embed_tokens.weight"] = state[name].clone()


def forget_the_mask(state: dict[str, torch.Tensor], layout: PromptLayout) -> None:
    (name,) = (name for name in state if name.endswith("shared.weight"))
    state[name][layout.mask_ids[0]] = 0
    for copy in ("encoder", "decoder"):
        if f"model.{copy}.embed_tokens.weight" in state:
            state[f"model.{copy}.embed_tokens.weight"] = state[name].clone()


@pytest.mark.parametrize(
    ("damage", "dtype"),
    [
        *((damage, "float32") for damage in (corrupt_head, swap_head_rows, corrupt_embedding, forget_the_mask)),
        *((damage, "bfloat16") for damage in (swap_head_rows, corrupt_embedding)),  # above the rounding of bf16
    ],
)
def test_a_merged_model_that_says_something_else_is_not_written(
    run: Path, damage, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = contents(tmp_path)
    faithful = export.merged_state

    def unfaithful(model: GenRecBackbone, layout: PromptLayout) -> dict[str, torch.Tensor]:
        state = {name: value.clone() for name, value in faithful(model, layout).items()}
        damage(state, layout)
        return state

    monkeypatch.setattr(export, "merged_state", unfaithful)
    with pytest.raises(SystemExit) as ended:
        recipe("merge", "--run", tmp_path / "run", "--dtype", dtype)
    assert ended.value.code == 2
    assert "does not say the same as the trained one" in capsys.readouterr().err
    assert contents(tmp_path) == before
    with pytest.raises(SystemExit):
        recipe("merge", "--run", tmp_path / "run", "--dtype", dtype, "--output-dir", tmp_path / "new")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_generation_that_leaves_items_out_is_not_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores agree; the bare `generate` does not."""
    faithful = export.generation_config

    def one_item_less(layout: PromptLayout):
        config = faithful(layout)
        config.suppress_tokens = sorted([*config.suppress_tokens, layout.base + 2])
        return config

    monkeypatch.setattr(export, "generation_config", one_item_less)
    with pytest.raises(SystemExit) as ended:
        recipe("merge", "--run", runs["t5-tied"], "--output-dir", tmp_path / "merged")
    assert ended.value.code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bart", "full"])
def test_merging_again_replaces_what_was_there_with_the_same(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(runs[name], tmp_path / name)
    (tmp_path / name / "merged" / "stale.txt").write_text("of an earlier version")
    recipe("merge", "--run", tmp_path / name)
    assert contents(tmp_path / name / "merged") == contents(runs[name] / "merged")


def test_loading_a_merged_model_warns_of_nothing(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[logging.LogRecord] = []
    log = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", told.append)
    log.addHandler(handler)
    try:
        load_merged(runs["t5-untied"] / "merged")
        assert not told and not log.filters
        AutoModelForSeq2SeqLM.from_pretrained(runs["t5-untied"] / "merged")
        assert "so we will NOT tie them" in told[0].getMessage(), "the filter in load_merged can go"
    finally:
        log.removeHandler(handler)
