"""The facts of a card: what of a run and its evaluations goes with the model, and what every section reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genrec_llm.card.origins import SOURCES, Source, from_nothing
from genrec_llm.card.words import literal, text
from genrec_llm.data import named_variant
from genrec_llm.directory import MERGED, read_info
from genrec_llm.files import read_json
from genrec_llm.tasks import PromptLayout

OPENINGS_FILE = "test_openings.jsonl"

_FACTS = (
    "stage",
    "time",
    "commit",
    "versions",
    "hardware",
    "launch",
    "trainable_parameters",
    "row_init",
    "lora_targets",
)
_SETTINGS = {
    "data": ("users",),
    "model": (
        "backbone_init", "tuning", "quantization", "lora_r", "lora_alpha", "lora_dropout", "dropout", "tie_item_rows",
        "decoder_prompt", "last_items_share",
    ),
    "training": (
        "seed", "learning_rate", "rows_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "rows_weight_decay", "optim", "label_smoothing_factor", "num_train_epochs", "max_steps", "early_stopping_patience",
        "metric_for_best_model", "load_best_model_at_end", "user_dropout", "validation_users", "choose_last_items_share",
    ),
    "pretrain": ("masks_per_sequence", "last_item_probability"),
    "finetune": ("targets",),
}  # fmt: skip
"""What leaves home of a run's arguments, by group; the last two are the training arguments of one stage alone."""
_EVALUATED = ("commit", "versions", "hardware", "time", "model", "reports", "differences", "generate")


def stage_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a finished run.json goes with its model: no path, no user id, no command line."""
    arguments = run["arguments"]
    settings = {
        name: arguments["training" if group in ("pretrain", "finetune") else group].get(name)
        for group, names in _SETTINGS.items()
        for name in names
        if group in ("data", "model", "training", run["stage"])
    }
    finished = run["finished"]
    if "last_items_share" in finished:  # validation chose it
        settings["last_items_share"] = finished["last_items_share"]
    return {
        **{name: run[name] for name in _FACTS if name in run},
        "settings": settings,
        **{name: finished[name] for name in ("steps", "epochs", "seconds") if name in finished},
        "best_validation": finished["best"],
    }


def describe_measured(run: Path) -> dict[str, Any]:
    """Which model an evaluation of a run measures: the rows it was merged from, whose users it knows, how it is stored."""
    info = read_info(run / MERGED, MERGED)
    facts = {
        "rows_sha256": info["rows_sha256"],
        "user_rows": info["prompt"]["num_user_rows"],
        "weights": read_json(run / MERGED / "config.json")["dtype"],
    }
    quantised = quantized_training(info)
    return facts | ({"trained_on": quantised} if quantised else {})


def quantized_training(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What training measured on a quantised base; None where it was not quantised, or that was not of the model kept.

    Args:
        info: genrec.json of an exported directory.

    Returns:
        `quantization`, `validation_ndcg@10`, and `validation_users`: how many were ranked, 0 for all.
    """
    settings = info["training"][-1]["settings"] if info.get("training") else {}
    best = info["training"][-1]["best_validation"] if settings.get("quantization") else None
    kept = settings.get("load_best_model_at_end") and settings.get("metric_for_best_model") == "ndcg@10"
    if best is None or not kept:
        return None
    return {
        "quantization": settings["quantization"],
        "validation_ndcg@10": best,
        "validation_users": settings["validation_users"],
    }


def test_openings(run: Path) -> int:
    """How many evaluations of a run have opened the test split."""
    openings = run / OPENINGS_FILE
    return len(openings.read_text(encoding="utf-8").splitlines()) if openings.is_file() else 0


def evaluation_facts(run: Path, rows_sha256: str) -> dict[str, Any]:
    """What was measured of a run's model, by evaluation: "test", "validation", "test_seen-kept", ….

    Args:
        rows_sha256: of the model's id rows; reports on an earlier model in the same directory are left out.
    """
    times = test_openings(run)
    facts = {}
    for path in sorted((run / "evaluation").glob("*/report.json")):
        report = read_json(path)
        if report.get("model", {}).get("rows_sha256") != rows_sha256:
            continue
        facts[path.parent.name] = {name: report[name] for name in _EVALUATED}
        if report["reports"][0]["protocol"]["split"] == "test":
            facts[path.parent.name]["test_openings"] = times
    return facts


@dataclass(frozen=True)
class Facts:
    """What a card is made from; see `page.model_card`."""

    folder: Path
    info: dict[str, Any]
    layout: PromptLayout
    repo_id: str | None

    @property
    def kind(self) -> str:
        """Which kind of directory it is: an adapter, a backbone trained in full, or a merged model."""
        return str(self.info["kind"])

    @property
    def data(self) -> dict[str, Any]:
        """The data set: its name, its counts, and how it was filtered."""
        return dict(self.info["data"])

    @property
    def base(self) -> str:
        """Name of the base model, on the Hub or a folder; of the architecture, where training began from nothing."""
        return str(self.info["base_model"]["name"])

    @property
    def revision(self) -> str | None:
        """Commit of the base model on the Hub; None if it was not pinned."""
        return self.info["base_model"].get("revision")

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Facts of every stage of training, the first one first; see `stage_facts`."""
        return list(self.info.get("training", []))

    @property
    def from_nothing(self) -> bool:
        """Whether its backbone began with random weights; see `origins.from_nothing`."""
        return from_nothing(self.info)

    @property
    def source(self) -> Source | None:
        """The public data set that it was trained on; None for a file of one's own."""
        name, variant = named_variant(self.data["name"])
        source = SOURCES.get(name) if self.data.get("public") else None
        return replace(source, title=source.title + variant) if source else None

    @property
    def data_title(self) -> str:
        """What a sentence calls the data set."""
        return self.source.title if self.source else f"the data set “{text(self.data['name'])}”"

    @property
    def base_words(self) -> str:
        """What a sentence calls the base model, or the backbone where there was none."""
        if self.from_nothing:
            return f"a `{self.base}` backbone trained from random weights"
        return f"`{self.base}`"

    @property
    def place(self) -> str:
        """Python expression for what `from_pretrained` is given."""
        return literal(self.repo_id or ".")

    @property
    def known_users(self) -> int:
        """Users, or buckets of them, that have rows of their own."""
        return self.layout.num_user_rows - 1 if self.layout.user_token else 0

    def file(self, name: str) -> str:
        """Python expression for the path of a file of the directory."""
        return f'hf_hub_download("{self.repo_id}", "{name}")' if self.repo_id else f'"{name}"'
