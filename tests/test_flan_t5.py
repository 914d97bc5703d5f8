"""Both stages with LoRA on a checkpoint of Flan-T5-small's published shape, and on the real one where there is network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config

from genrec_llm.model import GenRecUntiedT5

# config.json of google/flan-t5-small as published.
PUBLISHED = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}


def both_stages(backbone: str, data: Path, folder: Path) -> None:
    """Pretrain and finetune fifty steps each, merge, and let plain transformers answer."""
    common = (
        "--dataset", "movielens-100k", "--data-dir", str(data), "--backbone", backbone, "--max-history", "10",
        "--global-batch-size", "8", "--max-steps", "50", "--eval-strategy", "steps", "--eval-steps", "50",
        "--save-strategy", "steps", "--save-steps", "50", "--validation-users", "64",
    )  # fmt: skip
    tiny.run(tiny.launch_command("cpu", "pretrain", *common, "--output-dir", str(folder / "pretrain")), timeout=1200)
    output = tiny.run(
        tiny.launch_command(
            "cpu", "finetune", *common, "--output-dir", str(folder / "finetune"), "--from-run", str(folder / "pretrain")
        ),
        timeout=1200,
    )
    assert "weights and rows from" in output
    output = tiny.run([sys.executable, "recipes/merge.py", "--run", str(folder / "finetune")], timeout=600)
    assert "top-20 agreement 100.0%" in output

    layout = json.loads((folder / "finetune" / "merged" / "genrec.json").read_text())["prompt"]
    assert layout["base"] == 32100 and layout["mask_ids"][0] == 32099
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "finetune" / "merged").eval()
    item = layout["base"] + 7
    ids = torch.tensor([[layout["base"] + layout["num_items"], item, layout["mask_ids"][0], 1]])
    prompt = torch.tensor([[layout["mask_ids"][0], item]])
    found = model.generate(ids, decoder_input_ids=prompt, num_beams=10, num_return_sequences=10)[:, -1] - layout["base"]
    assert len(set(found.tolist())) == 10 and found.min() >= 0 and found.max() < layout["num_items"]


@pytest.mark.slow
def test_the_published_shape_with_the_real_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "flan-t5-small"
    base.mkdir()
    torch.manual_seed(0)
    weights = GenRecUntiedT5(T5Config(**PUBLISHED)).state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(PUBLISHED))
    for file in ("tokenizer.json", "tokenizer_config.json", "spiece.model"):
        shutil.copy(shared_data / "t5-tokenizer" / file, base / file)
    both_stages(str(base), shared_data, tmp_path)

    # Nothing of the checkpoint itself changed on the way to the merged model but what LoRA adapts and the new rows.
    merged = load_file(tmp_path / "finetune" / "merged" / "model.safetensors")
    assert torch.equal(merged["shared.weight"][:32100], weights["shared.weight"][:32100])
    assert torch.equal(merged["lm_head.weight"][:32100], weights["lm_head.weight"][:32100])
    adapted = ("SelfAttention.q", "SelfAttention.v", "EncDecAttention.q", "EncDecAttention.v")
    for name, value in weights.items():
        if "block" in name and not any(part in name for part in adapted):
            assert torch.equal(merged[name], value), name


@pytest.mark.hub
def test_the_real_flan_t5_small(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "OFFLINE", "0")
    both_stages("google/flan-t5-small", shared_data, tmp_path)
