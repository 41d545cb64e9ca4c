"""The rotation is orthogonal, reproducible in any language, and makes every input look Gaussian."""

import math

import pytest
import torch

from tq_kernels.codebook import distortion, lloyd_max, midpoints
from tq_kernels.rotation import _signs, hadamard_matrix, rotation_matrix
from tq_kernels.spec import DEFAULT_ROTATION_SEED

from . import page_document
from .tolerances import HARD_INPUT, ORTHOGONALITY

ORDERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 12, 24, 48, 96, 192, 384, 20, 40, 80, 160, 320]
ROTATED = [order for order in ORDERS if order >= 16]

# from the generator's authors: the first outputs for the states 1234567 and 0
KNOWN_SPLIT_MIX = {
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
}


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrix_is_plus_minus_one_with_orthogonal_rows(order: int) -> None:
    matrix = hadamard_matrix(order)

    assert matrix.shape == (order, order)
    assert set(matrix.unique().tolist()) <= {-1, 1}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("order", [12, 16, 20, 48, 80])
def test_hadamard_matrix_is_the_documented_one(order: int) -> None:
    assert hadamard_matrix(order).tolist() == page_document.hadamard_rows(order)


@pytest.mark.parametrize("order", [3, 5, 6, 7, 10, 14, 28, 36, 44, 72, 112, 144])
def test_other_orders_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known here"):
        hadamard_matrix(order)


@pytest.mark.parametrize("head_dim", ROTATED)
def test_rotation_is_orthogonal(head_dim: int) -> None:
    rotation = rotation_matrix(head_dim, DEFAULT_ROTATION_SEED).double()
    error = rotation @ rotation.T - torch.eye(head_dim, dtype=torch.float64)

    assert error.abs().max() < ORTHOGONALITY


@pytest.mark.parametrize("head_dim", [16, 80, 96])
@pytest.mark.parametrize("seed", [DEFAULT_ROTATION_SEED, 0, (1 << 64) - 1])
def test_rotation_is_the_documented_one(head_dim: int, seed: int) -> None:
    documented = torch.tensor(page_document.rotation_rows(head_dim, seed), dtype=torch.float64)

    assert torch.equal(rotation_matrix(head_dim, seed), documented.float())


@pytest.mark.parametrize("state", KNOWN_SPLIT_MIX)
def test_signs_are_the_top_bits_of_split_mix_64(state: int) -> None:
    known = KNOWN_SPLIT_MIX[state]

    assert page_document.split_mix_64(state, 5) == known
    assert _signs(state, 5) == [-1 if number >= 1 << 63 else 1 for number in known]


def test_signs_of_the_default_seed() -> None:
    """Golden: every page ever written depends on them."""
    bits = "".join("-" if sign < 0 else "+" for sign in _signs(DEFAULT_ROTATION_SEED, 64))

    assert DEFAULT_ROTATION_SEED == 8840656085688647681
    assert bits == "--+--+-+-+--+++++-+-+-+-+-++++------++-++---+++++----+++----+-+-"


def test_signs_are_as_random_as_they_look() -> None:
    signs = torch.tensor(_signs(DEFAULT_ROTATION_SEED, 4096), dtype=torch.float64)

    for lag in (1, 2, 16, 64, 128):
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 4 / math.sqrt(len(signs))
    assert abs(signs.mean()) < 4 / math.sqrt(len(signs))


def test_seeds_give_unrelated_rotations() -> None:
    first, second = rotation_matrix(128, 1), rotation_matrix(128, 2)

    # entries of a product of unrelated rotations have standard deviation 1 / sqrt(128) = 0.088
    assert (first @ second.T).abs().max() < 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_rounds_make_sparse_inputs_gaussian_and_one_does_not(bits: int) -> None:
    """One channel alone, exact Lloyd-Max, d = 128: one round's known figures, and two rounds against them.

    The images of all basis vectors under signs and Sylvester's H hold the same numbers in another order, so
    one seed is one sample however many channels are averaged; the mean is over seeds.
    """
    levels = lloyd_max(bits)
    gaussian = distortion(levels, 1.0)
    hadamard = hadamard_matrix(128).double()
    ones, twos = [], []
    for seed in range(32):
        signs = torch.tensor(_signs(seed, 128), dtype=torch.float64)
        ones.append(_scalar_distortion((hadamard * signs).T, levels))
        twos.append(_scalar_distortion(rotation_matrix(128, seed).double().T * math.sqrt(128), levels))
    one, two = (sum(parts) / len(parts) for parts in (ones, twos))

    assert one == pytest.approx({2: 0.260, 3: 0.0596, 4: 0.0033}[bits], rel=0.02)
    assert max(one / gaussian, gaussian / one) > 1.7
    assert two / gaussian == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_signs_a_constant_vector_would_collapse(bits: int) -> None:
    """The shortcut of a public port: a constant is a row of H, so all of it lands on one coordinate."""
    constant = torch.ones(128, dtype=torch.float64)
    collapsed = hadamard_matrix(128).double() @ constant / math.sqrt(128)
    rotated = rotation_matrix(128, DEFAULT_ROTATION_SEED).double() @ constant

    levels = lloyd_max(bits)

    assert _scalar_distortion(collapsed, levels) > 0.5
    assert _scalar_distortion(rotated, levels) < HARD_INPUT * distortion(levels, 1.0)


def _scalar_distortion(coordinates: torch.Tensor, positive_levels: tuple[float, ...]) -> float:
    """Of coordinates whose mean square is one, without norm correction."""
    levels = torch.tensor(positive_levels, dtype=torch.float64)
    edges = torch.tensor(midpoints(positive_levels), dtype=torch.float64)
    magnitude = coordinates.abs().contiguous()
    return float(((magnitude - levels[torch.bucketize(magnitude, edges)]) ** 2).mean())


def test_a_matrix_first_made_in_inference_mode_serves_outside_it() -> None:
    with torch.inference_mode():
        matrix = rotation_matrix(48, 12345)
    assert not matrix.is_inference()
