"""The measurements of cold pages and of compression, as far as they go without a model or a GPU."""

import pytest
import torch

from benchmarks import coding, trellis_tables
from tq_kernels import PageLayout, preset
from tq_kernels.reference import quantize
from tq_kernels.trellis_tables import FREQUENCIES, RATES, STEPS


def gaussian_pages(name: str) -> tuple[torch.Tensor, PageLayout]:
    layout = PageLayout(spec=preset(name), head_dim=64, num_kv_heads=2, page_tokens=128)
    keys, values = torch.randn(2, 512, 2, 64, generator=torch.Generator().manual_seed(0))
    return quantize(keys, values, layout, search=False), layout


@pytest.mark.parametrize(
    ("name", "saved_bits", "bits"), [("tq4", 0.235, 4), ("tq3", 0.175, 3), ("tq2", 0.089, 2)]
)
def test_ideal_is_the_known_entropy_of_lloyd_max(name: str, saved_bits: float, bits: int) -> None:
    pages, layout = gaussian_pages(name)
    share = bits * 2 * 64 * layout.page_tokens / 8 / layout.section_bytes
    ratio = coding.ideal_ratio(pages, layout)

    assert ratio == pytest.approx(1 - saved_bits / bits * share, abs=0.003)
    # scales compress a little on top
    assert abs(coding.by_plane_ratio(pages, layout) - ratio) < 0.03


def test_a_row_and_what_it_means_over_a_link() -> None:
    row = coding.measure("here", "tq4", *gaussian_pages("tq4"), seconds=0.02)
    assert row["ideal"] < row["level_1"] < 0.97
    assert row["pack_gbps"] > 0

    fast_core = {"level_1": 0.95, "unpack_gbps": 100.0}
    assert coding.over_link(fast_core, 0.125) == pytest.approx((1 / 0.95, 1 / (0.95 + 0.125 / 100)))
    assert coding.over_link({"level_1": 0.95, "unpack_gbps": 1.0}, 2.0) == pytest.approx(
        (0.5, 1 / 2.95 * 2 / 2)
    )


def test_shipped_tables_are_what_their_script_derives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_tables, "ROUNDS", 4)
    vectors = torch.randn(600, 128, generator=torch.Generator().manual_seed(1))
    vectors *= 128**0.5 / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    table = RATES.index(3.0)
    step, halves = trellis_tables.derive(3.0, vectors)

    assert step == pytest.approx(STEPS[table], rel=0.01)
    for half, shipped in zip(halves, FREQUENCIES[table], strict=True):
        assert len(half) == len(shipped)
        assert all(abs(one - other) < 40 for one, other in zip(half, shipped, strict=True))
