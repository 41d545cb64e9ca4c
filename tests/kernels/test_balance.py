"""The balance is the best there is, is the same in any order of tokens, and refuses what tells nothing."""

import pytest
import torch

from tq_kernels import PageLayout, preset
from tq_kernels.balance import LARGEST_RATIO, estimate_balance
from tq_kernels.reference import dequantize, quantize

TOKENS, HEADS, GROUP, DIM = 512, 2, 3, 64


def _sides(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose channels differ by up to a hundred times, each in its own way, off centre."""
    key_scale = torch.exp(1.5 * torch.randn(HEADS, DIM, generator=generator))
    query_scale = torch.exp(torch.randn(HEADS, DIM, generator=generator)).repeat_interleave(GROUP, dim=0)
    keys = (torch.randn(TOKENS, HEADS, DIM, generator=generator) + 3) * key_scale
    return torch.randn(TOKENS, HEADS * GROUP, DIM, generator=generator) * query_scale, keys


def _product_error(queries: torch.Tensor, keys: torch.Tensor, balance: torch.Tensor | None) -> float:
    """Mean squared error of query times key, less each query's own mean, which softmax does not see."""
    layout = PageLayout(spec=preset("tq3"), head_dim=DIM, num_kv_heads=HEADS, page_tokens=64)
    pages = quantize(keys, keys, layout, key_balance=balance)
    error = dequantize(pages, layout, key_balance=balance)[0] - keys
    products = torch.einsum("qhd,khd->hqk", queries, error.repeat_interleave(GROUP, dim=1))
    return float((products - products.mean(dim=-1, keepdim=True)).square().mean())


def test_products_err_least_with_it(generator: torch.Generator) -> None:
    queries, keys = _sides(generator)
    balance = estimate_balance(queries, keys, page_tokens=64, num_sinks=4)
    best = _product_error(queries, keys, balance)

    assert best < 0.5 * _product_error(queries, keys, None)
    for other in (balance**0.7, balance**1.3, keys.std(dim=0), keys.std(dim=0) ** 0.5):
        assert best < _product_error(queries, keys, other)


def test_it_is_centred_on_one_and_bounded(generator: torch.Generator) -> None:
    queries, keys = _sides(generator)
    balance = estimate_balance(queries, keys, page_tokens=64, num_sinks=4)
    assert balance.shape == (HEADS, DIM)
    assert balance.dtype == torch.float32
    assert torch.equal(balance, balance.bfloat16().float())
    torch.testing.assert_close(balance.log().mean(dim=-1), torch.zeros(HEADS), rtol=0, atol=2.0**-8)

    keys[..., 0], keys[..., 1] = 0, keys[..., 1] * 1e9
    extreme = estimate_balance(queries, keys, page_tokens=64, num_sinks=4)
    assert extreme[:, 1].tolist() == [LARGEST_RATIO] * HEADS
    assert (extreme[:, 0] >= 1 / LARGEST_RATIO).all()


def test_sinks_and_an_offset_do_not_matter(generator: torch.Generator) -> None:
    queries, keys = _sides(generator)
    expected = estimate_balance(queries, keys, page_tokens=64, num_sinks=4)
    keys[:4], queries[:4] = 1e4, -1e4
    moved = keys + torch.tensor(8.0)
    torch.testing.assert_close(
        estimate_balance(queries, moved, page_tokens=64, num_sinks=4), expected, rtol=2.0**-7, atol=0
    )


def test_few_tokens_do(generator: torch.Generator) -> None:
    queries, keys = _sides(generator)
    few = estimate_balance(queries[:40], keys[:40], page_tokens=64, num_sinks=4)
    many = estimate_balance(queries, keys, page_tokens=64, num_sinks=4)
    assert _product_error(queries, keys, few) < 1.15 * _product_error(queries, keys, many)


@pytest.mark.parametrize(
    ("queries", "keys", "sinks", "message"),
    [
        ((8, 6, 64), (9, 2, 64), 4, "do not go with"),
        ((8, 5, 64), (8, 2, 64), 4, "not a multiple"),
        ((5, 6, 64), (5, 2, 64), 4, "tell nothing"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    queries: tuple[int, ...], keys: tuple[int, ...], sinks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_balance(torch.ones(queries), torch.ones(keys), page_tokens=64, num_sinks=sinks)


def test_numbers_that_are_not_finite_are_refused() -> None:
    keys = torch.ones(8, 2, 64)
    keys[7, 1, 3] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        estimate_balance(torch.ones(8, 6, 64), keys, page_tokens=64, num_sinks=4)
