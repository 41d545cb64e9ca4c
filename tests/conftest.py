"""Before anything imports Triton: without a GPU, kernels run in its interpreter in a whole test session."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
