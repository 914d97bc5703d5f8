"""Merge adapters and id rows into a plain `transformers` checkpoint, and print that both say the same.

    python recipes/merge.py --run runs/movielens_t5-micro/finetune

The merged directory needs no code of this project: its README.md shows `generate` returning the top N.
"""

from pathlib import Path

import torch

from genrec_llm.args import MergeArguments, parse_args
from genrec_llm.card.facts import quantized_training
from genrec_llm.card.page import refresh_cards
from genrec_llm.directory import MERGED, trained_directory
from genrec_llm.errors import exits_cleanly
from genrec_llm.export import merge
from genrec_llm.hub import check_push, push_finished
from genrec_llm.loading import load_trained


@exits_cleanly
def main() -> None:
    (args,) = parse_args(MergeArguments)
    source = trained_directory(Path(args.run))
    out = Path(args.output_dir or Path(args.run) / MERGED)

    sharing = {"revision": args.hub_revision, "private": args.hub_private_repo, "base_model": args.base_model}
    if args.push_to_hub:
        check_push(source, args.hub_model_id, **sharing)

    trained = load_trained(source, backbone=args.backbone, dtype=getattr(torch, args.dtype))
    parity = merge(trained, out, without_users=args.without_users)
    refresh_cards(Path(args.run))

    print(f"merged {source} into {out}")
    print(
        f"parity: largest score difference {parity['max_score_difference']:.2g}, "
        f"top-{parity['n']:.0f} agreement {parity['top_n_agreement']:.1%} on {parity['samples']:.0f} sample histories"
    )
    if quantised := quantized_training(trained.info):
        print(
            f"trained on {quantised['quantization']} weights, where validation NDCG@10 was "
            f"{quantised['validation_ndcg@10']:.4f}; on the merged ones: genrec evaluate --run {args.run}"
        )
    if args.push_to_hub:
        push_finished(out, args.hub_model_id, **sharing)
    if out == Path(args.run) / MERGED:
        print(f"Next: genrec evaluate --run {args.run}")


if __name__ == "__main__":
    main()
