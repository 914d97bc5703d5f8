"""The behaviour of transformers, PEFT, bitsandbytes and evaluate that genrec_llm is built around.

Each test pins one silent fault of the installed libraries. A failure here is no fault of ours: an update has
removed the trap, so that code of ours can become simpler, or has changed it, so that our answer to it has to
be looked at again. The docstring of the test says what the trap is, where our answer lives and what to do.

The common answer: the new rows live in our own `IdTokens` module (genrec_llm/model.py), the backbone's
matrices are never resized, tied or trained, and an exported T5 is written with `tie_word_embeddings=false`
(genrec_llm/export.py).

Measured with transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, deepspeed 0.19.8, bitsandbytes 0.50.2,
evaluate 0.4.6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

VOCABULARY = 60
START = 3
NEW_TOKENS = [55, 56, 57]
INPUT = torch.tensor([[55, 56, 7, 1]])
LABELS = torch.tensor([[57, 56, 1]])
ROUNDING = 1e-4  # fp32 logits of size 1 to 20, summed in another order; the faults below move them by 0.01 and more


class UntiedT5(T5ForConditionalGeneration):
    """The mend of traps 1 and 2: the inputs stay tied to `shared`, the checkpoint's head stays its own."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def t5_config(**changes: object) -> T5Config:
    """A T5 small enough to build in milliseconds, without dropout."""
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": START,
    }
    return T5Config(**(values | changes))


def tiny_t5(**changes: object) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(t5_config(**changes)).eval()


@pytest.fixture(scope="module")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Flan-T5's: `shared` and `lm_head` differ, its config says it is untied."""
    source = tiny_t5(tie_word_embeddings=False)
    weights = {name: value.clone() for name, value in source.state_dict().items() if "embed_tokens" not in name}
    weights["lm_head.weight"] = torch.randn(VOCABULARY, 16)
    config = source.config.to_dict() | {
        "tie_word_embeddings": False,
        "architectures": ["T5ForConditionalGeneration"],
    }
    del config["scale_decoder_outputs"]  # unknown to the versions that wrote the published checkpoints

    folder = tmp_path_factory.mktemp("untied_t5")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def right_logits(untied_checkpoint: Path) -> torch.Tensor:
    """The logits of the untied checkpoint, with its head applied by hand."""
    source = tiny_t5(tie_word_embeddings=False)
    head = load_file(untied_checkpoint / "model.safetensors")["lm_head.weight"]
    with torch.no_grad():
        encoded = source.encoder(input_ids=INPUT).last_hidden_state
        decoder_input = source.prepare_decoder_input_ids_from_labels(LABELS)
        return source.decoder(input_ids=decoder_input, encoder_hidden_states=encoded).last_hidden_state @ head.T


def logits(model: torch.nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device  # bitsandbytes puts a model on the GPU where there is one
    with torch.no_grad():
        return model.eval()(input_ids=INPUT.to(device), labels=LABELS.to(device)).logits.cpu()


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


# 1. Tied and untied T5


def test_t5_config_turns_tying_on_whatever_is_asked() -> None:
    """Trap 1: `T5Config(tie_word_embeddings=False)` is stored as True; `scale_decoder_outputs` remembers it.

    Our answer: genrec_llm/backbone.py looks for `lm_head.weight` in the checkpoint instead of asking the config.
    When this fails the trap is gone: read the flag of the config and drop that look and the subclass.
    """
    config = t5_config(tie_word_embeddings=False)

    assert config.tie_word_embeddings is True
    assert config.scale_decoder_outputs is False
    assert t5_config().scale_decoder_outputs is True


def test_untied_checkpoint_loads_with_its_own_head(untied_checkpoint: Path, right_logits: torch.Tensor) -> None:
    """The part of trap 1 that works: a plain load keeps the head, since both tables are found and differ.

    When this fails there is a new form of the trap: every load of an untied T5 needs the subclass.
    """
    model = T5ForConditionalGeneration.from_pretrained(untied_checkpoint)

    assert distance(logits(model), right_logits) < ROUNDING


def test_resizing_an_untied_t5_destroys_its_head(untied_checkpoint: Path, right_logits: torch.Tensor) -> None:
    """Trap 1(a): `resize_token_embeddings` ties again and replaces the pretrained head by the input table.

    Our answer: rows of items and users live in `IdTokens` (genrec_llm/model.py); no model is ever resized.
    When this fails the trap is gone: nothing breaks, but the export may then resize a model.
    """
    model = T5ForConditionalGeneration.from_pretrained(untied_checkpoint)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)

    assert model.lm_head.weight is model.shared.weight
    assert distance(logits(model)[..., :VOCABULARY], right_logits) > 1


