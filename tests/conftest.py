"""Triton kernels run on a GPU where there is one, else in Triton's interpreter: to be set before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
