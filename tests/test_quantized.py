"""LoRA on a quantised backbone, its merge into full precision, and 8-bit optimizers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import recipe
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.backbone import load_backbone, quantized
from genrec_llm.batching import as_tensors
from genrec_llm.build import Built, build_model
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError
from genrec_llm.loading import fingerprint, load_trained
from genrec_llm.model import GenRecUntiedT5
from genrec_llm.prediction import estimate
from genrec_llm.shape import Shape
from genrec_llm.tasks import NextItem
from genrec_llm.tokenizer import bare_tokenizer
from genrec_llm.trainer import GenRecTrainer, keep_rows_in_32_bits
from genrec_llm.workload import Run

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = ("8bit", "4bit")
ITEMS = 100
"""Rows of 64 numbers each: more than the 4,096 numbers from which bitsandbytes quantises the state of a tensor."""
RANK = 64
"""So that the adapters have 4,096 numbers."""
TOLERANCE = 2e-5
"""Largest difference of a trained value after ten steps in fp32: AdamW divides by small numbers."""
OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, and a base whose layers are as wide as a 4-bit kernel's block of 64."""
    folder = tmp_path_factory.mktemp("quantized")
    tiny.save_log(folder / "log.csv", items=ITEMS)
    torch.manual_seed(0)
    tokenizer = bare_tokenizer("t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=32, num_heads=2, d_ff=128, num_layers=2, num_decoder_layers=1
    )
    T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def data(home: Path) -> Data:
    return load_data(DataArguments(dataset=str(home / "log.csv")))


@pytest.fixture
def build(home: Path, data: Data, tmp_path: Path) -> Callable[..., tuple[Built, GenRecTrainingArguments]]:
    """Builds a model ready to train, with adapters of rank `RANK` and without dropout."""

    def built(kind: str | None, **training: Any) -> tuple[Built, GenRecTrainingArguments]:
        torch.manual_seed(0)
        args = GenRecTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, global_batch_size=16, learning_rate=1e-3,
            rows_learning_rate=3e-3, save_strategy="no", load_best_model_at_end=False, report_to="none",
            **({"eval_strategy": "no"} | training),
        )  # fmt: skip
        model = ModelArguments(
            backbone=str(home / "base"), quantization=kind, lora_r=RANK, dropout=0.0, lora_dropout=0.0
        )
        return build_model(model, args, data), args

    return built


def finetune(home: Path, out: Path, *arguments: object, stage: str = "finetune") -> Path:
    recipe(
        stage, "--dataset", home / "log.csv", "--backbone", home / "base", "--output-dir", out, "--use_cpu",
        "--disable_tqdm", "true", "--global-batch-size", 16, "--lora-r", RANK, "--learning-rate", "3e-3",
        *arguments,
    )  # fmt: skip
    return out


