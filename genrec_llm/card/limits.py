"""What a card ends with: the limits of the model, the licences that bind it, and whom to cite."""

from __future__ import annotations

from genrec_llm.card.facts import Facts
from genrec_llm.card.origins import S3REC, base_licence


def limits_section(facts: Facts) -> list[str]:
    """What the model cannot do, and what was not measured of it."""
    data, stages = facts.data, facts.stages
    cold = data.get("items_without_training_interactions")
    cold_words = (
        f"{'An unrecorded number' if cold is None else f'{cold:,}'} of its items were never seen in training; those are"
    )
    begun = stages[0]["row_init"] if stages else ""
    if begun == "text":
        language = (
            "Item rows began as the texts of the items: items described in a language that the base knows less may rank "
            "worse, which was not measured."
        )
    elif "vectors" in begun:
        language = (
            "Item rows began with vectors that were made elsewhere, of the items' texts perhaps: what those favour may be "
            "in the lists too, which was not measured."
        )
    else:
        language = (
            "Texts of items were not read in training: their language plays no part, and nothing is known from them."
        )
    if facts.known_users and facts.info.get("user_mode") == "hashed":
        users = (
            f"Rows of {facts.known_users:,} user buckets are included; a bucket is shared by the users hashed to it."
        )
    elif facts.known_users:
        users = (
            f"Rows of {facts.known_users:,} users of the training data are included, by number; raw user ids are not. A row "
            "is learned from one person's history and may give some of it away."
        )
    elif facts.layout.user_token:
        users = "Rows of single users are not included: every user is `<user_unknown>`, and the history alone counts."
    else:
        users = "It was trained without user tokens: the history alone counts."
    return [
        "## Limits",
        "",
        f"- The catalogue is fixed: {facts.layout.num_items:,} items, as they were in training; a new item needs new "
        "training.",
        f"- {cold_words} without evidence: if they are recommended at all, then by where their row began. Not measured.",
        "- It learns from what people did, and so favours what was popular then. Popularity, season and stock of today are "
        "unknown to it.",
        f"- {language}",
        "- It was not evaluated for fairness between groups of users or of items, nor for harm from what it recommends.",
        "- All figures are offline: they tell how well past choices are found again, not how people take to the lists.",
        f"- {users}",
    ]


def licences_section(facts: Facts) -> list[str]:
    """Terms of the base model, the data, the weights and the code."""
    source = facts.source
    if facts.from_nothing:
        base = "none: the backbone was trained from random weights"
    else:
        base = f"{facts.base_words}: {base_licence(facts.base) or 'not known: see the base’s own card'}"
    data = (
        f"{source.title}: {source.terms}"
        if source
        else f"{facts.data_title}: licence stated by whoever shares it; not known here"
    )
    return [
        "## Licences",
        "",
        f"- Base model: {base}.",
        f"- Data: {data}.",
        "- These weights: whoever shares them chooses, within what the base and the data allow.",
        "- genrec_llm, the code that made them: apache-2.0.",
    ]


def citation_section(facts: Facts) -> list[str]:
    """The paper to cite, and those of the data set where it is known."""
    lines = [
        "## Citation",
        "",
        "```bibtex",
        "@misc{cao2024genrec,",
        "  title         = {GenRec: Generative Sequential Recommendation with Large Language Models},",
        "  author        = {Panfeng Cao and Pietro Li{\\`o}},",
        "  year          = {2024},",
        "  eprint        = {2407.21191},",
        "  archivePrefix = {arXiv}",
        "}",
        "```",
    ]
    if facts.source:
        lines += [
            "",
            f"Data: {facts.source.cite}" + ("" if facts.data["name"].startswith("movielens-100k") else f" {S3REC}"),
        ]
    return lines
