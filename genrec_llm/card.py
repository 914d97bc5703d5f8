"""The model card: README.md of an adapter or merged directory, made from the facts in its genrec.json and from nothing else.

What is not known is said to be unknown, and what was not measured has no number. The front matter follows the Hub's
specification of model cards (`huggingface_hub.ModelCardData`); every code block of a card is executed by a test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from genrec_llm.data import SHUFFLED
from genrec_llm.errors import ConfigError
from genrec_llm.evaluation import HEADLINE, WITHOUT_USERS
from genrec_llm.files import atomic_directory, atomic_file, read_json, sha256_file, write_json
from genrec_llm.loading import ADAPTER, INFO_FILE, MERGED, ROWS_FILE, TRAINED, read_info, trained_directory
from genrec_llm.metrics import p_words
from genrec_llm.tasks import PromptLayout
from genrec_llm.vocab import IdVocab

CARD_FILE, PLOTS = "README.md", "plots"
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
        "decoder_prompt",
    ),
    "training": (
        "seed", "learning_rate", "rows_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "rows_weight_decay", "optim", "label_smoothing_factor", "num_train_epochs", "max_steps", "early_stopping_patience",
        "metric_for_best_model", "load_best_model_at_end", "user_dropout", "validation_users",
    ),
    "pretrain": ("masks_per_sequence", "last_item_probability"),
    "finetune": ("targets",),
}  # fmt: skip
"""What leaves home of a run's arguments, by group; the last two are the training arguments of one stage alone."""

_QUANTIZED = {
    None: "",
    "8bit": ", linear layers of the base in 8 bits (bitsandbytes)",
    "4bit": ", linear layers of the base in nf4 (QLoRA, bitsandbytes)",
}
_EVALUATED = ("commit", "versions", "hardware", "time", "model", "reports", "differences", "generate")
_SHOWN_METRICS = (*HEADLINE, "coverage@10", "novelty@10")


@dataclass(frozen=True)
class _Source:
    """What is known of a public data set.

    Attributes:
        title: its name in a sentence.
        terms: on which it may be used.
        cite: whom to cite.
        license: `license_name` and `license_link` of the front matter, where there are terms of its own.
    """

    title: str
    terms: str
    cite: str
    license: tuple[str, str] | None = None


_MCAULEY = (
    "J. McAuley, C. Targett, Q. Shi, A. van den Hengel. Image-Based Recommendations on Styles and Substitutes. SIGIR "
    "2015; R. He, J. McAuley. Ups and Downs: Modeling the Visual Evolution of Fashion Trends with One-Class "
    "Collaborative Filtering. WWW 2016."
)
_NO_LICENCE = "its authors state no licence (Amazon reviews, 2014 release); ask them before any other than research use"
_SOURCES = {
    "movielens-100k": _Source(
        "MovieLens-100K",
        "GroupLens' terms: research use, no commercial use without permission, no redistribution without separate "
        "permission. `items.parquet` repeats film titles and genres of it: ask GroupLens before making this public",
        "F. M. Harper, J. A. Konstan. The MovieLens Datasets: History and Context. ACM Transactions on Interactive "
        "Intelligent Systems 5(4), 2015.",
        ("movielens-terms", "https://files.grouplens.org/datasets/movielens/ml-100k-README.txt"),
    ),
    "amazon-beauty": _Source("Amazon Beauty (2014, 5-core)", _NO_LICENCE, _MCAULEY),
    "amazon-sports": _Source("Amazon Sports and Outdoors (2014, 5-core)", _NO_LICENCE, _MCAULEY),
    "yelp": _Source(
        "Yelp (as preprocessed for S3-Rec)",
        "Yelp's dataset terms of use: academic and other non-commercial use, no redistribution",
        "Yelp Open Dataset.",
        ("yelp-dataset-terms", "https://www.yelp.com/dataset"),
    ),
}
_S3REC = (
    "K. Zhou et al. S3-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual Information "
    "Maximization. CIKM 2020 (the preprocessing)."
)
_BASE_LICENCES = {
    r"google/(flan-t5|t5-v1_1|mt5)-.+": "apache-2.0",
    r"(google-t5/)?t5-(small|base|large|3b|11b)": "apache-2.0",
    r"facebook/bart-(base|large)": "apache-2.0",  # not those finetuned from it, some of which are under mit
}
"""Pattern of a Hub name → licence that its own card states."""

