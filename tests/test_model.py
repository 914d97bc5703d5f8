"""The backbone with id rows against stock transformers, its gradients, LoRA, loading and the id words."""

from __future__ import annotations

import json
import math
import re
import socket
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, save_backbone
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BartForConditionalGeneration,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from genrec_llm.backbone import load_backbone
from genrec_llm.batching import as_tensors
from genrec_llm.errors import ConfigError
from genrec_llm.model import GenRecBackbone, IdTokens, add_lora, id_tokens_of, unwrapped
from genrec_llm.tasks import IGNORED, MaskedItem, NextItem, PromptLayout, Sequences
from genrec_llm.tokenizer import add_id_words, bare_tokenizer, prompt_layout
from genrec_llm.vocab import IdVocab

ITEMS, USERS, WIDTH = 9, 4, 16
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums of a few hundred terms in another order."""


def vocabulary(items: int = ITEMS, users: int = USERS) -> IdVocab:
    catalogue = pd.DataFrame({"item": [f"i{number}" for number in range(items)]})
    return IdVocab.build(catalogue, [f"u{number}" for number in range(users)], seed=0)


def id_rows(tie: bool, seed: int = 1) -> IdTokens:
    generator = torch.Generator().manual_seed(seed)
    item_in, item_out = (torch.randn(ITEMS, WIDTH, generator=generator) for _ in range(2))
    return IdTokens(item_in, torch.randn(USERS + 1, WIDTH, generator=generator), None if tie else item_out, scale=0.7)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone("t5-untied", tmp_path_factory.mktemp("one"))


def built(folder: Path, *, tie: bool = True) -> tuple[GenRecBackbone, PromptLayout]:
    model, tokenizer = load_backbone(str(folder))
    layout = prompt_layout(tokenizer, vocabulary(), max_history=6)
    model.add_id_tokens(id_rows(tie), layout.base)
    return model.eval(), layout


def sequences() -> Sequences:
    lists = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 0, 2], [3, 1, 5, 8, 6, 4]]
    return Sequences(
        items=np.concatenate(lists), offsets=np.cumsum([0, *map(len, lists)]), users=np.arange(1, USERS + 1)
    )


def next_items(layout: PromptLayout) -> dict[str, Tensor]:
    task = NextItem(sequences(), layout, seed=0)
    return as_tensors(task.batch(0, np.arange(len(task.lengths))))


def several_targets(layout: PromptLayout) -> dict[str, Tensor]:
    task = MaskedItem(sequences(), layout, seed=0, masks_per_sequence=min(3, len(layout.mask_ids)))
    return as_tensors(task.batch(0, np.arange(len(task.lengths))))


# --- scores and loss against stock transformers -------------------------------------------------------


def stock(folder: Path, model: GenRecBackbone, layout: PromptLayout) -> PreTrainedModel:
    """Transformers' own class with the checkpoint's weights and one big table in and out, made by hand."""
    rows, tensors = id_tokens_of(model), load_file(folder / "model.safetensors")
    bart = model.config.model_type == "bart"
    name = "model.shared.weight" if bart else "shared.weight"
    scale = math.sqrt(WIDTH) if bart else 1.0  # the tiny BART has scale_embedding, as bart-large-cnn and others
    table = torch.cat([tensors[name][: layout.base], rows.item_in.weight / scale, rows.user_in.weight / scale])
    outside = torch.randn(layout.base, WIDTH)
    item_out = rows.item_in.weight * 0.7 if rows.tied else rows.item_out.weight
    head = torch.cat([outside, item_out, torch.randn(USERS + 1, WIDTH)])

    other = (BartForConditionalGeneration if bart else T5ForConditionalGeneration).from_pretrained(folder)
    other.config.vocab_size = layout.vocab_size
    inner = other.model if bart else other
    for module in (inner.shared, inner.encoder.embed_tokens, inner.decoder.embed_tokens):
        module.weight = nn.Parameter(table.detach().clone())
    other.lm_head.weight = nn.Parameter(head.detach().clone())
    if bart:
        other.final_logits_bias = torch.zeros(1, layout.vocab_size)
    elif other.config.scale_decoder_outputs:
        other.lm_head.weight.data *= math.sqrt(WIDTH)  # the stock head sees outputs times d^-0.5
    return other.eval()


def stock_scores(other: PreTrainedModel, batch: dict[str, Tensor], layout: PromptLayout) -> Tensor:
    """Every target on its own: an input row without padding and its decoder prompt."""
    prompts = batch["decoder_input_ids"]
    scores = []
    for row, own in enumerate(prompts[:, None] if prompts.ndim == 2 else prompts):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        for prompt in own:
            with torch.no_grad():
                logits = other(input_ids=ids[None], decoder_input_ids=prompt[None]).logits
            scores.append(logits[0, -1, layout.base : layout.base + ITEMS])
    return torch.stack(scores)


@pytest.mark.parametrize("tie", [True, False], ids=["tied rows", "own output rows"])
def test_scores_and_loss_are_those_of_the_stock_class_with_the_same_rows(checkpoint: Path, tie: bool) -> None:
    model, layout = built(checkpoint, tie=tie)
    other = stock(checkpoint, model, layout)
    for batch in (next_items(layout), several_targets(layout)):
        expected = stock_scores(other, batch, layout)
        labels = batch.pop("labels")
        with torch.no_grad():
            scores = model(**batch).logits
            loss = model(**batch, labels=labels).loss
            shared = model(**batch, labels=labels, num_items_in_batch=40).loss
        labels = labels.flatten()
        assert scores.shape == (len(labels), ITEMS) and scores.dtype == torch.float32
        assert scores.std() > 0.1  # scores that say something
        torch.testing.assert_close(scores, expected, **ROUNDING)
        there = [(row, label) for row, label in zip(expected, labels, strict=True) if label != IGNORED]
        by_hand = sum(torch.log(torch.exp(row).sum()) - row[label] for row, label in there)
        torch.testing.assert_close(loss, by_hand / len(there), **ROUNDING)
        torch.testing.assert_close(shared, by_hand / 40, **ROUNDING)


@pytest.mark.parametrize("kind", ["t5-tied", "t5-untied"])
def test_several_targets_a_row_equal_the_same_row_given_once_for_each(kind: str, tmp_path: Path) -> None:
    model, layout = built(save_backbone(kind, tmp_path))
    batch = several_targets(layout)
    there = batch["labels"] != IGNORED
    owners = there.nonzero()[:, 0]
    assert len(owners) > len(batch["input_ids"])
    repeated = {name: batch[name][owners] for name in ("input_ids", "attention_mask")}
    repeated |= {"decoder_input_ids": batch["decoder_input_ids"][there], "labels": batch["labels"][there]}
    torch.testing.assert_close(model(**batch).loss, model(**repeated).loss, **ROUNDING)


def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_split_up(checkpoint: Path) -> None:
    model, layout = built(checkpoint)
    task = NextItem(sequences(), layout, seed=0)
    count = len(task.lengths)
    found = []
    for parts in (1, 2, 5, count):
        model.zero_grad()
        loss = torch.zeros(())
        for examples in np.array_split(np.arange(count), parts):
            part = model(**as_tensors(task.batch(0, examples)), num_items_in_batch=torch.tensor(count)).loss
            part.backward()
            loss += part.detach()
        found.append(
            (
                loss,
                {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None},
            )
        )
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], **ROUNDING)
        assert gradients.keys() == found[0][1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_padding_changes_no_score(checkpoint: Path) -> None:
    model, layout = built(checkpoint)
    histories, users = [np.array([1, 2]), np.array([3, 4, 5, 6, 7, 8])], np.array([1, 2])
    together = as_tensors(layout.encode_histories(histories, users))
    alone = as_tensors(layout.encode_histories(histories[:1], users[:1]))
    with torch.no_grad():
        torch.testing.assert_close(model(**together).logits[:1], model(**alone).logits, **ROUNDING)


def test_user_rows_change_the_input_and_are_never_scored(checkpoint: Path) -> None:
    model, layout = built(checkpoint)
    batch = next_items(layout)
    del batch["labels"]
    with torch.no_grad():
        before = model(**batch).logits
        assert before.shape[1] == ITEMS
        id_tokens_of(model).user_in.weight[1:].neg_()
        after = model(**batch).logits
    known = batch["input_ids"][:, 0] > layout.first_user_id
    assert known.any()
    assert (before - after).abs().max(dim=1).values[known].min() > 1e-4
    assert torch.equal(before[~known], after[~known])


def test_gradients_reach_the_rows_that_were_used_and_no_other(checkpoint: Path) -> None:
    model, layout = built(checkpoint, tie=False)
    batch = as_tensors(layout.encode_histories([np.array([2, 5]), np.array([7])], np.array([3, 0])))
    model(**batch, labels=torch.tensor([1, 1])).loss.backward()
    rows = id_tokens_of(model)
    moved = {
        name: table.grad.abs().sum(dim=1).nonzero().flatten().tolist()
        for name, table in (
            ("items", rows.item_in.weight),
            ("users", rows.user_in.weight),
            ("out", rows.item_out.weight),
        )
    }
    assert moved == {"items": [2, 5, 7], "users": [0, 3], "out": list(range(ITEMS))}


def test_tied_rows_are_one_parameter_and_the_scale_is_learned() -> None:
    rows = id_rows(tie=True)
    assert rows.tied and rows.item_out.weight is rows.item_in.weight
    hidden = torch.randn(3, WIDTH)
    torch.testing.assert_close(rows.item_out(hidden), 0.7 * hidden @ rows.item_in.weight.T, **ROUNDING)
    torch.testing.assert_close(rows.item_out.rows(), 0.7 * rows.item_in.weight, **ROUNDING)
    rows.item_out(hidden).sum().backward()
    assert rows.item_out.scale is not None and rows.item_out.scale.grad.abs() > 0
    own = id_rows(tie=False)
    assert not own.tied and own.item_out.scale is None
    assert sorted(name for name, _ in own.named_parameters()) == [
        "item_in.weight",
        "item_out.weight",
        "user_in.weight",
    ]


def test_scores_are_fp32_on_a_bf16_backbone_also_under_autocast(one_checkpoint: Path) -> None:
    model, tokenizer = load_backbone(str(one_checkpoint), dtype=torch.bfloat16)
    layout = prompt_layout(tokenizer, vocabulary(), max_history=6)
    model.add_id_tokens(id_rows(tie=True), layout.base)
    batch = next_items(layout)
    del batch["labels"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.eval()(**batch).logits
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())  # not bf16 numbers in fp32 clothes


# --- LoRA -------------------------------------------------------


def adapted(folder: Path) -> tuple[nn.Module, PromptLayout]:
    model, layout = built(folder)
    return add_lora(model, r=2, alpha=4, dropout=0.0, targets=None, base_name=str(folder), revision=None), layout


def test_adapters_start_silent(checkpoint: Path) -> None:
    plain, layout = built(checkpoint)
    batch = next_items(layout)
    lora, _ = adapted(checkpoint)
    torch.testing.assert_close(lora.eval()(**batch).loss, plain(**batch).loss, **ROUNDING)


def test_only_adapters_and_id_rows_train_and_the_backbone_stays_bit_for_bit(checkpoint: Path) -> None:
    model, layout = adapted(checkpoint)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "id_tokens.modules_to_save" in name for name in trainable)
    for part in ("lora_A", "lora_B", "item_in", "user_in", "item_out.scale"):
        assert any(part in name for name in trainable), part
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.05)
    batch, losses = next_items(layout), []
    for _ in range(5):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    moved = before.keys() - same
    assert all("lora_" in name or "id_tokens.modules_to_save" in name for name in moved)
    assert trainable <= moved
    # … and what did not move is what the checkpoint's file says, head included.
    file = load_file(checkpoint / "model.safetensors")
    inner = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
    }
    assert all(torch.equal(inner[name], value) for name, value in file.items())


def test_peft_keeps_no_second_copy_of_the_rows(one_checkpoint: Path) -> None:
    model, _ = adapted(one_checkpoint)
    wrapper = model.base_model.model.id_tokens
    assert wrapper.original_module.item_in.weight.shape == (0, WIDTH)
    assert wrapper.original_module.user_in.weight.shape == (0, WIDTH)
    tables = [value for name, value in model.named_parameters() if "id_tokens" in name and value.dim() == 2]
    assert sum(table.numel() for table in tables) == (ITEMS + USERS + 1) * WIDTH
    assert id_tokens_of(model).item_in.num_embeddings == ITEMS
    assert unwrapped(model) is model.get_base_model()


# --- loading -------------------------------------------------------


def published(folder: Path) -> dict[str, Tensor]:
    """A checkpoint in the form of google/flan-t5-small: its config's fields, its file's tensor names."""
    torch.manual_seed(3)
    tokenizer = bare_tokenizer("t5")
    size = len(tokenizer) + 28
    values = {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 32, "d_kv": 8, "d_model": WIDTH,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
        "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 2, "num_heads": 2, "num_layers": 2, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "task_specific_params": {
            "summarization": {"early_stopping": True, "max_length": 200, "prefix": "summarize: "},
        },
        "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True, "vocab_size": size,
    }  # fmt: skip
    tensors = {
        name: value.clone()
        for name, value in T5ForConditionalGeneration(T5Config(**values)).state_dict().items()  # type: ignore[arg-type]
    }
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    tensors["lm_head.weight"] = torch.randn(size, WIDTH)
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    generation = {
        "_from_model_config": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation | {"transformers_version": "4.27.0.dev0"}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def test_a_checkpoint_in_the_published_flan_t5_form_loads_bit_for_bit(tmp_path: Path) -> None:
    tensors = published(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.get_encoder().embed_tokens.weight is model.get_input_embeddings().weight
    assert model.config.scale_decoder_outputs is False
    model.tie_weights()  # as transformers, PEFT and accelerate may at any time; stock T5 would lose its head
    assert torch.equal(model.get_output_embeddings().weight, tensors["lm_head.weight"])


def test_every_weight_is_that_of_the_file(checkpoint: Path) -> None:
    model, _ = load_backbone(str(checkpoint))
    state, file = model.state_dict(), load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in file.items())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == ("lm_head.weight" not in file)
    if "lm_head.weight" in file:
        assert not torch.equal(file["lm_head.weight"], file["shared.weight"])


def test_dtype_dropout_and_random_weights_are_as_asked_for(checkpoint: Path) -> None:
    model, _ = load_backbone(str(checkpoint), dtype=torch.bfloat16, dropout=0.37)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert 0.37 in {module.p for module in model.modules() if isinstance(module, nn.Dropout)} or (
        model.config.to_dict().get("dropout", None) == 0.37
    )
    fresh, _ = load_backbone(str(checkpoint), init="random")
    old = load_file(checkpoint / "model.safetensors")
    table = "model.shared.weight" if model.config.model_type == "bart" else "shared.weight"
    assert fresh.state_dict()[table].shape == old[table].shape
    assert not torch.equal(fresh.state_dict()[table], old[table])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1 in the environment; a connection would fail the test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError(f"went to the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["t5-mini", "bart-micro"])
def test_a_fresh_backbone_scores_by_the_row_of_the_last_item(name: str) -> None:
    """Whatever the history before it; on T5, whose positions add nothing, in the order of the rows' products with it."""
    model, tokenizer = load_backbone(name, init="random", dropout=0.0)
    layout = prompt_layout(tokenizer, vocabulary(), max_history=6)
    rows = nn.functional.normalize(torch.randn(ITEMS, model.config.d_model), dim=1)
    model.add_id_tokens(IdTokens(rows, torch.zeros(USERS + 1, model.config.d_model), None), layout.base)
    histories = [np.array([4, 2, 7]), np.array([1, 3, 7]), np.array([7, 1])]
    batch = as_tensors(layout.encode_histories(histories, np.array([1, 2, 3])))
    with torch.no_grad():
        same, too, other = model.eval()(**batch).logits
    assert torch.allclose(same, too, atol=1e-5) and not torch.allclose(same, other, atol=1e-2)
    if name == "t5-mini":
        assert same.argsort().tolist() == (rows @ rows[7]).argsort().tolist()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["t5-micro", "bart-micro"])
