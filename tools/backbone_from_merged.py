"""Make a backbone out of a merged model: its items become ordinary words of a plain checkpoint.

    python tools/backbone_from_merged.py --merged runs/movielens_t5-micro/finetune/merged --out runs/movielens-backbone

For whoever has no pretrained checkpoint at hand and wants to try LoRA in earnest: a small T5 trained fully on one data set
takes the place of Flan-T5, its weights stay frozen, and adapters and new rows take it to another data set.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from genrec_llm.directory import MERGED, read_info
from genrec_llm.errors import ExportError, exits_cleanly
from genrec_llm.files import atomic_directory

WORDS = {"<item_": "<word_", "<user_": "<name_"}
"""The new names of the old id tokens, so that new items and users can have theirs."""


@exits_cleanly
def main() -> None:
    """Copy weights and configuration, and the tokenizer with its id words renamed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merged", type=Path, required=True, help="merged directory of a run")
    parser.add_argument("--out", type=Path, required=True, help="where the backbone goes")
    args = parser.parse_args()
    read_info(args.merged, MERGED)
    weights = sorted(args.merged.glob("*.safetensors*"))
    if not weights:
        raise ExportError(f"{args.merged}: no weights (*.safetensors): merge the run again")
    with atomic_directory(args.out) as folder:
        for path in (*weights, args.merged / "config.json"):
            shutil.copy(path, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (args.merged / name).read_text(encoding="utf-8")
            for old, new in WORDS.items():
                text = text.replace(old, new)
            (folder / name).write_text(text, encoding="utf-8")
    print(f"written to {args.out}: give it as --backbone")


if __name__ == "__main__":
    main()
