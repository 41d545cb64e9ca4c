"""The paper's theorems as statistical tests, and why `prod` is in no default.

Intervals are those of a mean over independent groups: each group has a rotation, a sketch and vectors of its
own, so that no randomness is shared between groups. They cover 4 standard errors.
"""

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch

from tq_kernels.codebook import distortion, lloyd_max
from tq_kernels.prod import (
    dequantize_mse,
    dequantize_prod,
    estimate_inner_products,
    quantize_prod,
    sketch_matrix,
)
from tq_kernels.reference import level_table, nearest_indices
from tq_kernels.rotation import rotation_matrix
from tq_kernels.spec import Code

from .prediction import norm_corrected_distortion, scalar_slope
from .tolerances import SIGMAS

HEAD_DIM = 64
GROUPS = 256
VECTORS = 192
COSINE = 0.3
PANTER_DITE = math.sqrt(3) * math.pi / 2


def _interval(samples: list[float]) -> tuple[float, float]:
    values = torch.tensor(samples, dtype=torch.float64)
    half = SIGMAS * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def _pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random unit vectors and unit queries whose inner product is COSINE, ``[VECTORS, HEAD_DIM]`` each."""
    vectors, other = torch.nn.functional.normalize(
        torch.randn(2, VECTORS, HEAD_DIM, generator=generator), dim=-1
    )
    across = other - (other * vectors).sum(-1, keepdim=True) * vectors
    across = torch.nn.functional.normalize(across, dim=-1)
    return vectors, COSINE * vectors + math.sqrt(1 - COSINE**2) * across


def _norm_corrected(vectors: torch.Tensor, code: Code, seed: int) -> torch.Tensor:
    rotation = rotation_matrix(HEAD_DIM, seed)
    indices, scales = nearest_indices(vectors @ rotation.T, code, search=False)
    return level_table(code, torch.device("cpu"))[indices] * scales.float()[:, None] @ rotation


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_theorem_1_and_3_distortion_lies_between_the_bounds(bits: int, generator: torch.Generator) -> None:
    """4^-b <= D_mse <= sqrt(3) pi / 2 4^-b, for the paper's code: no norm correction, exact Lloyd-Max."""
    samples = []
    for seed in range(GROUPS // 4):
        vectors, _ = _pairs(generator)
        error = dequantize_mse(quantize_prod(vectors, bits=bits + 1, seed=seed)) - vectors
        samples.append(float((error**2).sum(-1).mean()))
    low, high = _interval(samples)

    assert 4.0**-bits < low
    assert high < PANTER_DITE * 4.0**-bits
    assert low < distortion(lloyd_max(bits), 1.0, HEAD_DIM) < high


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_theorem_2_prod_is_unbiased_and_its_variance_bounded(bits: int, generator: torch.Generator) -> None:
    bias, variance = [], []
    for seed in range(GROUPS):
        vectors, queries = _pairs(generator)
        error = estimate_inner_products(queries, quantize_prod(vectors, bits=bits, seed=seed)) - COSINE
        bias.append(float(error.mean()))
        variance.append(HEAD_DIM * float((error**2).mean()))
    low, high = _interval(bias)

    assert low < 0 < high
    assert high - low < 2 * 0.01 * COSINE, "a bias of 1 % would be outside"
    low, high = _interval(variance)
    assert high < math.sqrt(3) * math.pi**2 * 4.0**-bits
    # over the sketch alone Var = (pi / 2 |r|^2 |y|^2 - <r, y>^2) / d, |r|^2 being D_mse of one bit less;
    # <r, y>^2 is near COSINE^2 for zero bits of mse and negligible for more
    residual = distortion(lloyd_max(bits - 1), 1.0, HEAD_DIM) if bits > 1 else 1.0
    aligned = COSINE**2 if bits == 1 else 0.0
    assert (low + high) / 2 == pytest.approx(math.pi / 2 * residual - aligned, rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_mse_shrinks_inner_products_and_prod_does_not(bits: int, generator: torch.Generator) -> None:
    """The mse code's slope is about 1 - D_mse; the norm-corrected one, 1 - D / 2, halves the shrinkage."""
    slopes: dict[str, list[float]] = {"mse": [], "prod": [], "corrected": []}
    for seed in range(GROUPS):
        vectors, queries = _pairs(generator)
        mse = dequantize_mse(quantize_prod(vectors, bits=bits + 1, seed=seed))
        slopes["mse"].append(float((queries * mse).sum(-1).mean()) / COSINE)
        prod = dequantize_prod(quantize_prod(vectors, bits=bits, seed=seed))
        slopes["prod"].append(float((queries * prod).sum(-1).mean()) / COSINE)
        if bits > 1:
            corrected = _norm_corrected(vectors, Code(bits), seed)
            slopes["corrected"].append(float((queries * corrected).sum(-1).mean()) / COSINE)
    low, high = _interval(slopes["mse"])

    assert low < scalar_slope(lloyd_max(bits), HEAD_DIM) < high < 1
    shrunk = high
    low, high = _interval(slopes["prod"])
    assert low < 1 < high
    if bits > 1:
        low, high = _interval(slopes["corrected"])
        assert shrunk < low < 1 - norm_corrected_distortion(Code(bits), HEAD_DIM) / 2 < high < 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prod_has_over_four_times_the_variance_of_the_shipped_code(
    bits: int, generator: torch.Generator
) -> None:
    """At equal bits, about the estimator's own mean; the shipped code's small bias is tested above."""
    ratios = []
    for seed in range(GROUPS // 4):
        vectors, queries = _pairs(generator)
        prod = estimate_inner_products(queries, quantize_prod(vectors, bits=bits, seed=seed))
        corrected = (queries * _norm_corrected(vectors, Code(bits), seed)).sum(-1)
        ratios.append(float(prod.var() / corrected.var()))
    low, _ = _interval(ratios)

    assert low > 4


def test_distortion_falls_by_four_for_every_bit() -> None:
    """The scaling 4^-b is a limit. At 1 to 7 bits the ratios are 3.09, 3.40, 3.64, 3.79, 3.89, 3.94."""
    measured = [distortion(lloyd_max(bits), 1.0) for bits in range(1, 8)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(measured)]

    assert ratios == pytest.approx([3.093, 3.401, 3.636, 3.793, 3.888, 3.941], abs=1e-3)
    assert ratios == sorted(ratios)
    gaps = [PANTER_DITE - 4**bits * d for bits, d in zip(range(1, 8), measured, strict=True)]
    assert all(gap > 0 for gap in gaps)
    # the gap to the high-rate constant halves with every bit in the end
    assert gaps[-1] / gaps[-2] == pytest.approx(0.5, abs=0.03)


def test_estimate_is_the_inner_product_with_the_reconstruction(generator: torch.Generator) -> None:
    vectors = torch.randn(5, 7, 80, generator=generator) * 3
    queries = torch.randn(5, 7, 80, generator=generator)
    quantized = quantize_prod(vectors, bits=3, seed=5)

    direct = (queries * dequantize_prod(quantized)).sum(-1)
    torch.testing.assert_close(estimate_inner_products(queries, quantized), direct, atol=1e-4, rtol=1e-4)


def test_code_spends_bits_as_it_says(generator: torch.Generator) -> None:
    vectors = torch.randn(64, 64, generator=generator)
    for bits in (1, 2, 3, 4):
        quantized = quantize_prod(vectors, bits=bits, seed=1)
        assert quantized.indices.unique().tolist() == list(range(1 << (bits - 1)))
        assert quantized.signs.unique().tolist() == [-1.0, 1.0]
        torch.testing.assert_close(quantized.norms, torch.linalg.vector_norm(vectors, dim=-1))


def test_a_zero_vector_stays_zero() -> None:
    quantized = quantize_prod(torch.zeros(3, 64), bits=2, seed=0)

    assert torch.equal(dequantize_prod(quantized), torch.zeros(3, 64))


def test_sketches_of_two_seeds_are_unrelated_gaussians() -> None:
    first, second = sketch_matrix(128, 1), sketch_matrix(128, 2)

    assert abs(float(first.mean())) < 4 / 128
    assert float(first.var()) == pytest.approx(1, abs=4 * math.sqrt(2) / 128)
    assert abs(float((first * second).mean())) < 4 / 128
    assert torch.equal(first, sketch_matrix(128, 1))


def test_less_than_one_bit_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be at least 1, of which one is the sketch's, not 0"):
        quantize_prod(torch.ones(1, 64), bits=0, seed=0)


def test_nothing_ships_with_prod() -> None:
    root = Path(__file__).parents[2]
    files = [
        path for folder in ("tq_store", "kernels", "connectors") for path in (root / folder).rglob("*.py")
    ]
    importers = [
        path
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").endswith("prod"))
        or (isinstance(node, ast.Import) and any(name.name.endswith(".prod") for name in node.names))
    ]

    assert len(files) > 20
    assert importers == []