_CAPTIONS = {
    "curves": "Training loss, and ranking of the validation split while training",
    "metrics": "Metrics with 95 % intervals, beside the baselines",
    "ranks": "Share of users whose next item is among the first n",
    "items": "The item rows in two dimensions",
}
"""First part of a picture's name in `plots/` → what it shows."""
_ROW_INITS = {
    "cooccurrence": "from co-occurrence in training",
    "cooccurrence+vectors": "from co-occurrence in training and vectors of the items",
    "vectors": "from vectors of the items",
    "text": "from the texts of the items",
    "random": "random",
}


# --- facts ------------------------------------------------------------------------------------------------------------


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


def evaluation_facts(run: Path, rows_sha256: str) -> dict[str, Any]:
    """What was measured of a run's model, by evaluation: "test", "validation", "test_seen-kept", ….

    Args:
        rows_sha256: of the model's id rows; reports on an earlier model in the same directory are left out.
    """
    openings = run / OPENINGS_FILE
    times = len(openings.read_text(encoding="utf-8").splitlines()) if openings.is_file() else 0
    facts = {}
    for path in sorted((run / "evaluation").glob("*/report.json")):
        report = read_json(path)
        if report.get("model", {}).get("rows_sha256") != rows_sha256:
            continue
        facts[path.parent.name] = {name: report[name] for name in _EVALUATED}
        if report["reports"][0]["protocol"]["split"] == "test":
            facts[path.parent.name]["test_openings"] = times
    return facts


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


# --- the card ---------------------------------------------------------------------------------------------------------


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
    facts = _Facts(folder, info, PromptLayout.from_dict(info["prompt"]), repo_id)
    if repo_id is not None and not facts.from_nothing and not is_hub_name(facts.base):
        raise ConfigError(
            f"{folder}: its base model is {facts.base!r}, a folder of this machine that nobody else has: name the same "
            "checkpoint on the Hub with --base-model org/name"
        )
    sections = [
        _introduction(facts),
        _use(facts),
        _evaluation(facts),
        _pictures(facts),
        _training(facts),
        _data(facts),
        _limits(facts),
        _licences(facts),
        _citation(facts),
    ]
    front = _front_matter(facts).to_yaml()
    return (
        "\n".join(["---", front.strip(), "---", "", *(line for section in sections for line in [*section, ""])]).strip()
        + "\n"
    )


def is_hub_name(name: str) -> bool:
    """Whether a base model's name can be one on the Hub (`org/name`, or one of the old `t5-small`) and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return ("/" in name or base_licence(name) is not None) and not Path(name).exists()


def base_licence(name: str) -> str | None:
    """Licence that the card of a well-known base model states; None if it is not known here."""
    return next((licence for pattern, licence in _BASE_LICENCES.items() if re.fullmatch(pattern, name)), None)


def from_nothing(info: Mapping[str, Any]) -> bool:
    """Whether a model's backbone began with random weights, so that there is no base model; `info` is its genrec.json."""
    return any(stage["settings"].get("backbone_init") == "random" for stage in info.get("training", []))


@dataclass(frozen=True)
class _Facts:
    """What a card is made from; see `model_card`."""

    folder: Path
    info: dict[str, Any]
    layout: PromptLayout
    repo_id: str | None

    @property
    def kind(self) -> str:
        return str(self.info["kind"])

    @property
    def data(self) -> dict[str, Any]:
        return dict(self.info["data"])

    @property
    def base(self) -> str:
        return str(self.info["base_model"]["name"])

    @property
    def revision(self) -> str | None:
        return self.info["base_model"].get("revision")

    @property
    def stages(self) -> list[dict[str, Any]]:
        return list(self.info.get("training", []))

    @property
    def from_nothing(self) -> bool:
        return from_nothing(self.info)

    @property
    def source(self) -> _Source | None:
        """The public data set that it was trained on; None for a file of one's own."""
        name, _, seed = self.data["name"].partition(SHUFFLED)
        source = _SOURCES.get(name) if self.data.get("public") else None
        return replace(source, title=f"{source.title}, ties shuffled (seed {seed})") if source and seed else source

    @property
    def data_title(self) -> str:
        return self.source.title if self.source else f"the data set “{_text(self.data['name'])}”"

    @property
    def place(self) -> str:
        """Python expression for what `from_pretrained` is given."""
        return _literal(self.repo_id or ".")

    @property
    def known_users(self) -> int:
        return self.layout.num_user_rows - 1 if self.layout.user_token else 0

    def file(self, name: str) -> str:
        """Python expression for the path of a file of the directory."""
        return f'hf_hub_download("{self.repo_id}", "{name}")' if self.repo_id else f'"{name}"'


