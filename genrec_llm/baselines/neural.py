"""Training of the neural rivals: one loop for all, that goes on after a kill; and what it leaves, a recommender."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from genrec_llm.baselines.networks import FORM, HGN, BERT4Rec, Caser, Loss, Network, SASRec
from genrec_llm.decoding import mask_seen_, mixed_scores, mixtures, rank_targets
from genrec_llm.errors import ConfigError
from genrec_llm.evaluation import LAST_ITEMS_TOO, EvalData, each_user
from genrec_llm.files import atomic_file, read_json, write_json
from genrec_llm.metrics import Ranks, ndcg
from genrec_llm.processes import ALONE, Processes
from genrec_llm.tasks import LAST_ITEMS_SHARES, PromptLayout, Sequences, last_items_weights

WEIGHTS, FACTS, CHECKPOINT = "rival.safetensors", "rival.json", "checkpoint.safetensors"
Model = Literal["sasrec", "bert4rec", "caser", "hgn"]
MODELS: tuple[Model, ...] = ("sasrec", "bert4rec", "caser", "hgn")
FirstRows = Literal["random", "cooccurrence", "cooccurrence+vectors"]
FIRST_ROWS: tuple[FirstRows, ...] = ("random", "cooccurrence", "cooccurrence+vectors")


@dataclass(frozen=True)
class RivalSettings:
    """A rival and how it is trained.

    Args:
        model: one of `MODELS`.
        loss: see `Network`; BERT4Rec has the whole softmax always.
        dim, layers, heads, dropout: of the network; Caser and HGN have no layers and heads.
        max_history: most recent items that SASRec and BERT4Rec read.
        window, ahead: items that Caser and HGN read, and items after them that they are to find.
        mask_probability: of BERT4Rec.
        negatives: random items a target, for bce; bpr takes one.
        first_rows: one of `FIRST_ROWS`; but for random ones what our own model's rows start from, at length one.
        batch_size: sequences (SASRec, BERT4Rec) or windows (Caser, HGN) a step.
        weight_decay: L2 penalty in Adam's gradient, as these models have it.
        epochs: at most.
        validate_every: epochs between validations.
        patience: validations without a better NDCG@10 after which training ends.
        seed: of weights, order, draws and dropout.
    """

    model: Model
    loss: Loss = "softmax"
    dim: int = 64
    layers: int = 2
    heads: int = 1
    dropout: float = 0.5
    max_history: int = 50
    window: int = 5
    ahead: int = 3
    mask_probability: float = 0.2
    negatives: int = 1
    first_rows: FirstRows = "random"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 200
    validate_every: int = 2
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.model not in MODELS:
            problems.append(f"model: {self.model!r} is not one of {', '.join(MODELS)}")
        if self.loss not in ("softmax", "bce", "bpr"):
            problems.append(f"loss: {self.loss!r} is not one of softmax, bce, bpr")
        if self.first_rows not in FIRST_ROWS:
            problems.append(f"first_rows: {self.first_rows!r} is not one of {', '.join(FIRST_ROWS)}")
        counts = ("dim", "layers", "heads", "max_history", "window", "ahead", "negatives", "batch_size", "epochs",
                  "validate_every", "patience")  # fmt: skip
        problems += [
            f"{name}: {value} is not a whole number of at least 1"
            for name in counts
            if not isinstance(value := getattr(self, name), int) or value < 1
        ]
        problems += [f"{name}: {getattr(self, name)} is not between 0 and 1"
                     for name in ("dropout", "mask_probability") if not 0 <= getattr(self, name) < 1]  # fmt: skip
        if self.learning_rate <= 0 or self.weight_decay < 0:
            problems.append("learning_rate has to be above 0, weight_decay at least 0")
        if problems:
            raise ConfigError(problems)

    def with_values(self, texts: dict[str, str]) -> RivalSettings:
        """The same with some values replaced, each from its text.

        Raises:
            ConfigError: an unknown name, or a text that is no value of it; all at once.
        """
        known = {field.name: type(getattr(self, field.name)) for field in dataclasses.fields(self)}
        problems, values = [], {}
        for name, text in texts.items():
            try:
                values[name] = known[name](text)
            except KeyError:
                problems.append(f"{name}: unknown; there are {', '.join(known)}")
            except ValueError:
                problems.append(f"{name}: {text!r} is no {known[name].__name__}")
        if problems:
            raise ConfigError(problems)
        return dataclasses.replace(self, **values)

    def network(self, num_items: int, num_users: int) -> Network:
        """A fresh one; its weights follow from the seed."""
        torch.manual_seed(self.seed)
        if self.model in ("sasrec", "bert4rec"):
            shape = {name: getattr(self, name) for name in ("dim", "layers", "heads", "dropout", "max_history")}
            if self.model == "bert4rec":
                return BERT4Rec(num_items, **shape, mask_probability=self.mask_probability)
            return SASRec(num_items, **shape, loss=self.loss, negatives=self.negatives)
        kind = Caser if self.model == "caser" else HGN
        shape = {name: getattr(self, name) for name in ("dim", "window", "ahead", "dropout", "loss", "negatives")}
        return kind(num_items, num_users, **shape)


@dataclass(frozen=True)
class NeuralRecommender:
    """A trained network behind `SequenceRecommender`.

    Its user rows are those of `user_order`, whatever the vocabulary of the model beside it has.
    """

    network: Network
    name: str

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `SequenceRecommender.scores`."""
        found: NDArray[np.float32] = self.network.scores(histories, users).numpy()
        return found

    @classmethod
    def load(cls, folder: Path) -> NeuralRecommender:
        """What `finish` left in a folder.

        Raises:
            ConfigError: its networks computed something else then.
        """
        facts = read_json(folder / FACTS)
        if facts.get("form") != FORM:
            raise ConfigError(f"{folder}: trained with an earlier form of the rivals: train it again in another folder")
        network = RivalSettings(**facts["settings"]).network(facts["items"], facts["users"])
        network.load_state_dict(load_file(folder / WEIGHTS))
        return cls(network.eval(), facts["name"])


