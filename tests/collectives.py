"""Counts the bytes that a real step hands to collectives, on a fake process group of any size; run by test_memory.

    python collectives.py STRATEGY WORLD TUNING PRECISION [once] [sparse]

A fake group has one real process and answers at once, so shapes and bytes are those of a real group. Prints json. With
`once` ZeRO-3 keeps nothing gathered for a second use, as it is for a backbone above its limit; with `sparse` DDP leaves the
user rows to `sparse_rows.exchange`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config

from genrec_llm.kernels import quicken
from genrec_llm.model import GenRecUntiedT5, IdTokens, add_lora, id_tokens_of
from genrec_llm.sparse_rows import exchange, make_sparse

GEOMETRY = {
    "vocab_size": 200, "d_model": 64, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
ITEMS, USERS, EXAMPLES = 3000, 700, 4


class Counted(TorchDispatchMode):
    """Adds up the larger tensor of each collective: what is gathered, or what is scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        for kind in ("allreduce", "allgather", "reduce_scatter"):
            if name.startswith("c10d.") and kind in name:
                tensors = args[1] if kind == "reduce_scatter" else args[0]
                tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
                self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def ddp(model: torch.nn.Module, batch: dict[str, torch.Tensor], world: int, *, sparse: bool) -> Counter[str]:
    """torch's DDP: what its reducer hands to the all-reduce, bucket by bucket; and the exchange of sparse user rows."""
    users = id_tokens_of(model).user_in
    if sparse:
        make_sparse(model, users)
    counted: Counter[str] = Counter()

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are text
        counted["allreduce"] += bucket.buffer().numel() * bucket.buffer().element_size()
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    wrapped(**batch).loss.backward()
    if sparse:
        with Counted() as pairs:
            exchange(users.weight, world)
        counted += pairs.bytes
    return counted


def fsdp2(model: torch.nn.Module, batch: dict[str, torch.Tensor], world: int) -> Counter[str]:
    """`fully_shard` of each block, then of the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    backbone: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in [*backbone.get_encoder().block, *backbone.get_decoder().block]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Counted() as counted:
        model(**batch).loss.backward()
    return counted.bytes


def zero(model: torch.nn.Module, batch: dict[str, torch.Tensor], stage: int, *, bf16: bool, once: bool) -> Counter[str]:
    """DeepSpeed's engine with the settings of ds_configs/; its second step, after it has seen the order of modules."""
    import deepspeed

    width = GEOMETRY["d_model"]
    settings = {
        "stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": width**2,
        "stage3_prefetch_bucket_size": int(0.9 * width**2), "stage3_param_persistence_threshold": 0 if once else 10 * width,
    }  # fmt: skip
    if once:
        settings |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained),
        config={
            "train_micro_batch_size_per_gpu": EXAMPLES, "bf16": {"enabled": bf16}, "zero_optimization": settings,
            "gradient_clipping": 1.0,
        },
        dist_init_required=False,
    )  # fmt: skip
    for _ in range(2):
        with Counted() as counted:
            engine.backward(engine(**batch).loss)
            engine.step()
    return counted.bytes


def main() -> None:
    """One step; its bytes by kind of collective."""
    strategy, world, tuning, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    torch.manual_seed(0)
    width = int(str(GEOMETRY["d_model"]))
    model: Any = GenRecUntiedT5(T5Config(**GEOMETRY))
    model.add_id_tokens(IdTokens(torch.randn(ITEMS, width), torch.randn(USERS, width), None), 150)
    if tuning == "lora":
        model = add_lora(model, r=16, alpha=32, dropout=0.0, targets=None, base_name="x", revision=None)
    else:
        model.get_output_embeddings().requires_grad_(False)
    quicken(model)
    ids = torch.randint(0, 1000, (EXAMPLES, 11))
    ids[:, 0] = 150 + ITEMS + torch.arange(EXAMPLES)  # a user each
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :2],
        "labels": torch.randint(0, ITEMS, (EXAMPLES,)),
    }  # fmt: skip
    if strategy == "ddp":
        counted = ddp(model, batch, world, sparse="sparse" in sys.argv)
    elif strategy == "fsdp2":
        counted = fsdp2(model, batch, world)
    else:
        counted = zero(model, batch, int(strategy[-1]), bf16=precision == "bf16", once="once" in sys.argv)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