ZERO3_LOAD = """
import json, os, sys
import deepspeed, torch
from transformers import T5ForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

checkpoint, rendezvous = sys.argv[1:]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of g++; gloo suffices
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
active = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})

class UntiedT5(T5ForConditionalGeneration):
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

heads = {}
for cls in (T5ForConditionalGeneration, UntiedT5):
    model = cls.from_pretrained(checkpoint)
    assert hasattr(model.shared.weight, "ds_id"), "ZeRO-3 did not partition the model"
    with deepspeed.zero.GatheredParameters([model.lm_head.weight]):
        heads[cls.__name__] = model.lm_head.weight.tolist()
print(json.dumps(heads), flush=True)
os._exit(0)  # gloo can abort at interpreter exit after all work is done
"""


def test_zero3_ties_an_untied_t5_while_loading(untied_checkpoint: Path, tmp_path: Path) -> None:
    """Trap 1(b): under ZeRO-3 the two partitioned, empty tables compare as equal, so loading ties them.

    Our answer: the subclass of genrec_llm/model.py, whose `_tied_weights_keys` leave the head out.
    When the stock half fails the trap is gone: once 1(a) and trap 2 are gone as well, drop the subclass. When
    the subclass half fails, load outside the ZeRO-3 configuration until another mend is found.
    """
    pytest.importorskip("deepspeed")
    finished = subprocess.run(
        [sys.executable, "-c", ZERO3_LOAD, str(untied_checkpoint), str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    )
    assert finished.returncode == 0, finished.stderr
    heads = json.loads(finished.stdout.splitlines()[-1])
    weights = load_file(untied_checkpoint / "model.safetensors")

    assert torch.equal(torch.tensor(heads["T5ForConditionalGeneration"]), weights["shared.weight"])
    assert torch.equal(torch.tensor(heads["UntiedT5"]), weights["lm_head.weight"])


def test_passing_the_flag_leaves_the_inputs_random(untied_checkpoint: Path, right_logits: torch.Tensor) -> None:
    """Trap 1(c): `from_pretrained(..., tie_word_embeddings=False)` unties encoder and decoder as well.

    Our answer: genrec_llm/backbone.py never passes the flag; it chooses the subclass.
    When this fails the trap is gone: pass the flag and drop the subclass, if 1(a) and 1(b) are gone as well.
    """
    model, report = T5ForConditionalGeneration.from_pretrained(
        untied_checkpoint, tie_word_embeddings=False, output_loading_info=True
    )

    assert report["missing_keys"] == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert not torch.equal(model.encoder.embed_tokens.weight, model.shared.weight)
    assert not torch.equal(model.decoder.embed_tokens.weight, model.encoder.embed_tokens.weight)
    assert distance(logits(model), right_logits) > 1


def test_the_untied_subclass_keeps_head_and_inputs(untied_checkpoint: Path, right_logits: torch.Tensor) -> None:
    """The mend of trap 1 that genrec_llm/model.py uses; it keeps the head even through a resize.

    When this fails there is a new form of the trap: untied backbones train and export wrongly until it is
    mended.
    """
    model = UntiedT5.from_pretrained(untied_checkpoint)
    assert distance(logits(model), right_logits) < ROUNDING

    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert distance(logits(model)[..., :VOCABULARY], right_logits) < ROUNDING
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight


def test_an_untied_t5_is_saved_as_tied(untied_checkpoint: Path, right_logits: torch.Tensor, tmp_path: Path) -> None:
    """Trap 1, on saving: the config is written with `tie_word_embeddings: true`, which transformers 4 obeys.

    (transformers 4.57.3 loads such a file with the head tied, logits off by 12 here; written as false it is
    right.)
    Our answer: genrec_llm/export.py writes `tie_word_embeddings` and `scale_decoder_outputs` both false.
    When the first assertion fails the trap is gone: drop that correction. When the last one fails, exported
    T5s are scaled wrongly by the installed version.
    """
    UntiedT5.from_pretrained(untied_checkpoint).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True

    exported = config | {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    (tmp_path / "config.json").write_text(json.dumps(exported))
    assert distance(logits(T5ForConditionalGeneration.from_pretrained(tmp_path)), right_logits) < ROUNDING


# 2. Training rows of an untied T5 through PEFT


def adapted(base: PreTrainedModel, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"], **settings))


def take_three_steps(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=INPUT, labels=LABELS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("model_class", "flag", "inputs_move", "head"),
    [
        (T5ForConditionalGeneration, True, True, "overwritten by the input rows"),
        (T5ForConditionalGeneration, False, False, "trained"),
        (UntiedT5, False, False, "trained"),
        (UntiedT5, True, True, "trained"),
    ],
)
def test_trainable_token_indices_reach_both_tables_in_one_case_only(
    untied_checkpoint: Path,
    model_class: type[T5ForConditionalGeneration],
    flag: bool,
    inputs_move: bool,
    head: str,
) -> None:
    """Trap 2: `trainable_token_indices` for both tables works with the subclass and the flag left true only.

    With the stock class the head silently takes the input rows, with the flag false the input rows never
    move, although they are listed as trainable.
    Our answer: PEFT trains LoRA alone, the rows are `IdTokens` (genrec_llm/model.py).
    When a wrong case works the trap is gone: that alone is no reason to change, our rows are faster as well.
    When the last case changes, only docs and FACTS.md are concerned.
    """
    base = model_class.from_pretrained(untied_checkpoint)
    base.config.tie_word_embeddings = flag
    model = adapted(base, trainable_token_indices={"shared": NEW_TOKENS, "lm_head": NEW_TOKENS})
    take_three_steps(model)
    merged = model.merge_and_unload()
    before = load_file(untied_checkpoint / "model.safetensors")

    moved = distance(merged.encoder.embed_tokens.weight[NEW_TOKENS], before["shared.weight"][NEW_TOKENS])
    assert (moved > 0) == inputs_move
    head_rows = merged.lm_head.weight[NEW_TOKENS]
    assert torch.equal(head_rows, merged.shared.weight[NEW_TOKENS]) == (head == "overwritten by the input rows")
    assert distance(head_rows, before["lm_head.weight"][NEW_TOKENS]) > 0


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, UntiedT5])
def test_modules_to_save_on_shared_never_trains_the_inputs(
    untied_checkpoint: Path, model_class: type[T5ForConditionalGeneration]
) -> None:
    """Trap 2: PEFT trains a full copy of `shared`, but encoder and decoder go on reading the old table.

    Our answer: `modules_to_save` names `id_tokens` alone (genrec_llm/model.py), which our own forward reads.
    When this fails the trap is gone; our rows stay, since the copy is the whole vocabulary.
    """
    model = adapted(model_class.from_pretrained(untied_checkpoint), modules_to_save=["shared"])
    copy = model.base_model.model.shared.modules_to_save["default"].weight
    take_three_steps(model)

    assert copy.requires_grad and copy.shape == (VOCABULARY, 16)
    assert copy.grad is None
    before = load_file(untied_checkpoint / "model.safetensors")["shared.weight"]
    assert torch.equal(model.merge_and_unload().encoder.embed_tokens.weight, before)


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, UntiedT5])
def test_modules_to_save_on_embed_tokens_lets_the_copies_drift_apart(
    untied_checkpoint: Path, model_class: type[T5ForConditionalGeneration]
) -> None:
    """Trap 2: encoder and decoder each train a copy of their own; the merged model has three input tables.

    The merged model is right in memory and through transformers 5, which finds three tables and ties none;
    whatever knows one input table only (transformers 4.57.3: logits off by 0.66 here) reads `shared`, which
    has learned nothing.
    Our answer: as above. When this fails the trap is gone; nothing of ours has to change.
    """
    model = adapted(model_class.from_pretrained(untied_checkpoint), modules_to_save=["embed_tokens"])
    take_three_steps(model)
    trained = logits(model)
    merged = model.merge_and_unload()

    assert not torch.equal(merged.encoder.embed_tokens.weight, merged.decoder.embed_tokens.weight)
    assert torch.equal(merged.shared.weight, load_file(untied_checkpoint / "model.safetensors")["shared.weight"])
    assert distance(logits(merged), trained) < ROUNDING


