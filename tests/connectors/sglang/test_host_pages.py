"""SGLang's host pages are seen in one order, whatever the layout of the pool, and are views of it."""

import pytest
import torch
from connectors.sglang.host_pool import SHAPES, HostMemory

from tq_connectors.sglang.host_pages import read_host_pool
from tq_store.errors import ConfigError

SIZES = {"num_pages": 3, "page_size": 4, "layers": 2, "heads": 5, "dim": 6}


def numbered(layout: str) -> HostMemory:
    """A pool in which each number says where it belongs: side, token, layer, head and channel."""
    pool = HostMemory(layout, **SIZES, dtype=torch.float32)
    for index in range(0, 12, 4):
        page = read_host_pool(pool).page(index)
        for side in range(2):
            for layer in range(2):
                for token in range(4):
                    page[side, layer, token] = side * 1000 + layer * 100 + index + token
    return pool


@pytest.mark.parametrize("layout", SHAPES)
def test_a_page_is_a_view_in_one_order(layout):
    pages = read_host_pool(numbered(layout))
    assert pages.shape.num_layers == 2
    assert (pages.shape.num_kv_heads, pages.shape.head_dim, pages.shape.page_tokens) == (5, 6, 4)
    assert pages.shape.page_bytes == 2 * 2 * 4 * 5 * 6 * 4
    page = pages.page(8)
    assert page.shape == (2, 2, 4, 5, 6)
    assert page[1, 1, 3, 4, 5] == 1111
    page.zero_()
    assert torch.count_nonzero(pages.pool.get_data_page(8)) == 0
    assert torch.count_nonzero(pages.page(4)) == torch.count_nonzero(read_host_pool(numbered(layout)).page(4))


@pytest.mark.parametrize("layout", SHAPES)
def test_a_flat_page_is_seen_alike(layout):
    pool = numbered(layout)
    pages = read_host_pool(pool)
    assert torch.equal(pages.view_flat(pool.get_data_page(4)), pages.page(4))
    flat = pages.empty_flat()
    pages.view_flat(flat).copy_(pages.page(4))
    assert torch.equal(flat, pool.get_data_page(4))


def test_an_fp8_cache_is_seen_as_fp8_though_its_pool_holds_bytes():
    pool = HostMemory("page_first", **SIZES, dtype=torch.uint8)
    pages = read_host_pool(pool, torch.float8_e4m3fn)
    pages.page(4).copy_(torch.ones(pages.page(4).shape))
    assert pages.shape.dtype_name == "float8_e4m3fn"
    assert torch.equal(pool.get_data_page(4).unique(), torch.tensor([0x38], dtype=torch.uint8))
    assert pages.view_flat(pool.get_data_page(4)).float().unique() == 1
    with pytest.raises(ConfigError, match="does not hold keys and values"):
        read_host_pool(numbered("page_first"), torch.float8_e4m3fn)


def test_other_pools_are_refused():
    pool = HostMemory("layer_first", **SIZES)
    pool.layout = "page_unified"
    with pytest.raises(ConfigError, match=r"'page_unified'.*layer_first or page_first"):
        read_host_pool(pool)


def test_a_pool_without_heads_is_refused():
    latent = HostMemory("layer_first", **SIZES)
    latent.kv_buffer = torch.zeros(2, 12, 1, 6)  # [layers, tokens, 1, channels], as MLA has it
    with pytest.raises(ConfigError, match="HostMemory does not hold keys and values of heads"):
        read_host_pool(latent)


def test_a_pool_that_says_another_dtype_than_it_has_is_refused():
    pool = HostMemory("layer_first", **SIZES)
    pool.dtype = torch.uint8
    with pytest.raises(ConfigError, match="does not hold keys and values"):
        read_host_pool(pool)
