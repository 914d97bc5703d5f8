"""What a card shows of how well the model does: the tables of its evaluations, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec_llm.card.facts import Facts
from genrec_llm.card.words import commit_words, table, text
from genrec_llm.directory import MERGED
from genrec_llm.evaluation import HEADLINE, HISTORY_ALONE, WITHOUT_USERS
from genrec_llm.files import read_json
from genrec_llm.metrics import p_words

PLOTS = "plots"
_SHOWN_METRICS = (*HEADLINE, "coverage@10", "novelty@10")
_CAPTIONS = {
    "curves": "Training loss, and ranking of the validation split while training",
    "metrics": "Metrics with 95 % intervals, beside the baselines",
    "ranks": "Share of users whose next item is among the first n",
    "items": "The item rows in two dimensions",
}
"""First part of a picture's name in `plots/` → what it shows."""


def evaluation_section(facts: Facts) -> list[str]:
    """Every evaluation of the model beside its baselines, the best validation of training, and the check of merging."""
    lines = ["## Evaluation", ""]
    measured = ordered_evaluations(facts)
    if not measured:
        lines.append("No evaluation was run on this model: there are no figures beside baselines.")
    else:
        lines.append(
            "Each user's held-out item is ranked once against the whole catalogue. HR@K: share of users whose item is among "
            "the first K; NDCG@K and MRR also count how high it stands; coverage@10: share of the catalogue that is in "
            "anyone's top 10; novelty@10: mean information of the recommended items, in bits (higher is less popular). "
            "Popularity, item-kNN and recent repeats count what happened in the same training histories, without a model."
        )
    for one in measured:
        lines += ["", *_measured(facts, one)]
    lines += _while_training(facts.stages[-1:])
    if facts.kind == MERGED and "parity" in facts.info:
        parity = facts.info["parity"]
        lines += [
            "",
            f"Merging was checked on {parity['samples']} sample histories: the bare `generate` of this checkpoint and the "
            f"model it was merged from agree on {parity['top_n_agreement']:.1%} of the top {parity['n']}, scores to "
            f"{parity['max_score_difference']:.1g}.",
        ]
    return lines


def _while_training(last: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best validation figure of the last stage, if there is one."""
    lines = []
    for stage in last:
        settings, best = stage["settings"], stage["best_validation"]
        if best is None:
            continue
        sample = settings["validation_users"]
        asked = f"a fixed sample of {sample:,} users of the validation split" if sample else "the validation split"
        kept = (
            "best checkpoint, which was kept"
            if settings["load_best_model_at_end"]
            else "best checkpoint (the last was kept)"
        )
        name = settings["metric_for_best_model"].upper()
        lines += [
            "",
            f"While training, the {kept}, had {name} {best:.4f} on {asked}; picked by it, that figure flatters.",
        ]
    return lines


def _measured(facts: Facts, measured: Mapping[str, Any]) -> list[str]:
    reports, own = measured["reports"], own_report(facts, measured)
    named, whose = {reports[0]["name"]: "this model"}, "Against"
    if own is not reports[0]:
        named, whose = {reports[0]["name"]: "with rows of known users"}, "With rows of known users, against"
        if own is not None:
            named[own["name"]] = "this model"
    named[reports[0]["name"] + HISTORY_ALONE] = f"{named[reports[0]['name']]}{HISTORY_ALONE}"
    protocol = reports[0]["protocol"]
    seen = "items of the history removed" if protocol["exclude_seen"] else "items of the history may come again"
    lines = [
        f"### {protocol['split'].capitalize()} split" + ("" if protocol["exclude_seen"] else ", seen items kept"),
        "",
        f"{protocol['users']:,} users, full ranking of {protocol['candidates']:,} items, {seen}; brackets are 95 % "
        "bootstrap intervals over users.",
        "",
        *table(
            ("", *(named.get(report["name"], text(report["name"])) for report in reports)),
            [(name, *(_interval(report["metrics"][name]) for report in reports)) for name in _SHOWN_METRICS],
            numbers=True,
        ),
        "",
        *(_difference(whose, name, both["NDCG@10"]) for name, both in measured["differences"].items()),
    ]
    generated = measured["generate"]
    lines.append(
        f"- `generate` of the merged model gives the one-step top 20 for {generated['agreement']:.2%} of "
        f"{generated['users']:,} users."
    )
    if protocol["split"] == "test":
        times = measured["test_openings"]
        lines.append(
            f"- The test split had been opened {times} time{'' if times == 1 else 's'} for this run, this one included."
        )
    else:
        lines.append("- This split was looked at while training, so its figures flatter.")
    if own is not reports[0]:
        known = f"rows for {measured['model']['user_rows'] - 1:,} known users"
        here = f"{facts.known_users:,} of them" if facts.known_users else "none"
        lines.append(
            f"- {known[0].upper()}{known[1:]} were measured; this model has {here}. "
            + ("Its own figures were not measured." if own is None else "Its own figures take every user for unknown.")
        )
    lines.append(
        f"- Measured on the merged model ({measured['model']['weights']} weights, computed in float32); "
        f"{measured['hardware']}; {measured['time'][:10]}; genrec_llm {commit_words(measured)}."
    )
    if (
        facts.kind == MERGED
        and (own := read_json(facts.folder / "config.json")["dtype"]) != measured["model"]["weights"]
    ):
        lines.append(f"- This checkpoint holds {own} weights, whose own figures were not measured.")
    return lines


def _difference(whose: str, rival: str, difference: Mapping[str, float]) -> str:
    low, high = difference["low"], difference["high"]
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
    return (
        f"- {whose} {text(rival)}, same users: NDCG@10 {difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}], "
        f"{p_words(difference['p_value'])}: {verdict}."
    )


def _interval(metric: Mapping[str, float | None]) -> str:
    if metric["mean"] is None:
        return "–"
    digits = 2 if abs(metric["mean"]) >= 2 else 4
    bounds = [f"{bound:.{digits}f}" for bound in (metric["low"], metric["high"]) if bound is not None]
    return f"{metric['mean']:.{digits}f}" + (f" [{', '.join(bounds)}]" if bounds else "")


def ordered_evaluations(facts: Facts) -> list[dict[str, Any]]:
    """Evaluations, those on the test split first."""
    found: Mapping[str, dict[str, Any]] = facts.info.get("evaluation", {})
    return [found[name] for name in sorted(found, key=lambda name: (not name.startswith("test"), name))]


def own_report(facts: Facts, measured: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report on just this directory's model: without the users, the one for which all were unknown."""
    reports: list[dict[str, Any]] = measured["reports"]
    if _same_users(facts, measured):
        return reports[0]
    unknown = [report for report in reports if report["name"].endswith(WITHOUT_USERS)]
    return unknown[0] if unknown and not facts.known_users else None


def _same_users(facts: Facts, measured: Mapping[str, Any]) -> bool:
    """Whether the measured model knew the users that this directory knows."""
    return not facts.layout.user_token or measured["model"]["user_rows"] == facts.layout.num_user_rows


def pictures_section(facts: Facts) -> list[str]:
    """The pictures of the directory with their captions; nothing where there are none."""
    pictures = sorted((facts.folder / PLOTS).glob("*.png"))
    if not pictures:
        return []
    lines = ["## Pictures", ""]
    for picture in pictures:
        name, _, detail = picture.stem.partition("_")
        caption = _CAPTIONS.get(name, name) + (f" ({detail.replace('_', ', ').replace('-', ' ')})" if detail else "")
        lines += [f"![{caption}]({PLOTS}/{picture.name})", "", f"*{caption}*", ""]
    return lines[:-1]