def test_merging_trained_tokens_of_embed_tokens_changes_the_model(untied_checkpoint: Path) -> None:
    """Trap 2: `trainable_token_indices` on `embed_tokens` merges two sets of rows into one shared table.

    Our answer: as above. When this fails the trap is gone; nothing of ours has to change.
    """
    model = adapted(UntiedT5.from_pretrained(untied_checkpoint), trainable_token_indices={"embed_tokens": NEW_TOKENS})
    take_three_steps(model)
    trained = logits(model)

    assert distance(logits(model.merge_and_unload()), trained) > 0.01


# 3. The Trainer's loss


def trainer(model: T5ForConditionalGeneration, folder: Path, batch: int, accumulation: int) -> Seq2SeqTrainer:
    """One step over the same four examples, however they are split into batches."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        optim="sgd",
        max_grad_norm=1e9,
    )
    examples = [{"input_ids": [5 + i, 6, 7, 1], "labels": [8 + i, 9, 1]} for i in range(4)]
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=examples)


@pytest.mark.parametrize(("declared", "factor"), [(None, 4), (False, 1)])
def test_accumulation_multiplies_the_loss_of_stock_t5(tmp_path: Path, declared: bool | None, factor: int) -> None:
    """Trap 3: the Trainer takes T5's **kwargs for support of `num_items_in_batch`, and divides nothing.

    Our answer: `accepts_loss_kwargs` is true on our subclass because its forward divides by the global number
    of targets itself (genrec_llm/model.py). A stock T5 in a comparison needs `accepts_loss_kwargs = False`.
    When the first case fails the trap is gone: drop that line from the rivals. When the second fails, the
    attribute has lost its meaning: check our own loss first (tests/test_spine.py).
    """
    logged = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = tiny_t5()
        if declared is not None:
            model.accepts_loss_kwargs = declared
        one_step = trainer(model, tmp_path, batch, accumulation)
        one_step.train()
        logged.append(one_step.state.log_history[0])

    whole, accumulated = logged
    assert accumulated["loss"] == pytest.approx(factor * whole["loss"], rel=1e-3)
    assert accumulated["grad_norm"] == pytest.approx(factor * whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("declared", "factor"), [(None, 2), (False, 1)])
def test_world_size_multiplies_the_loss_of_stock_t5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: bool | None, factor: int
) -> None:
    """Trap 3 on two processes: the Trainer multiplies by the world size what T5 never divided by it.

    The world size is pretended, as only the arithmetic of `compute_loss` is at stake. Our answer and what to
    do: as in the test above; our forward counts on this factor, because data parallelism averages the
    gradients.
    """
    model = tiny_t5()
    if declared is not None:
        model.accepts_loss_kwargs = declared
    loss_of = trainer(model, tmp_path, 4, 1).compute_loss
    batch = {"input_ids": INPUT, "labels": LABELS}
    single = loss_of(model, dict(batch), num_items_in_batch=torch.tensor(6)).item()

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    assert loss_of(model, dict(batch), num_items_in_batch=torch.tensor(6)).item() == pytest.approx(factor * single)


# 4. What PEFT saves


@pytest.mark.parametrize(
    ("from_disk", "save_embedding_layers", "saved"),
    [(True, "auto", {"shared", "lm_head"}), (True, False, set()), (False, "auto", set())],
)
def test_auto_saves_both_tables_once_a_base_from_disk_has_another_vocabulary(
    tmp_path: Path, from_disk: bool, save_embedding_layers: str | bool, saved: set[str]
) -> None:
    """Trap 4: "auto" adds both full tables when the vocabulary differs from that of the base on disk.

    A base that was built in memory has no such config: the same resized rows are then silently not saved.
    Our answer: `config.vocab_size` stays the base's in training, because the Trainer's checkpoints cannot
    pass False (Trainer._save); genrec_llm/export.py passes `save_embedding_layers=False`.
    When this fails the trap is gone or changed: look into an exported adapter for anything but LoRA and
    `id_tokens`.
    """
    base = tiny_t5()
    if from_disk:
        base.save_pretrained(tmp_path / "base")
        base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    adapted(base).save_pretrained(tmp_path / "adapter", save_embedding_layers=save_embedding_layers)

    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in names if "lora_" not in name} == saved


def test_auto_saves_no_table_while_the_vocabulary_is_unchanged(tmp_path: Path) -> None:
    """The part of trap 4 that our checkpoints rely on, as the Trainer always saves with "auto".

    When this fails every checkpoint carries the backbone's tables: override `_save` in genrec_llm/trainer.py.
    """
    tiny_t5().save_pretrained(tmp_path / "base")
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")

    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


# 5. Ranking through generate

ITEMS = torch.arange(20, VOCABULARY)
NO_ITEMS = list(range(20))
TOP = 20
HISTORIES = torch.tensor([[21, 33, 45, 1], [50, 51, 22, 1]])
PROMPTS = torch.tensor([[START, 45], [START, 22]])


def tiny_bart(forced_eos_token_id: int | None) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        init_std=1.0,
        decoder_start_token_id=START,
        forced_eos_token_id=forced_eos_token_id,
    )
    return BartForConditionalGeneration(config).eval()


def seq2seq(family: str) -> PreTrainedModel:
    return tiny_t5() if family == "t5" else tiny_bart(forced_eos_token_id=None)


def one_step_top(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        scores = model(input_ids=HISTORIES, decoder_input_ids=PROMPTS).logits[:, -1, ITEMS]
    return ITEMS[scores.topk(TOP).indices]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_generate_with_one_new_token_is_the_one_step_top(family: str) -> None:
    """The part of trap 5 that works, as exports promise: `generate` gives the one-step top 20, in order.

    It needs a decoder prompt that begins with `decoder_start_token_id` (nothing is added to it),
    `max_new_tokens=1` and `suppress_tokens`; the item is the last column. genrec_llm/export.py writes these
    into `generation_config`.
    When this fails the model cards' snippet is wrong: mend the export and genrec_llm/decoding.py before a
    release.
    """
    model = seq2seq(family)
    found = model.generate(
        HISTORIES,
        decoder_input_ids=PROMPTS,
        num_beams=TOP,
        num_return_sequences=TOP,
        max_new_tokens=1,
        suppress_tokens=NO_ITEMS,
    )

    assert found.shape == (2 * TOP, 3)
    assert torch.equal(found[:, -1].view(2, TOP), one_step_top(model))


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(("renormalised", "right_order"), [(False, False), (True, True)])
def test_an_end_token_after_the_item_spoils_the_order(family: str, renormalised: bool, right_order: bool) -> None:
    """Trap 5: with item + EOS the beam adds the log-probability of EOS: the set is right, the order is not.

    Our answer: the target is one token and `max_new_tokens=1` (genrec_llm/decoding.py, genrec_llm/export.py).
    When the first case fails the trap is gone, which changes nothing for us.
    """
    model = seq2seq(family)
    allowed = {2: ITEMS.tolist(), 3: [model.config.eos_token_id]}
    found = model.generate(
        HISTORIES,
        decoder_input_ids=PROMPTS,
        num_beams=TOP,
        num_return_sequences=TOP,
        max_new_tokens=2,
        prefix_allowed_tokens_fn=lambda row, tokens: allowed[len(tokens)],
        renormalize_logits=renormalised,
    )
    items, expected = found[:, 2].view(2, TOP), one_step_top(model)

    assert torch.equal(items.sort().values, expected.sort().values)
    assert torch.equal(items, expected) == right_order


def test_bart_with_a_forced_end_token_cannot_rank() -> None:
    """Trap 5: BART forces EOS at the last position, the item's; transformers refuses to suppress it as well.

    Our answer: genrec_llm/export.py clears `forced_eos_token_id`. When this fails, look at what `generate`
    returns: without the refusal every "item" would be EOS.
    """
    model = tiny_bart(forced_eos_token_id=2)
    prompt = {"decoder_input_ids": PROMPTS, "max_new_tokens": 1}

    with pytest.raises(ValueError, match="forced_eos_token_id"):
        model.generate(HISTORIES, num_beams=TOP, num_return_sequences=TOP, suppress_tokens=NO_ITEMS, **prompt)
    assert (model.generate(HISTORIES, **prompt)[:, -1] == model.config.eos_token_id).all()


# 6. Merging into quantised weights


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.01, 100.0), (4, 0.1, 100.0), (32, 0.0, ROUNDING)])
def test_merging_into_quantised_weights_is_lossy(tmp_path: Path, bits: int, least: float, most: float) -> None:
    """Trap 6: `merge_and_unload` on an 8- or 4-bit base quantises the sum again, and the logits move.

    Our answer: genrec_llm/export.py merges into a freshly loaded bf16 or fp32 base.
    When a quantised case fails the trap is gone: merging in place would then save a second load of the base.
    """
    options = {}
    if bits < 32:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
        )
    tiny_t5(d_model=64, d_kv=32, d_ff=128, num_layers=2).save_pretrained(tmp_path)
    model = adapted(T5ForConditionalGeneration.from_pretrained(tmp_path, **options), init_lora_weights=False)
    with_adapter = logits(model)

    assert least <= distance(logits(model.merge_and_unload()), with_adapter) <= most


# 8. evaluate without a network

METRIC = """
{imports}

