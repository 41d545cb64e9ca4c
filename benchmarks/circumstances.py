"""What a measurement was made with, for the lines of `results/`."""

import os
import platform
import subprocess
from pathlib import Path


def circumstances() -> dict[str, str]:
    """Machine, Python and commit; the commit ends in ``-dirty`` when the tree was not that commit's."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip(),  # noqa: S603
    }


def device_name() -> str:
    """The GPU, or ``cpu``."""
    import torch  # takes seconds, and most measurements have no use for it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
