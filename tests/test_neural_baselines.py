"""Neural rivals: each learns, ranks as it was trained, and goes on after a kill as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genrec_llm.baselines import neural
from genrec_llm.baselines.networks import HGN, SASRec, of_like_length, right_aligned
from genrec_llm.baselines.neural import FACTS, NeuralRecommender, RivalSettings, train
from genrec_llm.errors import ConfigError
from genrec_llm.files import read_json, write_json
from genrec_llm.tasks import Sequences

ITEMS, USERS = 20, 60
SMALL: dict[str, Any] = {
    "dim": 32, "dropout": 0.1, "learning_rate": 1e-2, "batch_size": 16, "ahead": 1, "validate_every": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "sasrec-softmax": {"model": "sasrec", "epochs": 10},
    "sasrec-bce": {"model": "sasrec", "loss": "bce", "negatives": 2, "epochs": 30},
    "bert4rec": {"model": "bert4rec", "heads": 2, "dropout": 0.0, "learning_rate": 3e-3, "epochs": 120},
    "caser": {"model": "caser", "loss": "bce", "negatives": 3, "epochs": 10},
    "hgn": {"model": "hgn", "loss": "bpr", "epochs": 20},
}


@pytest.fixture
def cycles() -> Sequences:
    """Every user walks through the items in the same order, from a random one on."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 15, USERS)
    items = np.concatenate([(random.integers(ITEMS) + np.arange(length)) % ITEMS for length in lengths])
    return Sequences(items, np.concatenate([[0], np.cumsum(lengths)]), np.arange(1, USERS + 1))


def next_found(recommender: NeuralRecommender) -> float:
    """Share of short walks whose next item has the highest score."""
    walks = [(start + np.arange(4)) % ITEMS for start in range(ITEMS)]
    scores = recommender.scores(walks, np.zeros(ITEMS, dtype=np.int64))
    assert scores.dtype == np.float32 and scores.shape == (ITEMS, ITEMS)
    return float((scores.argmax(axis=1) == (np.arange(ITEMS) + 4) % ITEMS).mean())


def trained(settings: RivalSettings, cycles: Sequences, folder: Path) -> tuple[Any, dict[str, Any]]:
    network = settings.network(ITEMS, USERS + 1)
    found = train(network, settings, cycles, folder, {"data": "cycles"}, next_found, lambda *_: None)
    return network, found


