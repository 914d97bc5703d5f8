"""Turn a pretrained seq2seq language model into a generative sequential recommender (GenRec)."""

__version__ = "0.1.0"
