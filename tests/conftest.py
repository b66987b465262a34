"""One thread a process (two spinning thread pools on two cores are poison), and the scripts on the path."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (after the thread count is set)

torch.set_num_threads(1)
