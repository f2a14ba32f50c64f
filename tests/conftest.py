"""For all tests."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # networks this small are no faster with more, and their sums in one order

import torch  # noqa: E402

torch.set_num_threads(1)  # where it was imported before
