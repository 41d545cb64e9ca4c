"""Time other projects' KV-quantization kernels, each at its best setting, from a folder the user names.

The folder holds one folder a peer, named as in `registry.PEERS`; what goes into each is in its driver's
docstring. Nothing of them is in this repository. A peer runs in a process of its own, so that a crash or an
import that takes over a name ends only that peer:

    python -m benchmarks.peers turbo-attn --folder FOLDER --shape 32x8192 --shape 1x131072

prints one JSON line a shape; `python -m benchmarks.run --peers FOLDER` asks all of them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.registry import PEERS

_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a peer did at one shape; times are None, and `note` says why, where it gave none.

    Args:
        shape: Batch and context, as ``32x8192``.
        decode_us: Decode attention with the rotations of query and output.
        encode_us: 32,768 tokens of bf16 into pages.
        bytes_per_token: Keys and values of all heads.
        note: Best settings, or an error.
    """

    shape: str
    decode_us: float | None = None
    encode_us: float | None = None
    bytes_per_token: int | None = None
    note: str = ""


def ask(
    peer: str, folder: Path, shapes: Sequence[str], heads: tuple[int, int, int], *, warm: bool = False
) -> dict[str, Answer]:
    """Run a peer in a process of its own; an answer for every shape, whatever happens to it.

    Args:
        peer: One of `registry.PEERS`.
        folder: Holds a folder of its name.
        shapes: Batch and context of each, as ``32x8192``.
        heads: Query heads, KV heads and head size.
        warm: Only compile its kernels, for a later call.
    """
    command = [sys.executable, "-m", "benchmarks.peers", peer, "--folder", str(folder.resolve())]
    command += [f"--shape={shape}" for shape in shapes]
    command += ["--heads", *map(str, heads), *["--warm"] * warm]
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
        )
        output, why = done.stdout, f"exit status {done.returncode}: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        why = f"not done after {_TIMEOUT_S} s"
    answers = {}
    for line in output.splitlines():
        if line.startswith("{"):
            answer = Answer(**json.loads(line))
            answers[answer.shape] = answer
    return {shape: answers.get(shape, Answer(shape=shape, note=why)) for shape in shapes}


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time one peer at some shapes; a line whenever a faster setting is found, the last one counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, **_AS_WRITTEN)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--folder", type=Path, required=True, help="folder with one folder a peer")
    parser.add_argument("--shape", action="append", required=True, help="BATCHxCONTEXT; several in turn")
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("Q", "KV", "DIM"))
    parser.add_argument("--warm", action="store_true", help="only run every candidate once, to compile it")
    parsed = parser.parse_args(arguments)

    import torch

    from benchmarks.gpu.peer_drivers import DRIVERS, PAGE_TOKENS
    from benchmarks.gpu.peer_folders import open_folder
    from benchmarks.gpu.peer_load import Best, random_load, sweep, warm_up
    from benchmarks.gpu.timing import Stopwatch

    device = torch.device("cuda")
    open_folder(parsed.peer, parsed.folder)
    watch = Stopwatch(device)
    for shape in parsed.shape:
        batch, context = map(int, shape.split("x"))
        best: Best | None = None
        for page_tokens in PAGE_TOKENS.get(parsed.peer, (16, 128)):
            load = random_load(batch, context, tuple(parsed.heads), page_tokens, device)
            if parsed.warm:
                warm_up(DRIVERS[parsed.peer](load))
                continue
            for found in sweep(DRIVERS[parsed.peer](load), load, watch):
                if isinstance(found, str):
                    print(found, file=sys.stderr)
                    if best is None:
                        _print(Answer(shape=shape, note=found))
                elif best is None or found.decode_us < best.decode_us:
                    best = found
                    _print(
                        Answer(
                            shape=shape,
                            decode_us=best.decode_us,
                            encode_us=best.encode_us,
                            bytes_per_token=best.candidate.bytes_per_token,
                            note=best.note,
                        )
                    )
    return 0


def _print(answer: Answer) -> None:
    print(json.dumps(asdict(answer)), flush=True)


_AS_WRITTEN: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}

if __name__ == "__main__":
    sys.exit(main())