@dataclass(frozen=True)
class LastItemsToo:
    """A trained rival whose ranking is mixed from the history and its last items, as that of our model is."""

    rival: NeuralRecommender
    layout: PromptLayout

    @classmethod
    def by_validation(
        cls,
        rival: NeuralRecommender,
        layout: PromptLayout,
        validation: EvalData,
        *,
        exclude_seen: bool,
        batch_size: int = 512,
        processes: Processes = ALONE,
    ) -> LastItemsToo:
        """With the share of `LAST_ITEMS_SHARES` that has the best NDCG@10, as training chooses that of our model.

        Args:
            layout: what a history's last items are; its own share is not used.
            validation: with the rival's user rows, see `user_order`.
            exclude_seen, batch_size, processes: see `rank_recommender`.
        """
        mixed = replace(layout, last_items_weights=last_items_weights(0.5))  # of these only the proportions count

        def gains(users: NDArray[np.int64]) -> tuple[NDArray[np.float64]]:
            asked = [validation.histories[user] for user in users], validation.users[users]
            targets, found = torch.from_numpy(validation.targets[users]), []
            for scores in mixtures(rival.network.scores, mixed, LAST_ITEMS_SHARES, *asked):
                if exclude_seen:
                    mask_seen_(scores, [validation.seen[user] for user in users])
                better, tied = rank_targets(scores, targets)
                found.append(ndcg(Ranks(better.numpy(), tied.numpy(), validation.num_items), 10))
            return (np.stack(found, axis=1),)

        name = f"{rival.name}, shares of the last items"
        (of_shares,) = each_user(gains, validation, name, batch_size, processes)
        share = LAST_ITEMS_SHARES[int(of_shares.mean(axis=0).argmax())]
        return cls(rival, replace(layout, last_items_weights=last_items_weights(share)))

    @property
    def name(self) -> str:
        """In reports."""
        return f"{self.rival.name}{LAST_ITEMS_TOO}"

    @property
    def share(self) -> float:
        """Of the last items, all together."""
        return round(sum(self.layout.last_items_weights), 6)

    def scores(self, histories: Sequence[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `SequenceRecommender.scores`."""
        found: NDArray[np.float32] = mixed_scores(self.rival.network.scores, self.layout, histories, users).numpy()
        return found


def user_order(count: int) -> NDArray[np.int64]:
    """The rows that a neural rival has for the users of a data set, in the data set's order, int64 `[count]`."""
    return np.arange(1, count + 1)


def train(
    network: Network,
    settings: RivalSettings,
    sequences: Sequences,
    folder: Path,
    of: dict[str, Any],
    validate: Callable[[NeuralRecommender], float],
    report: Callable[[int, float, float], None],
) -> dict[str, Any]:
    """Train until validations get no better, and leave the best weights in `folder`; a killed call goes on.

    Args:
        sequences: training parts.
        of: what else the weights follow from (data, first rows, protocol); a checkpoint of something else is refused.
        validate: figure of merit of a recommender on the validation split, higher is better.
        report: told epoch, mean loss and figure after each validation.

    Returns:
        `curve`, `[epoch, loss, figure]` of each validation, `best_epoch` and `seconds` of training and validation.

    Raises:
        ConfigError: the folder has a checkpoint of other settings, or of something else.
    """
    optimizer = torch.optim.Adam(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    curve: list[list[float]] = []
    before = 0.0
    if (folder / CHECKPOINT).is_file():
        curve, before = _read_checkpoint(folder / CHECKPOINT, network, optimizer, identity(settings, of))
    begun, losses, done = time.perf_counter(), [], int(curve[-1][0]) if curve else 0
    while done < settings.epochs and not _ended(curve, settings.patience):
        losses.append(_epoch(network, optimizer, settings, sequences, done))
        done += 1
        if done % settings.validate_every and done < settings.epochs:
            continue
        network.eval()
        figure = validate(NeuralRecommender(network, settings.model))
        curve.append([done, float(np.mean(losses)), figure])
        report(*curve[-1])  # type: ignore[arg-type]
        losses = []
        if curve.index(_best(curve)) == len(curve) - 1:
            with atomic_file(folder / WEIGHTS) as temporary:
                save_file(network.state_dict(), temporary)
        _write_checkpoint(folder / CHECKPOINT, network, optimizer, curve, before + time.perf_counter() - begun,
                          identity(settings, of))  # fmt: skip
    best = _best(curve)
    network.load_state_dict(load_file(folder / WEIGHTS))
    network.eval()
    return {"curve": curve, "best_epoch": int(best[0]), "seconds": before + time.perf_counter() - begun}


def identity(settings: RivalSettings, of: dict[str, Any]) -> dict[str, Any]:
    """All that the weights of a rival follow from."""
    return {"settings": asdict(settings), "form": FORM} | of


def _best(curve: list[list[float]]) -> list[float]:
    """The first of the best validations."""
    return max(curve, key=lambda point: point[2])


def _ended(curve: list[list[float]], patience: int) -> bool:
    figures = [figure for *_, figure in curve]
    return bool(figures) and len(figures) - 1 - int(np.argmax(figures)) >= patience


def _epoch(
    network: Network, optimizer: torch.optim.Optimizer, settings: RivalSettings, sequences: Sequences, epoch: int
) -> float:
    """Every example once; all draws follow from (seed, epoch). Mean loss of the steps."""
    generator = np.random.default_rng((settings.seed, epoch))
    torch.manual_seed(int(generator.integers(2**62)))
    network.train()
    order = generator.permutation(network.examples(sequences))
    total, steps = torch.zeros(()), max(1, round(len(order) / settings.batch_size))
    for examples in np.array_split(order, steps):
        optimizer.zero_grad()
        loss = network.loss(sequences, examples, generator)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total) / steps


def _write_checkpoint(
    path: Path, network: Network, optimizer: torch.optim.Optimizer, curve: list[list[float]], seconds: float,
    of: dict[str, Any],
) -> None:  # fmt: skip
    tensors: dict[str, Tensor] = {f"network.{name}": value for name, value in network.state_dict().items()}
    for place, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{place}.{name}": value for name, value in moments.items()}
    with atomic_file(path) as temporary:
        facts = {"curve": curve, "seconds": seconds, "of": of}
        save_file(tensors, temporary, {name: json.dumps(value, sort_keys=True) for name, value in facts.items()})


def _read_checkpoint(
    path: Path, network: Network, optimizer: torch.optim.Optimizer, of: dict[str, Any]
) -> tuple[list[list[float]], float]:
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    if facts.get("of") != json.dumps(of, sort_keys=True):
        raise ConfigError(f"{path}: of a run with other settings or data: choose another --out, or remove its folder")
    tensors = load_file(path)
    network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, place, name = key.split(".")
            state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return json.loads(facts["curve"]), json.loads(facts["seconds"])


def finish(folder: Path, settings: RivalSettings, of: dict[str, Any], network: Network, facts: dict[str, Any]) -> None:
    """Write what `NeuralRecommender.load` reads, and what made it; the checkpoint goes.

    Args:
        of: see `train`.
        facts: what else is known, `users` (rows of users) among it.
    """
    write_json(folder / FACTS, identity(settings, of) | {"items": network.num_items} | facts)
    (folder / CHECKPOINT).unlink(missing_ok=True)
