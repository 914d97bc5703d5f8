"""Everything that only a GPU can show, in one run; results as json.

    python tools/gpu_check.py --data-dir ../shared/data --out docs/results/gpu.json
    python tools/gpu_check.py --shape small --steps 5 --data-dir ../shared/data --out /tmp/gpu.json   # on a CPU, to try it

Now: both stages on a backbone of Flan-T5-XL's published shape with random bf16 weights, LoRA r=16, Amazon Beauty, and
finetuning once more on its weights in nf4 (QLoRA; left out without bitsandbytes): bytes of the frozen weights, peak
memory beside the estimate of `genrec estimate`, examples a second, losses; the accumulation that --auto-batch-size finds for
a global batch that does not fit. Needs torch, transformers, peft, accelerate, datasets; no network.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, TrainerCallback, set_seed

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.errors import ConfigError
from genrec_llm.files import write_json
from genrec_llm.memory import estimate_run
from genrec_llm.model import (
    GenRecBackbone,
    GenRecUntiedT5,
    Quantization,
    add_id_words,
    add_lora,
    bare_tokenizer,
    load_backbone,
    prompt_layout,
    quantized,
    ready_to_train,
)
from genrec_llm.rows import initial_rows
from genrec_llm.runs import Data, load_data, provenance
from genrec_llm.tasks import MaskedItem, NextItem
from genrec_llm.trainer import GenRecTrainer

SHAPES: dict[str, dict[str, int]] = {
    "xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32},
    "small": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
}
"""Published geometry of google/flan-t5-xl, and one that a CPU runs through."""


class Clock(TrainerCallback):
    """Times the steps after a warm-up that compiles kernels and fills the allocator."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.started, self.seconds = warm_up, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == self.warm_up:
            self.started = now
        self.seconds = now - self.started


def measure(
    stage: str,
    data: Data,
    shape: str,
    steps: int,
    batch: int,
    *,
    quantization: Quantization | None = None,
    auto_batch_size: bool = False,
) -> dict[str, Any]:
    """Train one stage for some steps."""
    set_seed(0)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    quantizing = quantized(quantization, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        training = GenRecTrainingArguments(
            output_dir=folder, max_steps=steps, global_batch_size=batch, bf16=cuda, learning_rate=3e-4,
            rows_learning_rate=1e-3, eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
            logging_steps=max(1, steps // 5), auto_batch_size=auto_batch_size,
        )  # fmt: skip
        tokenizer = bare_tokenizer("t5")
        with torch.device(device):
            config = T5Config(
                **SHAPES[shape], vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False
            )
            model: GenRecBackbone = GenRecUntiedT5._from_config(config, dtype=dtype)
        parameters = model.num_parameters()
        if quantizing:  # happens to a checkpoint while it is loaded
            model.save_pretrained(f"{folder}/base")
            tokenizer.save_pretrained(f"{folder}/base")
            del model
            gc.collect()
            model, _ = load_backbone(f"{folder}/base", dtype=dtype, **quantizing)
            ready_to_train(model)
        layout = prompt_layout(tokenizer, data.vocab, max_history=data.max_history)
        rows, _ = initial_rows(model, tokenizer, data.vocab, layout, data.train)
        model.add_id_tokens(rows.to(device), layout.base)
        add_id_words(tokenizer, data.vocab)
        adapted = add_lora(model, r=16, alpha=32, dropout=0.0, targets=None, base_name="random", revision=None)
        task = (MaskedItem if stage == "pretrain" else NextItem)(data.train, layout, seed=0)
        trainer = GenRecTrainer(adapted, training, task=task, layout=layout, validation=None)
        clock = Clock(warm_up=max(1, steps // 5))
        trainer.add_callback(clock)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    around = 3  # user, mask and end
    estimated = estimate_run(
        config.to_dict(),
        ModelArguments(quantization=quantization),
        training,
        items=data.vocab.num_items,
        user_rows=data.vocab.num_user_rows,
        longest=int(task.lengths.max()) + around,
        mean_length=float(task.lengths.mean()) + around,
        strategy="single_gpu" if cuda else "cpu",
        processes=1,
        own_head=True,
    )
    timed = steps - clock.warm_up
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {
        "stage": stage,
        "quantization": quantization,
        "shape": shape,
        "parameters": parameters + trainable,
        "trainable": trainable,
        "frozen_weights_mib": round(sum(p.nbytes for p in adapted.parameters() if not p.requires_grad) / 2**20, 2),
        "precision": "bf16" if cuda else "fp32",
        "global_batch_size": batch,
        "accumulation": training.gradient_accumulation_steps,
        "steps": steps,
        "losses": losses,
        "examples_per_second": round(timed * batch / clock.seconds, 1) if cuda else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "estimated_memory_gib": round(estimated.total / 2**30, 2),
    }


def main() -> None:
    """Run the checks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of the Beauty files")
    parser.add_argument("--out", type=Path, required=True, help="json file of results")
    parser.add_argument("--shape", choices=SHAPES, default="xl")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=256, help="examples a step")
    args = parser.parse_args()
    data = load_data(DataArguments(dataset="amazon-beauty", data_dir=args.data_dir))
    results = [measure(stage, data, args.shape, args.steps, args.batch) for stage in ("pretrain", "finetune")]
    try:
        results.append(measure("finetune", data, args.shape, args.steps, args.batch, quantization="4bit"))
    except ConfigError as error:
        print(f"left out: {error}")
    whole = (
        256 * args.batch
    )  # more than a GPU of 141 GB holds at once; a CPU refuses no memory, so it takes what is asked
    most = whole if torch.cuda.is_available() else args.batch
    results.append(measure("finetune", data, args.shape, min(args.steps, 5), most, auto_batch_size=True))
    write_json(args.out, {**provenance(), "results": results})
    for result in results:
        print(result)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
