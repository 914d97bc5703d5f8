"""How a card says the model is used: code blocks with genrec_llm and without it."""

from __future__ import annotations

from collections.abc import Sequence

from genrec_llm.card.facts import Facts
from genrec_llm.card.words import literal, text
from genrec_llm.directory import ADAPTER, MERGED, ROWS_FILE
from genrec_llm.vocab import IdVocab


def use_section(facts: Facts) -> list[str]:
    """Code for asking the model, with genrec_llm and without it, on items that it knows."""
    items = IdVocab.load(facts.folder).items
    history = list(range(min(3, len(items))))
    lines = ["## Use", "", "### With genrec_llm", "", "```python", "from genrec_llm.recommender import Recommender", ""]
    if "title" in items:
        titles = [text(title) for title in items["title"].iloc[history] if isinstance(title, str)]
        lines += [f"# {'; '.join(titles)}"] if titles else []
    lines += [
        f"recommender = Recommender.from_pretrained({facts.place})",
        f"for found in recommender.recommend({literal(items['item'].iloc[history].tolist())}, k={_beams(facts)}):",
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


def _beams(facts: Facts) -> int:
    return min(10, facts.layout.num_items)


def _token_lines(facts: Facts, history: Sequence[int]) -> list[str]:
    """Lines that make tokens of a history and, where the items are ranked by its answer alone, the question."""
    layout = facts.layout
    asked = [] if layout.last_items_weights else _question(facts, "history")
    return [
        f"first, mask, end = {layout.base}, {layout.mask_ids[0]}, {layout.eos_id}  # tokens: item 0, mask, end of input",
        f"user = [{layout.first_user_id}]  # any user: <user_unknown>" if layout.user_token else "user = []",
        f"history = {list(history)}  # column `index` of items.parquet, oldest first"
        + (", at least one" if layout.decoder_prompt == "last-item" else ""),
        f"history = [first + item for item in history[-{layout.max_history}:]]",
        *asked,
    ]


def _question(facts: Facts, items: str) -> list[str]:
    """Lines that make the model's two inputs of the tokens in the variable `items`."""
    prompt = f"mask, {items}[-1]" if facts.layout.decoder_prompt == "last-item" else "mask"
    return [f"ids = torch.tensor([[*user, *{items}, mask, end]])", f"prompt = torch.tensor([[{prompt}]])"]


def _mixture_lines(facts: Facts, scores: Sequence[str]) -> list[str]:
    """Lines that rank by the answers to the history and to its last items alone; `scores` make those of one question."""
    weights = facts.layout.last_items_weights
    share = sum(weights)
    return [
        f"weights = {list(weights)}[:len(history)]  # of the last item alone, the one before it, …",
        f"alone = [({share!r} * weight / sum(weights), [item]) for weight, item in zip(weights, reversed(history))]",
        "likely = 0  # of each item, the next one",
        "with torch.no_grad():",
        f"    for weight, items in [({1 - share!r}, history), *alone]:",
        *(f"        {line}" for line in [*_question(facts, "items"), *scores]),
        "        likely = likely + weight * scores.softmax(-1)",
        f"best = likely.topk({_beams(facts)}).indices.tolist()",
    ]


def _use_without_genrec(facts: Facts, history: Sequence[int]) -> list[str]:
    hub = ["from huggingface_hub import hf_hub_download"] if facts.repo_id else []
    revision = f", revision={literal(facts.revision)}" if facts.revision else ""
    base = f"{literal(facts.base)}{revision}, dtype=torch.float32"
    scores = [
        "out = model(inputs_embeds=table[ids], decoder_inputs_embeds=table[prompt], output_hidden_states=True)",
        'scores = out.decoder_hidden_states[-1][0, -1] @ rows["item_out"].T',
    ]
    if facts.layout.last_items_weights:
        ranked = _mixture_lines(facts, scores)
    else:
        ranked = [*(f"    {line}" for line in scores), f"best = scores.topk({_beams(facts)}).indices.tolist()"]
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
        *ranked,
        "print(best)  # column `index` of items.parquet, best first",
        "```",
        "",
        *_merge_block(facts),
        "",
        *_titles_block(facts),
    ]


def _merge_block(facts: Facts) -> list[str]:
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


def _use_merged(facts: Facts, history: Sequence[int]) -> list[str]:
    beams = _beams(facts)
    if facts.layout.last_items_weights:
        how = "items are ranked by what the model answers to the history and to its last items alone"
        ranked = _mixture_lines(
            facts,
            [
                "logits = model(ids, decoder_input_ids=prompt).logits",
                f"scores = logits[0, -1, first : first + {facts.layout.num_items}]",
            ],
        )
    else:
        how = "beam search over one token gives the top of the ranking"
        ranked = [
            f"top = model.generate(ids, decoder_input_ids=prompt, num_beams={beams}, num_return_sequences={beams})",
            "best = (top[:, -1] - first).tolist()",
        ]
    return [
        "### Without genrec_llm",
        "",
        f"With torch and transformers alone; {how}:",
        "",
        "```python",
        "import torch",
        "from transformers import AutoModelForSeq2SeqLM",
        "",
        f"model = AutoModelForSeq2SeqLM.from_pretrained({facts.place}, dtype=torch.float32).eval()",
        *_token_lines(facts, history),
        *ranked,
        "print(best)  # column `index` of items.parquet, best first",
        "```",
        "",
        *_titles_block(facts),
    ]


def _titles_block(facts: Facts) -> list[str]:
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
