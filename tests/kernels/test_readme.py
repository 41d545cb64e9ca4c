"""The numbers in `kernels/README.md` that can be computed are right."""

import itertools
import re
from pathlib import Path

import pytest

from tq_kernels.codebook import LEVELS, TARGETS, distortion, lloyd_max
from tq_kernels.spec import Code

from .prediction import norm_corrected_distortion

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()


def _row(table: str, first: str) -> list[str]:
    section = README.partition(f"\n## {table}\n")[2].partition("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4])
def test_codebook_table(code: Code) -> None:
    ours, exact = distortion(LEVELS[code], TARGETS[code]), distortion(lloyd_max(code), 1.0)

    assert _row("Codebooks", code.name) == [
        code.name,
        ", ".join(f"{level:g}" for level in LEVELS[code]),
        str(TARGETS[code]),
        f"{ours:.6f}",
        f"{exact:.6f}",
        f"{ours / exact - 1:+.2%}".replace("%", " %"),
        f"{4**code * ours:.3f}",
    ]


@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4, Code.E4M3_SCALED])
def test_distortion_table(code: Code) -> None:
    cells = _row("Scale", code.name)[1:]
    predicted = [float(cell.split(" / ")[0]) for cell in cells]
    measured = [float(cell.split(" / ")[1]) for cell in cells]

    assert predicted == [round(norm_corrected_distortion(code, d), 6) for d in (64, 80, 96, 128, 256)]
    assert measured == pytest.approx(predicted, rel=0.01)


def test_ratios_of_distortion() -> None:
    measured = [distortion(lloyd_max(bits), 1.0) for bits in range(1, 8)]
    ratios = [f"{coarse / fine:.3f}" for coarse, fine in itertools.pairwise(measured)]
    sentence = re.search(r"D\(b\) / D\(b \+ 1\) is (.*) for b = 1 to 6", README)

    assert sentence is not None
    assert re.findall(r"\d\.\d{3}", sentence[1]) == ratios
