"""Training and ranking with a million items: peak memory beside the same run with all scores at once, as a table and json.

    python tools/bench_rows.py --out docs/results/speed_cpu.json
    python tools/bench_rows.py --items 100000 --user-buckets 20000       # smaller, printed alone

A made-up log (every item occurs, half of the interactions are with popular ones, eight a user) is read, split, numbered and
encoded as any other; a T5 of width 256 with 2 + 2 layers gets a row an item and a row a bucket of users, trains for
`--steps` steps by `GenRecTrainer`, writes its checkpoint, optimizer state included, and ranks `--users` users. Arms, each
in a process of its own, one after another:

    full         the whole backbone is trained
    lora         adapters and rows
    whole scores full, with the scores of all targets at once: the rival

The figure is the most resident memory of the process from its start to its end (VmHWM). glibc is told to return what is
released (MALLOC_MMAP_THRESHOLD_, as in check_memory.py). Seconds are CPU time of the process, all threads together. The
peaks of the stages are printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_results import GIB, MEMORY, compare, peak_bytes, record, table

ARMS = ("full", "lora", "whole scores")
RIVAL = "whole scores"
GEOMETRY = {
    "d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
}  # fmt: skip
A_USER = 8
"""Interactions of each user."""


def save_log(path: Path, items: int) -> None:
    """Write the log: each user has four items of their own, then four that are the more popular the lower their number."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(0)
    users, own = -(-items // (A_USER // 2)), A_USER // 2
    order = np.resize(random.permutation(items), users * own).reshape(users, own)
    popular = (items * random.random((users, own)) ** 4).astype(np.int64)
    bought = np.concatenate([order, popular], axis=1)
    log = pd.DataFrame({"user": np.repeat(np.arange(users), A_USER), "item": bought.ravel()})
    log["timestamp"] = np.tile(np.arange(A_USER), users) + 1_700_000_000
    log.to_parquet(path)


def save_backbone(folder: Path) -> None:
    """Write a T5 with random weights and a tokenizer that knows masks alone."""
    from transformers import T5Config, T5ForConditionalGeneration, set_seed

    from genrec_llm.tokenizer import bare_tokenizer

    set_seed(0)
    tokenizer = bare_tokenizer("t5")
    T5ForConditionalGeneration(T5Config(**GEOMETRY, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Stages:
    """Peak resident memory and CPU seconds of this process by stage; Linux alone lets a peak be taken anew."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.begun = time.process_time()

    def end(self, name: str) -> None:
        """Note what the stage took, and begin another."""
        self.peaks[name] = peak_bytes(cuda=False)
        now = time.process_time()
        self.seconds[name], self.begun = now - self.begun, now
        Path("/proc/self/clear_refs").write_text("5")


def whole_scores(hidden: Any, weight: Any, labels: Any, smoothing: float, *_: Any) -> Any:
    """What anybody would write: torch's loss on all scores."""
    from torch.nn import functional as F

    from genrec_llm.tasks import IGNORED

    scores = F.linear(hidden, weight.float())
    return F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)


def measure(arm: str, folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the run of an arm in this process."""
    stages = Stages()
    from transformers import set_seed

    from genrec_llm import item_loss
    from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
    from genrec_llm.build import build_model
    from genrec_llm.encoded import load_data
    from genrec_llm.tasks import NextItem
    from genrec_llm.trainer import GenRecTrainer

    if arm == RIVAL:
        item_loss._in_slices = whole_scores
    stages.end("imports")
    settings = DataArguments(dataset=str(folder / "log.parquet"), users="hashed", user_buckets=args.user_buckets)
    data = load_data(settings)
    stages.end("data")
    training = GenRecTrainingArguments(
        output_dir=str(out), max_steps=args.steps, global_batch_size=args.batch, use_cpu=True, eval_strategy="no",
        save_strategy="steps", save_steps=args.steps, load_best_model_at_end=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    set_seed(0)
    tuning = "lora" if arm == "lora" else "full"
    built = build_model(ModelArguments(backbone=str(folder / "backbone"), tuning=tuning), training, data)
    stages.end("model")
    task = NextItem(data.train, built.layout, seed=0)
    trainer = GenRecTrainer(built.model, training, task=task, layout=built.layout, validation=None)
    saving = trainer._save_checkpoint

    def save_checkpoint(*given: Any) -> None:
        stages.end("training")
        saving(*given)
        stages.end("checkpoint")

    trainer._save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    loss = trainer.train().training_loss
    stages.end("after training")
    assert trainer.optimizer is not None
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    ranks = trainer.rank(data.held_out("test", sample=args.users))
    stages.end("ranking")
    return {
        "peaks": stages.peaks,
        "seconds": stages.seconds,
        "loss": loss,
        "optimizer_bytes": sum(value.numel() * value.element_size() for value in states),
        "trained": sum(value.numel() for value in built.model.parameters() if value.requires_grad),
        "ranked": len(ranks.better),
        "row_init": built.row_init,
    }


def run(arm: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "TQDM_DISABLE": "1"}
        sizes = ("items", "user_buckets", "steps", "batch", "users")
        flags = [word for name in sizes for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
        command = [sys.executable, __file__, *flags, "--child", arm, "--folder", str(folder), "--run", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{arm}: exit {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--user-buckets", type=int, default=200_000, help="rows that users share")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256, help="examples of a step")
    parser.add_argument("--users", type=int, default=100, help="users ranked at the end")
    parser.add_argument("--arm", action="append", choices=ARMS, help="this arm; may be given several times")
    parser.add_argument("--out", type=Path, help="json file of results; rows of other benches stay")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.folder, args.run, args)))
        return

    from genrec_llm.provenance import provenance

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_log(folder / "log.parquet", args.items)
        save_backbone(folder / "backbone")
        for arm in args.arm or ARMS:
            found[arm] = run(arm, folder, args)
            one = found[arm]
            stages = ", ".join(
                f"{stage} {peak / GIB:.2f} ({one['seconds'][stage]:.0f} s)" for stage, peak in one["peaks"].items()
            )
            print(
                f"{arm}: peak {max(one['peaks'].values()) / GIB:.2f} GiB; {one['trained']:,} numbers trained, their state "
                f"{one['optimizer_bytes'] / GIB:.2f} GiB, rows {one['row_init']}, loss {one['loss']:.3f}\n    {stages}",
                flush=True,
            )
    measured = {
        arm: {
            MEMORY: [max(one["peaks"].values()) / GIB],
            "CPU s a step": [one["seconds"]["training"] / args.steps],
            "CPU s ranking": [one["seconds"]["ranking"]],
        }
        for arm, one in found.items()
    }
    bench = f"rows: {args.items:,} items, {args.user_buckets:,} user buckets, CPU"
    shape = f"T5 d_model 256, 2+2 layers, fp32 AdamW, batch {args.batch}, {args.steps} steps, {args.users} users ranked"
    rows = compare(bench, shape, measured, [RIVAL] if RIVAL in found else list(found), provenance())
    print(table(list(map(asdict, rows))))
    if args.out:
        record(args.out, rows)
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
