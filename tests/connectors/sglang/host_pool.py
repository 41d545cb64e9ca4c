"""Host memory laid out as SGLang's host pools lay it out, for tests where there is no SGLang."""

import torch

SHAPES = {
    "layer_first": lambda pages, tokens, layers, heads, dim: (2, layers, pages * tokens, heads, dim),
    "page_first": lambda pages, tokens, layers, heads, dim: (2, pages * tokens, layers, heads, dim),
    "page_first_direct": lambda pages, tokens, layers, heads, dim: (2, pages, layers, tokens, heads, dim),
    "page_head": lambda pages, tokens, layers, heads, dim: (2, pages, heads, tokens, layers, dim),
}


class HostMemory:
    """The part of SGLang's `HostKVCache` that we call; engine tests hold it against the real one."""

    def __init__(
        self,
        layout: str,
        *,
        num_pages: int,
        page_size: int,
        layers: int,
        heads: int,
        dim: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.layout = layout
        self.page_size = page_size
        self.dtype = dtype
        shape = SHAPES[layout](num_pages, page_size, layers, heads, dim)
        self.kv_buffer = torch.zeros(shape, dtype=dtype)

    def fill(self, seed: int) -> "HostMemory":
        noise = torch.randn(self.kv_buffer.shape, generator=torch.Generator().manual_seed(seed))
        self.kv_buffer.copy_(noise)
        return self

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        tokens = slice(index, index + self.page_size)
        page = slice(index // self.page_size, index // self.page_size + 1)
        if self.layout == "layer_first":
            found = self.kv_buffer[:, :, tokens]
        else:
            found = self.kv_buffer[:, tokens if self.layout == "page_first" else page]
        return found.flatten() if flat else found

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.get_data_page(0))
