"""A PYTHONPATH by which every process of an engine finds this tree and its plugins, installed or not."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
_ENTRY_POINTS = """\
[sglang.srt.plugins]
tq_store = tq_connectors.sglang.plugin:register

[vllm.general_plugins]
tq_store = tq_connectors.vllm.plugin:register
"""


def plugin_path(folder: Path) -> str:
    """The path, with what `folder`, which is empty, then says of our entry points."""
    about = folder / "tq_store-0.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: tq-store\nVersion: 0\n")
    about.joinpath("entry_points.txt").write_text(_ENTRY_POINTS)
    ours = [folder, ROOT, ROOT / "kernels", ROOT / "connectors"]
    return os.pathsep.join([*map(str, ours), *filter(None, [os.environ.get("PYTHONPATH")])])
