"""Sparse gradients of user rows: their sum over processes, their part in clipping, and the update of these rows alone.

A step touches at most as many users as it has examples. A dense gradient of a million user rows of width 2,048 would be 8
GB, to be made, clipped, reduced and stepped over each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def make_sparse(model: nn.Module, table: nn.Embedding) -> None:
    """Let a table of `model` have sparse gradients, which DDP leaves to `exchange`.

    DDP would hand them to an all-reduce that NCCL does not have for sparse tensors (torch 2.13). It does not broadcast the
    table at the start either: the processes have to begin with the same one, which `guards.SameWeights` looks at.
    """
    table.sparse = True
    name = next(name for name, parameter in model.named_parameters() if parameter is table.weight)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])


def exchange(weight: nn.Parameter, processes: int = 1) -> None:
    """Replace the sparse gradient of a table by its mean over all processes, each row once, the same on every process.

    To be called once a step, after the last backward pass. Every process gathers the (row, gradient) pairs of all others,
    as many as the process with the most of them has, and sums them in the order of the processes.

    Args:
        weight: `[rows, d_model]`, with a sparse gradient.
        processes: of the default process group.
    """
    assert weight.grad is not None
    gradient = weight.grad.coalesce()
    if processes > 1:
        rows, values = gradient.indices()[0], gradient.values()
        most = torch.tensor(len(rows), device=rows.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        missing = int(most) - len(rows)
        # What fills up is a row that is there already, with a gradient of zero: no other row is touched.
        rows = torch.cat([rows, rows[:1].expand(missing)])
        values = F.pad(values / processes, (0, 0, 0, missing))
        gradient = torch.sparse_coo_tensor(
            _from_all(rows, processes).unsqueeze(0), _from_all(values, processes), weight.shape, check_invariants=False
        ).coalesce()
    weight.grad = gradient


def _from_all(tensor: Tensor, processes: int) -> Tensor:
    gathered = tensor.new_empty(processes * len(tensor), *tensor.shape[1:])
    distributed.all_gather_into_tensor(gathered, tensor)
    return gathered


def with_dense_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """Parameters as torch's `clip_grad_norm_` can take them, which knows no norm of a sparse gradient (torch 2.13).

    In place of one with a coalesced sparse gradient comes a tensor whose gradient is that one's values, in the same memory.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            values = parameter.grad.values()
            stand_in = values.detach()
            stand_in.grad = values
            yield stand_in
        else:
            yield parameter


class LazyAdamW(torch.optim.AdamW):
    """AdamW that updates of a table with a sparse gradient only the rows in it, and only their moments.

    A row that is not in a step stays where it is, while AdamW would move it on by its momentum; its moments do not fade
    meanwhile. Steps are counted for the whole table. So do `torch.optim.SparseAdam`, which knows no other parameters and
    adds its epsilon before the correction for bias, and TensorFlow's LazyAdam. Rows that are in every step are updated
    exactly as by AdamW. A table with sparse gradients has to have no weight decay.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters; sparse gradients have to be coalesced."""
        sparse = [
            (parameter, group, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for parameter, _, _ in sparse:
            parameter.grad = None
        loss: float | None = super().step(closure)
        for parameter, group, gradient in sparse:
            parameter.grad = gradient
            self._update_rows(parameter, group, gradient.indices()[0], gradient.values())
        return loss

    def _update_rows(self, weight: nn.Parameter, group: dict[str, Any], rows: Tensor, gradient: Tensor) -> None:
        """Adam (Kingma and Ba, 2015, algorithm 1) on `rows`, each of which comes once, with `gradient` `[rows, d_model]`."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the host, where the corrections are computed
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first = state["exp_avg"][rows].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, first)
        state["exp_avg_sq"].index_copy_(0, rows, second)
        step = float(state["step"])
        root = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        weight.index_add_(0, rows, first.div_(root), alpha=-group["lr"] / (1 - beta1**step))
