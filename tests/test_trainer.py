"""The trainer: two learning rates, weight decay, validation, whole checkpoints, stopping, and what is exported."""

from __future__ import annotations

import json
import math
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import contents, recipe, tensors_and_words
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from genrec_llm import decoding
from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments
from genrec_llm.batching import GlobalBatches, as_tensors
from genrec_llm.build import build_model
from genrec_llm.checkpoints import MANIFEST, is_complete, last_complete_checkpoint, write_manifest
from genrec_llm.encoded import Data, load_data
from genrec_llm.errors import ConfigError, ExportError
from genrec_llm.evaluation import EvalData, rank_recommender
from genrec_llm.files import read_json
from genrec_llm.loading import Loaded
from genrec_llm.metrics import Ranks, hit_rate, ndcg, reciprocal_rank
from genrec_llm.recommender import Recommender
from genrec_llm.runs import load_run_data
from genrec_llm.tasks import IGNORED, LAST_ITEMS_SHARES, MaskedItem, NextItem, Task, last_items_weights
from genrec_llm.trainer import GenRecTrainer
from genrec_llm.world import describe_launch

USERS = 37
"""Not divisible by the evaluation batches used here."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log and the base checkpoints."""
    return tiny.save_ground(tmp_path_factory.mktemp("trainer"), users=USERS)


@pytest.fixture(scope="module")
def data(home: Path) -> Data:
    return load_data(DataArguments(dataset=str(home / "log.csv")))


@pytest.fixture
def trainer(home: Path, data: Data, tmp_path: Path) -> Callable[..., GenRecTrainer]:
    """Builds a trainer of three steps without validation or checkpoints; arguments override that."""

    def build(kind: str = "t5-untied", model: dict[str, Any] | None = None, masks: int = 0, **arguments: Any):
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "max_steps": 3,
            "global_batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 0, "eval_strategy": "no",
            "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1, "report_to": "none",
        }  # fmt: skip
        training = GenRecTrainingArguments(**(settings | arguments))
        model_args = ModelArguments(backbone=str(home / kind), lora_r=2, **({"lora_dropout": 0.0} | (model or {})))
        built = build_model(model_args, training, data)
        task: Task = (
            MaskedItem(data.train, built.layout, seed=0, masks_per_sequence=masks)
            if masks
            else NextItem(data.train, built.layout, seed=0)
        )
        return GenRecTrainer(
            built.model, training, task=task, layout=built.layout, validation=data.held_out("validation")
        )

    return build


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_what_is_built_follows_from_the_seed_of_training_alone(trainer: Callable[..., GenRecTrainer]) -> None:
    once, again, other = (trainable(trainer(seed=seed).model) for seed in (3, 3, 4))
    adapters = [name for name in once if "lora_A" in name]
    assert adapters and all(torch.equal(once[name], again[name]) for name in once)
    assert not any(torch.equal(once[name], other[name]) for name in adapters)