def test_a_named_geometry_comes_with_a_tokenizer_that_fits(name: str) -> None:
    model, tokenizer = load_backbone(name, init="random")
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert (model.config.pad_token_id, model.config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    with pytest.raises(ConfigError, match="random"):
        load_backbone(name)


@pytest.mark.usefixtures("no_network")
def test_a_backbone_that_is_not_there_is_a_config_error_that_says_what_to_give(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), str(tmp_path), "nobody/no-such-model"):
        with pytest.raises(ConfigError) as caught:
            load_backbone(name)
        (problem,) = caught.value.problems
        assert problem.startswith(f"backbone: {name!r}")
        assert "google/flan-t5-small" in problem and "t5-micro" in problem


@pytest.mark.usefixtures("no_network")
def test_a_model_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"type 'gpt2'.*t5, mt5, bart.*Flan-T5"):
        load_backbone(str(tmp_path))


@pytest.mark.usefixtures("no_network")
def test_of_several_shards_the_damaged_ones_are_named(one_checkpoint: Path, tmp_path: Path) -> None:
    T5ForConditionalGeneration.from_pretrained(one_checkpoint).save_pretrained(tmp_path, max_shard_size="8KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((one_checkpoint / name).read_bytes())
    load_backbone(str(tmp_path))
    first, _, third, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    third.write_bytes(b"?" * 1000)
    with pytest.raises(ConfigError) as caught:
        load_backbone(str(tmp_path))
    assert [problem.split(" is damaged")[0] for problem in caught.value.problems] == [
        f"backbone: {first}", f"backbone: {third}",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_network")
def test_missing_or_broken_parts_of_a_checkpoint_are_config_errors(one_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((one_checkpoint / name).read_bytes())
    with pytest.raises(ConfigError, match="no weights that load"):
        load_backbone(str(tmp_path))
    whole = (one_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged \(.*\): fetch it again"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="no tokenizer that loads"):
        load_backbone(str(tmp_path))


# --- id words -------------------------------------------------------


def tokenizer_of(kind: str, shared_data: Path) -> PreTrainedTokenizerBase:
    if kind == "t5-real":
        return AutoTokenizer.from_pretrained(shared_data / "t5-tokenizer")
    return bare_tokenizer(kind)


@pytest.mark.parametrize("kind", ["t5", "bart", "t5-real"])
def test_text_becomes_the_ids_of_training_with_and_without_spaces(kind: str, shared_data: Path, tmp_path: Path) -> None:
    tokenizer, vocab = tokenizer_of(kind, shared_data), vocabulary(items=120, users=30)
    layout = prompt_layout(tokenizer, vocab, max_history=8)
    add_id_words(tokenizer, vocab)
    assert len(tokenizer) == layout.vocab_size
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)

    random = np.random.default_rng(0)
    histories = [random.integers(0, 120, length) for length in (0, 1, 2, 5, 8, 12)] + [np.array([1, 11, 111, 0, 100])]
    users = np.array([0, 1, 30, 5, 12, 3, 10])
    expected = layout.encode_histories(histories, users)
    mask = tokenizer.convert_ids_to_tokens(layout.mask_ids[0])
    words, user_words = vocab.item_tokens, vocab.user_tokens
    for row, (history, user) in enumerate(zip(histories, users, strict=True)):
        text = [user_words[user], *(words[item] for item in history[-8:]), mask]
        ids = expected["input_ids"][row][expected["attention_mask"][row] == 1].tolist()
        for reader in (tokenizer, saved):
            for joint in ("", " ", "  "):
                assert reader(joint.join(text))["input_ids"] == ids
        # Item words are not special: they survive decoding without special tokens, which drops mask and end.
        assert (
            re.findall("<[a-z]+_[0-9]+>|<user_unknown>", tokenizer.decode(ids, skip_special_tokens=True)) == text[:-1]
        )


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_tokenizer_that_has_id_words_is_refused(kind: str) -> None:
    tokenizer = bare_tokenizer(kind)
    add_id_words(tokenizer, vocabulary())
    for again in (vocabulary(), vocabulary(items=ITEMS + 3), vocabulary(items=2, users=1)):
        with pytest.raises(ConfigError, match="already has item or user tokens"):
            add_id_words(tokenizer, again)


def test_a_tokenizer_without_mask_is_refused() -> None:
    tokenizer = bare_tokenizer("bart")
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="lacks a mask"):
        prompt_layout(tokenizer, vocabulary(), max_history=3)
