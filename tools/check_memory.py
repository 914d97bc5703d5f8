"""Real short trainings against `genrec_llm.prediction`: measured peak memory beside the predicted one, as json.

    python tools/check_memory.py --out docs/results/memory_cpu.json
    python tools/check_memory.py --only t5-mid-lora --only bart-full     # some of the shapes, printed alone

Each shape is trained for three steps by `GenRecTrainer` in a process of its own, on drawn histories of one item up to
the most, as many of each length, with weights at random: sizes do not depend on values. Measured on a CPU are (1) the
peak of torch's allocator, every allocation and release of which torch.profiler records, temporaries inside of operators
too, and (2) the peak resident memory that the kernel saw (VmHWM, reset once everything is imported) above what was
resident then. The prediction is of (1); (2) has code loaded at first use on top, and is taken with
MALLOC_MMAP_THRESHOLD_=65536: by default glibc keeps what is released for later. On a GPU the peak is
`torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 0.15
VOCAB = {"t5": 32_128, "bart": 2_000}
T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
T5_MICRO = {"d_model": 64, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
T5_MID = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4}


@dataclass(frozen=True)
class Case:
    """One training: what `genrec_llm.workload.Run` is told, and the numbers of a configuration of transformers."""

    family: str
    geometry: dict[str, Any]
    run: dict[str, Any]
    history: int = 30
    """Items of the longest history."""
    masks: int = 0
    """Items hidden in a history (pretraining); 0 is finetuning."""


def bart(d_model: int, layers: int, d_ff: int, heads: int) -> dict[str, Any]:
    """Keywords of a BartConfig with as many encoder as decoder layers."""
    return {
        "d_model": d_model, "encoder_layers": layers, "decoder_layers": layers, "encoder_ffn_dim": d_ff,
        "decoder_ffn_dim": d_ff, "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "max_position_embeddings": 1024,
    }  # fmt: skip


GATED = {"feed_forward_proj": "gated-gelu"}
CASES: dict[str, Case] = {
    # Flan-T5-small as published, with LoRA: activations and weights.
    "flan-t5-small-lora": Case("t5", T5_SMALL | GATED, {"items": 12_101, "user_rows": 22_364, "examples": 64}),
    "flan-t5-small-full": Case(
        "t5", T5_SMALL | GATED, {"items": 12_101, "user_rows": 1, "examples": 32, "tuning": "full"}
    ),
    "t5-mid-lora": Case("t5", T5_MID, {"items": 5_000, "user_rows": 1_000, "examples": 128}),
    "t5-mid-full": Case("t5", T5_MID, {"items": 5_000, "user_rows": 1_000, "examples": 128, "tuning": "full"}),
    "t5-mid-full-small-batch": Case("t5", T5_MID | GATED, {"items": 2_000, "user_rows": 1, "examples": 8, "tuning": "full"}),
    "t5-mid-accumulated": Case(
        "t5", T5_MID | GATED,
        {"items": 40_000, "user_rows": 1, "examples": 64, "tuning": "full", "accumulation": 2},
    ),
    "t5-mid-pretraining": Case("t5", T5_MID | GATED, {"items": 5_000, "user_rows": 1_000, "examples": 96}, masks=3),
    "t5-mid-long": Case("t5", T5_MID | GATED, {"items": 5_000, "user_rows": 1_000, "examples": 16}, history=200),
    "large-catalogue": Case("t5", T5_MID, {"items": 300_000, "user_rows": 100_000, "examples": 32}),
    "large-catalogue-untied": Case(
        "t5", T5_MID, {"items": 200_000, "user_rows": 1, "examples": 32, "tied_rows": False}
    ),
    "many-users-sparse": Case(
        "t5", T5_MID, {"items": 5_000, "user_rows": 300_000, "examples": 128, "sparse_users": True}
    ),
    "logits": Case("t5", T5_MICRO, {"items": 100_000, "user_rows": 1, "examples": 384}, history=4),
    "t5-micro-full": Case("t5", T5_MICRO, {"items": 12_101, "user_rows": 1, "examples": 256, "tuning": "full"}),
    "bart-lora": Case("bart", bart(512, 4, 2048, 8), {"items": 12_101, "user_rows": 1_000, "examples": 64}),
    "bart-full": Case("bart", bart(512, 4, 2048, 8), {"items": 12_101, "user_rows": 1, "examples": 64, "tuning": "full"}),
    "flan-t5-small-bf16": Case(
        "t5", T5_SMALL | GATED, {"items": 12_101, "user_rows": 22_364, "examples": 64, "bf16": True}
    ),
    # What can be switched off.
    "flan-t5-small-stock": Case(
        "t5", T5_SMALL | GATED,
        {"items": 12_101, "user_rows": 22_364, "examples": 64, "packing": False, "kernels": False},
    ),
    "t5-mid-stock-packed": Case(
        "t5", T5_MID | GATED, {"items": 5_000, "user_rows": 1_000, "examples": 128, "kernels": False}
    ),
    "t5-mid-padded": Case(
        "t5", T5_MID | GATED, {"items": 5_000, "user_rows": 1_000, "examples": 128, "packing": False}
    ),
    "t5-mid-lora-dropout": Case(
        "t5", T5_MID | GATED, {"items": 5_000, "user_rows": 1_000, "examples": 128, "lora_dropout": 0.05}
    ),
}  # fmt: skip


def status(field_name: str) -> int:
    """Bytes of a line of this process's /proc status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field_name}")


