"""For every test: one thread (tiny models gain nothing from two, and lose a lot on a busy machine); no deadlines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses, too

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("protege", deadline=None)  # a busy machine is no error
settings.load_profile("protege")