def moved(trainer: GenRecTrainer) -> set[str]:
    """Names of the tensors that training changes."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}


def losses(trainer: GenRecTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- the optimizer ---------------------------------------------------


@pytest.mark.parametrize("kind", ["t5-tied", "bart"])
def test_each_learning_rate_moves_its_own_tensors_and_no_other(trainer, kind: str) -> None:
    still_rows = moved(trainer(kind, rows_learning_rate=0.0))
    assert still_rows and all("lora_" in name for name in still_rows)
    still_adapters = moved(trainer(kind, learning_rate=0.0, rows_learning_rate=1e-2))
    assert still_adapters and all("id_tokens" in name for name in still_adapters)
    both = moved(trainer(kind))
    assert both == still_rows | still_adapters, "by default the rows learn at the rate of the rest"


def test_every_trained_tensor_has_its_rate_and_its_decay(trainer) -> None:
    settings = {"weight_decay": 0.1, "rows_weight_decay": 0.3, "learning_rate": 1e-3, "rows_learning_rate": 2e-3}
    for model in ({}, {"tuning": "full"}, {"tie_item_rows": False}):
        built = trainer("t5-tied", model=model, **settings)
        names = {id(value): name for name, value in built.model.named_parameters()}
        found: dict[str, tuple[float, float]] = {}
        for group in built.create_optimizer().param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in found, "a tensor in two groups"
                found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
        assert found.keys() == trainable(built.model).keys()
        for name, settings_of in found.items():
            if "id_tokens" in name:
                assert settings_of == (2e-3, 0.0 if name.endswith("item_out.scale") else 0.3), name
            else:
                undecayed = "layer_norm" in name or "relative_attention_bias" in name
                assert settings_of == (1e-3, 0.0 if undecayed else 0.1), name
        assert any("layer_norm" in name for name in found) == ("tuning" in model)


def test_the_rows_decay_by_their_own_weight_decay_alone(trainer) -> None:
    """AdamW with decay w and rate r multiplies by 1 - r w each step: seen alone at rows that nobody uses."""
    rates = {"lr_scheduler_type": "constant", "learning_rate": 0.1, "weight_decay": 0.5, "max_steps": 2}
    for decay in (0.0, 0.25):
        built = trainer(model={"row_init": "random"}, rows_weight_decay=decay, **rates)
        (name,) = (name for name in trainable(built.model) if name.endswith("user_in.weight"))
        never = np.setdiff1d(np.arange(1, 1 + USERS), used_users(built))
        assert len(never), "two steps do not touch every user"
        before = trainable(built.model)[name][never]
        built.train()
        torch.testing.assert_close(trainable(built.model)[name][never], before * (1 - 0.1 * decay) ** 2)


def used_users(built: GenRecTrainer) -> np.ndarray:
    first = built.layout.first_user_id
    ids = [batch["input_ids"].numpy().ravel() - first for batch in built.get_train_dataloader()]
    used = np.unique(np.concatenate(ids[: built.args.max_steps]))
    return used[used >= 0]


# --- steps -------------------------------------------------------------


@pytest.mark.parametrize(("masks", "smoothing"), [(0, 0.0), (3, 0.0), (0, 0.3)])
def test_the_first_loss_is_the_mean_over_the_targets_of_the_first_global_batch(
    trainer, masks: int, smoothing: float
) -> None:
    built = trainer(masks=masks, max_steps=1, global_batch_size=16)
    batches = GlobalBatches(built.task.lengths, 16, seed=0, shares=1)
    batch = as_tensors(built.task.batch(0, batches.epoch(0)[0]))
    labels = batch.pop("labels").flatten()
    there = labels != IGNORED
    with torch.no_grad():
        surprise = -built.model.eval()(**batch).logits[there].log_softmax(dim=1)  # of every item
    labels = labels[there]
    expected = float((1 - smoothing) * surprise[range(len(labels)), labels].mean() + smoothing * surprise.mean())
    assert len(labels) > 16 or not masks
    built = trainer(
        masks=masks, max_steps=1, global_batch_size=16, model={"dropout": 0.0}, label_smoothing_factor=smoothing
    )
    built.train()
    assert losses(built) == [pytest.approx(expected, rel=1e-4)]  # the log rounds to four digits


@pytest.mark.parametrize(("kind", "masks"), [("t5-untied", 0), ("t5-tied", 3), ("bart", 1)])
def test_accumulation_trains_the_same_weights(trainer, kind: str, masks: int) -> None:
    """1 x 16 and 4 x 4 examples, whose parts differ in targets. SGD, since the first steps of Adam are mere signs."""
    runs = [
        trainer(
            kind, masks=masks, gradient_accumulation_steps=accumulation, model={"dropout": 0.0}, optim="sgd",
            learning_rate=0.5, max_steps=6,
        )
        for accumulation in (1, 4)
    ]  # fmt: skip
    start = trainable(runs[0].model)
    for run in runs:
        run.train()
    whole, parts = (trainable(run.model) for run in runs)
    for name in start:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=3e-6)  # fp32 sums in another order
    assert max(float((whole[name] - start[name]).abs().max()) for name in start) > 1e-2
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-4)
    assert len(losses(runs[0])) == 6


class Questions(TrainerCallback, TorchDispatchMode):
    """Where a step's operators on tensors ask for a value, which makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.asked.append("".join(traceback.format_stack(limit=8)))
        return function(*args, **(kwargs or {}))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.__enter__()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.__exit__(None, None, None)