def batch_of(data: Data, built: Built) -> dict[str, Tensor]:
    chosen = data.held_out("validation")
    batch = as_tensors(built.layout.encode_histories(chosen.histories, chosen.users))
    return batch | {"labels": torch.from_numpy(chosen.targets)}


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def plain_weight(layer: nn.Module) -> Tensor:
    """What a quantised layer stands for: bitsandbytes' own dequantisation, or 8 bits times the row's scale."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.float() * scales[:, None] / 127


def backwards(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the trained tensors."""
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_weights_before_and_after_a_validation(
    build: Callable[..., Any], data: Data, kind: str
) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 loses the gradient of nf4 layers once they were asked without one."""
    (small, _), (plain, _) = build(kind), build(None)
    torch.manual_seed(1)
    for value in plain.model.parameters():
        if value.requires_grad and value.dim() == 2:
            nn.init.normal_(value, std=0.05)  # a fresh adapter's A has no gradient, since its B is zero
    theirs = dict(plain.model.named_parameters())
    with torch.no_grad():
        for name, value in small.model.named_parameters():
            if value.requires_grad:
                value.copy_(theirs[name])
        for name, layer in quantised_layers(small.model).items():
            plain.model.get_submodule(name).weight.copy_(plain_weight(layer))
    batch = batch_of(data, small)
    expected = backwards(plain.model, batch)
    assert expected.keys() == {name for name, value in small.model.named_parameters() if value.requires_grad}
    assert all(gradient.any() for gradient in expected.values())
    before = backwards(small.model, batch)
    small.model.eval()
    with torch.no_grad():
        small.model(**batch)
    after = backwards(small.model, batch)
    assert before.keys() == after.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(after[name], before[name], atol=0, rtol=0)
        torch.testing.assert_close(before[name], wanted, atol=1e-5, rtol=1e-3)  # sums in another order


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_rows_are_fp32_beside_layers_of_few_bits(build: Callable[..., Any], kind: str) -> None:
    for bf16 in (False, True):
        model = build(kind, bf16=bf16)[0].model
        dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
        for value in model.parameters():
            dtypes[value.requires_grad].add(value.dtype)
        rest = torch.bfloat16 if bf16 else torch.float32
        assert dtypes[True] == {torch.float32}
        assert dtypes[False] - {torch.float32} == {torch.int8 if kind == "8bit" else torch.uint8, rest} - {
            torch.float32
        }
        # Attention (q, k, v, o) and T5's wi, in 2 encoder layers and 1 decoder layer with cross-attention.
        assert len(quantised_layers(model)) == 2 * 5 + 9
        assert model.get_input_embeddings().weight.dtype == rest


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), [("8bit", 8.0625), ("4bit", 4.1274)])
def test_layers_of_a_mid_size_backbone_take_so_many_bits_a_weight(tmp_path: Path, kind: Any, bits: float) -> None:
    """8 bits and an fp32 scale a row of 512; nf4 and a scale of 8 bits a block of 64, with scales of their own."""
    tokenizer = bare_tokenizer("t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=512, d_kv=64, num_heads=8, d_ff=1024, num_layers=6, num_decoder_layers=6,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    GenRecUntiedT5(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_backbone(str(tmp_path), **quantized(kind, dtype=torch.float32, device="cpu"))
    layers = quantised_layers(model)
    weights = taken = 0
    for layer in layers.values():
        weights += layer.in_features * layer.out_features
        taken += layer.weight.nbytes
        if kind == "8bit":
            taken += layer.weight.SCB.nbytes
        else:
            state = layer.weight.quant_state
            taken += state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert len(layers) == 6 * 6 + 6 * 10
    assert 8 * taken / weights == pytest.approx(bits, abs=2e-3)


def test_the_documented_size_of_flan_t5_xl_follows_from_its_shape() -> None:
    config = T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = GenRecUntiedT5(config)
    whole = small = eight = 0.0
    for name, value in model.named_parameters():
        kept = value.dim() == 1 or any(
            part in name for part in ("shared", "lm_head", "relative_attention_bias", ".wo.")
        )
        whole += 2 * value.numel()
        small += value.numel() * (2 if kept else (4 + 8 / 64 + 32 / (64 * 256)) / 8)
        eight += value.numel() * 2 if kept else value.numel() + 4 * len(value)
    page = " ".join((tiny.REPOSITORY / "docs" / "ml_engineer.md").read_text().split())
    assert (
        f"{small / 1e9:.2f} GB in nf4 and {eight / 1e9:.2f} GB in 8 bits, where bf16 takes {whole / 1e9:.2f} GB" in page
    )
    assert "takes 4.13 bits in nf4 and 8.06 in 8 bits" in page
    shape = Shape.from_config(config.to_dict(), own_head=True)
    for kind, held in (("4bit", small), ("8bit", eight), (None, whole)):
        run = Run(items=1, user_rows=1, examples=1, bf16=True, quantization=kind)
        assert estimate(shape, run).largest["weights"] == pytest.approx(held, rel=1e-3)


# --- from training to a merged model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished QLoRA run, merged and evaluated."""
    out = finetune(home, tmp_path_factory.mktemp("run") / "qlora", "--quantization", "4bit", "--num-train-epochs", 2)
    recipe("merge", "--run", out)
    recipe("evaluate", "--run", out)
    return out


def test_the_run_says_that_its_base_was_quantised_and_names_the_full_precision_one(run: Path, home: Path) -> None:
    info = json.loads((run / "adapter" / "genrec.json").read_text())
    assert info["base_model"]["fingerprint"] == fingerprint(load_backbone(str(home / "base"))[0])
    assert info["training"][-1]["settings"]["quantization"] == "4bit"
    assert json.loads((run / "run.json").read_text())["arguments"]["model"]["quantization"] == "4bit"
    for kind in ("adapter", "merged"):
        assert "| precision | fp32, linear layers of the base in nf4" in (run / kind / "README.md").read_text()


