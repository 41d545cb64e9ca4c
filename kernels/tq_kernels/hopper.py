"""Where the Hopper split kernel applies, the thread layouts it wants, and its launch."""

from typing import Any

import torch

from tq_kernels.layout import WORD_FORMATS, PageLayout
from tq_kernels.ptx import level_bytes, levels_of_groups
from tq_kernels.spec import Code, KeyCenter

_STRIP_ROWS = 16
_CHANNELS_OF_A_LOAD = 32
_COLUMNS_MULTIPLE = 8
_BLOCK_COLUMNS = 16
"""Columns of a program: an accumulator of more does not fit the registers; others read the pages again."""


def serves(layout: PageLayout) -> bool:
    """Whether the kernel reads such pages: coded values, and sizes whose words fill its fragments."""
    spec, head_dim = layout.spec, layout.head_dim
    power_of_two = head_dim & (head_dim - 1) == 0 and layout.page_tokens & (layout.page_tokens - 1) == 0
    strips = layout.page_tokens // (_STRIP_ROWS * WORD_FORMATS[spec.value].groups)
    return (
        spec.key.rotated
        and spec.value in (Code.LM2, Code.LM3, Code.LM4)
        and power_of_two
        and 64 <= head_dim <= 256
        and strips >= 1
    )


def max_registers(layout: PageLayout, padded_columns: int) -> int | None:
    """Most registers of a thread where fewer than it asks for run faster, as measured; or None."""
    four_bits = layout.spec.key is Code.LM4 and layout.spec.value is Code.LM4
    return 168 if four_bits and layout.head_dim <= 128 and padded_columns == _COLUMNS_MULTIPLE else None


def resident_programs(layout: PageLayout, padded_columns: int) -> int:
    """Programs that a multiprocessor runs at once, from the registers that they take."""
    if layout.head_dim < 128 and padded_columns == _COLUMNS_MULTIPLE:
        return 12
    return 12 if max_registers(layout, padded_columns) else 8


def launch_split(
    *,
    prepared: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    layout: PageLayout,
    rows: int,
    group: int,
    num_sinks: int,
    sliding_window: int | None,
    softcap: float | None,
    cap_log2: float,
) -> None:
    """Attend every split of every sequence and KV head; see `decode_attention` for the tensors."""
    from tq_kernels.device.hopper_decode import attend_split  # Gluon is a part of some Triton releases only

    num_seqs, _, padded, _ = prepared.shape
    num_splits = partial_lse.shape[2]
    fixed = constants(
        layout,
        rows=rows,
        group=group,
        padded=padded,
        window=sliding_window is not None,
        softcap=softcap is not None,
    )
    attend_split[(num_splits, layout.num_kv_heads * fixed["BLOCKS"], num_seqs)](
        p_query=prepared,
        p_pages=pages,
        p_table=block_table,
        p_lengths=lengths,
        p_positions=positions,
        p_out=partial_out,
        p_lse=partial_lse,
        table_stride=block_table.stride(0),
        page_stride=pages.stride(0),
        num_splits=num_splits,
        num_sinks=num_sinks,
        window=sliding_window or 0,
        cap_log2=cap_log2,
        **fixed,
        num_warps=1,
        maxnreg=max_registers(layout, padded),
    )


def constants(
    layout: PageLayout, *, rows: int, group: int, padded: int, window: bool, softcap: bool
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, thread layouts among them."""
    from triton.experimental.gluon import language as gl

    head_dim, words = layout.head_dim, layout.head_dim // WORD_FORMATS[layout.spec.key].elements
    together = min(4, words // 4)
    """Key words that a thread loads at once."""
    width = min(padded, _BLOCK_COLUMNS)
    return {
        "KEY": int(layout.spec.key),
        "VALUE": int(layout.spec.value),
        "D": head_dim,
        "P": layout.page_tokens,
        "SECTION": layout.section_bytes,
        "COLUMNS": rows * group,
        "PADDED": padded,
        "N": width,
        "BLOCKS": -(-padded // width),
        "ROWS": rows,
        "GROUP": group,
        "K_WORDS": _offset(layout, "key_words"),
        "K_SIGNS": _offset(layout, "key_signs"),
        "V_WORDS": _offset(layout, "value_words"),
        "V_SIGNS": _offset(layout, "value_signs"),
        "K_SCALES": _offset(layout, "key_scales"),
        "V_SCALES": _offset(layout, "value_scales"),
        "CENTER": _offset(layout, "key_center"),
        "HAS_CENTER": layout.spec.key_center is not KeyCenter.NONE,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "VEC": together,
        "K_ASM": levels_of_groups(layout.spec.key),
        "V_ASM": levels_of_groups(layout.spec.value),
        "K_TABLE": level_bytes(layout.spec.key),
        "V_TABLE": level_bytes(layout.spec.value),
        "L_ACC": gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]),
        "L_KEYS": gl.DistributedLinearLayout(
            reg_bases=[
                *([0, bit] for bit in _bits(together)),
                *([0, bit] for bit in _bits(words) if bit >= 4 * together),
                [8, 0],
            ],
            lane_bases=[[0, together], [0, 2 * together], [1, 0], [2, 0], [4, 0]],
            warp_bases=[],
            block_bases=[],
            shape=[_STRIP_ROWS, words],
        ),
        "L_VALUES": gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], *([0, bit] for bit in _bits(head_dim) if bit >= _CHANNELS_OF_A_LOAD)],
            lane_bases=[[1, 0], [2, 0], [0, 4], [0, 8], [0, 16]],
            warp_bases=[],
            block_bases=[],
            shape=[4, head_dim],
        ),
        "L_CENTER": gl.DistributedLinearLayout(
            reg_bases=[
                *([bit] for bit in _bits(4 * together)),
                *([bit] for bit in _bits(head_dim) if bit >= 16 * together),
            ],
            lane_bases=[[4 * together], [8 * together], [0], [0], [0]],
            warp_bases=[],
            block_bases=[],
            shape=[head_dim],
        ),
    }


def _bits(size: int) -> list[int]:
    """Powers of two below a power of two."""
    return [1 << i for i in range(size.bit_length() - 1)]


def _offset(layout: PageLayout, name: str) -> int:
    plane = layout.plane(name)
    return plane.offset if plane else 0