def _front_matter(facts: _Facts) -> ModelCardData:
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


def _eval_results(facts: _Facts) -> list[EvalResult]:
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
        for measured in _ordered(facts)
        if (own := _own_report(facts, measured)) is not None
        for protocol in [own["protocol"]]
        for name in HEADLINE
    ]


def _same_users(facts: _Facts, measured: Mapping[str, Any]) -> bool:
    """Whether the measured model knew the users that this directory knows."""
    return not facts.layout.user_token or measured["model"]["user_rows"] == facts.layout.num_user_rows


def _own_report(facts: _Facts, measured: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report on just this directory's model: without the users, the one for which all were unknown."""
    reports: list[dict[str, Any]] = measured["reports"]
    if _same_users(facts, measured):
        return reports[0]
    unknown = [report for report in reports if report["name"].endswith(WITHOUT_USERS)]
    return unknown[0] if unknown and not facts.known_users else None


def _ordered(facts: _Facts) -> list[dict[str, Any]]:
    """Evaluations, those on the test split first."""
    found: Mapping[str, dict[str, Any]] = facts.info.get("evaluation", {})
    return [found[name] for name in sorted(found, key=lambda name: (not name.startswith("test"), name))]


def _introduction(facts: _Facts) -> list[str]:
    layout = facts.layout
    title = facts.source.title if facts.source else _text(facts.data["name"])
    held = {
        ADAPTER: f"a LoRA adapter for {_base_words(facts)}, and the trained rows of the item tokens (`{ROWS_FILE}`)",
        TRAINED: "a backbone trained in full and the rows of the item tokens: a state to merge, not to share",
        MERGED: "the merged model: a plain `transformers` checkpoint that needs no other files and no code of genrec_llm",
    }
    rows: list[tuple[str, str]] = [
        ("base model", _base_words(facts) + ("" if is_hub_name(facts.base) else " (a folder where it was trained)")),
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
        *_table(("", ""), rows),
    ]


def _base_words(facts: _Facts) -> str:
    if facts.from_nothing:
        return f"a `{facts.base}` backbone trained from random weights"
    return f"`{facts.base}`"


def _weights_words(facts: _Facts) -> str:
    print_ = facts.info["base_model"].get("fingerprint")
    if print_ is None:
        return "changed by training: they are contained in this model"
    return f"fingerprint `{print_[:16]}…`" + (", checked when genrec_llm loads them" if facts.kind == ADAPTER else "")


def _users_words(facts: _Facts) -> str:
    if not facts.layout.user_token:
        return "no user tokens"
    if facts.info.get("user_mode") == "hashed":
        return f"{facts.known_users:,} buckets of users and one token for unknown users"
    if not facts.known_users:
        return "one token for all users"
    return f"{facts.known_users:,} users and one token for unknown users"


# --- use --------------------------------------------------------------------------------------------------------------


def _use(facts: _Facts) -> list[str]:
    items = IdVocab.load(facts.folder).items
    history = list(range(min(3, len(items))))
    lines = ["## Use", "", "### With genrec_llm", "", "```python", "from genrec_llm.recommender import Recommender", ""]
    if "title" in items:
        titles = [_text(title) for title in items["title"].iloc[history] if isinstance(title, str)]
        lines += [f"# {'; '.join(titles)}"] if titles else []
    lines += [
        f"recommender = Recommender.from_pretrained({facts.place})",
        f"for found in recommender.recommend({_literal(items['item'].iloc[history].tolist())}, k={_beams(facts)}):",
        "    print(found.item, found.score, found.text)",
        "```",
        "",
        "The history is raw item ids as in `items.parquet`, oldest first; items of the history are left out of the list.",
    ]
    if facts.kind == ADAPTER:
        lines += ["", *_use_without_genrec(facts, history)]
    elif facts.kind == MERGED:
        lines += ["", *_use_merged(facts, history)]
    return lines


def _beams(facts: _Facts) -> int:
    return min(10, facts.layout.num_items)


def _token_lines(facts: _Facts, history: Sequence[int]) -> list[str]:
    layout = facts.layout
    return [
        f"first, mask, end = {layout.base}, {layout.mask_ids[0]}, {layout.eos_id}  # tokens: item 0, mask, end of input",
        f"user = [{layout.first_user_id}]  # any user: <user_unknown>" if layout.user_token else "user = []",
        f"history = {list(history)}  # column `index` of items.parquet, oldest first"
        + (", at least one" if layout.decoder_prompt == "last-item" else ""),
        f"history = [first + item for item in history[-{layout.max_history}:]]",
        "ids = torch.tensor([[*user, *history, mask, end]])",
        f"prompt = torch.tensor([[{'mask, history[-1]' if layout.decoder_prompt == 'last-item' else 'mask'}]])",
    ]


def _use_without_genrec(facts: _Facts, history: Sequence[int]) -> list[str]:
    hub = ["from huggingface_hub import hf_hub_download"] if facts.repo_id else []
    revision = f", revision={_literal(facts.revision)}" if facts.revision else ""
    base = f"{_literal(facts.base)}{revision}, dtype=torch.float32"
    return [
        "### Without genrec_llm",
        "",
        "`PeftModel` alone loads the LoRA part only: it knows no item. The rows of the item tokens are in "
        f"`{ROWS_FILE}`, and are used beside it (torch, transformers, peft, safetensors):",
        "",
        "```python",
        "import torch",
        *hub,
        "from peft import PeftModel",
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForSeq2SeqLM",
        "",
        f"base = AutoModelForSeq2SeqLM.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {facts.place}).eval()",
        f"rows = load_file({facts.file(ROWS_FILE)})",
        *_token_lines(facts, history),
        "with torch.no_grad():",
        "    words = base.get_input_embeddings()(torch.arange(first))",
        '    table = torch.cat([words, rows["item_in"], rows["user_in"]])',
        "    out = model(inputs_embeds=table[ids], decoder_inputs_embeds=table[prompt], output_hidden_states=True)",
        '    scores = out.decoder_hidden_states[-1][0, -1] @ rows["item_out"].T',
        f"best = scores.topk({_beams(facts)}).indices.tolist()",
        "print(best)  # column `index` of items.parquet, best first",
        "```",
        "",
        *_merge_block(facts),
        "",
        *_titles_block(facts),
    ]


def _merge_block(facts: _Facts) -> list[str]:
    run = facts.repo_id.partition("/")[2] if facts.repo_id else ".."
    pull = [f"genrec pull {facts.repo_id} --output-dir {run}/{ADAPTER}"] if facts.repo_id else []
    return [
        f"For a checkpoint that needs none of this, merge it with genrec_llm; it then lies in `{run}/{MERGED}`:",
        "",
        "```bash",
        *pull,
        f"genrec merge --run {run}",
        "```",
    ]


def _use_merged(facts: _Facts, history: Sequence[int]) -> list[str]:
    beams = _beams(facts)
    return [
        "### Without genrec_llm",
        "",
        "With torch and transformers alone; beam search over one token gives the top of the ranking:",
        "",
        "```python",
        "import torch",
        "from transformers import AutoModelForSeq2SeqLM",
        "",
        f"model = AutoModelForSeq2SeqLM.from_pretrained({facts.place}, dtype=torch.float32).eval()",
        *_token_lines(facts, history),
        f"top = model.generate(ids, decoder_input_ids=prompt, num_beams={beams}, num_return_sequences={beams})",
        "best = (top[:, -1] - first).tolist()",
        "print(best)  # column `index` of items.parquet, best first",
        "```",
        "",
        *_titles_block(facts),
    ]


def _titles_block(facts: _Facts) -> list[str]:
    hub = ["from huggingface_hub import hf_hub_download"] if facts.repo_id else []
    return [
        "The list may hold items of the history: drop them where that is not wanted. What the numbers stand for, where "
        "pandas and pyarrow are at hand:",
        "",
        "```python",
        "import pandas as pd",
        *hub,
        "",
        f'items = pd.read_parquet({facts.file("items.parquet")}).set_index("index")',
        "print(items.loc[best])",
        "```",
    ]


# --- evaluation -------------------------------------------------------------------------------------------------------


def _evaluation(facts: _Facts) -> list[str]:
    lines = ["## Evaluation", ""]
    measured = _ordered(facts)
    if not measured:
        lines.append("No evaluation was run on this model: there are no figures beside baselines.")
    else:
        lines.append(
            "Each user's held-out item is ranked once against the whole catalogue. HR@K: share of users whose item is among "
            "the first K; NDCG@K and MRR also count how high it stands; coverage@10: share of the catalogue that is in "
            "anyone's top 10; novelty@10: mean information of the recommended items, in bits (higher is less popular). The "
            "baselines beside it count what happened in the same training histories, without a model."
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


def _measured(facts: _Facts, measured: Mapping[str, Any]) -> list[str]:
    reports, own = measured["reports"], _own_report(facts, measured)
    named, whose = {reports[0]["name"]: "this model"}, "Against"
    if own is not reports[0]:
        named, whose = {reports[0]["name"]: "with rows of known users"}, "With rows of known users, against"
        if own is not None:
            named[own["name"]] = "this model"
    protocol = reports[0]["protocol"]
    seen = "items of the history removed" if protocol["exclude_seen"] else "items of the history may come again"
    lines = [
        f"### {protocol['split'].capitalize()} split" + ("" if protocol["exclude_seen"] else ", seen items kept"),
        "",
        f"{protocol['users']:,} users, full ranking of {protocol['candidates']:,} items, {seen}; brackets are 95 % "
        "bootstrap intervals over users.",
        "",
        *_table(
            ("", *(named.get(report["name"], _text(report["name"])) for report in reports)),
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
        f"{measured['hardware']}; {measured['time'][:10]}; genrec_llm {_commit(measured)}."
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
        f"- {whose} {_text(rival)}, same users: NDCG@10 {difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}], "
        f"{p_words(difference['p_value'])}: {verdict}."
    )


def _interval(metric: Mapping[str, float | None]) -> str:
    if metric["mean"] is None:
        return "–"
    digits = 2 if abs(metric["mean"]) >= 2 else 4
    bounds = [f"{bound:.{digits}f}" for bound in (metric["low"], metric["high"]) if bound is not None]
    return f"{metric['mean']:.{digits}f}" + (f" [{', '.join(bounds)}]" if bounds else "")


def _pictures(facts: _Facts) -> list[str]:
    pictures = sorted((facts.folder / PLOTS).glob("*.png"))
    if not pictures:
        return []
    lines = ["## Pictures", ""]
    for picture in pictures:
        name, _, detail = picture.stem.partition("_")
        caption = _CAPTIONS.get(name, name) + (f" ({detail.replace('_', ', ').replace('-', ' ')})" if detail else "")
        lines += [f"![{caption}]({PLOTS}/{picture.name})", "", f"*{caption}*", ""]
    return lines[:-1]


# --- training and data ------------------------------------------------------------------------------------------------


def _training(facts: _Facts) -> list[str]:
    stages = facts.stages
    if not stages:
        return ["## Training", "", "How it was trained was not recorded."]
    rows = [_stage_rows(stage, first=place == 0) for place, stage in enumerate(stages)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    hours = [stage["seconds"] for stage in stages if "seconds" in stage]
    lines = [
        "## Training",
        "",
        *_table(
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
        "genrec_llm commit": _commit(stage),
    }
    return {name: _text(str(value)) for name, value in values.items()}


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


def _commit(facts: Mapping[str, Any]) -> str:
    commit = facts.get("commit")
    if not commit:
        return "at an unknown commit"
    sha, _, changes = commit.partition("+")
    return f"`{sha[:12]}`" + (" with uncommitted changes" if changes else "")


def _data(facts: _Facts) -> list[str]:
    data = facts.data
    rows = [
        ("data set", facts.source.title if facts.source else f"{_text(data['name'])} (a file of the trainer's own)")
    ]
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
        *_table(("", ""), rows),
        "",
        "Leave-last-two-out: of each user, ordered by time, the last item is the test target and the one before it the "
        "validation target; neither enters training, the numbering of ids or the first item rows. The test history includes "
        "the validation item. Ids are numbered by a seeded permutation of the whole catalogue, so that a number tells "
        "nothing of when an item first appeared. Every interaction counts alike; ratings are not read.",
    ]


# --- limits, licences, citation ---------------------------------------------------------------------------------------


def _limits(facts: _Facts) -> list[str]:
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


def _licences(facts: _Facts) -> list[str]:
    source = facts.source
    if facts.from_nothing:
        base = "none: the backbone was trained from random weights"
    else:
        base = f"{_base_words(facts)}: {base_licence(facts.base) or 'not known: see the base’s own card'}"
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


def _citation(facts: _Facts) -> list[str]:
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
            f"Data: {facts.source.cite}" + ("" if facts.data["name"].startswith("movielens-100k") else f" {_S3REC}"),
        ]
    return lines


def _literal(value: Any) -> str:
    """A string, or a list of them, as Python writes it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    align = ["---", *("---:" if numbers else "---" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


def _text(value: str) -> str:
    """One line that breaks neither a table nor a code comment."""
    return " ".join(value.split()).replace("|", "\\|")
