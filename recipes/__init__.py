"""The things a user runs: `python -m recipes.NAME key=value …`. The only place where everything meets."""

import os

# Large CPU tensors on huge pages: a fifth off the training stage (benchmarks/LOG.md). torch reads this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving: the recipes show their own progress
