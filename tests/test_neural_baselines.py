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


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    for kind in ("sasrec-softmax", "bert4rec", "caser", "hgn"):
        network = RivalSettings(**(SMALL | KINDS[kind])).network(ITEMS, USERS).eval()
        histories, users = [np.array([7, 2]), np.arange(9)], np.array([3, 0])
        together = network.scores(histories, users)
        alone = torch.cat(
            [network.scores([history], users[place : place + 1]) for place, history in enumerate(histories)]
        )
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


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
