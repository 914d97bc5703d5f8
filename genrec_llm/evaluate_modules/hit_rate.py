"""HR@K as a module of the Hugging Face `evaluate` library: `evaluate.load("<path to this file>")`, offline.

`evaluate` 0.4 parses the imports of this file by regular expression: one module a line.
"""

import datasets
import evaluate

from genrec_llm.metrics import hit_rate, list_ranks


class HitRate(evaluate.Metric):
    """Share of the users whose target is among the first k recommended items."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the users whose target is among the first k recommended items.",
            citation="",
            inputs_description=(
                "predictions: one list of item indices a user, best first, -1 for nothing; references: "
                "one item index a user; k: how many items of a list count (10). Returns {'hit_rate': float}."
            ),
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int], k: int = 10) -> dict[str, float]:
        return {"hit_rate": float(hit_rate(list_ranks(predictions, references, k), k).mean())}
