"""What the first item rows know before any training: validation figures of ranking by the last item's row alone.

python tools/initial_rows.py amazon-beauty --data-dir ../shared/data --item-vectors vectors.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.nn.functional import normalize

from genrec_llm.args import DataArguments
from genrec_llm.baselines import ItemKNN, SequenceRecommender
from genrec_llm.encoded import load_data
from genrec_llm.evaluation import build_report, markdown, rank_recommender
from genrec_llm.rows import cooccurrence_and_vectors, cooccurrence_rows, vector_rows
from genrec_llm.vectors import read_item_vectors


@dataclass(frozen=True)
class LastItemRow:
    """Scores every item by the product of its row with the row of the last item; rows `[items, dim]` of length one."""

    rows: npt.NDArray[np.float32]
    name: str

    def scores(
        self, histories: Sequence[npt.NDArray[np.int64]], users: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        return self.rows[[history[-1] for history in histories]] @ self.rows.T


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--data-dir")
    parser.add_argument("--item-vectors", help="as of `genrec vectors`")
    args = parser.parse_args()
    data = load_data(DataArguments(dataset=args.dataset, data_dir=args.data_dir))
    recommenders: list[SequenceRecommender] = [ItemKNN.fit(data.train, data.vocab.num_items)]
    vectors = read_item_vectors(args.item_vectors, data.vocab) if args.item_vectors else None
    for dim in (64, 128, 256):
        known = {"co-occurrence": cooccurrence_rows(data.train, data.vocab.num_items, dim, seed=0)}
        if vectors is not None:
            known["vectors"] = vector_rows(vectors, dim, seed=0)
            known["both"] = cooccurrence_and_vectors(data.train, vectors, dim, seed=0)
        recommenders += [
            LastItemRow(normalize(rows, dim=1).numpy(), f"last item's row, {name}, {dim} wide")
            for name, rows in known.items()
        ]
    held_out = data.held_out("validation")
    print(
        markdown(
            [
                build_report(
                    each.name, rank_recommender(each, held_out, exclude_seen=True), held_out, exclude_seen=True
                )
                for each in recommenders
            ]
        )
    )


if __name__ == "__main__":
    main()