@pytest.mark.parametrize("options", [{}, {"sparse_user_rows": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_step_that_is_not_logged_never_waits_for_the_device(trainer, options: dict[str, Any]) -> None:
    built = trainer(max_steps=4, logging_steps=100, model={"dropout": 0.1}, **options)
    questions = Questions()
    built.add_callback(questions)
    built.train()
    # AdamW's count of steps lies on the host; `coalesce` of sparse gradients has to know how many rows there are.
    unexpected = [where for where in questions.asked if "adamw.py" not in where and "sparse_rows.py" not in where]
    assert not unexpected, unexpected[0]
    built = trainer(max_steps=2, logging_steps=100, logging_nan_inf_filter=True)  # the Trainer's default, which waits
    built.add_callback(questions)
    built.train()
    assert any("trainer.py" in where for where in questions.asked)


class Copies(TorchDispatchMode):
    """Notes of each copy to another device whether it was to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] == "_to_copy" and kwargs.get("device") is not None:
            self.waited.append(not kwargs.get("non_blocking"))
        return function(*args, **(kwargs or {}))


def test_no_copy_of_a_batch_to_the_device_is_waited_for(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer()
    batch = next(iter(built.get_train_dataloader()))
    monkeypatch.setattr(GenRecTrainingArguments, "device", torch.device("meta"))
    with Copies() as copies:
        sent = built._prepare_inputs(batch)
        count = built._get_num_items_in_batch([batch], torch.device("meta"))
    assert sent["input_ids"].is_meta and count.is_meta
    assert len(copies.waited) > len(batch) and not any(copies.waited)


class Graphs(TrainerCallback):
    """How many graphs torch has compiled after each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow  # about half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_step_trains_the_same_and_all_steps_have_its_shapes(trainer) -> None:
    plain, compiled = (trainer(model={"dropout": 0.0}, max_steps=6, torch_compile=on) for on in (False, True))
    plain.train()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs = Graphs()
    compiled.add_callback(graphs)
    compiled.train()
    assert graphs.counts[0] > 0 and set(graphs.counts) == {graphs.counts[0]}
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.slow  # about half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_step_draws_its_dropout_from_the_seed(trainer) -> None:
    torch.compiler.reset()
    found = []
    for dropout in (0.3, 0.3, 0.0):
        built = trainer(model={"dropout": dropout}, torch_compile=True)
        built.train()
        found.append(losses(built))
    assert found[0] == found[1] and found[0] != found[2] and all(map(math.isfinite, found[0]))


def test_the_same_seed_gives_the_same_history_and_another_seed_another(trainer) -> None:
    histories = []
    for seed in (0, 0, 1):
        run = trainer(seed=seed, model={"lora_dropout": 0.3}, max_steps=5)
        run.train()
        histories.append(losses(run))
    assert histories[0] == histories[1] != histories[2]
    assert len(histories[0]) == 5 and np.isfinite(histories[0]).all()


# --- validation ---------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("batch_size", [8, 256])
@pytest.mark.parametrize(("exclude_seen", "share"), [(True, 0.0), (False, 0.0), (True, 0.5)])
def test_validation_ranks_are_those_of_the_evaluator(
    trainer, data: Data, kind: str, batch_size: int, exclude_seen: bool, share: float
) -> None:
    model = {"lora_dropout": 0.5, "dropout": 0.5, "last_items_share": share}
    built = trainer(kind, per_device_eval_batch_size=batch_size, model=model)
    assert sum(built.layout.last_items_weights) == pytest.approx(share)
    held_out = data.held_out("validation")
    assert len(held_out.targets) == USERS
    for trained in (False, True):
        if trained:
            built.train()
        ranks = built.rank(held_out, exclude_seen=exclude_seen)
        loaded = Loaded(built.model, None, data.vocab, built.layout, {"kind": "adapter"})  # type: ignore[arg-type]
        expected = rank_recommender(Recommender(loaded), held_out, exclude_seen=exclude_seen, batch_size=USERS).ranks
        assert np.array_equal(ranks.better, expected.better) and np.array_equal(ranks.tied, expected.tied)
        assert ranks.candidates == expected.candidates == data.vocab.num_items


def test_a_large_catalogue_is_validated_for_fewer_users_at_a_time(
    trainer, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, held_out, sizes = trainer(), data.held_out("validation"), []
    whole = built.rank(held_out)
    monkeypatch.setattr(decoding, "MOST_SCORES", 7 * data.vocab.num_items)
    hook = built.model.register_forward_hook(lambda *given: sizes.append(len(given[-1].logits)))
    ranks = built.rank(held_out)
    hook.remove()
    assert max(sizes) <= 7 and sum(sizes) == USERS
    assert np.array_equal(ranks.better, whole.better) and np.array_equal(ranks.tied, whole.tied)


def test_each_share_of_the_last_items_ranks_as_a_layout_with_that_share(trainer, data: Data) -> None:
    built, held_out, asked = trainer(), data.held_out("validation"), []
    hook = built.model.register_forward_hook(lambda *given: asked.append(len(given[-1].logits)))
    of_shares = built._rank(held_out, LAST_ITEMS_SHARES)
    hook.remove()
    assert sum(asked) == 5 * USERS, "the model is asked once for all shares"
    for share, ranks in zip(LAST_ITEMS_SHARES, of_shares, strict=True):
        built.layout = replace(built.layout, last_items_weights=last_items_weights(share))
        expected = built.rank(held_out)
        assert np.array_equal(ranks.better, expected.better) and np.array_equal(ranks.tied, expected.tied)
    assert len({ranks.better.tobytes() for ranks in of_shares}) == len(LAST_ITEMS_SHARES)


@pytest.mark.parametrize(("best_kept", "share"), [(True, 0.7), (False, 0.15)])
def test_the_model_that_is_kept_has_the_share_that_was_chosen_for_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_kept: bool, share: float
) -> None:
    """Each epoch another share ranks best; the second epoch is the best one."""
    best = iter([(0.3, 2), (0.7, 0), (0.15, 1)])

    def rank(self: GenRecTrainer, data: EvalData, shares: Sequence[float]) -> list[Ranks]:
        wins, better = next(best)
        nobody = np.zeros(len(data.targets), dtype=np.int64)
        return [Ranks(nobody + (better if each == wins else 5), nobody, data.num_items) for each in shares]

    monkeypatch.setattr(GenRecTrainer, "_rank", rank)
    keep = () if best_kept else ("--load-best-model-at-end", "false")
    run = tiny.train(home / "t5-untied", tmp_path, tmp_path / "run", "--choose-last-items-share", "true",
                     "--num-train-epochs", 3, *keep)  # fmt: skip
    log = [entry for entry in read_json(run / "log_history.json") if "eval_last_items_share" in entry]
    assert [entry["eval_last_items_share"] for entry in log] == [0.3, 0.7, 0.15]
    assert log[1]["eval_ndcg@10"] == 1.0 and read_json(run / "run.json")["finished"]["last_items_share"] == share
    tiny.recipe("merge", "--run", run)
    for folder in ("adapter", "merged"):
        layout = Recommender.from_pretrained(run / folder, device="cpu").layout
        assert sum(layout.last_items_weights) == pytest.approx(share)
        words = f"history {1 - share:g}, its last 4 items alone {share:g}, chosen on validation"
        assert words in (run / folder / "README.md").read_text()


def test_what_is_kept_for_its_validation_has_to_be_saved(trainer) -> None:
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 2}
    with pytest.raises(ConfigError, match="save_steps: 2, but eval_steps 1: what validates best has to be saved"):
        trainer(load_best_model_at_end=True, **steps)
    trainer(load_best_model_at_end=False, **steps)


def test_a_share_that_is_given_is_not_to_be_chosen(trainer) -> None:
    with pytest.raises(
        ConfigError, match=r"last_items_share: 0\.5, and choose_last_items_share as well: give --last-items-share 0 or"
    ):
        trainer(eval_strategy="epoch", choose_last_items_share=True, model={"last_items_share": 0.5})
    with pytest.raises(
        ConfigError, match="choose_last_items_share: it is chosen on validation, and eval_strategy is no"
    ):
        trainer(choose_last_items_share=True)


def test_every_batch_asks_the_model_equally_often_whatever_its_histories(trainer, data: Data) -> None:
    """Under ZeRO-3 a process that asked less often would leave the others waiting."""
    built, held_out, asked = (
        trainer(per_device_eval_batch_size=7, model={"last_items_share": 0.5}),
        data.held_out("test"),
        [],
    )
    hook = built.model.register_forward_hook(lambda *given: asked.append(len(given[-1].logits)))
    one_item = replace(held_out, histories=[history[:1] for history in held_out.histories])
    for histories in (held_out, one_item):
        asked.clear()
        built.rank(histories)
        assert asked == sorted(asked, reverse=True) and len(asked) == 5 * -(-USERS // 7)
    hook.remove()


def test_the_logged_metrics_are_means_over_every_user_once(trainer, data: Data) -> None:
    built = trainer(per_device_eval_batch_size=5)
    metrics = built.evaluate()
    ranks = built.rank(data.held_out("validation"))
    assert metrics["eval_ndcg@10"] == float(ndcg(ranks, 10).mean())
    assert metrics["eval_hit_rate@5"] == float(hit_rate(ranks, 5).mean())
    assert metrics["eval_mrr"] == float(reciprocal_rank(ranks).mean())
    assert len(ranks.better) == USERS


def test_a_sample_of_validation_users_is_fixed_and_small(data: Data) -> None:
    sample, again = (data.held_out("validation", sample=10) for _ in range(2))
    everyone = data.held_out("validation")
    assert sample.users.tolist() == again.users.tolist() and len(set(sample.users.tolist())) == 10
    where = {int(user): place for place, user in enumerate(everyone.users)}
    assert [everyone.targets[where[int(user)]] for user in sample.users] == sample.targets.tolist()
    assert len(data.held_out("validation", sample=10_000).users) == USERS


def scripted(values: list[float]) -> Callable[..., Ranks]:
    """A `rank` by which validation has the hit rate `values[0]`, then `values[1]`, …"""
    left = list(values)

    def rank(self: GenRecTrainer, data: EvalData, *, exclude_seen: bool = True) -> Ranks:
        hits = np.arange(len(data.targets)) < left.pop(0) * len(data.targets)
        return Ranks(np.where(hits, 0, data.num_items - 1), np.zeros(len(hits), dtype=np.int64), data.num_items)

    return rank


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "global_batch_size": 64}


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (0, 6)])
def test_training_stops_after_so_many_validations_without_a_better_one(
    trainer, monkeypatch: pytest.MonkeyPatch, patience: int, epochs: int
) -> None:
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.2, 0.8, 0.6, 0.8, 0.9, 0.1]))
    built = trainer(num_train_epochs=6, early_stopping_patience=patience, load_best_model_at_end=True, **EPOCHS)
    built.train()
    validations = [entry for entry in built.state.log_history if "eval_ndcg@10" in entry]
    assert len(validations) == epochs == round(built.state.epoch)


