"""Turn a pretrained seq2seq language model into a generative sequential recommender (GenRec)."""

import logging

__version__ = "0.1.0"

# peft imports bitsandbytes wherever it is installed, which then misses a kernel that only 4-bit layers on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
