"""Benchmarks: what the figures in docs/benchmarks.md come from. No download; the last line is one JSON document.

    python bench.py optim                              # our AdamW and Muon against torch's
    python bench.py step                               # tokens/s of a training step, of the presets that fit
    python bench.py step --nanogpt ~/nanoGPT           # the same against a checkout of nanoGPT, in turn
    python bench.py shakespeare --nanogpt ~/nanoGPT --data_path input.txt   # loss and time of its CPU recipe
    python bench.py data                               # batches/s

Peers run in the same call, in turn with ours, so that a machine whose speed drifts slows both. We print medians.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from batches import Batches, TokenStream
from configurator import ROOT, Settings, UserError, configure, find_path, pick, run
from data import DataSettings, prepare
from machine import MachineSettings, choose_machine, peak_memory
from model import LanguageModel, ModelConfig
from optim import OptimSettings, build_optimizer


@dataclass
class BenchSettings:
    nanogpt: str = ""           # checkout of nanoGPT to compare with
    repeats: int = 5            # measurements of each variant; we report the median
    threads: int = 0            # CPU threads; 0 = all
    seeds: int = 3              # runs of `shakespeare`, of each
    batch: str = "1x512"        # sequences x tokens of a training step
    worker: str = ""            # internal: what this process measures


SETTINGS = [BenchSettings, ModelConfig, OptimSettings, DataSettings, MachineSettings]