def test_the_best_checkpoint_is_what_is_exported(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.2, 0.8, 0.6, 0.4]))
    run = finetune(home, tmp_path / "run", "--num-train-epochs", 4, "--save-total-limit", 10)
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    assert len(checkpoints) == 4
    exported = load_file(run / "adapter" / "adapter_model.safetensors")
    rows = load_file(run / "adapter" / "id_tokens.safetensors")
    for place, checkpoint in enumerate(checkpoints):
        state = load_file(checkpoint / "adapter_model.safetensors")
        same = all(torch.equal(state[name], value) for name, value in exported.items())
        (name,) = (name for name in state if name.endswith("item_in.weight"))
        assert same == torch.equal(state[name], rows["item_in"]) == (place == 1)
    info = json.loads((run / "adapter" / "genrec.json").read_text())
    assert info["metrics"]["validation_ndcg@10"] == pytest.approx(math.ceil(0.8 * USERS) / USERS)


def test_the_exported_model_has_the_metric_that_is_written_beside_it(home: Path, tmp_path: Path) -> None:
    run = finetune(home, tmp_path / "run", "--num-train-epochs", 3)
    held_out = load_run_data(run).held_out("validation")
    ranks = rank_recommender(Recommender.from_pretrained(run / "adapter"), held_out, exclude_seen=True).ranks
    info = json.loads((run / "adapter" / "genrec.json").read_text())
    assert info["metrics"]["validation_ndcg@10"] == pytest.approx(float(ndcg(ranks, 10).mean()), abs=1e-9)
    history = json.loads((run / "log_history.json").read_text())
    best = max(entry["eval_ndcg@10"] for entry in history if "eval_ndcg@10" in entry)
    assert info["metrics"]["validation_ndcg@10"] == best


