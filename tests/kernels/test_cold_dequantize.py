"""The kernel that reads cold pages says exactly what the reference says, of sound and of damaged bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tq_kernels import cold_page
from tq_kernels.cold_dequantize import dequantize_cold, read_symbols_on_device
from tq_kernels.cold_layout import ColdLayout, section_bytes_for
from tq_kernels.cold_sections import open_sections, read_symbols
from tq_kernels.trellis import NEXT_STATE


def layout_for(bits: float, head_dim: int, heads: int, page_tokens: int = 16) -> ColdLayout:
    return ColdLayout(
        head_dim=head_dim,
        num_kv_heads=heads,
        page_tokens=page_tokens,
        section_bytes=section_bytes_for(bits, head_dim, page_tokens),
    )


def pages_of(layout: ColdLayout, num_pages: int, generator: torch.Generator) -> torch.Tensor:
    shape = (2, num_pages * layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    keys, values = 3 * torch.randn(shape, generator=generator)
    return cold_page.quantize(keys, values, layout)


def test_next_state_is_what_the_kernel_computes() -> None:
    for state in range(8):
        for parity in (0, 1):
            assert NEXT_STATE[state][parity] == (state >> 1) ^ (5 * (state & 1)) ^ (2 * parity)


@pytest.mark.parametrize(
    ("bits", "head_dim", "heads", "num_pages"),
    [(3, 32, 1, 1), (2, 16, 5, 1), (5.5, 16, 1, 2)],
)
def test_symbols_are_the_references(
    bits: float, head_dim: int, heads: int, num_pages: int, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_for(bits, head_dim, heads)
    pages = pages_of(layout, num_pages, generator)
    wanted = read_symbols(open_sections(pages, layout), layout)
    found = read_symbols_on_device(open_sections(pages.to(device), layout), layout)

    assert wanted[2].all()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.cpu(), other.to(one.dtype))


def test_keys_and_values_are_the_references(generator: torch.Generator, device: torch.device) -> None:
    layout = layout_for(3, 16, 1, page_tokens=32)
    pages = pages_of(layout, 2, generator)
    balance = torch.rand(1, 16, generator=generator) + 0.5
    wanted = cold_page.dequantize(pages, layout, torch.bfloat16, key_balance=balance)
    found = dequantize_cold(pages.to(device), layout, key_balance=balance.to(device))

    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_damage_is_judged_alike(generator: torch.Generator, device: torch.device) -> None:
    """States and words of every kind, read without harm; as many words as the header says, and no others."""
    layout = layout_for(2, 16, 4)
    pages = pages_of(layout, 1, generator)
    sections = pages.view(4, -1)
    sections[:2, layout.states_offset + 3 :: 7] ^= 0x55
    sections[1, layout.states_offset + 2 : layout.states_offset + 4] = 0
    sections[2, :2] = torch.tensor([3, 0], dtype=torch.uint8)
    sections[2, layout.words_offset + 6 :] = 0
    sections[:, layout.words_offset :].view(torch.int16)[
        torch.arange(layout.max_words) >= (sections[:, :2].contiguous().view(torch.int16).long() & 0xFFFF)
    ] = 0
    wanted = read_symbols(open_sections(pages, layout), layout)
    found = read_symbols_on_device(open_sections(pages.to(device), layout), layout)

    assert wanted[2].tolist() == [False] * 3 + [True]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.cpu(), other.to(one.dtype))
    with pytest.raises(ValueError, match="head 0 of cold page 0 is damaged"):
        dequantize_cold(pages.to(device), layout)


def test_no_pages(device: torch.device) -> None:
    layout = layout_for(2, 16, 4)
    keys, values = dequantize_cold(
        torch.empty(0, layout.page_bytes, dtype=torch.uint8, device=device), layout
    )
    assert keys.shape == values.shape == (0, 4, 16)


def test_a_cpu_without_the_interpreter_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr("tq_kernels.cold_dequantize.takes_kernel", lambda device: False)
    monkeypatch.setattr("tq_kernels.cold_dequantize.read_symbols_on_device", None)
    layout = layout_for(2, 16, 1)
    pages = pages_of(layout, 1, generator)
    for one, other in zip(dequantize_cold(pages, layout), cold_page.dequantize(pages, layout), strict=True):
        assert torch.equal(one, other.bfloat16())


def test_on_hopper_a_program_is_one_warp_in_registers() -> None:
    """Compiled in a process of its own: this one may have chosen the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compile_cold = Path(__file__).parent / "compile_cold.py"
    run = subprocess.run(
        [sys.executable, compile_cold],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = json.loads(run.stdout)

    # 64 registers let 32 programs share a multiprocessor, the most that it takes
    assert found["REG"] <= 64
    assert found["STACK"] == found["LOCAL"] == found["SHARED"] == 0
    # five reads, unrolled
    assert found["instructions"] < 600
