"""Where the Hopper kernel that quantizes many tokens applies, and its constants."""

from functools import lru_cache

import torch

from tq_kernels import cells
from tq_kernels._page_shape import page_shape
from tq_kernels.codebook import LEVELS, TARGETS
from tq_kernels.layout import PageLayout
from tq_kernels.spec import Code

_ALIGNMENT = 16
"""Elements by whose multiples vectors are apart, so that 16 bytes are copied at a time."""
WARPS = 4
"""Of a program: a warpgroup, which takes tiles of 64 rows."""
_TILE_ROWS = 16 * WARPS
_PAGE_TOKENS = (64, 128)
_MAX_REGISTERS = {64: 96, 128: 168}
"""By channels of a head; the fastest of those that were timed."""
_TABLE_COPIES = 16
"""The more there are, the fewer lanes meet in a bank, and the less room is left for programs."""
_REGISTERS = 1 << 16
"""Of a multiprocessor."""


def serves(layout: PageLayout, keys: torch.Tensor, values: torch.Tensor, *, balanced: bool) -> bool:
    """Whether the kernel packs such vectors into such pages.

    Args:
        layout: Of the pages.
        keys: ``[..., num_kv_heads, head_dim]``, of tokens or in pages of a cache.
        values: Likewise.
        balanced: Whether keys are divided by a balance, by which a float16 may leave its range.
    """
    dtypes = (torch.bfloat16,) if balanced else (torch.bfloat16, torch.float16)
    aligned = all(
        side.data_ptr() % 16 == 0 and all(stride % _ALIGNMENT == 0 for stride in side.stride()[:-1])
        for side in (keys, values)
    )
    return (
        layout.spec.key is Code.LM4
        and layout.spec.value is Code.LM4
        and layout.page_tokens in _PAGE_TOKENS
        and layout.head_dim in _MAX_REGISTERS
        and keys.dtype in dtypes
        and aligned
    )


def max_registers(layout: PageLayout) -> int:
    """Registers of a thread, so that as many programs share a multiprocessor as were the fastest."""
    return _MAX_REGISTERS[layout.head_dim]


def programs_per_processor(layout: PageLayout) -> int:
    """Programs that a multiprocessor holds at once, by registers."""
    return _REGISTERS // (32 * WARPS * max_registers(layout))


def _look_up(copies: int) -> str:
    """The word of a coordinate: 0 is that, 1 the coordinate, 2 the factor, 3 the address of the table.

    The low byte of a sum that one bounds is the step and one more, modulo 256; of what is no number it is 0.
    """
    return f"""{{
        .reg .f32 u;
        .reg .b32 t;
        abs.f32 u, $1;
        fma.rz.sat.f32 u, u, $2, 0f3F7FFF01;
        mov.b32 t, u;
        dp4a.u32.u32 t, t, {4 * copies}, $3;
        ld.shared.b32 $0, [t];
        }}"""


def _table_address(copies: int, offset: int) -> str:
    """Where the copy of a lane begins, the table being at an offset in shared memory."""
    return f"""{{
        .reg .b32 t;
        mov.u32 t, %laneid;
        and.b32 t, t, {copies - 1};
        shl.b32 t, t, 2;
        add.u32 t, t, {offset};
        mov.u32 $0, global_smem;
        add.u32 $0, $0, t;
        }}"""


_WORD4 = """{
        .reg .b32 a, b, c, d, p, s;
        prmt.b32 a, $2, $6, 0x7632;
        prmt.b32 b, $3, $7, 0x7632;
        prmt.b32 c, $4, $8, 0x6327;
        prmt.b32 d, $5, $9, 0x6327;
        and.b32 a, a, $18;
        lop3.b32 a, c, $19, a, 0xEA;
        and.b32 b, b, $18;
        lop3.b32 b, d, $19, b, 0xEA;
        shf.l.wrap.b32 b, b, b, 4;
        or.b32 a, a, b;
        shf.r.wrap.b32 a, a, a, $20;
        prmt.b32 c, $21, $22, a;
        dp4a.u32.u32 $1, c, c, 0;
        shr.u32 d, a, 16;
        prmt.b32 c, $21, $22, d;
        dp4a.u32.u32 $1, c, c, $1;
        shr.u32 s, $13, 28;
        shf.l.wrap.b32 s, $17, s, 4;
        shf.l.wrap.b32 s, $12, s, 4;
        shf.l.wrap.b32 s, $16, s, 4;
        shf.l.wrap.b32 s, $11, s, 4;
        shf.l.wrap.b32 s, $15, s, 4;
        shf.l.wrap.b32 s, $10, s, 4;
        shf.l.wrap.b32 s, $14, s, 4;
        lop3.b32 $0, s, 0x88888888, a, 0xEA;
        }"""
"""A word of LM4, 0, and the sum of the squares of its levels, 1.

Of found words 2 to 9 and coordinates 10 to 17, those of the first group first, the mask of magnitudes 18, the
same turned by a byte 19, where they begin 20, and levels 21 and 22.
"""


def _quarters(bits: int) -> tuple[int, int]:
    """Levels of four magnitudes in a number, those of 0 to 3 and of 4 to 7."""
    levels = bytes(int(4 * level) for level in LEVELS[bits])
    low, high = (int.from_bytes(part, "little", signed=True) for part in (levels[:4], levels[4:]))
    return low, high


@lru_cache(maxsize=32)
def constants(layout: PageLayout, cache_tokens: int) -> dict[str, object]:
    """Compile-time arguments of the kernel; the same object for the same call."""
    from triton.experimental.gluon import language as gl

    bits, head_dim = int(layout.spec.key), layout.head_dim
    words = head_dim // 8
    table_bytes = 4 * cells.NUM_STEPS * _TABLE_COPIES
    larger = [size for size in (2 * head_dim * head_dim, 2 * _TILE_ROWS * head_dim) if size > table_bytes]
    warps = [[row, 0] for row in _bits(_TILE_ROWS) if row >= 16]
    ahead, behind = [[0, bit] for bit in _bits(words // 4)], [[0, bit] for bit in (words // 4, words // 2)]
    layouts = {
        "L_WORDS": ([*ahead, [8, 0]], [*behind, [1, 0], [2, 0], [4, 0]]),
        "L_TOKENS": ([[1, 0], [2, 0], [8, 0]], [*behind, *ahead, *[[0, 0]] * (2 - len(ahead)), [4, 0]]),
    }
    return {
        "HEADS": layout.num_kv_heads,
        "SHAPE": page_shape(layout),
        "CODE": (
            TARGETS[bits],
            cells.RANGES[bits],
            _quarters(bits),
            _look_up(_TABLE_COPIES),
            _WORD4,
            _table_address(_TABLE_COPIES, sum(larger)),
        ),
        "COPIES": _TABLE_COPIES,
        "CACHE_TOKENS": cache_tokens,
        **{
            name: gl.DistributedLinearLayout(
                reg_bases=registers,
                lane_bases=lanes,
                warp_bases=warps,
                block_bases=[],
                shape=[_TILE_ROWS, words],
            )
            for name, (registers, lanes) in layouts.items()
        },
    }


def _bits(size: int) -> list[int]:
    """Powers of two below a power of two."""
    return [1 << i for i in range(size.bit_length() - 1)]
