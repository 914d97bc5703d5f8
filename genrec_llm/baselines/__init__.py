"""Recommenders to beat, behind one protocol: everything that gives a score to every item for a history."""

from genrec_llm.baselines.item_knn import ItemKNN
from genrec_llm.baselines.protocol import SequenceRecommender
from genrec_llm.baselines.simple import Popularity, RecentRepeat

__all__ = ["ItemKNN", "Popularity", "RecentRepeat", "SequenceRecommender"]
