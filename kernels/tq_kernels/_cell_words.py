"""The tables of `cells` on a device."""

from functools import lru_cache

import torch

from tq_kernels import cells
from tq_kernels.codebook import LEVELS
from tq_kernels.layout import PageLayout


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def cell_words(layout: PageLayout, device: torch.device) -> torch.Tensor:
    """Tables of cells for keys and for values, ``[2, 256]`` int32; zeros for codes that are not searched."""
    tables = [
        cells.words(code) if code in LEVELS else (0,) * cells.NUM_STEPS
        for code in (layout.spec.key, layout.spec.value)
    ]
    return torch.tensor(tables, dtype=torch.int32, device=device)
