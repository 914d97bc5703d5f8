"""The forward contract, end to end: two ZeRO-2 processes → kill → resume → adapter → merge → plain `transformers`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from genrec_llm.batching import as_tensors
from genrec_llm.decoding import top_items
from genrec_llm.loading import load_trained

STEPS = 40
ADAPTER_FILES = ("adapter_model.safetensors", "id_tokens.safetensors")

ANSWER_WITHOUT_GENREC = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "genrec_llm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForSeq2SeqLM

folder, asked = sys.argv[1:]
model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
answers = []
for ids, prompt in json.loads(asked):
    found = model.generate(
        torch.tensor([ids]), decoder_input_ids=torch.tensor([prompt]), num_beams=20, num_return_sequences=20
    )
    answers.append(found[:, -1].tolist())
print(json.dumps(answers))
"""


def training_command(base: Path, log: Path, out: Path) -> list[str]:
    return tiny.launch_command(
        "zero2", "finetune", "--dataset", str(log), "--backbone", str(base), "--output-dir", str(out),
        "--max-steps", str(STEPS), "--global-batch-size", "16", "--lora-r", "2", "--rows-learning-rate", "3e-3",
        "--eval-strategy", "no", "--load-best-model-at-end", "false",
        "--save-strategy", "steps", "--save-steps", "4", "--save-total-limit", "20",
    )  # fmt: skip


def kill_after_first_checkpoint(command: list[str], out: Path) -> None:
    process = subprocess.Popen(
        command, cwd=tiny.REPOSITORY, env=tiny.environment(), text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not list(out.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None, "training ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in four minutes"
        time.sleep(0.01)
    tiny.kill_group(process)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_killed_resumed_exported_merged_and_answered_by_plain_transformers(kind: str, tmp_path: Path) -> None:
    base, log = tiny.save_backbone(kind, tmp_path / "base"), tiny.save_log(tmp_path / "log.csv")
    tiny.run(training_command(base, log, tmp_path / "whole"))
    kill_after_first_checkpoint(training_command(base, log, tmp_path / "killed"), tmp_path / "killed")
    assert not (tmp_path / "killed" / "adapter").exists()
    output = tiny.run(training_command(base, log, tmp_path / "killed"))
    assert "going on from" in output and "strategy DEEPSPEED, world_size 2" in output

    # The resumed run is the uninterrupted one, bit for bit; rows and adapters moved.
    for name in ADAPTER_FILES:
        whole, resumed = (load_file(tmp_path / run / "adapter" / name) for run in ("whole", "killed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name
    lora = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert lora and all("lora_" in key for key in lora)
    assert all(value.any() for key, value in lora.items() if "lora_B" in key), "some adapter never trained"

    # Plain PEFT reads the adapter.
    from peft import PeftModel

    PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "whole" / "adapter")

    # A process without genrec_llm gets the one-step list of the adapter from the merged directory.
    merged = tmp_path / "whole" / "merged"
    output = tiny.run([sys.executable, "recipes/merge.py", "--run", str(tmp_path / "whole")])
    assert "top-20 agreement 100.0%" in output
    trained = load_trained(tmp_path / "whole" / "adapter")
    random = np.random.default_rng(1)
    histories = [random.integers(0, trained.layout.num_items, length) for length in (1, 2, 5, 9)]
    batch = trained.layout.encode_histories(histories, np.array([0, 1, 2, 3]))
    with torch.no_grad():
        expected, _ = top_items(trained.model(**as_tensors(batch)).logits, 20)
    questions = [
        (ids[mask == 1].tolist(), prompt.tolist())
        for ids, mask, prompt in zip(
            batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"], strict=True
        )
    ]
    answered = subprocess.run(
        [sys.executable, "-c", ANSWER_WITHOUT_GENREC, str(merged), json.dumps(questions)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr[-2000:]
    answers = np.array(json.loads(answered.stdout.splitlines()[-1])) - trained.layout.base
    assert answers.tolist() == expected.tolist()