def test_merged_weights_are_the_full_precision_base_plus_the_adapters(run: Path, home: Path) -> None:
    base, merged = load_file(home / "base" / "model.safetensors"), load_file(run / "merged" / "model.safetensors")
    adapters = load_file(run / "adapter" / "adapter_model.safetensors")
    changed = set()
    for name in adapters:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            added = adapters[name.replace("lora_A", "lora_B")] @ adapters[name] * (32 / RANK)
            torch.testing.assert_close(merged[f"{module}.weight"], base[f"{module}.weight"] + added)
            assert added.abs().max() > 1e-4
            changed.add(f"{module}.weight")
    assert len(changed) == 2 * (2 + 2)
    kept = [name for name in base if name not in changed and "shared" not in name]
    assert all(torch.equal(merged[name], base[name]) for name in kept)


def test_an_adapter_trained_on_quantised_weights_is_refused_on_another_base(
    run: Path, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "base", tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["encoder.block.0.layer.0.SelfAttention.q.weight"] *= 1.5
    save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="not the one it was trained on: its weights are others"):
        load_trained(run / "adapter", backbone=str(tmp_path / "other"))


def test_the_validation_of_training_stands_beside_that_of_the_merged_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = json.loads((run / "run.json").read_text())["finished"]["best"]
    report = json.loads((run / "evaluation" / "validation" / "report.json").read_text())
    assert report["model"]["trained_on"] == {
        "quantization": "4bit", "validation_ndcg@10": measured, "validation_users": 0,
    }  # fmt: skip
    merged = report["reports"][0]["metrics"]["NDCG@10"]["mean"]
    (line,) = re.findall(r"(?m)^Validation NDCG@10 .*", (run / "evaluation" / "validation" / "report.md").read_text())
    assert line == (
        f"Validation NDCG@10 on the 4bit weights of training {measured:.4f}, merged into float32 {merged:.4f} "
        f"({merged - measured:+.4f})."
    )
    recipe("merge", "--run", run)
    assert f"trained on 4bit weights, where validation NDCG@10 was {measured:.4f}" in capsys.readouterr().out


def test_nothing_stands_beside_an_evaluation_on_other_terms_than_training_has(run: Path) -> None:
    recipe("evaluate", "--run", run, "--keep-seen")
    assert "weights of training" not in (run / "evaluation" / "validation_seen-kept" / "report.md").read_text()


