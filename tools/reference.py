"""Write docs/configuration.md, the reference of all configuration keys, from the dataclasses of genrec_llm/args.py.

python tools/reference.py           # after a change of args.py
python tools/reference.py --check   # exits with 1 if the file is not what would be written
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from genrec_llm.args import (
    DataArguments,
    EvaluateArguments,
    GenRecTrainingArguments,
    MergeArguments,
    ModelArguments,
)
from genrec_llm.errors import exits_cleanly
from genrec_llm.files import atomic_file

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
RELIED_ON = (
    "num_train_epochs", "max_steps", "gradient_accumulation_steps", "weight_decay", "optim", "max_grad_norm",
    "label_smoothing_factor", "bf16", "eval_steps", "save_steps", "dataloader_num_workers", "disable_tqdm", "hub_model_id",
    "hub_revision", "hub_token",
)  # fmt: skip
"""Keys of transformers that are used here as they are."""
IN_OUR_WORDS = {
    "max_steps": "Optimizer steps, in place of `num_train_epochs`, where it is above 0.",
    "gradient_accumulation_steps": "Parts in which a process computes its share of a global batch; the batch is the same.",
    "label_smoothing_factor": "Share of the target's probability that is spread over all items in training; 0 is plain "
    "cross-entropy.",
    "weight_decay": "Weight decay of the adapters (or the backbone) but for biases and norms; of the id rows: "
    "`rows_weight_decay`.",
    "optim": "The optimizer: a name that transformers knows, such as adamw_torch.",
    "bf16": "bfloat16 on a GPU that has it; the id rows and the scores of items stay in fp32.",
    "eval_steps": "With `eval_strategy: steps`, steps between validations (below 1 the share of all steps); without it "
    "`logging_steps`.",
    "save_steps": "With `save_strategy: steps`, steps between checkpoints (below 1 the share of all steps).",
    "dataloader_num_workers": "Processes that prepare batches beside each training process.",
    "disable_tqdm": "Show no progress bars.",
    "hub_model_id": "Where `push_to_hub` sends the finished adapter: org/name.",
    "hub_revision": "Branch on the Hub that it goes to; by default the main one.",
    "hub_token": "Token of the Hub, never written down; better given by `hf auth login` or `HF_TOKEN` than here.",
}
"""For keys of `RELIED_ON` whose help in transformers does not fit, or says more than is needed."""

INTRODUCTION = """\
# Configuration

Written by `python tools/reference.py` from the dataclasses of `genrec_llm/args.py`; a test fails when the two differ.

Every key is a flag of its recipe (`--learning-rate 1e-3`; `--learning_rate` is the same flag), and a key of the YAML file
that `--config` names (`learning_rate: 1.0e-3`). Flags win over the file. Unknown keys and flags are refused, with the
nearest name. Switches take `true` or `false`; a switch alone, such as `--bf16`, means true. `genrec pretrain` and
`genrec finetune` hand all flags but `--strategy` and `--processes` on to the recipe, `genrec merge` and `genrec evaluate`
hand all on. A "–" stands for no value.

"""
TRAINING = """\
`GenRecTrainingArguments` adds these keys to `Seq2SeqTrainingArguments` of transformers:

"""
CHANGED = """\
These keys of transformers are declared anew, most of them with another default:

"""
KEPT = """\
And these are used with the default of transformers:

"""
REST = """\
The other keys of `Seq2SeqTrainingArguments` are accepted as well, but no recipe here needs them.
`per_device_train_batch_size` is computed from `global_batch_size`, whatever is given. Refused are `fp16` (T5 overflows in
it), `average_tokens_across_devices: false`, `hub_strategy` other than `end`, `push_to_hub` without `hub_model_id`, and
`use_reentrant: true` in `gradient_checkpointing_kwargs` beside `packing` and `kernels`.
"""


def page() -> str:
    """The whole text of docs/configuration.md."""
    theirs = {entry.name: entry for entry in dataclasses.fields(Seq2SeqTrainingArguments)}
    own = [GenRecTrainingArguments.__dataclass_fields__[name] for name in GenRecTrainingArguments.__annotations__]
    kept = [GenRecTrainingArguments.__dataclass_fields__[name] for name in RELIED_ON]
    return "".join(
        [
            INTRODUCTION,
            "## Data: `pretrain`, `finetune`\n\n",
            _table(DataArguments),
            "\n## Model: `pretrain`, `finetune`\n\n",
            _table(ModelArguments),
            "\n## Training: `pretrain`, `finetune`\n\n",
            TRAINING,
            _table(GenRecTrainingArguments, [entry for entry in own if entry.name not in theirs]),
            "\n",
            CHANGED,
            _table(GenRecTrainingArguments, [entry for entry in own if entry.name in theirs], theirs=theirs),
            "\n",
            KEPT,
            _table(GenRecTrainingArguments, kept, words=IN_OUR_WORDS),
            "\n",
            REST,
            "\n## `merge`\n\n",
            _table(MergeArguments),
            "\n## `evaluate`\n\n",
            _table(EvaluateArguments),
        ]
    )


def _table(
    cls: type[Any],
    fields: list[dataclasses.Field[Any]] | None = None,
    *,
    theirs: Mapping[str, dataclasses.Field[Any]] | None = None,
    words: Mapping[str, str] | None = None,
) -> str:
    """A row a field, of all fields where none are named.

    Args:
        theirs: fields whose defaults get a column of their own.
        words: what to say of a field in place of its help.
    """
    kinds = typing.get_type_hints(cls)
    head = ["key", "values", "default", *(["in transformers"] if theirs else []), "what it is"]
    rows = [head, ["---"] * len(head)]
    for entry in fields or dataclasses.fields(cls):
        row = [f"`{entry.name}`", _kind(kinds[entry.name]), _default(entry)]
        row += [_default(theirs[entry.name])] if theirs else []
        rows.append([*row, (words or {}).get(entry.name) or _help(entry)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _kind(kind: Any) -> str:
    """What a value may be, in words."""
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    if kind in names:
        return names[kind]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        # Of several kinds the last is the widest: transformers names enumerations first and `str` behind them.
        return _kind([inner for inner in typing.get_args(kind) if inner is not type(None)][-1])
    if typing.get_origin(kind) is list:
        return f"list of {_kind(typing.get_args(kind)[0])}"
    raise TypeError(f"no word for values of {kind}")


def _default(entry: dataclasses.Field[Any]) -> str:
    value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if value is dataclasses.MISSING:
        return "has to be given"
    if value is None:
        return "–"
    value = getattr(value, "value", value)  # of an enumeration
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _help(entry: dataclasses.Field[Any]) -> str:
    """What the flag's own help says, on one line; `<…>` would be taken for html."""
    return re.sub(r"(<\w+>[/\w]*)", r"`\1`", " ".join(str(entry.metadata["help"]).split()))


@exits_cleanly
def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file would change")
    if not parser.parse_args().check:
        with atomic_file(PAGE) as temporary:
            temporary.write_text(page(), encoding="utf-8")
        print(f"written to {PAGE.relative_to(PAGE.parent.parent)}")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(
            f"{PAGE.relative_to(PAGE.parent.parent)} is not what genrec_llm/args.py says: python tools/reference.py"
        )


if __name__ == "__main__":
    main()
