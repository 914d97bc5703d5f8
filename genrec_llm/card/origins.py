"""What a model was made from: terms and citations of public data sets, licences and names of base models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


@dataclass(frozen=True)
class Source:
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
SOURCES = {
    "movielens-100k": Source(
        "MovieLens-100K",
        "GroupLens' terms: research use, no commercial use without permission, no redistribution without separate "
        "permission. `items.parquet` repeats film titles and genres of it: ask GroupLens before making this public",
        "F. M. Harper, J. A. Konstan. The MovieLens Datasets: History and Context. ACM Transactions on Interactive "
        "Intelligent Systems 5(4), 2015.",
        ("movielens-terms", "https://files.grouplens.org/datasets/movielens/ml-100k-README.txt"),
    ),
    "amazon-beauty": Source("Amazon Beauty (2014, 5-core)", _NO_LICENCE, _MCAULEY),
    "amazon-sports": Source("Amazon Sports and Outdoors (2014, 5-core)", _NO_LICENCE, _MCAULEY),
    "yelp": Source(
        "Yelp (as preprocessed for S3-Rec)",
        "Yelp's dataset terms of use: academic and other non-commercial use, no redistribution",
        "Yelp Open Dataset.",
        ("yelp-dataset-terms", "https://www.yelp.com/dataset"),
    ),
}
"""Name of a public data set → what is known of it."""
S3REC = (
    "K. Zhou et al. S3-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual Information "
    "Maximization. CIKM 2020 (the preprocessing)."
)
_BASE_LICENCES = {
    r"google/(flan-t5|t5-v1_1|mt5)-.+": "apache-2.0",
    r"(google-t5/)?t5-(small|base|large|3b|11b)": "apache-2.0",
    r"facebook/bart-(base|large)": "apache-2.0",  # not those finetuned from it, some of which are under mit
}
"""Pattern of a Hub name → licence that its own card states."""


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