def allocator_peak(events: list[Any]) -> int:
    """Largest sum of torch's live CPU allocations, in bytes, of a profile that began before the first of them."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def shortest(case: Case) -> int:
    """Items of the shortest history: of two one can be hidden."""
    return 2 if case.masks else 1


def train(case: Case) -> dict[str, int]:
    """Train a case in this process; measured bytes."""
    import numpy as np
    import torch
    from transformers import BartConfig, T5Config, set_seed

    from genrec_llm.args import GenRecTrainingArguments
    from genrec_llm.model import GenRecBart, GenRecUntiedT5, IdTokens, add_lora
    from genrec_llm.tasks import MaskedItem, NextItem, PromptLayout, Sequences
    from genrec_llm.trainer import GenRecTrainer
    from genrec_llm.workload import Run

    set_seed(0)
    run = Run(**case.run)
    cuda, lora = torch.cuda.is_available(), run.tuning == "lora"
    examples = run.examples * run.accumulation * 3  # three steps
    # One step of the smallest kind, so that what libraries load at first use is not counted as the training's.
    torch.nn.functional.cross_entropy(
        torch.nn.Linear(8, 8)(torch.randn(4, 8)), torch.zeros(4, dtype=torch.long)
    ).backward()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")
        if os.environ["MEASURE"] == "allocator":
            profiler.start()
    before = 0 if cuda else status("VmRSS")
    dtype = torch.bfloat16 if run.bf16 and lora else torch.float32
    with torch.device("cuda" if cuda else "cpu"):
        if case.family == "bart":
            config = BartConfig(**case.geometry, vocab_size=VOCAB["bart"])
            model: Any = GenRecBart._from_config(config, dtype=dtype)
        else:
            config = T5Config(**case.geometry, vocab_size=VOCAB["t5"])
            model = GenRecUntiedT5._from_config(config, dtype=dtype)
    base = 1_000 if case.family == "bart" else 32_100
    layout = PromptLayout(
        base=base, num_items=run.items, num_user_rows=run.user_rows, mask_ids=tuple(range(900, 910)), eos_id=1, pad_id=0,
        max_history=case.history,
    )  # fmt: skip
    item_in, user_in = torch.randn(run.items, config.d_model), torch.randn(run.user_rows, config.d_model)
    item_out = None if run.tied_rows else torch.randn(run.items, config.d_model)
    model.add_id_tokens(IdTokens(item_in, user_in, item_out), base)
    del item_in, user_in, item_out
    if lora:
        model = add_lora(
            model, r=16, alpha=32, dropout=run.lora_dropout, targets=None, base_name="random", revision=None
        )
    elif model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.get_output_embeddings().requires_grad_(False)
    shown = np.linspace(shortest(case), case.history, examples).round().astype(int)
    offsets = np.concatenate([[0], np.cumsum(shown if case.masks else shown + 1)])  # and the target
    random = np.random.default_rng(0)
    histories = Sequences(
        items=random.integers(run.items, size=offsets[-1]),
        offsets=offsets,
        users=random.integers(run.user_rows, size=examples),
    )
    task: Any = NextItem(histories, layout, seed=0, targets="last")
    if case.masks:
        task = MaskedItem(histories, layout, seed=0, masks_per_sequence=case.masks)
    with tempfile.TemporaryDirectory() as folder:
        training = GenRecTrainingArguments(
            output_dir=folder, max_steps=3, global_batch_size=run.examples * run.accumulation,
            gradient_accumulation_steps=run.accumulation, use_cpu=not cuda, bf16=run.bf16, eval_strategy="no",
            save_strategy="no", load_best_model_at_end=False, disable_tqdm=True, sparse_user_rows=run.sparse_users,
            packing=run.packing, kernels=run.kernels,
        )  # fmt: skip
        trainer = GenRecTrainer(model, training, task=task, layout=layout, validation=None)
        trainer.train()
    if cuda:
        return {"allocator": torch.cuda.max_memory_allocated()}
    if os.environ["MEASURE"] == "allocator":
        profiler.stop()
        return {"allocator": allocator_peak(profiler.profiler.kineto_results.events())}
    return {"resident": status("VmHWM") - before}


def predict(case: Case, *, cuda: bool) -> Any:
    """The estimate of a case."""
    from genrec_llm.prediction import estimate
    from genrec_llm.shape import Shape
    from genrec_llm.workload import Run

    vocab = VOCAB[case.family]
    shape = Shape.from_config(
        {"model_type": case.family, "vocab_size": vocab, **case.geometry}, own_head=case.family == "t5"
    )
    around = 2 if case.masks else 3  # user, end, and in finetuning the mask behind the history
    strategy = "single_gpu" if cuda else "cpu"
    mean_length = (shortest(case) + case.history) / 2 + around
    told = {"strategy": strategy, "targets": case.masks or 1}
    return estimate(shape, Run(**case.run, **told, longest=case.history + around, mean_length=mean_length))


def measured(name: str, ways: Sequence[str] = ("allocator", "resident")) -> dict[str, int]:
    """Train a case in child processes, one for each way of measuring; bytes."""
    found: dict[str, int] = {}
    for way in ways:
        environment = {**os.environ, "MEASURE": way, "TQDM_DISABLE": "1"}
        if way == "resident":
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        done = subprocess.run(
            [sys.executable, __file__, "--child", name], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{name}: {done.stderr[-4000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="json file of results")
    parser.add_argument("--only", action="append", choices=CASES, help="this shape; may be given several times")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(train(CASES[args.child])))
        return

    import torch

    from genrec_llm.files import write_json
    from genrec_llm.provenance import provenance

    mib, results = 2**20, []
    print(f"{'shape':26}{'predicted':>10}{'measured':>10}{'ratio':>7}{'resident':>10}   MiB")
    for name in args.only or CASES:
        expected = predict(CASES[name], cuda=torch.cuda.is_available())
        bytes_of = measured(name)
        ratio = expected.total / bytes_of["allocator"]
        resident = bytes_of.get("resident", 0)
        print(
            f"{name:26}{expected.total / mib:10.0f}{bytes_of['allocator'] / mib:10.0f}{ratio:7.3f}{resident / mib:10.0f}",
            flush=True,
        )
        results.append(
            {
                "shape": name,
                "predicted_bytes": round(expected.total),
                "measured_bytes": bytes_of["allocator"],
                "predicted_over_measured": round(ratio, 4),
                "resident_bytes": bytes_of.get("resident"),
                "moment": expected.moment,
                "predicted_parts": {part: round(value) for part, value in expected.parts.items()},
            }
        )
    worst = max(abs(result["predicted_over_measured"] - 1) for result in results)
    print(f"largest deviation {worst:.1%}, allowed {TOLERANCE:.0%}")
    if args.out:
        write_json(args.out, {**provenance(), "tolerance": TOLERANCE, "largest_deviation": worst, "results": results})
        print(f"written to {args.out}")
    if worst > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
