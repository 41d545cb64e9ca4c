"""The document, the code and the golden page say the same about cold pages."""

import hashlib
import re
from pathlib import Path

import torch

from tq_kernels import cold_layout
from tq_kernels.cold_layout import HEADER_FIELDS, ColdLayout, section_bytes_for
from tq_kernels.cold_page import read_levels
from tq_kernels.cold_scales import dequantize_scales
from tq_kernels.entropy import FIRST_SCALE_TABLE, SCALE_WIDTHS, all_frequencies
from tq_kernels.trellis_tables import FREQUENCIES, RATES

from . import cold_document

GOLDEN = Path(__file__).parent / "golden" / "cold" / "page.bin"
LAYOUT = ColdLayout(head_dim=64, num_kv_heads=2, page_tokens=32, section_bytes=section_bytes_for(3, 64, 32))


def test_documented_fields_are_the_fields() -> None:
    sizes = {"B": 1, "H": 2, "h": 2}
    assert {
        name: (offset, sizes[code]) for name, (offset, code) in HEADER_FIELDS.items()
    } == cold_document.FIELDS


def test_documented_tables_are_the_tables() -> None:
    assert [[list(half) for half in pair] for pair in FREQUENCIES] == cold_document.HALVES
    assert list(RATES) == [1 + table / 4 for table in range(len(cold_document.HALVES))]
    for table in range(len(FREQUENCIES)):
        for grid in (0, 1):
            assert cold_document.index_slots(table, grid) == list(all_frequencies()[2 * table + grid])
    for table in range(len(SCALE_WIDTHS)):
        assert cold_document.scale_slots(table) == list(all_frequencies()[FIRST_SCALE_TABLE + table])


def test_documented_numbers_are_the_numbers() -> None:
    numbers = f"`codec_id` {cold_layout.CODEC_ID} and `packing_id` {cold_layout.PACKING_ID}"
    assert numbers in cold_document.SECTION


def test_documented_fingerprint_is_the_fingerprint() -> None:
    prefix, rotation = re.search(r"SHA-256 of `(.*?)` and.*?`(.*?)` and", cold_document.SECTION).groups()
    text = f"{prefix}{LAYOUT.section_bytes}{rotation}{LAYOUT.rotation_seed}"
    assert LAYOUT.fingerprint == hashlib.sha256(text.encode()).digest()


def test_the_document_reads_the_golden_page() -> None:
    page = GOLDEN.read_bytes()
    levels, scales, _ = read_levels(torch.frombuffer(bytearray(page), dtype=torch.uint8)[None], LAYOUT)
    numbers = dequantize_scales(scales)
    for head in range(2):
        section = page[head * LAYOUT.section_bytes :][: LAYOUT.section_bytes]
        read_levels_, read_scales = cold_document.read_section(section, 64, 32)
        assert torch.equal(levels[head].long(), torch.tensor(read_levels_))
        torch.testing.assert_close(numbers[head], torch.tensor(read_scales), rtol=2**-23, atol=0)
