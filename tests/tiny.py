"""Tiny checkpoints and logs, built in memory, and the real launch command around them."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from genrec_llm.evaluation import EvalData
from genrec_llm.model import GenRecUntiedT5
from genrec_llm.tokenizer import bare_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ("t5-tied", "t5-untied", "bart")
OFFLINE = "1"
"""HF_HUB_OFFLINE of the commands that tests start."""
PADDED = 5
"""Rows of the tiny matrices beyond the tokenizer, as T5's 32,128 rows for 32,100 tokens."""
USERS, ITEMS, RANK = 40, 31, 2
"""Of the runs of `train`. One of the items is cold: it stands in the item file alone."""


def save_backbone(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Save a tiny checkpoint with its tokenizer; `kind` is one of `KINDS`."""
    torch.manual_seed(seed)
    tokenizer = bare_tokenizer("bart" if kind == "bart" else "t5")
    rows = len(tokenizer) + PADDED
    if kind == "bart":
        config = BartConfig(
            vocab_size=rows, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
            scale_embedding=True,
        )  # fmt: skip
        BartForConditionalGeneration(config).save_pretrained(folder)
    else:
        config = T5Config(
            vocab_size=rows, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=1, num_decoder_layers=1,
            feed_forward_proj="relu" if kind == "t5-tied" else "gated-gelu", tie_word_embeddings=kind == "t5-tied",
            decoder_start_token_id=0,
        )  # fmt: skip
        if kind == "t5-tied":
            T5ForConditionalGeneration(config).save_pretrained(folder)
        else:
            model = GenRecUntiedT5(config)
            model.save_pretrained(folder)
            text = (folder / "config.json").read_text()
            published = text.replace("GenRecUntiedT5", "T5ForConditionalGeneration")
            (folder / "config.json").write_text(
                published.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
            )
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(words: Sequence[str], folder: Path) -> Path:
    """A sentence encoder that knows a few words."""
    known = ["[PAD]", "[UNK]", *words]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=6
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(known), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=8)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def save_ground(folder: Path, *, users: int) -> Path:
    """A folder with a log (log.csv) and a checkpoint of each of `KINDS`."""
    save_log(folder / "log.csv", users=users)
    for kind in KINDS:
        save_backbone(kind, folder / kind)
    return folder


def eval_data(*, users: int, items: int, longest: int, split: str) -> EvalData:
    """Random histories of fewer than `longest` items, with targets."""
    generator = np.random.default_rng(0)
    histories = [generator.integers(items, size=length) for length in generator.integers(1, longest, size=users)]
    return EvalData(
        users=generator.permutation(users) + 1,
        histories=histories,
        seen=histories,
        targets=generator.integers(items, size=users),
        num_items=items,
        item_counts=np.bincount(np.concatenate(histories), minlength=items),
        split=split,
        dataset="tiny",
        fingerprint="f00d",
        max_history=20,
    )


def save_log(path: Path, *, users: int = 40, items: int = 30, seed: int = 0, longest: int = 12) -> Path:
    """Write a csv of interactions (user,item,timestamp), in which items often follow their predecessor."""
    random = np.random.default_rng(seed)
    lines = ["user,item,timestamp"]
    for user in range(users):
        item = int(random.integers(items))
        for step in range(int(random.integers(4, longest + 1))):
            lines.append(f"u{user},i{item},{1_000_000 + 100 * step}")
            item = (item + 1) % items if random.random() < 0.8 else int(random.integers(items))
    path.write_text("\n".join(lines) + "\n")
    return path


def save_private_log(path: Path) -> Path:
    """A log whose users are e-mail addresses."""
    log = save_log(path, users=USERS)
    log.write_text(re.sub(r"(?m)^u(\d+)", r"person\1@private.example", log.read_text()))
    return log


def save_items(path: Path) -> Path:
    """An item file: a title for most of the log's 30 items, and a cold item."""
    rows = [f'i{number},"Item, ""{number}"""' if number % 7 else f"i{number}," for number in range(30)]
    path.write_text("\n".join(["item,title", *rows, "cold,Never seen"]) + "\n")
    return path


def save_stages(folder: Path) -> Path:
    """The configurations of both stages of a short training, on a log of its own; their folder."""
    shared = {"dataset": str(save_log(folder / "log.csv")), "backbone": str(save_backbone("t5-untied", folder / "base")),
              "global_batch_size": 32, "num_train_epochs": 1, "lora_r": 2, "disable_tqdm": True,
              "output_dir": "elsewhere"}  # fmt: skip
    configs = folder / "configs"
    configs.mkdir()
    for stage, more in (("pretrain", {"masks_per_sequence": 2}), ("finetune", {"from_run": "elsewhere"})):
        (configs / f"{stage}.yaml").write_text(yaml.safe_dump(shared | more))
    return configs


def recipe(name: str, *arguments: object) -> None:
    """Run a recipe's `main` in this process, as if from the command line."""
    before = sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


def train(base: Path | str, folder: Path, out: Path, *arguments: object, stage: str = "finetune") -> Path:
    """One epoch on the private log; returns the run directory."""
    log, items = folder / "log.csv", folder / "items.csv"
    if not log.exists():
        save_private_log(log)
        save_items(items)
    recipe(
        stage, "--dataset", log, "--items-file", items, "--backbone", base, "--output-dir", out, "--use_cpu",
        "--disable_tqdm", "true", "--num-train-epochs", 1, "--global-batch-size", 32, "--lora-r", RANK,
        "--learning-rate", "5e-3", *arguments,
    )  # fmt: skip
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors_and_words(folder: Path) -> dict[str, bytes]:
    """`contents` of an exported directory but for genrec.json and the card, which tell when and for how long it was made."""
    return {name: content for name, content in contents(folder).items() if name not in ("genrec.json", "README.md")}


def environment() -> dict[str, str]:
    """As a user's shell: the tools of this interpreter first, one thread a process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
    }


def launch_command(strategy: str, recipe: str, *arguments: str, processes: int = 2) -> list[str]:
    """`accelerate launch` with one of the shipped files."""
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", f"accelerate_configs/{strategy}.yaml",
        *(("--num_processes", str(processes), "--main_process_port", "0") if strategy != "cpu" else ()),
        f"recipes/{recipe}.py", "--use_cpu", "--disable_tqdm", "true", *arguments,
    ]  # fmt: skip


def run(command: Sequence[str], *, timeout: float = 300) -> str:
    """Run a command from the repository's root; its output, or an assertion error that shows it."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}: {' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a launcher and all its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