def test_a_quantised_finetuning_goes_on_from_a_pretraining_on_other_weights(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--max-steps", 2)
    first = finetune(home, tmp_path / "pretrain", "--quantization", "8bit", *short, stage="pretrain")
    capsys.readouterr()
    second = finetune(home, tmp_path / "finetune", "--quantization", "4bit", "--from-run", first, *short)
    assert "(pretrain, seed 0, trained on 8bit weights, validation NDCG@10" in capsys.readouterr().out
    stages = json.loads((second / "adapter" / "genrec.json").read_text())["training"]
    assert [stage["settings"]["quantization"] for stage in stages] == ["8bit", "4bit"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_quantisation_in_the_same_run_directory_is_refused(
    run: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, now in (((), "None"), (("--quantization", "8bit"), "8bit")):
        with pytest.raises(SystemExit):
            finetune(home, run, "--num-train-epochs", 2, *arguments)
        assert (
            f"was made with quantization 4bit, now it is {now}: choose another --output-dir" in capsys.readouterr().err
        )


def test_a_run_of_an_earlier_release_goes_on(home: Path, tmp_path: Path) -> None:
    """Its run.json does not have the keys."""
    out = finetune(home, tmp_path / "old", "--max-steps", 1)
    facts = json.loads((out / "run.json").read_text())
    for part, later in (
        ("model", "quantization"),
        ("model", "last_items_share"),
        ("training", "choose_last_items_share"),
    ):
        del facts["arguments"][part][later]
    (out / "run.json").write_text(json.dumps(facts))
    finetune(home, out, "--max-steps", 1)


def test_quantisation_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelArguments(quantization="2bit", tuning="full", backbone_init="random")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["quantization", "quantization"]
    assert "'2bit' is not one of 8bit, 4bit" in str(caught.value) and "use --tuning lora" in str(caught.value)
    with pytest.raises(ConfigError, match="adapters on a frozen backbone with random weights"):
        ModelArguments(quantization="4bit", backbone_init="random")


@pytest.mark.parametrize("sharing", ["zero3", "fsdp"])
def test_launches_that_share_weights_out_are_refused(
    build: Callable[..., Any], sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharing == "zero3":
        monkeypatch.setattr("genrec_llm.build.is_deepspeed_zero3_enabled", lambda: True)
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"quantization: 4bit .* launch with ddp or zero2, or leave quantization out"):
        build("4bit")


def test_without_bitsandbytes_training_says_what_to_install(
    build: Callable[..., Any], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, args = build(None, optim="adamw_8bit")
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"quantization: 4bit needs bitsandbytes.*pip install 'genrec-llm\[quant\]'"):
        build("4bit")
    trainer = trainer_of(built, args, data)
    with pytest.raises(ConfigError, match=r"optim: adamw_8bit needs a package.*pip install 'genrec-llm\[quant\]'"):
        trainer.create_optimizer()


# --- 8-bit optimizers -------------------------------------------------------------------------------------------------


def trainer_of(built: Built, args: GenRecTrainingArguments, data: Data) -> GenRecTrainer:
    task = NextItem(data.train, built.layout, seed=0)
    return GenRecTrainer(built.model, args, task=task, layout=built.layout, validation=data.held_out("validation"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_adapters_have_8_bits_and_those_of_rows_32(build: Callable[..., Any], data: Data, name: str) -> None:
    built, args = build(None, optim=name, max_steps=2, lr_scheduler_type="constant", warmup_steps=0)
    trainer = trainer_of(built, args, data)
    before = {key: value.detach().clone() for key, value in built.model.named_parameters() if value.requires_grad}
    trainer.train()
    optimizer: Any = trainer.optimizer.optimizer  # type: ignore[union-attr]
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert built.model.get_base_model().shared.weight.requires_grad is False
    for key, value in built.model.named_parameters():
        if not value.requires_grad:
            continue
        assert not torch.equal(value, before[key]), key
        rows = "id_tokens" in key
        assert rates[id(value)] == (3e-3 if rows else 1e-3)
        bits = torch.float32 if rows else torch.uint8
        assert value.numel() >= 4096 or key.endswith(("scale", "user_in.weight"))
        assert {optimizer.state[value][moment].dtype for moment in ("state1", "state2")} == {bits}, key


def test_the_bits_of_a_row_are_not_inherited_by_an_adapter_that_has_its_id() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    for rows, bits in (([id(weight)], torch.float32), ([], torch.uint8)):
        optimizer = bitsandbytes.optim.AdamW([weight], optim_bits=8)
        keep_rows_in_32_bits(optimizer, rows)
        weight.grad = torch.ones(64, 64)
        optimizer.step()
        assert optimizer.state[weight]["state1"].dtype == bits


def test_a_resumed_run_with_an_8_bit_optimizer_equals_the_uninterrupted_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "--quantization", "4bit", "--optim", "adamw_8bit", "--max-steps", 6, "--eval-strategy", "steps",
        "--eval-steps", 3, "--save-strategy", "steps", "--save-steps", 3, "--load-best-model-at-end", "false",
    )  # fmt: skip
    whole = finetune(home, tmp_path / "whole", *settings)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(stopped / name)
    capsys.readouterr()
    finetune(home, stopped, *settings)
    assert f"going on from {stopped / 'checkpoint-3'}" in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "id_tokens.safetensors"):
        one, other = (load_file(folder / "adapter" / name) for folder in (whole, stopped))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


# --- several processes ------------------------------------------------------------------------------------------------


def launched(home: Path, out: Path, strategy: str, kind: str, *extra: str) -> str:
    """Ten steps in two processes (or one), validated and saved in the middle."""
    return tiny.run(
        tiny.launch_command(
            strategy, "finetune", "--dataset", str(home / "log.csv"), "--backbone", str(home / "base"),
            "--output-dir", str(out), "--max-steps", "10", "--global-batch-size", "16", "--lora-r", "4",
            "--dropout", "0", "--lora-dropout", "0", "--quantization", kind, "--eval-strategy", "steps",
            "--eval-steps", "5", "--save-strategy", "steps", "--save-steps", "5", *extra,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("ddp", "4bit"),
        pytest.param("zero2", "4bit", marks=pytest.mark.slow),
        pytest.param("ddp", "8bit", marks=pytest.mark.slow),
        pytest.param("zero2", "8bit", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_adapter_of_one(home: Path, tmp_path: Path, strategy: str, kind: str) -> None:
    # In a process of its own, with as many threads: adapters with hardly a gradient amplify its last digits.
    launched(home, tmp_path / "one", "cpu", kind)
    output = launched(home, tmp_path / "two", strategy, kind)
    assert "world_size 2" in output and "an autograd kernel was not registered" not in output
    for name in ("adapter_model.safetensors", "id_tokens.safetensors"):
        one, two = (load_file(tmp_path / run / "adapter" / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=TOLERANCE, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_an_8_bit_optimizer_is_refused_under_deepspeed(home: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error: optim: adamw_8bit under DeepSpeed.*launch with ddp"):
        launched(home, tmp_path / "run", "zero2", "4bit", "--optim", "adamw_8bit")
