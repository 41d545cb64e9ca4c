"""The section "Page" of `proto/BLOCK_FORMAT.md`: its tables as data, and a page reader written from it alone.

Slow, plain Python without torch and without anything from `tq_kernels`, so that it cannot share a mistake.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

SECTION = (
    (Path(__file__).parents[2] / "proto" / "BLOCK_FORMAT.md").read_text().partition("\n## Page\n")[2]
).partition("\n## ")[0]


def table(first_header: str) -> list[dict[str, str]]:
    """Rows of the table whose first column is called that, by header."""
    lines = iter(SECTION.splitlines())
    header = next(line for line in lines if line.startswith(f"| {first_header} |"))
    names = _cells(header)
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip(" `").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@dataclass(frozen=True, slots=True)
class DocumentedWord:
    """Bits of a word, by group and lane."""

    magnitudes: list[list[range]]
    signs: list[list[int]]
    sign_plane: bool

    @property
    def elements(self) -> int:
        """Elements of a word."""
        return sum(len(group) for group in self.magnitudes)


@dataclass(frozen=True, slots=True)
class DocumentedCode:
    """A row of the table of codes."""

    number: int
    rotated: bool
    bits: int
    levels: tuple[float, ...]
    target: float


CODES = {
    row["code"]: DocumentedCode(
        int(row["number"]),
        row["rotated, with a scale"] == "yes",
        int(row["index bits"]),
        tuple(float(x) for x in row["positive levels"].split(",")) if row["code"][:2] == "LM" else (),
        float(row["target"] or 0),
    )
    for row in table("code")
}


def _word(code: str) -> DocumentedWord:
    rows = [row for row in table("code of the word") if row["code of the word"] == code]
    assert [int(row["group"]) for row in rows] == list(range(len(rows)))
    spans = [[_span(bits) for bits in row["bits of the magnitude"].split(",")] for row in rows]
    signs = [[int(bit) for bit in row["bit of the sign"].split(",") if bit] for row in rows]
    return DocumentedWord(spans, signs, rows[0]["sign in"] == "the sign plane")


def _span(bits: str) -> range:
    first, _, last = bits.strip().partition("-")
    return range(int(first), int(last or first) + 1)


WORDS = {code: _word(code) for code in CODES}


def pack_axis(indices: list[int], code: str) -> tuple[list[int], list[int]]:
    """Words and sign words of one packed axis, bit by bit."""
    word, bits, n = WORDS[code], CODES[code].bits, len(indices)
    words, sign_words = [0] * (n // word.elements), [0] * (n // word.elements)
    for element, index in enumerate(indices):
        group, rest = divmod(element, n // len(word.magnitudes))
        u, lane = divmod(rest, len(word.magnitudes[0]))
        for bit, place in enumerate(word.magnitudes[group][lane]):
            words[u] |= (index >> bit & 1) << place
        if word.signs[group]:
            signs = sign_words if word.sign_plane else words
            signs[u] |= (index >> (bits - 1)) << word.signs[group][lane]
    return words, sign_words


def unpack_axis(words: list[int], sign_words: list[int], code: str) -> list[int]:
    """Undo `pack_axis`."""
    word, bits = WORDS[code], CODES[code].bits
    lanes = len(word.magnitudes[0])
    indices = []
    for group, spans in enumerate(word.magnitudes):
        for u in range(len(words)):
            for lane in range(lanes):
                index = sum((words[u] >> place & 1) << bit for bit, place in enumerate(spans[lane]))
                if word.signs[group]:
                    signs = sign_words if word.sign_plane else words
                    index |= (signs[u] >> word.signs[group][lane] & 1) << (bits - 1)
                indices.append(index)
    return indices


def level_of(index: int, code: str) -> float:
    """The number that an index stands for."""
    if code == "BF16":
        return float(struct.unpack("<f", (index << 16).to_bytes(4, "little"))[0])
    if code in ("E4M3", "E4M3_SCALED"):
        return e4m3(index)
    levels = CODES[code].levels
    sign, magnitude = divmod(index, len(levels))
    return -levels[magnitude] if sign else levels[magnitude]


def e4m3(byte: int) -> float:
    """OCP FP8 e4m3: bias 7, no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def planes(key: str, value: str, center: bool, head_dim: int, page_tokens: int) -> dict[str, tuple[int, ...]]:
    """Offset, rows, columns and item bytes of every plane of a section, from the table; last `end`."""
    present = {
        "always": True,
        "key code LM3": key == "LM3",
        "value code LM3": value == "LM3",
        "key code rotated": CODES[key].rotated,
        "value code rotated": CODES[value].rotated,
        "key_center` 1": center,
    }
    result, offset = {}, 0
    for row in table("plane"):
        if not present[row["present"]]:
            continue
        elements = WORDS[key if row["plane"].startswith("key") else value].elements
        sizes = {"P": page_tokens, "d": head_dim, "1": 1}
        sizes |= {"d / E": head_dim // elements, "P / E": page_tokens // elements}
        item_bytes = {"32 bits": 4, "16 bits": 2, "fp16": 2}[row["item"]]
        result[row["plane"]] = (offset, sizes[row["rows"]], sizes[row["columns"]], item_bytes)
        offset += sizes[row["rows"]] * sizes[row["columns"]] * item_bytes
    result["end"] = (offset,)
    return result


def section_bytes(key: str, value: str, center: bool, head_dim: int, page_tokens: int) -> int:
    """Bytes of a section, zeros at its end included."""
    end = planes(key, value, center, head_dim, page_tokens)["end"][0]
    return math.ceil(end / math.lcm(128, page_tokens)) * math.lcm(128, page_tokens)


def read_section(
    section: bytes, key: str, value: str, center: bool, head_dim: int, page_tokens: int, seed: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Keys and values ``[page_tokens][head_dim]`` of one head, in double precision."""
    places = planes(key, value, center, head_dim, page_tokens)

    def array(name: str) -> list[list[float]]:
        offset, rows, columns, item_bytes = places[name]
        form = {4: "I", 2: "e" if "scales" in name or "center" in name else "H"}[item_bytes]
        numbers = struct.unpack_from(f"<{rows * columns}{form}", section, offset)
        return [list(numbers[row * columns : (row + 1) * columns]) for row in range(rows)]

    def transposed(rows: list[list[float]]) -> list[list[float]]:
        return [list(column) for column in zip(*rows, strict=True)]

    rotation = rotation_rows(head_dim, seed) if CODES[key].rotated or CODES[value].rotated else []
    sides = []
    for side, code, order in (("key", key, list), ("value", value, transposed)):
        words = order(array(f"{side}_words"))
        signs = order(array(f"{side}_signs")) if f"{side}_signs" in places else [[]] * len(words)
        vectors = [
            [level_of(index, code) for index in unpack_axis(*pair, code)]
            for pair in zip(words, signs, strict=True)
        ]
        vectors = order(vectors)
        if CODES[code].rotated:
            scales = array(f"{side}_scales")[0]
            centre = array("key_center")[0] if side == "key" and center else [0.0] * head_dim
            vectors = [
                _rotated_back([c + scale * level for c, level in zip(centre, vector, strict=True)], rotation)
                for scale, vector in zip(scales, vectors, strict=True)
            ]
        sides.append(vectors)
    return sides[0], sides[1]


def _rotated_back(vector: list[float], rotation: list[list[float]]) -> list[float]:
    """R transposed times the vector."""
    return [math.fsum(r[j] * y for r, y in zip(rotation, vector, strict=True)) for j in range(len(vector))]


def split_mix_64(seed: int, count: int) -> list[int]:
    """The first numbers of SplitMix64."""
    numbers, mask = [], (1 << 64) - 1
    for step in range(1, count + 1):
        z = (seed + step * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        numbers.append(z ^ z >> 31)
    return numbers


def rotation_rows(head_dim: int, seed: int) -> list[list[float]]:
    """R, row by row: the image of every basis vector under signs, H, signs, H, division."""
    signs = [-1 if number >> 63 else 1 for number in split_mix_64(seed, 2 * head_dim)]
    hadamard = hadamard_rows(head_dim)
    columns = []
    for j in range(head_dim):
        first = [row[j] * signs[j] for row in hadamard]
        second = [s * x for s, x in zip(signs[head_dim:], first, strict=True)]
        columns.append([sum(h * x for h, x in zip(row, second, strict=True)) / head_dim for row in hadamard])
    return [list(row) for row in zip(*columns, strict=True)]


def hadamard_rows(order: int) -> list[list[int]]:
    """H of that order."""
    root = next(root for root in (1, 12, 20) if order % root == 0 and (order // root).bit_count() == 1)
    rows = [[1]] if root == 1 else [[_paley(root - 1, i, j) for j in range(root)] for i in range(root)]
    while len(rows) < order:
        rows = [row + row for row in rows] + [row + [-x for x in row] for row in rows]
    return rows


def _paley(q: int, i: int, j: int) -> int:
    if i == 0:
        return 1
    if j == 0:
        return -1
    if i == j:
        return 1
    return 1 if any((x * x - (i - j)) % q == 0 for x in range(1, q)) else -1