# --- checkpoints ----------------------------------------------------------


def test_only_weights_that_are_lost_are_warned_of(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer("t5-untied", {"tuning": "full", "tie_item_rows": True})
    result = built.model.load_state_dict({}, strict=False)
    tied = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "id_tokens.item_out.weight"]
    assert {*tied, "lm_head.weight"} < set(result.missing_keys)
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    built._issue_warnings_after_load(result._replace(missing_keys=tied))
    assert not said
    built._issue_warnings_after_load(result._replace(missing_keys=[*tied, "lm_head.weight"]))
    (warning,) = said
    assert warning.endswith("['lm_head.weight'].")


def finetune(home: Path, out: Path, *arguments: object) -> Path:
    recipe(
        "finetune", "--dataset", home / "log.csv", "--backbone", home / "t5-untied", "--output-dir", out,
        "--use_cpu", "--disable_tqdm", "true", "--global-batch-size", 64, "--lora-r", 2, "--learning-rate", "1e-2",
        *arguments,
    )  # fmt: skip
    return out


STEPS = ("--max-steps", 6, "--eval-strategy", "no", "--load-best-model-at-end", "false", "--save-strategy", "steps",
         "--save-steps", 2, "--save-total-limit", 9, "--logging-steps", 1)  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(home: Path) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6."""
    return finetune(home, home / "whole", *STEPS)


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def cut_weights(folder: Path) -> None:
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-1])


def changed_byte(folder: Path) -> None:
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[-100] ^= 1
    (folder / "optimizer.pt").write_bytes(content)


def lost_file(folder: Path) -> None:
    (folder / "scheduler.pt").unlink()


LAUNCH = {"strategy": "NO", "world_size": 1}


def older_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({"files": manifest["files"]}))


DAMAGES = [no_manifest, older_manifest, cut_manifest, cut_weights, changed_byte, lost_file]


def test_a_manifest_lists_every_file_of_a_checkpoint(whole_run: Path) -> None:
    for step in (2, 4, 6):
        folder = whole_run / f"checkpoint-{step}"
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert set(listed) == set(contents(folder)) - {MANIFEST} and "adapter_model.safetensors" in listed
        assert is_complete(folder)
    assert last_complete_checkpoint(whole_run) == str(whole_run / "checkpoint-6")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_skipped_with_a_warning(
    whole_run: Path, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    damage(run / "checkpoint-6")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "checkpoint-6 is not whole" in record.getMessage()
    for step in (2, 4):
        no_manifest(run / f"checkpoint-{step}")
    assert last_complete_checkpoint(run) is None


def test_checkpoints_are_ordered_by_number_and_other_folders_are_none(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-old", "adapter"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, LAUNCH)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", [no_manifest, cut_weights])
def test_training_goes_on_from_the_whole_checkpoint_before_and_ends_with_the_same_model(
    home: Path, whole_run: Path, damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "adapter")
    damage(run / "checkpoint-6")
    finetune(home, run, *STEPS)
    assert f"going on from {run / 'checkpoint-4'}" in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "id_tokens.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (whole_run / "adapter" / name).read_bytes()
    histories = [json.loads((folder / "log_history.json").read_text()) for folder in (whole_run, run)]
    first, second = ([entry["loss"] for entry in history if "loss" in entry] for history in histories)
    assert first == second and len(first) == 6
    assert is_complete(run / "checkpoint-6"), "written anew"


def test_a_finished_run_that_is_started_again_trains_nothing_and_exports_the_same(
    home: Path, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    before = (tensors_and_words(run / "adapter"), contents(run / "checkpoint-6"))
    shutil.rmtree(run / "adapter")
    finetune(home, run, *STEPS)
    assert (tensors_and_words(run / "adapter"), contents(run / "checkpoint-6")) == before


def test_a_finished_run_keeps_another_checkpoint_if_it_is_asked_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = ("--num-train-epochs", 2)
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.8, 0.2]))
    run = finetune(home, tmp_path / "run", *epochs)
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([]))
    kept = []
    for more in ((), ("--load-best-model-at-end", "false"), ("--load-best-model-at-end", "false"), ()):
        finetune(home, run, *epochs, *more)
        kept.append((contents(run / "adapter")["id_tokens.safetensors"], (run / "adapter").stat().st_ino))
    best, last, again, back = kept
    assert best[0] == back[0] != last[0] and last == again


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_has_moved_still_exports_its_best_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    epochs = ("--num-train-epochs", 4, "--save-total-limit", 10)
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.2, 0.8, 0.6, 0.4]))
    finetune(home, tmp_path / "there", *epochs)
    expected = contents(tmp_path / "there" / "adapter")["id_tokens.safetensors"]
    shutil.move(tmp_path / "there", tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "adapter")
    last = max((tmp_path / "here").glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    if not finished:
        shutil.rmtree(last)
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([] if finished else [0.4]))
    finetune(home, tmp_path / "here", *epochs)
    assert contents(tmp_path / "here" / "adapter")["id_tokens.safetensors"] == expected


@pytest.mark.parametrize("damage", [shutil.rmtree, cut_weights])
def test_a_lost_best_checkpoint_is_told_and_no_other_is_exported(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    epochs = ("--num-train-epochs", 3, "--save-total-limit", 10)
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.8, 0.6, 0.4]))
    run = finetune(home, tmp_path / "run", *epochs)
    shutil.rmtree(run / "adapter")
    first, _, last = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    damage(first)
    shutil.rmtree(last)
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.4]))
    with pytest.raises(SystemExit):
        finetune(home, run, *epochs)
    assert "its best checkpoint" in capsys.readouterr().err and not (run / "adapter").exists()


PATIENT = ("--num-train-epochs", 9, "--early-stopping-patience", 2, "--save-total-limit", 10)


def test_patience_is_not_given_anew_when_a_run_goes_on_and_a_stopped_run_stays_stopped(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.2, 0.8, 0.6, 0.4]))
    run = finetune(home, tmp_path / "run", *PATIENT)
    expected = tensors_and_words(run / "adapter")
    assert len(list(run.glob("checkpoint-*"))) == 4

    monkeypatch.setattr(GenRecTrainer, "rank", scripted([]))  # a validation would fail
    shutil.rmtree(run / "adapter")
    finetune(home, run, *PATIENT)
    assert tensors_and_words(run / "adapter") == expected and len(list(run.glob("checkpoint-*"))) == 4

    shutil.rmtree(max(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))))
    monkeypatch.setattr(GenRecTrainer, "rank", scripted([0.4]))
    finetune(home, run, *PATIENT)
    assert tensors_and_words(run / "adapter") == expected and len(list(run.glob("checkpoint-*"))) == 4


@pytest.mark.parametrize("limit", [1, 9])
def test_a_run_that_is_at_its_end_makes_no_further_step(home: Path, tmp_path: Path, limit: int) -> None:
    """Killed before the export, inside an epoch, with a rate that does not fall to nought; the best is not the last."""
    steps = ("--max-steps", 7, "--lr-scheduler-type", "constant", "--save-strategy", "steps", "--save-steps", 1,
             "--eval-strategy", "steps", "--eval-steps", 1, "--save-total-limit", limit)  # fmt: skip
    run = finetune(home, tmp_path / "run", *steps)
    expected, checkpoints = tensors_and_words(run / "adapter"), sorted(path.name for path in run.glob("checkpoint-*"))
    assert "checkpoint-7" in checkpoints
    for _ in range(2):
        shutil.rmtree(run / "adapter")
        finetune(home, run, *steps)
        assert tensors_and_words(run / "adapter") == expected
        assert sorted(path.name for path in run.glob("checkpoint-*")) == checkpoints


def test_older_checkpoints_go_only_when_the_new_one_is_whole(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer(max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    run = Path(built.args.output_dir)
    before: list[str] = []

    def stopped(folder: Path, launch: dict[str, Any]) -> None:
        before.extend(path.name for path in run.glob("checkpoint-*/manifest.json") if is_complete(path.parent))
        write_manifest(folder, launch)

    monkeypatch.setattr("genrec_llm.trainer.write_manifest", stopped)
    built.train()
    assert before == [MANIFEST], "checkpoint-1 stands until checkpoint-2 has its manifest"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_complete(run / "checkpoint-2")


def test_the_only_good_checkpoint_stays_beside_a_broken_later_one(trainer) -> None:
    """Left by a run that was stopped; other --save-steps now."""
    built = trainer(max_steps=2, save_strategy="steps", save_steps=2, save_total_limit=1)
    run = Path(built.args.output_dir)
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "checkpoint-3" / "optimizer.pt").touch()
    built.train()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"] and is_complete(run / "checkpoint-2")


def test_nothing_of_a_broken_checkpoint_stays_in_the_one_written_anew(trainer) -> None:
    built = trainer(max_steps=1, save_strategy="steps", save_steps=1)
    left = Path(built.args.output_dir) / "checkpoint-1" / "half-written"
    left.parent.mkdir(parents=True)
    left.touch()
    built.train()
    assert not left.exists() and is_complete(left.parent)


def test_tensors_that_were_not_gathered_are_never_saved(trainer, tmp_path: Path) -> None:
    built = trainer()
    state = dict(built.model.state_dict())
    name = next(name for name in state if "lora_A" in name)
    with pytest.raises(ExportError, match="not gathered whole") as caught:
        built._save(str(tmp_path / "saved"), state | {name: torch.empty(0)})
    assert name in str(caught.value) and not (tmp_path / "saved").exists()


# --- the launch ------------------------------------------------------------


def test_the_launch_is_described_and_broken_promises_are_refused_together(
    trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = trainer(gradient_accumulation_steps=2)
    facts = describe_launch(built.args, built.accelerator.state)
    assert facts == {
        "strategy": "NO", "world_size": 1, "device": "cpu", "precision": "fp32", "global_batch_size": 16,
        "accumulation": 2,
    }  # fmt: skip
    built.args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"one process on 2 GPUs .* CUDA_VISIBLE_DEVICES=0"):
        describe_launch(built.args, built.accelerator.state)
    built.args._n_gpu = 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError) as caught:
        describe_launch(built.args, built.accelerator.state)
    assert len(caught.value.problems) == 2
    assert "4 processes were started" in str(caught.value) and "DeepSpeed was asked for" in str(caught.value)


def test_batches_that_are_shared_out_a_second_time_are_refused(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer()
    whole = built.get_train_dataloader

    def halved() -> Any:
        loader = whole()
        loader.collate_fn = lambda batch: {name: value[: len(value) // 2] for name, value in batch.items()}
        return loader

    monkeypatch.setattr(built, "get_train_dataloader", halved)
    with pytest.raises(ConfigError, match="given 7 examples in step 1, whose global batch has 15"):
        built.train()
