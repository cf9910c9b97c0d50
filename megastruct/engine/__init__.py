"""Third floor: the model in DeepSpeed, its optimizer, and the optimizer's state."""

import os

import torch

if not torch.cuda.is_available():  # else DeepSpeed warns, when it is imported, that it has found no GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
