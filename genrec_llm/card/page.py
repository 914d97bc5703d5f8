"""The whole card: its sections in their order, written as README.md beside genrec.json, and renewed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genrec_llm.card.facts import Facts, evaluation_facts
from genrec_llm.card.figures import PLOTS, evaluation_section, pictures_section
from genrec_llm.card.head import front_matter, introduction
from genrec_llm.card.limits import citation_section, licences_section, limits_section
from genrec_llm.card.origins import is_hub_name
from genrec_llm.card.training import data_section, training_section
from genrec_llm.card.use import use_section
from genrec_llm.directory import ADAPTER, INFO_FILE, MERGED, ROWS_FILE, TRAINED, read_info, trained_directory
from genrec_llm.errors import ConfigError
from genrec_llm.files import atomic_directory, atomic_file, sha256_file, write_json
from genrec_llm.tasks import PromptLayout

CARD_FILE = "README.md"


def model_card(folder: Path, info: dict[str, Any], *, repo_id: str | None = None) -> str:
    """README.md of an adapter or merged directory.

    Args:
        folder: the directory; its items, pictures and config files are read.
        info: its genrec.json.
        repo_id: `org/name` on the Hub, for a card that is meant for others; without it the code blocks read the folder
            that they are run in.

    Raises:
        ConfigError: the card is meant for others, who have no such base.
    """
    facts = Facts(folder, info, PromptLayout.from_dict(info["prompt"]), repo_id)
    if repo_id is not None and not facts.from_nothing and not is_hub_name(facts.base):
        raise ConfigError(
            f"{folder}: its base model is {facts.base!r}, a folder of this machine that nobody else has: name the same "
            "checkpoint on the Hub with --base-model org/name"
        )
    sections = [
        introduction(facts),
        use_section(facts),
        evaluation_section(facts),
        pictures_section(facts),
        training_section(facts),
        data_section(facts),
        limits_section(facts),
        licences_section(facts),
        citation_section(facts),
    ]
    front = front_matter(facts).to_yaml()
    return (
        "\n".join(["---", front.strip(), "---", "", *(line for section in sections for line in [*section, ""])]).strip()
        + "\n"
    )


def write_card(folder: Path, info: Mapping[str, Any]) -> None:
    """Write genrec.json and the README.md that is made from it.

    Raises:
        ExportError: they cannot be written.
    """
    write_json(folder / INFO_FILE, info)
    with atomic_file(folder / CARD_FILE) as temporary:
        temporary.write_text(model_card(folder, dict(info)), encoding="utf-8")


def refresh_cards(run: Path) -> None:
    """Bring what is known by now into a run's exported directories: evaluations and pictures, genrec.json and README.md.

    Call it after an evaluation, a merge or new pictures, in any order.

    Raises:
        ConfigError: the run holds no finished model.
        ExportError: a file cannot be written.
    """
    trained = trained_directory(run)
    for folder in (trained, run / MERGED):
        if not folder.is_dir():
            continue
        info = read_info(folder, ADAPTER, TRAINED, MERGED)
        known = {name: value for name, value in info.items() if name != "evaluation"}
        # What was measured elsewhere came with the model, as with one from the Hub.
        evaluation = {
            name: measured
            for name, measured in info.get("evaluation", {}).items()
            if not (run / "evaluation" / name / "report.json").is_file()
        } | evaluation_facts(run, info.get("rows_sha256") or sha256_file(folder / ROWS_FILE))
        pictures = [path for path in sorted((run / PLOTS).glob("*.png")) if _is_of(path, evaluation)]
        if pictures:
            with atomic_directory(folder / PLOTS) as copies:
                for picture in pictures:
                    shutil.copyfile(picture, copies / picture.name)
        write_card(folder, known | ({"evaluation": evaluation} if evaluation else {}))


def _is_of(picture: Path, evaluation: Mapping[str, Any]) -> bool:
    """Whether a picture shows this model: not `metrics_test.png` of a test whose report is on an earlier model."""
    kind, _, measured = picture.stem.partition("_")
    return kind not in ("metrics", "ranks") or measured in evaluation
