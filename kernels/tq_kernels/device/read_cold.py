"""Device code that reads sections of cold pages: entropy code and trellis in one walk, one lane a thread.

A program takes a few sections, so that their lanes fill a warp. Lanes of a section share one run of words,
and at each step a scan over the lanes tells which of them reads which word.
"""

import triton
import triton.language as tl


@triton.jit
def _read(state, position, table, p_slots, p_words, num_words, LIVE):
    """The next symbol of every lane, and where that leaves states ``[sections, lanes]`` and positions."""
    entry = tl.load(p_slots + (table << 12) + (state & 4095).to(tl.int32), mask=LIVE, other=0).to(tl.uint32)
    state = ((entry >> 8) & 4095) * (state >> 12) + (entry >> 20)
    low = (state < 65536).to(tl.int32)
    place = position[:, None] + tl.cumsum(low, axis=1) - 1
    wanted = (low > 0) & (place < num_words[:, None]) & LIVE
    word = tl.load(p_words + place, mask=wanted, other=0).to(tl.uint32) & 0xFFFF
    state = tl.where(low > 0, (state << 16) | word, state)
    return (entry & 0xFF).to(tl.int32), state, position + tl.sum(low, axis=1)


@triton.jit
def read_cold_sections(
    p_states,
    p_words,
    p_num_words,
    p_tables,
    p_scale_tables,
    p_slots,
    p_levels,
    p_differences,
    p_sound,
    num_sections,
    stride_states,
    stride_words,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    SECTIONS: tl.constexpr,
):
    """Levels, four bytes a word, and symbols of scales; `sound` is 1 where a section ended as it should.

    Four channels make a word of `p_levels` ``[sections, 2, PAGE_TOKENS, HEAD_DIM / 4]``; what is read are the
    tensors of `cold_sections.OpenSections`, numbers 32 bits wide.
    """
    section = tl.program_id(0).to(tl.int64) * SECTIONS + tl.arange(0, SECTIONS)
    lane = tl.arange(0, LANES)
    here = section < num_sections
    live = here[:, None] & (lane[None, :] >= 0)
    p_state = p_states + section[:, None] * stride_states + lane[None, :]
    state = tl.load(p_state, mask=live, other=65536).to(tl.uint32, bitcast=True)
    sound = tl.min((state >= 65536).to(tl.int32), axis=1)
    num_words = tl.load(p_num_words + section, mask=here, other=0)
    p_word = p_words + section[:, None] * stride_words
    position = tl.zeros([SECTIONS], dtype=tl.int32)
    for side in range(2):
        table = tl.load(p_tables + 2 * section + side, mask=here, other=0)[:, None]
        scale_table = tl.load(p_scale_tables + 2 * section + side, mask=here, other=0)[:, None]
        for turn in range(PAGE_TOKENS // LANES):
            row = (2 * section[:, None] + side) * PAGE_TOKENS + turn * LANES + lane[None, :]
            symbol, state, position = _read(
                state, position, scale_table + tl.zeros_like(lane)[None, :], p_slots, p_word, num_words, live
            )
            tl.store(p_differences + row, symbol, mask=live)
            path = tl.zeros([SECTIONS, LANES], dtype=tl.int32)
            for channels in range(HEAD_DIM // 4):
                levels = tl.zeros([SECTIONS, LANES], dtype=tl.int32)
                for i in tl.static_range(4):
                    grid = path & 1
                    symbol, state, position = _read(
                        state, position, table + grid, p_slots, p_word, num_words, live
                    )
                    levels |= ((2 * symbol + grid) & 0xFF) << (8 * i)
                    # `trellis.NEXT_STATE`, of which a test makes sure
                    path = (path >> 1) ^ (5 * grid) ^ (2 * (symbol & 1))
                tl.store(p_levels + row * (HEAD_DIM // 4) + channels, levels, mask=live)
    sound &= tl.min((state == 65536).to(tl.int32), axis=1)
    sound &= (position == num_words).to(tl.int32)
    tl.store(p_sound + section, sound, mask=here)