class HitRate(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        features = datasets.Features({{"predictions": number, "references": number}})
        return evaluate.MetricInfo(description="hits", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"hit_rate": sum(p == r for p, r in zip(predictions, references)) / len(references)}}
"""


@pytest.fixture
def offline_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`evaluate` without a network and with an empty module cache of its own."""
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    yield evaluate
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def write_metric(folder: Path, imports: str) -> str:
    script = folder / "hit_rate" / "hit_rate.py"
    script.parent.mkdir()
    script.write_text(METRIC.format(imports=imports))
    return str(script.parent)


def test_evaluate_finds_named_metrics_on_the_network_only(offline_evaluate) -> None:
    """Trap 8: `evaluate.load("accuracy")` downloads a script from the Hub.

    Our answer: genrec_llm/metrics.py needs nothing from the network.
    When this fails the trap is gone: evaluate ships its metrics, and ours could be compared with them in a
    test.
    """
    with pytest.raises((FileNotFoundError, ConnectionError)):
        offline_evaluate.load("accuracy")


def test_evaluate_loads_a_local_script_offline(offline_evaluate, tmp_path: Path) -> None:
    """The part of trap 8 that works. When this fails a local metric script can no longer be offered."""
    metric = offline_evaluate.load(
        write_metric(tmp_path, "import datasets\nimport evaluate"), cache_dir=str(tmp_path / "cache")
    )

    assert metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 5]) == {"hit_rate": 0.75}


