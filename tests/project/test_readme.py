"""What the README says of the code is so."""

import json
import re
from pathlib import Path

from project import readme_engines
from project.readme_settings import README, parts, table

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_declared_one():
    assert parts()[1] == table(), "run `python tests/project/readme_settings.py`"


def test_the_table_of_engines_is_the_measured_one():
    assert readme_engines.parts()[1] == readme_engines.table(), "run `python -m tests.project.readme_engines`"


def test_the_table_of_presets_is_the_measured_one():
    lines = (ROOT / "benchmarks" / "results" / "presets.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        numbers = f"{row['bytes_per_token']:,.0f}", f"{row['over_bf16']:.2f}x", f"{row['kl_mean']:.4f}"
        line = next(
            line for line in TEXT.splitlines() if line.replace("*", "").startswith(f"| `{row['preset']}`")
        )
        cells = [cell.strip(" *") for cell in line.split("|")[2:6]]
        assert cells == [*numbers, f"{row['top1']:.1%}".replace("%", " %")]


def test_every_file_of_the_map_is_there():
    listing = TEXT.partition("## Map\n")[2].partition("\n## ")[0]
    files = [
        path.relative_to(ROOT).as_posix()
        for top in ("tq_store", "kernels", "connectors")
        for path in (ROOT / top).rglob("*.py")
    ]
    named = re.findall(r"\b\w+\.py\b", listing)
    assert len(named) > 10
    for name in named:
        assert any(file.endswith(f"/{name}") for file in files), name
    for folder in re.findall(r"^ +([\w/]+/) ", listing, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir() or any(f"/{folder}" in file for file in files), folder


def test_every_link_leads_somewhere():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("benchmarks/*/*.md")]
    assert len(documents) >= 8
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{target} in {document}"


def test_a_map_line_names_each_module_of_the_store():
    listing = TEXT.partition("## Map\n")[2].partition("\n## ")[0]
    for folder in ("kernels/tq_kernels", "connectors/tq_connectors"):
        for module in Path(ROOT, folder).glob("*.py"):
            assert module.name.startswith("__") or module.name in listing, module
