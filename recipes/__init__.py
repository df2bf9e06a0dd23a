"""The things a user runs: `python -m recipes.NAME key=value …`. The only place where everything meets."""

import os

# torch reads these once, before its first product. Measured in benchmarks/LOG.md.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large CPU tensors on huge pages: a fifth off the training stage
# oneDNN keeps buffers for every shape it has seen, and packs have ever new ones: a run grew by gigabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")  # the same cache, one level up in torch

from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving: the recipes show their own progress
