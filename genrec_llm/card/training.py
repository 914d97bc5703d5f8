"""What a card tells of how the model came about: the stages of its training, its data, and the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genrec_llm.card.facts import Facts
from genrec_llm.card.words import commit_words, table, text
from genrec_llm.tasks import LAST_ITEMS

_QUANTIZED = {
    None: "",
    "8bit": ", linear layers of the base in 8 bits (bitsandbytes)",
    "4bit": ", linear layers of the base in nf4 (QLoRA, bitsandbytes)",
}
_ROW_INITS = {
    "cooccurrence": "from co-occurrence in training",
    "cooccurrence+vectors": "from co-occurrence in training and vectors of the items",
    "vectors": "from vectors of the items",
    "text": "from the texts of the items",
    "random": "random",
}


def training_section(facts: Facts) -> list[str]:
    """A table of the stages, a column each, with their time and versions."""
    stages = facts.stages
    if not stages:
        return ["## Training", "", "How it was trained was not recorded."]
    rows = [_stage_rows(stage, first=place == 0) for place, stage in enumerate(stages)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    hours = [stage["seconds"] for stage in stages if "seconds" in stage]
    lines = [
        "## Training",
        "",
        *table(
            ("", *(stage["stage"] for stage in stages)),
            [(name, *(row.get(name, "–") for row in rows)) for name in names],
        ),
        "",
        f"{_duration(sum(hours))} of training in all, on the hardware above; sessions of a stopped and resumed run are "
        "added up; energy was not measured. The loss is the cross-entropy of the hidden item over all items of the "
        "catalogue.",
        "",
    ]
    versions = stages[-1].get("versions") or facts.info.get("versions") or {}
    lines.append(f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items()) or 'not recorded'}.")
    return lines


def _stage_rows(stage: Mapping[str, Any], *, first: bool) -> dict[str, str]:
    """What one stage shows, label → text; labels in the order of the table."""
    settings, launch = stage["settings"], stage.get("launch", {})
    if stage["stage"] == "pretrain":
        share = settings["last_item_probability"]
        task = f"masked items: {settings['masks_per_sequence']} hidden a history" + (
            f", the last in {share:.0%}" if share else ""
        )
    else:
        task = "next item: " + ("every prefix" if settings["targets"] == "all" else "the last item of each user")
    rate, rows_rate = settings["learning_rate"], settings["rows_learning_rate"]
    dropouts = [("backbone", settings["dropout"])]
    if settings["tuning"] == "lora":
        dropouts.append(("LoRA", settings["lora_dropout"]))
        targets = ", ".join(f"`{name}`" for name in stage.get("lora_targets", [])) or "not recorded"
        tuned = f"LoRA r {settings['lora_r']}, alpha {settings['lora_alpha']} on {targets}; new rows in full"
    else:
        tuned = "the whole backbone and the new rows"
    if settings["users"] != "none":
        dropouts.append(("user token", settings["user_dropout"]))
    decays = f"{settings['weight_decay']:g}; rows {settings['rows_weight_decay']:g}"
    best = stage["best_validation"]
    values = {
        "task": task,
        "trained": tuned,
        "trained parameters": f"{stage['trainable_parameters']:,}",
        "first item rows": _ROW_INITS[stage["row_init"]] if first else "as the stage before left them",
        "item rows in and out": "one table and a learned scale" if settings["tie_item_rows"] else "two tables",
        "decoder prompt": "mask and last item" if settings["decoder_prompt"] == "last-item" else "mask",
        "ranking": _ranking(settings.get("last_items_share") or 0.0)
        + (", chosen on validation" if settings.get("choose_last_items_share") else ""),
        "steps": f"{stage['steps']:,}, {stage['epochs']:g} epochs; {_asked_for(settings)}",
        "global batch": f"{launch.get('global_batch_size', 'not recorded')} examples",
        "learning rate": f"{rate:g}; rows {rate if rows_rate is None else rows_rate:g}; {settings['lr_scheduler_type']}, "
        f"warm-up {settings['warmup_steps']:g}",
        "optimizer": settings["optim"],
        "weight decay": decays,
        "dropout": ", ".join(f"{name} {'as the base' if value is None else f'{value:g}'}" for name, value in dropouts),
        "label smoothing": f"{settings['label_smoothing_factor']:g}",
        "precision": launch.get("precision", "not recorded") + _QUANTIZED[settings.get("quantization")],
        "launch": _launch_words(launch),
        "hardware": stage["hardware"],
        "time": _duration(stage["seconds"]),
        "best on validation": "not measured"
        if best is None
        else f"{settings['metric_for_best_model'].upper()} {best:.4f}",
        "seed": str(settings["seed"]),
        "genrec_llm commit": commit_words(stage),
    }
    return {name: text(str(value)) for name, value in values.items()}


def _ranking(share: float) -> str:
    return f"history {1 - share:g}, its last {LAST_ITEMS} items alone {share:g}" if share else "history"


def _asked_for(settings: Mapping[str, Any]) -> str:
    asked = (
        f"{settings['max_steps']:,} steps" if settings["max_steps"] > 0 else f"{settings['num_train_epochs']:g} epochs"
    )
    patience = settings["early_stopping_patience"]
    return f"asked for: {asked}" + (f", patience {patience}" if patience else "")


def _launch_words(launch: Mapping[str, Any]) -> str:
    if not launch:
        return "not recorded"
    strategy = launch["strategy"]
    if "zero_stage" in launch:
        strategy = f"DeepSpeed ZeRO-{launch['zero_stage']}"
    elif strategy in ("MULTI_GPU", "MULTI_CPU"):
        strategy = "DDP"
    processes, accumulation = launch["world_size"], launch["accumulation"]
    words = "one process" if processes == 1 else f"{processes} processes"
    words += "" if strategy == "NO" else f", {strategy}"
    return words + (f", {accumulation} accumulation steps" if accumulation > 1 else "")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min ({seconds / 3600:.2f} h)"
    return f"{seconds / 3600:.1f} h"


def data_section(facts: Facts) -> list[str]:
    """The data set and its counts, and how it was split."""
    data = facts.data
    rows = [("data set", facts.source.title if facts.source else f"{text(data['name'])} (a file of the trainer's own)")]
    for name in ("users", "items", "interactions"):
        rows.append((name, f"{data[name]:,}" if name in data else "not recorded"))
    if "k_core" in data:
        rows += [
            ("k-core filter", f"{data['k_core']}" if data["k_core"] else "none"),
            ("text of items", ", ".join(f"`{name}`" for name in data["text_columns"]) or "none"),
        ]
    rows += [
        ("history", f"the last {facts.layout.max_history} items"),
        ("fingerprint", f"`{data['fingerprint'][:16]}…`"),
    ]
    return [
        "## Data and protocol",
        "",
        *table(("", ""), rows),
        "",
        "Leave-last-two-out: of each user, ordered by time, the last item is the test target and the one before it the "
        "validation target; neither enters training, the numbering of ids or the first item rows. The test history includes "
        "the validation item. Ids are numbered by a seeded permutation of the whole catalogue, so that a number tells "
        "nothing of when an item first appeared. Every interaction counts alike; ratings are not read.",
    ]
