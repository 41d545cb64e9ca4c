"""Committed pages are written byte for byte and read to the committed values, whatever the CPU."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tq_kernels import PRESETS, PageLayout, preset
from tq_kernels.reference import dequantize, quantize
from tq_kernels.spec import DEFAULT_ROTATION_SEED

from . import page_document
from .tolerances import rotation_error

FOLDER = Path(__file__).parent / "golden"
TOKENS, HEADS, HEAD_DIM = 32, 2, 64
SHA256 = {
    "inputs.bin": "d29a4fe42cbe24f89a801f2766d3671d2e89ce1b7510c48d4ef0c80bd00db358",
    "page_tq4.bin": "bb0fd6b319bc2218e6d3b0f9b49bffef738cbbd68e5ec5ecbb75b1761b0104e7",
    "page_tq3.bin": "0cf8c3337ade0707f1472344c56bec54117e2c1b2dc139be1911caea704425b0",
    "page_tq2.bin": "f73892a19e187361082312c4af0501f217eee22cb30988410eb1802958ff2f31",
    "page_k8v4.bin": "e880a90fe195f3fa512673144b7dfb66b114216c43a5c82b03ad64436af24691",
    "page_k4v3.bin": "adb705c9b3d8a761afd86c6fdb6026f8a8faceb44e84ab984b62c8267cc48de9",
    "page_k4v2.bin": "35fcbb0ab790a28094831d7d23afddd60ba732b5e08eedfc64ad8119d0d2b276",
    "page_k3v4.bin": "663f71b3c19bf729386d6c3404fc21474d2068d71c0648d4ebd5756063d3480f",
    "page_k3v2.bin": "29aab9f77bdb738c15a8d66b9c719ed3a7e23c4bcdb63ee52ca125582c305e01",
    "page_fp8.bin": "f8c32a93853f564ccdaf807f020169f35357d9c4c14f5ef73c2f1a46d75e4e0c",
    "page_raw.bin": "db6d2bfc1f9c7eeb1c45c39484af1898ac14f4bcd5f52dcc5fe104721fd01475",
}
"""Never change a line: `golden/README.md`."""


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    numbers = np.frombuffer((FOLDER / "inputs.bin").read_bytes(), dtype="<f4").astype(np.float32)
    keys, values = torch.from_numpy(numbers.reshape(2, TOKENS, HEADS, HEAD_DIM))
    return keys, values


def _layout(name: str) -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=HEAD_DIM, num_kv_heads=HEADS, page_tokens=TOKENS)


@pytest.mark.parametrize("name", SHA256)
def test_golden_bytes_are_those_that_were_released(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == SHA256[name]


def test_every_preset_has_a_golden_page() -> None:
    assert {path.name for path in FOLDER.glob("*.bin")} == set(SHA256)
    assert {f"page_{name}.bin" for name in PRESETS} | {"inputs.bin"} == set(SHA256)


@pytest.mark.parametrize("name", PRESETS)
def test_quantize_writes_exactly_the_golden_page(name: str) -> None:
    page = quantize(*_inputs(), _layout(name), search=False)

    assert page[0].numpy().tobytes() == (FOLDER / f"page_{name}.bin").read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_dequantize_agrees_with_a_reader_written_from_the_document(name: str) -> None:
    layout, spec = _layout(name), preset(name)
    page = (FOLDER / f"page_{name}.bin").read_bytes()
    sides = dequantize(torch.frombuffer(bytearray(page), dtype=torch.uint8)[None], layout)
    recorded = json.loads((FOLDER / "decoded.json").read_text())[name]
    assert len(page) == layout.page_bytes
    for head in range(HEADS):
        documented = page_document.read_section(
            page[head * layout.section_bytes : (head + 1) * layout.section_bytes],
            spec.key.name,
            spec.value.name,
            bool(spec.key_center),
            HEAD_DIM,
            TOKENS,
            spec.rotation_seed,
        )
        for side, code, restored, exact in zip(
            ("key", "value"), (spec.key, spec.value), sides, documented, strict=True
        ):
            truth = torch.tensor(exact, dtype=torch.float64)
            bound = rotation_error(HEAD_DIM) * torch.linalg.vector_norm(truth, dim=-1, keepdim=True)
            error = (restored[:, head].double() - truth).abs()
            assert (error <= (bound if code.rotated else torch.zeros(1))).all()
            if head == 1:
                assert exact[31][:8] == pytest.approx(recorded[side], rel=1e-12)


def test_golden_inputs_keep_clear_of_every_boundary() -> None:
    """Margins in double precision: what makes the bytes independent of the order of float32 sums."""
    rotation = torch.tensor(page_document.rotation_rows(HEAD_DIM, DEFAULT_ROTATION_SEED), dtype=torch.float64)
    keys, values = (side.double() @ rotation.T for side in _inputs())
    center = keys.mean(dim=0)
    error = (center - center.half().double()).abs()
    assert (error < 1e-6).all(), "half an fp16 unit in the last place is 2.4e-4 here"
    assert (center.abs() > 0.49).all()

    vectors = torch.cat((keys - center.half().double(), values)).flatten(0, 1)
    zeros = torch.linalg.vector_norm(vectors, dim=-1) == 0
    assert zeros.sum() == 1
    for name in ("LM2", "LM3", "LM4", "E4M3_SCALED"):
        documented = page_document.CODES[name]
        positive = documented.levels or tuple(page_document.e4m3(byte) for byte in range(127))
        for vector in vectors[~zeros]:
            _assert_clear(vector, torch.tensor(positive, dtype=torch.float64), documented.target)


def _assert_clear(vector: torch.Tensor, levels: torch.Tensor, target: float) -> None:
    norm = float(torch.linalg.vector_norm(vector))
    magnitude = (vector * (target * HEAD_DIM**0.5 / norm)).abs()
    edges = (levels[1:] + levels[:-1]) / 2
    assert magnitude.min() > 0.0999
    assert (magnitude[:, None] - edges).abs().min() > 0.0039
    scale = norm / float(torch.linalg.vector_norm(levels[torch.bucketize(magnitude, edges)]))
    in_ulps = scale / 2.0 ** (math.floor(math.log2(scale)) - 10)
    assert abs(in_ulps % 1 - 0.5) > 0.049