def test_evaluate_cannot_read_two_imports_on_one_line(offline_evaluate, tmp_path: Path) -> None:
    """Trap 8: its parser takes `import a, b` for a package called "a,", and asks for its installation.

    Our answer: one import a line, as ruff's isort rules (I) and E401 keep it. When this fails the trap is
    gone.
    """
    with pytest.raises(ImportError, match="datasets,"):
        offline_evaluate.load(write_metric(tmp_path, "import datasets, evaluate"))


# 9. New tokens in the tokenizer


def test_sentinels_run_down_in_the_shipped_tokenizer_and_up_in_another(shared_data: Path) -> None:
    """Trap 9: `<extra_id_0>` is the last id of T5's tokenizer; one built from a list numbers them upwards.

    Our answer: genrec_llm/vocab.py looks each sentinel up and never computes its id.
    When this fails the numbering has changed: look-ups stay right, ids in old exports have to be compared.
    """
    shipped = AutoTokenizer.from_pretrained(shared_data / "t5-tokenizer")
    built = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], extra_ids=3)
    sentinels = [f"<extra_id_{number}>" for number in range(3)]

    assert len(shipped) == 32_100
    assert shipped.convert_tokens_to_ids(sentinels) == [32_099, 32_098, 32_097]
    assert built.convert_tokens_to_ids(sentinels) == [4, 5, 6]


@pytest.mark.parametrize(("special", "kept"), [(False, True), (True, False)])
def test_items_added_as_special_tokens_vanish_from_decoded_text(shared_data: Path, special: bool, kept: bool) -> None:
    """Trap 9: `skip_special_tokens=True`, the usual way to decode, drops items that were added as special.

    Our answer: genrec_llm/vocab.py adds items with `special_tokens=False`.
    When the first case fails there is a new form of the trap: decoded recommendations are empty.
    """
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "t5-tokenizer")
    first = len(tokenizer)
    tokenizer.add_tokens(["<item_0>", "<item_1>"], special_tokens=special)
    ids = tokenizer("<item_1> <item_0>").input_ids

    assert ids == [first + 1, first, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ("<item_1><item_0>" if kept else "")