@pytest.mark.parametrize("kind", KINDS)
def test_each_learns_what_follows_what(kind: str, cycles: Sequences, tmp_path: Path) -> None:
    _, found = trained(RivalSettings(**(SMALL | KINDS[kind] | {"patience": 1000})), cycles, tmp_path)
    assert max(figure for *_, figure in found["curve"]) >= 0.8  # by chance 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_to_the_same_end(
    kind: str, cycles: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RivalSettings(**(SMALL | KINDS[kind] | {"epochs": 4}))
    whole, found = trained(settings, cycles, tmp_path / "whole")

    epochs = neural._epoch

    def killed(*args: Any) -> float:
        if args[-1] == 2:
            raise KeyboardInterrupt
        return epochs(*args)

    monkeypatch.setattr(neural, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(settings, cycles, tmp_path / "parts")
    monkeypatch.setattr(neural, "_epoch", epochs)
    parts, again = trained(settings, cycles, tmp_path / "parts")
    assert again["curve"] == found["curve"]
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_weights_are_kept_and_load_again(cycles: Sequences, tmp_path: Path) -> None:
    settings = RivalSettings(**(SMALL | KINDS["caser"] | {"epochs": 6, "patience": 2}))
    network = settings.network(ITEMS, USERS + 1)
    figures = iter([0.1, 0.5, 0.3, 0.5])
    kept: list[torch.Tensor] = []

    def validate(recommender: NeuralRecommender) -> float:
        kept.append(recommender.network.items.weight.detach().clone())
        return next(figures)

    found = train(network, settings, cycles, tmp_path, {}, validate, lambda *_: None)
    assert found["best_epoch"] == 2 and len(found["curve"]) == 4  # two validations without a better one; a tie is none
    neural.finish(tmp_path, settings, {}, network, found | {"name": "Caser", "users": USERS + 1})
    loaded = NeuralRecommender.load(tmp_path)
    assert torch.equal(loaded.network.items.weight, kept[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [FACTS, neural.WEIGHTS]
    write_json(tmp_path / FACTS, read_json(tmp_path / FACTS) | {"form": 0})
    with pytest.raises(ConfigError, match="an earlier form"):
        NeuralRecommender.load(tmp_path)


def test_a_checkpoint_of_something_else_is_refused(cycles: Sequences, tmp_path: Path) -> None:
    settings = RivalSettings(**(SMALL | KINDS["hgn"] | {"epochs": 1}))
    trained(settings, cycles, tmp_path)
    before = (tmp_path / neural.CHECKPOINT).read_bytes()
    for other, of in ((replace(settings, dropout=0.2), {"data": "cycles"}), (settings, {"data": "others"})):
        with pytest.raises(ConfigError, match="of a run with other settings or data"):
            train(settings.network(ITEMS, USERS + 1), other, cycles, tmp_path, of, next_found, lambda *_: None)
    assert (tmp_path / neural.CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(("kind", "entry"), [("sasrec-softmax", 8.0), ("bert4rec", 1.0)])
def test_what_goes_into_the_layers_is_as_published(kind: str, entry: float) -> None:
    """SASRec's rows times the root of their width, beside positions of their size; BERT4Rec's sum through a norm."""
    network = RivalSettings(**(SMALL | KINDS[kind] | {"dim": 64})).network(ITEMS, USERS).eval()
    seen: list[torch.Tensor] = []
    network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network.scores([np.array([4, 9])], np.array([0]))
    items, places = network.items.weight[[4, 9]], network.places.weight
    if kind == "bert4rec":
        assert seen[0].std().item() == pytest.approx(1, rel=0.05)
    else:
        torch.testing.assert_close(seen[0][0], items * entry + places[-2:])
    assert places.std().item() == pytest.approx(0.02 * entry, rel=0.1)


def test_layers_begin_with_weights_of_their_own() -> None:
    first, second = SASRec(ITEMS, dim=16, layers=2, heads=1, dropout=0.0, max_history=8, loss="softmax").encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_what_a_sequence_predicts_sees_nothing_of_what_comes_after() -> None:
    torch.manual_seed(0)
    network = SASRec(ITEMS, dim=16, layers=2, heads=2, dropout=0.0, max_history=8, loss="softmax").eval()
    one, other = (right_aligned([np.array([3, 1, 4, last])], 6, ITEMS) for last in (5, 9))
    states = [network.encode(rows, causal=True)[0] for rows in (one, other)]
    torch.testing.assert_close(states[0][:-1], states[1][:-1])
    assert (states[0][-1] - states[1][-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sasrec-softmax", "bert4rec"])
def test_padding_changes_nothing(kind: str) -> None:
    """Caser and HGN have rows of one width; what they make of a short history is in their formulas below."""
    torch.manual_seed(0)
    network = RivalSettings(**(SMALL | KINDS[kind])).network(ITEMS, USERS).eval()
    histories, users = [np.array([7, 2]), np.arange(9)], np.array([3, 0])
    together = network.scores(histories, users)
    alone = torch.cat([network.scores([history], users[place : place + 1]) for place, history in enumerate(histories)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def of_large_weights(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A network whose every part, biases too, shows in the scores; and its weights."""
    network = RivalSettings(**(SMALL | KINDS[kind] | {"dim": 6, "window": 4})).network(ITEMS, USERS).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in network.parameters():
            weights.normal_(std=0.5)
        network.items.weight[ITEMS] = 0.0
    return network, network.state_dict()


@pytest.mark.parametrize("history", [[7, 2], [9, 8, 1, 3, 3, 5]])
def test_hgn_is_its_formula(history: list[int]) -> None:
    """Ma et al. (2019), (2) to (7), item by item; an item that is not there has no weight."""
    network, w = of_large_weights("hgn")
    user, union, weights = w["users.weight"][3], torch.zeros(6), []
    recent = history[-4:]
    for place, item in enumerate(recent, 4 - len(recent)):
        row = w["items.weight"][item]
        gate = torch.sigmoid(w["of_item.weight"] @ row + w["of_item.bias"] + w["of_user.weight"] @ user)
        weights.append(torch.sigmoid(w["instance.weight"][0] @ (row * gate) + w["user_places.weight"][place] @ user))
        union += weights[-1] * row * gate
    state = user + union / sum(weights) + sum(w["items.weight"][item] for item in recent)
    expected = w["rows.weight"] @ state + w["bias"]
    torch.testing.assert_close(network.scores([np.array(history)], np.array([3]))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("history", [[7, 2], [9, 8, 1, 3, 3, 5]])
def test_caser_is_its_formula(history: list[int]) -> None:
    """Tang & Wang (2018), (4) to (11), filter by filter; rows of items that are not there are zero."""
    network, w = of_large_weights("caser")
    recent = history[-4:]
    image = torch.stack([torch.zeros(6)] * (4 - len(recent)) + [w["items.weight"][item] for item in recent])
    joined = []
    for kernel, bias in zip(w["across.weight"], w["across.bias"], strict=True):
        joined += [sum(kernel[0, place, 0] * image[place] for place in range(4)) + bias]
    for height in range(1, 5):
        kernels, biases = w[f"along.{height - 1}.weight"], w[f"along.{height - 1}.bias"]
        for kernel, bias in zip(kernels, biases, strict=True):
            slides = [(kernel[0] * image[top : top + height]).sum() + bias for top in range(5 - height)]
            joined += [torch.stack(slides).relu().max()[None]]
    seen = (w["joined.weight"] @ torch.cat(joined) + w["joined.bias"]).relu()
    expected = w["rows.weight"] @ torch.cat([seen, w["users.weight"][3]]) + w["bias"]
    torch.testing.assert_close(network.scores([np.array(history)], np.array([3]))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["caser", "hgn"])
def test_each_user_trains_a_row_of_their_own(kind: str) -> None:
    network = RivalSettings(**(SMALL | KINDS[kind])).network(ITEMS, 4)
    walks = Sequences(np.array([1, 2, 3, 4, 8, 9]), np.array([0, 4, 6]), np.array([2, 3]))
    for example, user in ((0, 2), (3, 3)):  # the first three examples are of the first sequence
        network.zero_grad()
        network.loss(walks, np.array([example]), np.random.default_rng(0)).backward()
        assert network.users.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [user]


def test_one_sequence_in_four_has_its_last_item_hidden_and_no_other() -> None:
    settings = RivalSettings(**(SMALL | KINDS["bert4rec"] | {"mask_probability": 0.5}))
    network = settings.network(ITEMS, 1).eval()
    count, length = 400, 10
    walks = Sequences(np.arange(count * length) % ITEMS, np.arange(count + 1) * length, np.arange(1, count + 1))
    seen: list[torch.Tensor] = []
    network.encode = lambda rows, causal: seen.append(rows) or torch.zeros(*rows.shape, 32)
    network.states_and_targets(walks, np.arange(count), np.random.default_rng(0))
    hidden = torch.cat(seen) == network.mask
    last_only = hidden[:, -1] & (hidden.sum(dim=1) == 1)
    assert last_only.float().mean().item() == pytest.approx(0.25, abs=0.06)  # by chance alone one in a thousand
    assert hidden[~last_only].float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_seed_and_penalty_matter(cycles: Sequences, tmp_path: Path) -> None:
    settings = RivalSettings(**(SMALL | KINDS["hgn"] | {"epochs": 3}))
    unknown: dict[str, torch.Tensor] = {}  # the row of a user whom no example has
    for name, other in {
        "as it is": settings, "seed": replace(settings, seed=1), "penalty": replace(settings, weight_decay=1.0)
    }.items():  # fmt: skip
        network, _ = trained(other, cycles, tmp_path / name)
        unknown[name] = network.users.weight[0].detach()
    fresh = settings.network(ITEMS, USERS + 1)
    assert torch.equal(unknown["as it is"], fresh.users.weight[0])
    assert unknown["penalty"].norm() < 0.8 * unknown["as it is"].norm()
    assert not torch.equal(unknown["seed"], unknown["as it is"])
    # From the same first weights, another seed draws otherwise.
    train(fresh, replace(settings, seed=1), cycles, tmp_path / "draws", {}, next_found, lambda *_: None)
    again = settings.network(ITEMS, USERS + 1)
    train(again, settings, cycles, tmp_path / "again", {}, next_found, lambda *_: None)
    assert not torch.equal(fresh.items.weight, again.items.weight)


def test_losses_are_their_formulas() -> None:
    torch.manual_seed(0)
    walks = Sequences(np.array([1, 2, 3]), np.array([0, 3]), np.array([1]))
    for loss in ("softmax", "bce", "bpr"):
        network = SASRec(5, dim=8, layers=1, heads=1, dropout=0.0, max_history=4, loss=loss, negatives=2).eval()
        found = network.loss(walks, np.array([0]), np.random.default_rng(7))
        states, targets = network.states_and_targets(walks, np.array([0]), np.random.default_rng(7))
        scores = states @ network.items.weight[:5].T
        assert targets.tolist() == [2, 3]
        wanted = scores.gather(1, targets[:, None])
        drawn = torch.from_numpy(np.random.default_rng(7).integers(5, size=(2, 2)))
        random = scores.gather(1, drawn)
        expected = {
            "softmax": torch.nn.functional.cross_entropy(scores, targets),
            "bce": -wanted.sigmoid().log().mean() - (1 - random.sigmoid()).log().mean(),
            "bpr": -(wanted - random).sigmoid().log().mean(),
        }[loss]
        torch.testing.assert_close(found, expected)


def test_a_window_predicts_the_items_that_its_sequence_still_has() -> None:
    network = HGN(10, 3, dim=4, window=3, ahead=2)
    walks = Sequences(np.array([1, 2, 3, 4, 8, 9]), np.array([0, 4, 6]), np.array([1, 2]))
    assert network.examples(walks) == 4
    asked: list[list[int]] = []
    network.states = lambda items, users: asked.extend(items.tolist()) or torch.zeros(len(items), 4)  # type: ignore
    _, targets = network.states_and_targets(walks, np.arange(4), np.random.default_rng(0))
    assert asked == [[10, 10, 1], [10, 1, 2], [1, 2, 3], [10, 10, 8]]
    assert targets.tolist() == [2, 3, 3, 4, 4, 9]


def test_classes_of_length_hold_every_sequence_once() -> None:
    lengths = np.array([1, 50, 7, 8, 9, 3, 0, 200])
    found = list(of_like_length(lengths, 50))
    assert sorted(np.concatenate([chosen for chosen, _ in found]).tolist()) == list(range(8))
    for chosen, width in found:
        assert width == min(50, lengths[chosen].max()) and (np.maximum(lengths[chosen], 4) * 2 >= width).all()


def test_settings_that_make_no_sense_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RivalSettings(model="gru", dim=0, dropout=1.0)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3
    settings = RivalSettings("sasrec")
    assert settings.with_values({"dropout": "0.3", "dim": "32", "loss": "bce"}).dim == 32
    with pytest.raises(ConfigError) as caught:
        settings.with_values({"droput": "0.3", "dim": "wide", "epochs": "2.7"})
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match=r"epochs: 2\.7 is not a whole number"):
        RivalSettings("sasrec", epochs=2.7)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="patience: inf is not a whole number"):
        RivalSettings("sasrec", patience=float("inf"))  # type: ignore[arg-type]
