"""For every test: one thread (tiny models gain nothing from two, and lose a lot on a busy machine); no deadlines."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses, too

from hypothesis import settings

settings.register_profile("protege", deadline=None)  # a busy machine is no error
settings.load_profile("protege")


def pytest_collection_finish() -> None:
    """In every process that runs tests: the one that hands them out to others needs no torch."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: a collection need not look at half a million objects again
