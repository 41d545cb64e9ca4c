"""What is packed is read again, exactly; what is damaged is noticed or harmless; bytes never change."""

import bisect
import hashlib
import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_kernels.entropy import (
    FIRST_SCALE_TABLE,
    NUM_INDEX_TABLES,
    SCALE_WIDTHS,
    SLOT_BITS,
    Reader,
    all_frequencies,
    pack,
    reading_table,
    symbol_costs,
)

CPU = torch.device("cpu")
LANES = 8


def drawn(tables: torch.Tensor, seed: int) -> torch.Tensor:
    """Symbols as often as their tables say."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor(all_frequencies(), dtype=torch.float32)[tables.flatten()]
    return torch.multinomial(shares, 1, generator=generator).view(tables.shape)


def some_tables(sections: int, steps: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(all_frequencies()), (sections, steps, LANES), generator=generator)


def read_all(
    states: torch.Tensor, words: torch.Tensor, num_words: torch.Tensor, tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    reader = Reader(states, words, num_words)
    symbols = torch.stack([reader.read(tables[:, step]) for step in range(tables.shape[1])], 1)
    return symbols, reader.sound()


def read_plainly(states: list[int], words: list[int], tables: list[list[int]]) -> list[list[int]]:
    """A reader in plain integers, written from the definition."""
    states, words, symbols = list(states), list(words), []
    for row in tables:
        symbols.append([])
        for lane, table in enumerate(row):
            slot, frequencies = states[lane] % 4096, all_frequencies()[table]
            firsts = [0, *itertools.accumulate(frequencies)]
            symbol = bisect.bisect_right(firsts, slot) - 1
            symbols[-1].append(symbol)
            states[lane] = frequencies[symbol] * (states[lane] >> 12) + slot - firsts[symbol]
            if states[lane] < 1 << 16:
                states[lane] = states[lane] << 16 | words.pop(0)
    assert states == [1 << 16] * LANES
    assert not words
    return symbols


def test_every_table_fills_its_slots() -> None:
    assert len(all_frequencies()) == 2 * NUM_INDEX_TABLES + len(SCALE_WIDTHS)
    for frequencies in all_frequencies():
        assert len(frequencies) == 256
        assert sum(frequencies) == 1 << SLOT_BITS
        assert max(frequencies) < 1 << SLOT_BITS


def test_tables_of_indices_are_their_own_mirror_images() -> None:
    for number, frequencies in enumerate(all_frequencies()[:FIRST_SCALE_TABLE]):
        grid = number & 1
        assert all(frequencies[k] == frequencies[-k - grid & 0xFF] for k in range(-128, 128))


def test_every_difference_of_scales_has_slots() -> None:
    for frequencies in all_frequencies()[FIRST_SCALE_TABLE:]:
        assert min(frequencies) >= 1
        assert frequencies[1:] == frequencies[:0:-1]
        assert all(a >= b for a, b in itertools.pairwise(frequencies[:129]))


def test_tables_never_change() -> None:
    """They are part of the format: pages in stores were written with these."""
    assert hashlib.sha256(repr(all_frequencies()).encode()).hexdigest() == TABLES_SHA256


def test_a_slot_names_its_symbol() -> None:
    for table, frequencies in zip(reading_table(CPU), all_frequencies(), strict=True):
        symbols, shares, bias = table & 0xFF, table >> 8 & 0xFFF, table >> 20 & 0xFFF
        assert torch.equal(torch.bincount(symbols, minlength=256), torch.tensor(frequencies))
        assert torch.equal(shares.long(), torch.tensor(frequencies)[symbols.long()])
        assert torch.equal(bias == 0, torch.cat((torch.tensor([True]), symbols[1:] != symbols[:-1])))


@settings(max_examples=60, deadline=None)
@given(sections=st.integers(0, 5), steps=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_what_is_packed_is_read_again(sections: int, steps: int, seed: int) -> None:
    tables = some_tables(sections, steps, seed)
    symbols = drawn(tables, seed) if sections else tables
    states, words, num_words = pack(symbols, tables)

    assert not words[torch.arange(words.shape[1]) >= num_words[:, None]].any()
    again, sound = read_all(states, words, num_words, tables)
    assert torch.equal(again, symbols)
    assert sound.all()


def test_the_definition_reads_the_same() -> None:
    tables = some_tables(3, 50, 1)
    symbols = drawn(tables, 1)
    states, words, num_words = pack(symbols, tables)
    for i in range(3):
        used = words[i, : num_words[i]].tolist()
        assert read_plainly(states[i].tolist(), used, tables[i].tolist()) == symbols[i].tolist()


def test_words_are_as_many_as_the_symbols_cost() -> None:
    tables = some_tables(16, 2000, 2)
    symbols = drawn(tables, 2)
    _, _, num_words = pack(symbols, tables)
    bits = symbol_costs(CPU)[tables, symbols].sum((1, 2))

    # states hold the rest: 8 lanes of up to 16 bits
    assert torch.all(16 * num_words <= 1.0005 * bits)
    assert torch.all(16 * num_words >= bits - LANES * 16 - 8)


def test_wrong_lengths_and_most_damage_are_noticed() -> None:
    """Not all: a flipped sign leads to the same state. Checksums are the block's business."""
    tables = some_tables(1, 60, 4).expand(300, -1, -1)
    symbols = drawn(tables[:1], 4).expand(300, -1, -1)
    states, words, num_words = pack(symbols, tables)
    generator = torch.Generator().manual_seed(4)
    places = torch.randint(0, int(num_words[0]), (300, 1), generator=generator)
    bits = 1 << torch.randint(0, 16, (300, 1), generator=generator)
    flipped = words.scatter(1, places, words.gather(1, places) ^ bits)

    assert int(read_all(states, flipped, num_words, tables)[1].sum()) < 30
    for error in (-1, 1):
        assert not read_all(states, words, num_words + error, tables)[1].any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 20))
def test_anything_can_be_read_without_harm(seed: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(-(2**31), 2**31, (2, LANES), generator=generator).to(torch.int32)
    words = torch.randint(-(2**15), 2**15, (2, length), generator=generator).to(torch.int16)
    symbols, _ = read_all(states, words, torch.full((2,), length), some_tables(2, 100, seed))

    assert int(symbols.min()) >= 0
    assert int(symbols.max()) < 256


def test_bytes_never_change() -> None:
    tables = some_tables(2, 300, 3)
    symbols = (torch.arange(tables.numel()).view(tables.shape) * 7919) % 5 - 2
    frequencies = torch.tensor(all_frequencies())
    symbols = torch.where(frequencies[tables, symbols & 0xFF] > 0, symbols, 0)
    states, words, num_words = pack(symbols, tables)
    written = [states.tolist(), [row[:n].tolist() for row, n in zip(words, num_words, strict=True)]]

    assert hashlib.sha256(repr(written).encode()).hexdigest() == BYTES_SHA256


TABLES_SHA256 = "0f5ca20b19d69ac647bf7b0243a83bf7e4d6f3cdb7a80a5307dc4687a02fa5b2"
BYTES_SHA256 = "ef2773cb037fb8deb618427a240b2996bbd9413f6afae6b5435f708e8e22c54c"
