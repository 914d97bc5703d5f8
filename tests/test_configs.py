"""Every shipped configuration parses, says how it is launched, and names only what exists; so do the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import REPOSITORY

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments, parse_args

CONFIGS = sorted((REPOSITORY / "recipes" / "configs").glob("*/*.yaml"))
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PLACES = re.compile(r"(?:docs|tools|recipes|accelerate_configs|ds_configs|tests)/[\w./-]+\w/?")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_configuration_parses_and_begins_with_its_launch_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    place = path.relative_to(REPOSITORY)
    assert text.startswith("# ")
    assert f"recipes/{path.stem}.py --config {place}" in text
    if "flan-t5" in path.parent.name:
        assert "Not yet run." in text and "GPUs" in text
    # bf16 asks for a GPU of those who have none; the flag on top of the file keeps the rest of the check.
    data, model, training = parse_args(
        DataArguments, ModelArguments, GenRecTrainingArguments, argv=["--config", str(path), "--use_cpu"]
    )
    assert training.output_dir.startswith("runs/") and training.output_dir.endswith(path.stem)
    assert (training.from_run is not None) == (path.stem == "finetune" and (path.parent / "pretrain.yaml").exists())
    other = path.with_stem("pretrain" if path.stem == "finetune" else "finetune")
    if other.exists():
        others = parse_args(
            DataArguments, ModelArguments, GenRecTrainingArguments, argv=["--config", str(other), "--use_cpu"]
        )
        assert data == others[0]
        assert (model.backbone, model.tuning, model.lora_r, model.tie_item_rows) == (
            others[1].backbone, others[1].tuning, others[1].lora_r, others[1].tie_item_rows,
        )  # fmt: skip


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_text_refers_to_exists(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b[A-Z]+_TABLE\b|\bTODO\b", text)
    named = {match.rstrip("/") for match in PLACES.findall(text)}
    missing = [name for name in named if not (REPOSITORY / name).exists() and not name.startswith("docs/results/gpu")]
    assert not missing, missing
