"""Each kernel computes what the layer of transformers computes, forward and backward, and keeps less for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_backbone
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MT5Config, T5Config
from transformers.models.mt5.modeling_mt5 import MT5DenseGatedActDense, MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm

from genrec_llm import kernels
from genrec_llm.backbone import load_backbone
from genrec_llm.batching import as_tensors
from genrec_llm.kernels import PackedStates, quicken
from genrec_llm.model import IdTokens, add_lora, unwrapped
from genrec_llm.packing import Packing
from genrec_llm.tasks import MaskedItem, NextItem, PromptLayout, Sequences

SIZES: dict[str, Any] = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, "num_layers": 1}
CONFIG = T5Config(**SIZES, feed_forward_proj="gated-gelu", dropout_rate=0.0, is_decoder=True)
CONFIG._attn_implementation = "sdpa"


def both(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer with random weights, and its quickened copy."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    quick = copy.deepcopy(layer)
    quicken(quick)
    return layer, quick


def assert_same(expected: list[Tensor], found: list[Tensor]) -> None:
    """The same values and gradients, but for fp32 sums in another order: relative to the largest of each tensor."""
    for one, other in zip(expected, found, strict=True):
        assert (other - one).abs().max() <= 1e-5 * one.abs().max()


def results(
    layer: Callable[..., Tensor], inputs: tuple[Tensor, ...], parameters: Iterator[nn.Parameter]
) -> list[Tensor]:
    """What a layer gives for inputs, and the gradients of inputs and parameters for a fixed gradient of that."""
    inputs = tuple(value.detach().clone().requires_grad_() for value in inputs)
    found = layer(*inputs)
    needed = [*inputs, *[parameter for parameter in parameters if parameter.requires_grad]]
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return [found.detach(), *torch.autograd.grad(found, needed, gradient.to(found.dtype))]


@pytest.mark.parametrize("trains", [True, False], ids=["full tuning", "frozen"])
@pytest.mark.parametrize("layer", [T5LayerNorm(24), MT5LayerNorm(24)])
def test_the_norm_is_that_of_transformers(layer: nn.Module, trains: bool) -> None:
    stock, quick = (one.requires_grad_(trains) for one in both(layer))
    inputs = (torch.randn(3, 5, 24) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None],)
    assert_same(results(stock, inputs, stock.parameters()), results(quick, inputs, quick.parameters()))


def test_the_norm_keeps_its_precision_where_weights_are_in_bf16() -> None:
    stock, quick = both(T5LayerNorm(24))
    stock, quick, x = stock.to(torch.bfloat16), quick.to(torch.bfloat16), torch.randn(7, 24)
    assert torch.equal(quick(x), stock(x))  # fp32 in, bf16 out: transformers' own
    ours, theirs = (results(one, (x.bfloat16(),), one.parameters()) for one in (quick, stock))
    for one, other in zip(theirs, ours, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(other, one, rtol=2**-6, atol=2**-6)  # a rounding of bf16, or two


MT5 = MT5Config(**SIZES, dropout_rate=0.0)


@pytest.mark.parametrize("layer", [T5DenseGatedActDense(CONFIG), MT5DenseGatedActDense(MT5)])
def test_the_gated_gelu_is_that_of_transformers(layer: nn.Module) -> None:
    stock, quick = both(layer)
    inputs = (4 * torch.randn(5, 3, 24),)
    assert_same(results(stock, inputs, stock.parameters()), results(quick, inputs, quick.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gelu_holds_for_small_and_huge_gates(dtype: torch.dtype) -> None:
    gates = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-8, -1e-8, 300.0, -300.0, 1e6, -1e6])])
    gate = gates.to(dtype).requires_grad_()
    value = torch.full_like(gate, 3.0).requires_grad_()
    found = kernels._GatedGelu.apply(gate, value)
    of_gate, of_value = torch.autograd.grad(found.sum(), (gate, value))
    exact = gate.detach().double().requires_grad_()
    gelu = torch.nn.functional.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(gelu.sum(), exact)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-7}
    for one, other in ((found, 3 * gelu), (of_gate, 3 * slope), (of_value, gelu)):
        torch.testing.assert_close(one.double(), other, **near)


def test_another_gate_stays_that_of_transformers() -> None:
    layer = T5DenseGatedActDense(T5Config(**SIZES, feed_forward_proj="gated-silu"))
    quicken(layer)
    assert "forward" not in vars(layer)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest_in_both_directions(p: float) -> None:
    layer = nn.Dropout(p)
    quicken(layer)
    torch.manual_seed(0)
    x = torch.ones(401, 251, requires_grad=True)  # not a multiple of four values
    found = layer(x)
    found.sum().backward()
    kept = found != 0
    count = x.numel()
    assert abs(int(kept.sum()) - count * (1 - p)) < 5 * (count * p * (1 - p)) ** 0.5
    # Each column, and neighbours of every distance that share a draw of 64 bits, are as independent as they should be.
    assert (kept.float().mean(dim=0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / len(x)) ** 0.5
    flat = kept.float().flatten() - kept.float().mean()
    for distance in (1, 2, 3, 4, 251):
        assert abs(float((flat[:-distance] * flat[distance:]).mean()) / (p * (1 - p))) < 5 / count**0.5
    assert x.grad is not None
    torch.testing.assert_close(x.grad, found.detach())  # ones went in and came back
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - p)), rtol=1e-3, atol=0)


def test_dropout_follows_the_seed_and_is_nothing_in_evaluation() -> None:
    layer, x = nn.Dropout(0.3), torch.randn(50, 9)
    quicken(layer)
    drawn = [(torch.manual_seed(seed), layer(x))[1] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(layer.eval()(x), x)


# --- cross-attention --------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A decoder's cross-attention in a module that LoRA can be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.EncDecAttention = T5Attention(CONFIG, layer_idx=0)


def cross_attention(targets: list[str] | None, dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    module: nn.Module = Adapted()
    if targets is not None:
        module = get_peft_model(module, LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=targets))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)  # LoRA's B too, which begins at zero
    return module.train()


@pytest.mark.parametrize("prompt", [1, 2, 6])
@pytest.mark.parametrize("targets", [None, ["q", "v"], ["k", "v", "o"]], ids=["plain", "q v", "k v o"])
def test_absorbed_cross_attention_is_that_of_transformers(targets: list[str] | None, prompt: int) -> None:
    module = cross_attention(targets)
    stock = next(part for part in module.modules() if isinstance(part, T5Attention))
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    whole = mask[:, None, None].expand(-1, 1, prompt, -1)
    inputs = (torch.randn(4, prompt, 24), torch.randn(4, 7, 24))

    def called(queries: Tensor, states: Tensor) -> Tensor:
        return stock(queries, mask=whole, key_value_states=states)[0]

    expected = results(called, inputs, module.parameters())
    quicken(module)
    found = results(called, inputs, module.parameters())
    assert len(found) == 3 + len([p for p in module.parameters() if p.requires_grad])
    assert_same(expected, found)
    assert (found[2][~mask] == 0).all()  # no gradient to what no query sees


def products(run: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of what goes through the matrix products of a forward pass."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append(tuple(args[-2].shape))
            return function(*args, **(kwargs or {}))

    seen: list[tuple[int, ...]] = []
    with Watching():
        run()
    return seen


@pytest.mark.parametrize(("dropout", "absorbed"), [(0.0, True), (0.2, False)])
def test_states_are_projected_once_a_token_where_an_adapter_has_dropout_and_never_where_none_has(
    dropout: float, absorbed: bool
) -> None:
    module = cross_attention(["q", "v"], dropout)
    layer = next(part for part in module.modules() if isinstance(part, T5Attention))
    quicken(module)
    rows = torch.randn(2, 11, 24)
    segments = torch.tensor([[0, 1, 2, -1, -1], [3, 4, 5, 6, 7], [11, 12, -1, -1, -1]])
    packed = PackedStates(rows, (segments[1:2], segments[[0, 2], :3]))  # the longest, then the two that are shorter
    segments = segments[[1, 0, 2]]
    mask = (segments >= 0)[:, None, None].expand(-1, 1, 2, -1)
    states = rows.flatten(0, 1)[segments.clamp(min=0)]
    call = dict(mask=mask, key_value_states=states, packed=packed)
    queries = torch.randn(3, 2, 24)
    shapes = products(lambda: layer(queries, **call))
    assert ((22, 24) in shapes) == (not absorbed) and (15, 24) not in shapes
    module.eval()  # without its dropout, the same function
    quick = layer(queries, **call)[0]
    stock = T5Attention.forward(layer, queries, mask, states)[0]
    torch.testing.assert_close(quick, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_computed_again_for_a_gpus_memory_is_the_same(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cross_attention(["q", "v"])
    layer = next(part for part in module.modules() if isinstance(part, T5Attention))
    quicken(module)
    mask = torch.ones(4, 1, 2, 7, dtype=torch.bool)
    inputs = (torch.randn(4, 2, 24), torch.randn(4, 7, 24))

    def called(queries: Tensor, states: Tensor) -> Tensor:
        return layer(queries, mask=mask, key_value_states=states)[0]

    def seeded() -> list[Tensor]:
        torch.manual_seed(3)  # the same dropout, which the second computation has to draw again
        return results(called, inputs, module.parameters())

    layer.dropout = dropout
    expected = seeded()
    monkeypatch.setattr(kernels, "_computes_again", lambda query: True)
    for one, other in zip(expected, seeded(), strict=True):
        assert torch.equal(one, other)


# --- self-attention and LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_self_attention_is_that_of_transformers_in_the_first_layer_and_in_those_that_share_its_bias(
    decoder: bool,
) -> None:
    config = copy.deepcopy(CONFIG)
    config.is_decoder = decoder
    layers = [T5Attention(config, first, layer_idx=0, is_causal=decoder) for first in (True, False)]
    torch.manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    owner = torch.tensor([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    mask = owner[:, None, :, None] == owner[:, None, None, :]
    if decoder:
        mask = mask & torch.ones(6, 6, dtype=torch.bool).tril()

    def called(x: Tensor) -> Tensor:
        first, bias, _ = layers[0](x, mask=mask)
        return layers[1](first, mask=mask, position_bias=bias)[0]

    parameters = [parameter for layer in layers for parameter in layer.parameters()]  # the bias of positions too
    inputs = (torch.randn(2, 6, 24),)
    expected = results(called, inputs, iter(parameters))
    for layer in layers:
        quicken(layer)
    assert_same(expected, results(called, inputs, iter(parameters)))


def lora_linear(dropout: float = 0.0) -> nn.Module:
    module = cross_attention(["q"], dropout)
    return next(part.q for part in module.modules() if isinstance(part, T5Attention))


def test_an_adapted_layer_is_that_of_peft() -> None:
    layer, x = lora_linear(), torch.randn(4, 5, 24)
    quick = copy.deepcopy(layer)
    quicken(quick)
    assert_same(*(results(one, (x,), one.parameters()) for one in (layer, quick)))
    half = []
    with torch.autocast("cpu", torch.bfloat16):
        for one in (layer, quick):
            one.base_layer.to(torch.bfloat16)
            half.append(results(one, (x.bfloat16(),), one.parameters()))
    for one, other in zip(*half, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= 2**-6 * one.abs().max()  # roundings of bf16


@pytest.mark.parametrize("state", ["disabled", "merged", "dropout"])
def test_an_adapter_that_is_switched_off_merged_or_has_dropout_is_left_to_peft(state: str) -> None:
    layer, x = lora_linear(0.5 if state == "dropout" else 0.0), torch.randn(4, 5, 24)
    if state == "disabled":
        layer.enable_adapters(False)
    if state == "merged":
        layer.merge()
    torch.manual_seed(0)
    expected = layer(x)
    quicken(layer)
    layer.lora_dropout["default"].__dict__.pop("forward", None)  # dropout draws otherwise; this is about the layer
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected)


# --- a whole model ----------------------------------------------------------------------------------------------------

ITEMS, USERS, BASE, WIDTH = 30, 20, 103, 16


def tasks(layout: PromptLayout) -> list[Any]:
    random = np.random.default_rng(1)
    lengths = random.integers(2, 14, USERS)
    train = Sequences(
        items=random.integers(0, ITEMS, lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        users=np.arange(1, USERS + 1),
    )
    return [NextItem(train, layout, seed=0), MaskedItem(train, layout, seed=0, masks_per_sequence=3)]


@pytest.fixture(params=["t5-tied", "t5-untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    backbone, _ = load_backbone(str(save_backbone(request.param, tmp_path)), dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, WIDTH, generator=generator) for count in (ITEMS, USERS + 1, ITEMS)]
    backbone.add_id_tokens(IdTokens(*rows), BASE)
    adapted = add_lora(backbone, r=2, alpha=4, dropout=0.0, targets=None, base_name="tiny", revision=None)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapted.train()


LAYOUT = PromptLayout(
    base=BASE,
    num_items=ITEMS,
    num_user_rows=USERS + 1,
    mask_ids=tuple(range(3, 103)),
    eos_id=1,
    pad_id=0,
    max_history=8,
)


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return found | {"loss": loss.detach()}


def test_a_quickened_model_has_the_loss_and_gradients_of_the_plain_one_on_packed_rows(model: nn.Module) -> None:
    quick = copy.deepcopy(model)
    quicken(quick)
    for task in tasks(LAYOUT):
        batch = task.batch(0, np.arange(len(task.lengths)))
        expected = loss_and_gradients(model, as_tensors(batch))
        shapes = Packing.fitting([task.lengths], most_classes=3)
        assert len(shapes.classes) == 3
        found = loss_and_gradients(quick, as_tensors(shapes.pack(batch)))
        assert found.keys() == expected.keys() and len(found) > 10
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_computed_again_give_the_same_on_packed_rows(dropout: float, model: nn.Module) -> None:
    """Activation checkpointing, with three classes of length and a place without an example."""
    quicken(model)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
    task = tasks(LAYOUT)[0]
    fitting = Packing.fitting([task.lengths], most_classes=3)
    (examples, longest), *others = fitting.classes
    shapes = replace(fitting, classes=((examples + 1, longest), *others))
    batch = as_tensors(shapes.pack(task.batch(0, np.arange(len(task.lengths)))))
    results = []
    for checkpoints in (False, True):
        if checkpoints:
            unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        results.append(loss_and_gradients(model, batch))
    kept, again = results
    assert kept.keys() == again.keys() and len(kept) > 10
    for name, value in kept.items():
        assert torch.equal(again[name], value), name


def test_weights_and_their_names_stay_what_they_are(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quicken(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


@contextmanager
def counted(names: tuple[str, ...]) -> Iterator[list[str]]:
    """Calls of operators by name while the block runs."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.__name__.split(".")[0] in names:
                calls.append(function.__name__)
            return function(*args, **(kwargs or {}))

    calls: list[str] = []
    with Counting():
        yield calls


def test_a_step_asks_no_value_of_the_device(model: nn.Module) -> None:
    """What would make a GPU wait for the host: a number read off a tensor, or a shape that depends on values."""
    quicken(model)
    for task in tasks(LAYOUT):
        packed = as_tensors(Packing.fitting([task.lengths]).pack(task.batch(0, np.arange(len(task.lengths)))))
        with counted(("_local_scalar_dense", "nonzero", "masked_select", "unique2")) as calls:
            model(**packed, num_items_in_batch=torch.tensor(40)).loss.backward()
        assert calls == []
    with counted(("_local_scalar_dense",)) as calls:
        torch.ones(1).item()
    assert calls  # the count can see one
