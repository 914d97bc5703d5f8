"""Merge adapters and id rows into a plain `transformers` checkpoint, and print that both say the same.

    python recipes/merge.py --run runs/movielens_t5-micro/finetune

The merged directory needs no code of this project: its README.md shows `generate` returning the top N.
"""

from pathlib import Path

import torch

from genrec_llm.args import MergeArguments, parse_args
from genrec_llm.errors import exits_cleanly
from genrec_llm.export import merge
from genrec_llm.loading import MERGED, load_trained, trained_directory


@exits_cleanly
def main() -> None:
    (args,) = parse_args(MergeArguments)
    source = trained_directory(Path(args.run))
    out = Path(args.output_dir or Path(args.run) / MERGED)

    trained = load_trained(source, backbone=args.backbone, dtype=getattr(torch, args.dtype))
    parity = merge(trained, out, without_users=args.without_users)

    print(f"merged {source} into {out}")
    print(
        f"parity: largest score difference {parity['max_score_difference']:.2g}, "
        f"top-{parity['n']:.0f} agreement {parity['top_n_agreement']:.1%} on {parity['samples']:.0f} sample histories"
    )


if __name__ == "__main__":
    main()
