"""One thread for every test: tiny models gain nothing from two, and lose a lot on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses, too

import torch

torch.set_num_threads(1)
