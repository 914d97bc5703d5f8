"""The item loss in slices: value and gradients of the plain loss, in bounded memory, under every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genrec_llm import memory
from genrec_llm.item_loss import IGNORED, item_loss
from genrec_llm.model import ItemHead

TARGETS, ITEMS, WIDTH = 13, 37, 8
FP32 = {"rtol": 1e-5, "atol": 1e-6}
"""Against float64; the absolute part is for gradients that are sums of which most cancels out."""


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets how many scores there may be at once."""
    yield lambda scores: monkeypatch.setattr(memory, "MOST_SCORES_ON_CPU", scores)


def drawn(ignored: tuple[int, ...] = (2, 7)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, rows = (torch.randn(count, WIDTH, generator=generator) for count in (TARGETS, ITEMS))
    labels = torch.randint(ITEMS, (TARGETS,), generator=generator)
    labels[list(ignored)] = IGNORED
    return hidden, 2 * rows, labels


def in_float64(
    hidden: Tensor, rows: Tensor, labels: Tensor, smoothing: float, scale: float, others: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """Loss and gradients of hidden states, rows and scale by torch's own cross-entropy on whole scores."""
    leaves = [value.detach().double().requires_grad_() for value in (hidden, rows, torch.tensor([scale]))]
    scores = F.linear(leaves[0] * leaves[2], torch.cat([leaves[1], *others]))
    loss = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
    return loss.detach(), *torch.autograd.grad(loss * 3, leaves)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scores", [1, 4 * ITEMS, 5 * ITEMS + 1, 13 * ITEMS - 1, 13 * ITEMS], ids=str)
def test_slices_of_any_size_give_loss_and_gradients_of_whole_scores(most: Any, scores: int, smoothing: float) -> None:
    hidden, rows, labels = drawn()
    expected = in_float64(hidden, rows, labels, smoothing, 0.7)
    most(scores)
    head = ItemHead(nn.Parameter(rows), 0.7)
    hidden.requires_grad_()
    loss = head(hidden, labels, smoothing)
    (loss * 3).backward()
    assert head.scale is not None
    for found, wanted in zip((loss, hidden.grad, head.weight.grad, head.scale.grad), expected, strict=True):
        assert found is not None and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, **FP32)
    assert not hidden.grad[2].any(), "an ignored target moves nothing"


def test_without_targets_the_rows_get_a_gradient_of_zeros() -> None:
    _, rows, _ = drawn()
    _memory_of_before = torch.full_like(rows, torch.nan)  # what an unwritten gradient would be made of
    del _memory_of_before
    hidden, rows = torch.empty(0, WIDTH, requires_grad=True), rows.requires_grad_()
    item_loss(hidden, rows, torch.empty(0, dtype=torch.int64)).backward()
    assert rows.grad is not None and not rows.grad.any()


@pytest.mark.parametrize("scores", [1, 5 * (ITEMS + 16), 10**6], ids=str)
def test_frozen_rows_compete_with_the_items(most: Any, scores: int) -> None:
    hidden, rows, labels = drawn()
    others = (torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1)), torch.zeros(5, WIDTH))
    loss, to_hidden, to_rows, _ = in_float64(hidden, rows, labels, 0.2, 1.0, tuple(o.double() for o in others))
    most(scores)
    hidden.requires_grad_(), rows.requires_grad_()
    found = item_loss(hidden, rows, labels, label_smoothing=0.2, others=others)
    (found * 3).backward()
    for value, wanted in ((found, loss), (hidden.grad, to_hidden), (rows.grad, to_rows)):
        assert value is not None
        torch.testing.assert_close(value.double(), wanted, **FP32)


def test_the_loss_of_the_model_is_the_same_in_slices(most: Any, tmp_path: Path) -> None:
    """Through the whole forward pass, with rows that encoder, decoder and head share."""
    from test_model import built, several_targets

    model, layout = built(tiny.save_backbone("t5-tied", tmp_path / "base"))
    model.label_smoothing = 0.1
    batch = several_targets(layout)
    found = []
    for scores in (10**6, 20):
        most(scores)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0], found[1], **FP32)


def test_bf16_rows_and_states_are_summed_in_fp32_and_get_gradients_of_their_own_type(most: Any) -> None:
    hidden, rows, labels = drawn()
    hidden, rows = hidden.bfloat16(), rows.bfloat16()
    expected = in_float64(hidden, rows, labels, 0.1, 1.0)
    most(3 * ITEMS)
    head, hidden = ItemHead(nn.Parameter(rows), None), hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, labels, 0.1)
    (loss * 3).backward()
    assert loss.dtype == torch.float32 and hidden.grad is not None
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    for gradient, wanted in ((hidden.grad, expected[1]), (head.weight.grad, expected[2])):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), wanted, rtol=2**-8, atol=1e-6)  # rounded once


