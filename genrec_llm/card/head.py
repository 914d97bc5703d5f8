"""What a card begins with: its front matter for the Hub, and what the model is."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from genrec_llm.card.facts import Facts
from genrec_llm.card.figures import ordered_evaluations, own_report
from genrec_llm.card.origins import is_hub_name
from genrec_llm.card.words import table, text
from genrec_llm.directory import ADAPTER, MERGED, ROWS_FILE, TRAINED
from genrec_llm.evaluation import HEADLINE


def front_matter(facts: Facts) -> ModelCardData:
    """Metadata for the Hub.

    No pipeline_tag, since the Hub has no task for recommendation; no `datasets`, since those are data sets on the Hub,
    where these files did not come from.
    """
    values: dict[str, Any] = {
        "library_name": "peft" if facts.kind == ADAPTER else "transformers",
        "tags": ["recommendation", "sequential-recommendation", "generative-recommendation", "genrec"],
    }
    if not facts.from_nothing and is_hub_name(facts.base):
        values |= {"base_model": facts.base, "base_model_relation": "adapter" if facts.kind == ADAPTER else "finetune"}
    if facts.source and facts.source.license:
        name, link = facts.source.license
        values |= {"license": "other", "license_name": name, "license_link": link}
    results = _eval_results(facts)
    if results:
        values |= {"model_name": facts.repo_id or f"genrec-{facts.data['name']}", "eval_results": results}
    return ModelCardData(**values)


def _eval_results(facts: Facts) -> list[EvalResult]:
    """The model's own metrics of every evaluation of it, for the model-index."""
    return [
        EvalResult(
            task_type="other",
            task_name="Sequential recommendation (next item, full ranking)",
            dataset_type=facts.data["name"],
            dataset_name=facts.source.title if facts.source else facts.data["name"],
            dataset_config=f"leave-last-two-out, seen items {'removed' if protocol['exclude_seen'] else 'kept'}",
            dataset_split=protocol["split"],
            metric_type=name.lower().replace("hr@", "hit_rate@"),
            metric_name=name,
            metric_value=round(own["metrics"][name]["mean"], 6),
        )
        for measured in ordered_evaluations(facts)
        if (own := own_report(facts, measured)) is not None
        for protocol in [own["protocol"]]
        for name in HEADLINE
    ]


def introduction(facts: Facts) -> list[str]:
    """Title, what the model does, what the directory holds, and the table of what it was made from."""
    layout = facts.layout
    title = facts.source.title if facts.source else text(facts.data["name"])
    held = {
        ADAPTER: f"a LoRA adapter for {facts.base_words}, and the trained rows of the item tokens (`{ROWS_FILE}`)",
        TRAINED: "a backbone trained in full and the rows of the item tokens: a state to merge, not to share",
        MERGED: "the merged model: a plain `transformers` checkpoint that needs no other files and no code of genrec_llm",
    }
    rows: list[tuple[str, str]] = [
        ("base model", facts.base_words + ("" if is_hub_name(facts.base) else " (a folder where it was trained)")),
        ("base revision", f"`{facts.revision}`" if facts.revision else "not pinned when it was trained"),
        ("base weights", _weights_words(facts)),
        ("vocabulary", f"{layout.base:,} tokens of the base, {layout.num_items:,} items, {_users_words(facts)}"),
        ("input", f"{'user token, ' if layout.user_token else ''}up to {layout.max_history} item tokens, mask, end"),
        ("output", "one item token: a score for every item in one decoder step"),
        ("seed", f"{facts.info.get('seed', 'unknown')}; of the id numbers {facts.info.get('id_seed', 'unknown')}"),
    ]  # fmt: skip
    if facts.from_nothing:
        rows = [("backbone", f"`{facts.base}` architecture from random weights; no base model"), *rows[3:]]
    return [
        f"# Next-item recommender for {title}",
        "",
        f"Given the items that a user has had so far, oldest first, this model ranks all {layout.num_items:,} items of its "
        "catalogue by how likely each comes next. Every item is one token of its own; a language model with encoder and "
        "decoder predicts the token behind the history. Made with `genrec_llm`, after GenRec (Cao & Liò, 2024).",
        "",
        f"This is {held[facts.kind]}.",
        "",
        *table(("", ""), rows),
    ]


def _weights_words(facts: Facts) -> str:
    print_ = facts.info["base_model"].get("fingerprint")
    if print_ is None:
        return "changed by training: they are contained in this model"
    return f"fingerprint `{print_[:16]}…`" + (", checked when genrec_llm loads them" if facts.kind == ADAPTER else "")


def _users_words(facts: Facts) -> str:
    if not facts.layout.user_token:
        return "no user tokens"
    if facts.info.get("user_mode") == "hashed":
        return f"{facts.known_users:,} buckets of users and one token for unknown users"
    if not facts.known_users:
        return "one token for all users"
    return f"{facts.known_users:,} users and one token for unknown users"
