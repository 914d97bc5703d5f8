"""How every section of a card writes: one line of text, a table, a Python literal, a commit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def literal(value: Any) -> str:
    """A string, or a list of them, as Python writes it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Lines of a Markdown table; with `numbers`, all columns but the first are aligned to the right."""
    align = ["---", *("---:" if numbers else "---" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


def text(value: str) -> str:
    """One line that breaks neither a table nor a code comment."""
    return " ".join(value.split()).replace("|", "\\|")


def commit_words(facts: Mapping[str, Any]) -> str:
    """The commit of genrec_llm that something was made with, of facts that may hold none."""
    commit = facts.get("commit")
    if not commit:
        return "at an unknown commit"
    sha, _, changes = commit.partition("+")
    return f"`{sha[:12]}`" + (" with uncommitted changes" if changes else "")