@pytest.mark.parametrize("trained", ["hidden", "rows", "nothing"])
def test_only_gradients_that_are_asked_for_are_made(most: Any, trained: str) -> None:
    hidden, rows, labels = drawn()
    expected = in_float64(hidden, rows, labels, 0.0, 1.0)
    most(ITEMS)
    hidden.requires_grad_(trained == "hidden"), rows.requires_grad_(trained == "rows")
    loss = item_loss(hidden, rows, labels)
    torch.testing.assert_close(loss.detach().double(), expected[0], **FP32)
    assert loss.requires_grad == (trained != "nothing")
    if trained != "nothing":
        (loss * 3).backward()
        value, wanted = (hidden, expected[1]) if trained == "hidden" else (rows, expected[2])
        torch.testing.assert_close(value.grad.double(), wanted, **FP32)


def test_scores_far_apart_neither_overflow_nor_vanish(most: Any) -> None:
    hidden, rows, labels = drawn(ignored=())
    hidden = hidden * 100
    expected = in_float64(hidden, rows, labels, 0.0, 1.0)
    most(2 * ITEMS)
    torch.testing.assert_close(item_loss(hidden, rows, labels).double(), expected[0], **FP32)


def test_a_label_that_is_no_item_is_refused_and_a_second_backward_pass_too(most: Any) -> None:
    hidden, rows, labels = drawn()
    most(ITEMS)
    loss = item_loss(hidden.requires_grad_(), rows, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for wrong in (ITEMS, -1):
        labels[0] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            item_loss(hidden, rows, labels)


class LargestTensor(TorchDispatchMode):
    """Counts the numbers in each storage that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(found) if isinstance(value, Tensor)]
        self.largest = max([self.largest, *sizes])
        return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_tensor_is_larger_than_was_stated(most: Any, smoothing: float) -> None:
    targets, items, width, scores = 64, 1_000, 4, 5_000
    hidden, rows = torch.randn(targets, width).requires_grad_(), torch.randn(items, width).requires_grad_()
    labels = torch.randint(items, (targets,))
    largest = {}
    for limit in (targets * items, scores):
        most(limit)
        with LargestTensor() as seen:
            item_loss(hidden, rows, labels, label_smoothing=smoothing).backward()
        largest[limit] = seen.largest
    assert largest == {targets * items: targets * items, scores: scores}


def test_a_slice_has_as_many_scores_as_the_rows_have_numbers() -> None:
    targets, items, width = 700, 1_000, 512
    hidden, rows = torch.randn(targets, width).requires_grad_(), torch.randn(items, width)
    with LargestTensor() as seen:  # the scores: no gradient of the rows is as large
        item_loss(hidden, rows, torch.randint(items, (targets,))).backward()
    assert seen.largest == items * width


def test_slices_are_neither_tiny_nor_huge() -> None:
    assert memory.scores_at_once(1_000, 16) == memory.scores_at_once(10, 8) == 2**18
    assert memory.scores_at_once(12_101, 64) == 12_101 * 64
    assert memory.scores_at_once(1_000_000, 64) == memory.MOST_SCORES_ON_CPU


# --- several processes ----------------------------------------------------

IN_SLICES = """
import runpy, sys
from genrec_llm import item_loss, memory
made, plain = [], item_loss._in_slices
memory.MOST_SCORES_ON_CPU = 70  # two targets at a time
item_loss._in_slices = lambda *given: made.append(len(given[0])) or plain(*given)
recipe = sys.argv.pop(1)
from genrec_llm import trainer, world
leave = world.leave

def said(*how, **more):
    print(f"{len(made)} losses in slices", flush=True)
    leave(*how, **more)

trainer.leave = said
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("tie", ["true", "false"])
def test_two_processes_in_slices_train_the_adapter_of_one_with_whole_scores(
    strategy: str, tie: str, tmp_path: Path
) -> None:
    """Under ZeRO-3 the rows are whole in the head's forward alone, which is all that the slices need."""
    tiny.save_backbone("t5-untied", tmp_path / "base")
    tiny.save_log(tmp_path / "log.csv")
    script = tmp_path / "sliced.py"
    script.write_text(IN_SLICES)
    values = {}
    for name in ("cpu", strategy):
        line = tiny.launch_command(
            name, "finetune", "--dataset", str(tmp_path / "log.csv"), "--backbone", str(tmp_path / "base"),
            "--output-dir", str(tmp_path / name), "--max-steps", "8", "--global-batch-size", "16", "--lora-r", "2",
            "--dropout", "0", "--lora-dropout", "0", "--rows-learning-rate", "3e-3", "--tie-item-rows", tie,
            "--label-smoothing-factor", "0.1",
        )  # fmt: skip
        if name != "cpu":
            line.insert(line.index("recipes/finetune.py"), str(script))
        output = tiny.run(line)
        assert name == "cpu" or output.count(" losses in slices") == 2, output[-3000:]
        folder = tmp_path / name / "adapter"
        values[name] = {
            name: value
            for file in ("adapter_model.safetensors", "id_tokens.safetensors")
            for name, value in load_file(folder / file).items()
        }
    assert values[strategy].keys() == values["cpu"].keys()
    for name, value in values[strategy].items():
        # AdamW divides by small numbers; as in test_launch.
        torch.testing.assert_close(
            value, values["cpu"][name], atol=2e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
