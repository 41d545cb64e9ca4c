"""The assembly that widens packed words, executed step by step, gives the levels of the format."""

import re

import pytest
import torch

from tq_kernels.layout import WORD_FORMATS
from tq_kernels.packing import unpack
from tq_kernels.ptx import level_bytes, levels_of_groups
from tq_kernels.reference import level_table
from tq_kernels.spec import Code

WIDENED = [Code.LM2, Code.LM3, Code.LM4, Code.E4M3_SCALED]
MASK32 = (1 << 32) - 1


def _prmt(low: int, high: int, selector: int) -> int:
    """Four bytes out of eight; bit 3 of a selector would replicate a sign and must not be set."""
    source = (low | high << 32).to_bytes(8, "little")
    picks = [selector >> (4 * i) & 0xF for i in range(4)]
    assert all(pick < 8 for pick in picks)
    return int.from_bytes(bytes(source[pick] for pick in picks), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for bit in range(32):
        row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> row & 1) << bit
    return result


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & MASK32,
    "mov.b32": lambda a: a,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK32,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
}


def _execute(assembly: str, word: int, sign_word: int, table: tuple[int, int]) -> list[int]:
    """The e4m3 bytes that the assembly hands to its conversions."""
    registers = {"$4": word, "$5": sign_word, "$6": table[0], "$7": table[1]}
    halves: list[int] = []
    for name, operands in re.findall(r"([a-z][a-z0-9.]+) ([^;]+);", assembly.replace("\n", " ")):
        names = [operand.strip() for operand in operands.split(",")]
        if name in (".reg", "reg") or name.startswith("cvt") or names[0].startswith("{$"):
            continue
        if names[0].startswith("{"):
            halves = [registers["x"] & 0xFFFF, registers["x"] >> 16]
            continue
        values = [registers[each] if each in registers else int(each, 0) for each in names[1:]]
        registers[names[0]] = OPERATIONS[name](*values)
    return [half >> shift & 0xFF for half in halves for shift in (0, 8)]


@pytest.mark.parametrize("code", WIDENED, ids=lambda code: code.name)
def test_assembly_gives_the_levels_that_unpacking_gives(code: Code, generator: torch.Generator) -> None:
    form = WORD_FORMATS[code]
    words = torch.randint(-(1 << 31), 1 << 31, (40,), generator=generator).to(torch.int32)
    signs = torch.randint(-(1 << 15), 1 << 15, (40,), generator=generator).to(torch.int16)
    e4m3 = level_table(Code.E4M3, torch.device("cpu"))

    indices = unpack(words[:, None], signs[:, None] if form.sign_plane else None, code)
    expected = level_table(code, torch.device("cpu"))[indices]
    for i, (word, sign) in enumerate(zip(words.tolist(), signs.tolist(), strict=True)):
        spread = (sign & 0xFFFF) * 0x100001 & MASK32
        found = [
            byte
            for assembly in levels_of_groups(code)
            for byte in _execute(assembly, word & MASK32, spread, level_bytes(code))
        ]
        torch.testing.assert_close(e4m3[torch.tensor(found)], expected[i], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("code", WIDENED, ids=lambda code: code.name)
def test_every_group_of_a_word_has_its_assembly(code: Code) -> None:
    assembly = levels_of_groups(code)

    assert len(assembly) == WORD_FORMATS[code].groups == len(set(assembly))
