"""The section "Cold page" of `proto/BLOCK_FORMAT.md`: its tables as data, and a reader written from it alone.

Slow, plain Python without torch and without anything from `tq_kernels`, so that it cannot share a mistake.
"""

import itertools
import re
import struct
from pathlib import Path

SECTION = (
    (Path(__file__).parents[2] / "proto" / "BLOCK_FORMAT.md").read_text().partition("\n## Cold page\n")[2]
).partition("\n## ")[0]
FIELDS = {
    name: (int(start), int(size))
    for start, size, name in re.findall(r"^\| (\d+) \| (\d) \| `(\w+)` \|", SECTION, re.MULTILINE)
}
HALVES = [
    [[int(slots) for slots in half.split()] for half in table.split("|")]
    for table in SECTION.split("```")[1].strip().split("\n\n")
]


def index_slots(table: int, grid: int) -> list[int]:
    """Slots of every byte."""
    slots = [0] * 256
    for k, number in enumerate(HALVES[table][grid]):
        slots[k] = slots[(-k if grid == 0 else -1 - k) % 256] = number
    return slots


def scale_slots(table: int) -> list[int]:
    """Slots of every byte."""
    w, a = 2**table, [1 << 30]
    for _ in range(128):
        a.append(a[-1] * w // (w + 1))
    weights = [a[min(s, 256 - s)] for s in range(256)]
    slots = [1 + weight * 3840 // sum(weights) for weight in weights]
    slots[0] += 4096 - sum(slots)
    return slots


def read_section(
    data: bytes, head_dim: int, page_tokens: int
) -> tuple[list[list[list[int]]], list[list[float]]]:
    """Levels ``[2][page_tokens][head_dim]`` and scales ``[2][page_tokens]`` of keys and of values."""
    fields = {
        name: int.from_bytes(data[start : start + size], "little", signed=name.endswith("_top"))
        for name, (start, size) in FIELDS.items()
    }
    assert (fields["version"], fields["reserved"]) == (1, 0)
    start = 16 + 2 * head_dim
    states = list(struct.unpack_from("<8I", data, start))
    words = struct.unpack_from(f"<{fields['num_words']}H", data, start + 32)
    assert not any(data[start + 32 + 2 * len(words) :])
    assert all(x >= 1 << 16 for x in states)
    unread = iter(words)

    def symbol(lane: int, slots: list[int]) -> int:
        firsts = [0, *itertools.accumulate(slots)]
        slot = states[lane] % 4096
        found = next(s for s in range(256) if firsts[s] <= slot < firsts[s + 1])
        x = slots[found] * (states[lane] >> 12) + slot - firsts[found]
        states[lane] = x << 16 | next(unread) if x < 1 << 16 else x
        return found

    levels = [[[0] * head_dim for _ in range(page_tokens)] for _ in range(2)]
    scales = [[0.0] * page_tokens for _ in range(2)]
    for side, name in enumerate(("key", "value")):
        grids = [index_slots(fields[f"{name}_table"], grid) for grid in (0, 1)]
        of_scales = scale_slots(fields[f"{name}_scale_table"])
        for first in range(0, page_tokens, 8):
            for lane in range(8):
                code = (symbol(lane, of_scales) + fields[f"{name}_middle"]) % 256
                exponent = (fields[f"{name}_top"] - code) / 2 ** fields[f"{name}_octave"]
                scales[side][first + lane] = 0.0 if code == 255 else 2.0**exponent
            paths = [0] * 8
            for channel in range(head_dim):
                for lane in range(8):
                    q = paths[lane]
                    g = q % 2
                    byte = symbol(lane, grids[g])
                    k = byte - 256 if byte > 127 else byte
                    levels[side][first + lane][channel] = 2 * k + g
                    paths[lane] = (q >> 1) ^ (5 * g) ^ (2 * (k % 2))
    assert states == [1 << 16] * 8
    assert next(unread, None) is None
    return levels, scales
