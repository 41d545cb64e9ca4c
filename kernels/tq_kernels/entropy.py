"""Interleaved range coding of whole sections: integers in, 16-bit words out, the same on every machine.

Asymmetric numeral systems with a state x of 32 bits a lane, x >= 2^16, and tables of 2^12 slots. To read a
symbol, a lane looks up slot = x mod 2^12 and goes to x = frequency * (x >> 12) + (slot - first slot); if that
is below 2^16, it appends the next word: x = (x << 16) | word. All lanes of a section take their words from
one run, lower lanes first, so that a lane costs four bytes and no index. Lanes start writing, and end
reading, at 2^16; a section that ends elsewhere is damaged.
"""

from functools import lru_cache

import torch

from tq_kernels.trellis_tables import FREQUENCIES

SLOT_BITS = 12


NUM_INDEX_TABLES = len(FREQUENCIES)
SCALE_WIDTHS = (1, 2, 4, 8, 16, 32)
"""Decay of the tables of scales, in codes: each frequency is width / (width + 1) of the one before."""
FIRST_SCALE_TABLE = 2 * NUM_INDEX_TABLES

_SLOTS = 1 << SLOT_BITS
_SMALLEST_STATE = 1 << 16
_SYMBOLS = 256


def scale_frequencies(width: int) -> list[int]:
    """Frequencies of a scale's difference to the middle, modulo 256; falling on both sides of 0, none 0."""
    weights, weight = [], 1 << 30
    for _ in range(_SYMBOLS // 2 + 1):
        weights.append(weight)
        weight = weight * width // (width + 1)
    both = [weights[min(symbol, _SYMBOLS - symbol)] for symbol in range(_SYMBOLS)]
    spare, total = _SLOTS - _SYMBOLS, sum(both)
    frequencies = [1 + weight * spare // total for weight in both]
    frequencies[0] += _SLOTS - sum(frequencies)
    return frequencies


@lru_cache(maxsize=1)
def all_frequencies() -> tuple[tuple[int, ...], ...]:
    """Frequencies of every table by symbol byte: an index or a difference, modulo 256; 0 for no symbol."""
    tables = []
    for pair in FREQUENCIES:
        for grid, half in enumerate(pair):
            frequencies = [0] * _SYMBOLS
            for index, frequency in enumerate(half):
                # levels 2 k + grid of either sign are equally likely
                frequencies[index] = frequencies[-index - grid] = frequency
            tables.append(tuple(frequencies))
    tables += [tuple(scale_frequencies(width)) for width in SCALE_WIDTHS]
    return tuple(tables)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _writing_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequency and first slot of every symbol byte: ``[tables, 256]`` int64 each."""
    frequencies = torch.tensor(all_frequencies(), dtype=torch.int64)
    return frequencies.to(device), (frequencies.cumsum(1) - frequencies).to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def reading_table(device: torch.device) -> torch.Tensor:
    """By slot, ``symbol | frequency << 8 | (slot - first slot) << 20``: ``[tables, 4096]`` int32."""
    frequencies = torch.tensor(all_frequencies(), dtype=torch.int64)
    first = frequencies.cumsum(1) - frequencies
    symbols = torch.stack(
        [torch.repeat_interleave(torch.arange(_SYMBOLS), each, output_size=_SLOTS) for each in frequencies]
    )
    bias = torch.arange(_SLOTS) - first.gather(1, symbols)
    entries = symbols | frequencies.gather(1, symbols) << 8 | bias << 20
    return (entries - (entries >> 31 << 32)).to(torch.int32).to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def symbol_costs(device: torch.device) -> torch.Tensor:
    """Bits of every symbol byte in every table: ``[tables, 256]`` float32, infinite where it has no slot."""
    return (SLOT_BITS - torch.tensor(all_frequencies()).double().log2()).float().to(device)


def pack(symbols: torch.Tensor, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of sections.

    Args:
        symbols: ``[sections, steps, lanes]`` integer, modulo 256, in reading order; each must have slots.
        tables: The table of each, the same shape.

    Returns:
        Lane states ``[sections, lanes]`` int64 to begin reading with; words ``[sections, steps * lanes]``
        int64, used ones first; number of words ``[sections]`` int64.
    """
    frequencies, firsts = _writing_tables(symbols.device)
    entries = tables.long() * _SYMBOLS + (symbols.long() & 0xFF)
    frequency, first = frequencies.take(entries), firsts.take(entries)
    state = torch.full_like(frequency[:, 0], _SMALLEST_STATE)
    words = torch.empty_like(frequency)
    written = torch.empty(frequency.shape, dtype=torch.bool, device=symbols.device)
    for step in reversed(range(symbols.shape[1])):
        each = frequency[:, step]
        full = state >= each << (32 - SLOT_BITS)
        written[:, step] = full
        words[:, step] = state & 0xFFFF
        state = torch.where(full, state >> 16, state)
        state = (state // each << SLOT_BITS) + state % each + first[:, step]
    words, written = words.flatten(1), written.flatten(1)
    order = torch.where(written, written.long().cumsum(1) - 1, words.shape[1] - 1)
    packed = torch.zeros_like(words)
    # unwritten words meet at the last place, which a written one takes only if all are written
    packed.scatter_(1, order, torch.where(written, words, 0))
    return state, packed, written.sum(1)


class Reader:
    """Reads sections step by step; the caller says which table each lane takes.

    Never reads beyond the words it was given, whatever they hold; `sound` tells whether all were well.

    Args:
        states: ``[sections, lanes]`` integer lane states, modulo 2^32.
        words: ``[sections, most words]`` integer, modulo 2^16.
        num_words: ``[sections]`` integer, how many of them belong to the section.
    """

    def __init__(self, states: torch.Tensor, words: torch.Tensor, num_words: torch.Tensor) -> None:
        self._states = states.long() & 0xFFFF_FFFF
        self._sound = (self._states >= _SMALLEST_STATE).all(1)
        self._words = torch.nn.functional.pad(words.long() & 0xFFFF, (0, 1)).contiguous()
        self._num_words = num_words.long()
        rows = torch.arange(words.shape[0], device=words.device) * self._words.shape[1]
        self._last = (rows + self._words.shape[1] - 1)[:, None]
        self._begin = rows[:, None]
        self._next = self._begin.clone()
        self._table = reading_table(words.device)

    def read(self, tables: torch.Tensor) -> torch.Tensor:
        """The next symbol of every lane, in ``[0, 256)``: ``[sections, lanes]`` int64, like `tables`."""
        entry = self._table.take((tables << SLOT_BITS) + (self._states & (_SLOTS - 1)))
        state = (entry >> 8 & 0xFFF) * (self._states >> SLOT_BITS) + (entry >> 20 & 0xFFF)
        low = state < _SMALLEST_STATE
        following = self._next + low.cumsum(1)
        word = self._words.take((following - 1).minimum(self._last))
        self._states = torch.where(low, state << 16 | word, state)
        self._next = following[:, -1:]
        return (entry & 0xFF).long()

    def sound(self) -> torch.Tensor:
        """Whether each section ended as every writer ends it, with all of its words read: ``[sections]``."""
        ended = (self._states == _SMALLEST_STATE).all(1)
        return self._sound & ended & ((self._next - self._begin)[:, 0] == self._num_words)
