"""LMCache's serdes and ours side by side: bytes, speed, error on real numbers, and loading over links.

Runs in LMCache's environment; ``make bench-lmcache`` first writes a real model's keys and values in ours.

Bytes and errors are those of a chunk of the real model. MB/s are of bfloat16, from buffer to buffer on the
host through LMCache's interface, on one thread: by its processor time, or by the clock where a GPU works,
whose copies count. With a GPU the buffers are pinned, as LMCache's are, and there are also MB/s from device
to device, which leave out every copy to the host, and our checksums.
Speed and outliers are measured on a chunk of 8 heads of 128 channels. With outliers, four channels of each
head are 20 times the others, and the error is the relative squared one; ``uniform 4 bits`` is what LMCache's
turboquant does to values, computed here. A link is shaped in user space; "loaded" is from the lookup until
LMCache has the prefix in memory in bfloat16. The first token comes one step of decoding later, whose time was
measured with the model, as was "computed": its time when the prefix is computed.
"""

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.circumstances import circumstances
from benchmarks.lmcache_serdes import Serde, all_serdes, seconds

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHUNK_TOKENS = 256
OUTLIER, NUM_OUTLIERS = 20.0, 4
LARGE_HEADS, LARGE_DIM = 8, 128


def read_chunks(path: Path) -> tuple[list[torch.Tensor], int, int]:
    """Chunks ``[2, layers, 256, heads * dim]`` bf16, KV heads and channels."""
    cache = torch.from_numpy(np.load(path, allow_pickle=False)).view(torch.bfloat16)
    heads, dim = cache.shape[-2:]
    return [chunk.contiguous() for chunk in cache.flatten(-2).split(CHUNK_TOKENS, dim=2)], heads, dim


def large_chunk(tokens: int = CHUNK_TOKENS, *, outliers: bool) -> torch.Tensor:
    """Gaussian numbers in a chunk of a larger model, with outlier channels if wanted."""
    layers = 32 if torch.cuda.is_available() else 8
    shape = (2, layers, tokens, LARGE_HEADS, LARGE_DIM)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if outliers:
        numbers[..., :: LARGE_DIM // NUM_OUTLIERS] *= OUTLIER
    return numbers.flatten(-2).bfloat16()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def uniform_4_bits(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Values as LMCache's turboquant keeps them: 16 even steps between each vector's least and greatest."""
    vectors = values.float().unflatten(-1, (-1, dim))
    low, high = vectors.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-8).half().float()
    low = low.half().float()
    return (((vectors - low) / step).round().clamp(0, 15) * step + low).flatten(-2)


def measure(serde: Serde, large: Serde, chunk: torch.Tensor, tokens: int, repeats: int) -> dict[str, Any]:
    """One row: a serde made for the real chunk, and the same made for the large one of some tokens."""
    source, packed, back = serde.buffers(chunk)
    size = serde.pack(source, packed)
    serde.unpack(packed, back)
    clock = time.process_time if large.on_device is None else time.perf_counter
    plain = large_chunk(tokens, outliers=False)
    much, much_packed, much_back = large.buffers(plain)
    pack_s = seconds(lambda: large.pack(much, much_packed), repeats, clock)
    unpack_s = seconds(lambda: large.unpack(much_packed, much_back), repeats, clock)
    hard, hard_packed, hard_back = large.buffers(large_chunk(outliers=True))
    large.pack(hard, hard_packed)
    large.unpack(hard_packed, hard_back)
    there = {}
    if large.on_device is not None:
        pack, unpack = large.on_device(plain.cuda())
        for name, work in (("device_pack", pack), ("device_unpack", unpack)):
            there[f"{name}_mb_per_s"] = plain.nbytes / seconds(work, 10 * repeats, clock) / 1e6
    return {
        "serde": serde.name,
        "timed_tokens": tokens,
        "bytes": size,
        "over_bf16": chunk.nbytes / size,
        "pack_mb_per_s": plain.nbytes / pack_s / 1e6,
        "unpack_mb_per_s": plain.nbytes / unpack_s / 1e6,
        **there,
        "key_error": relative(back.tensor[0], chunk[0]),
        "value_error": relative(back.tensor[1], chunk[1]),
        "outlier_value_error": relative(hard_back.tensor[1], hard.tensor[1]) ** 2,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kv", type=Path, default=ROOT / "out" / "lmcache_kv.npy")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        default=[0.5, 1.0, 2.0, 5.0, 10.0, 25.0],
        help="Gbit/s; none leaves the links out",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=CHUNK_TOKENS, help="of the chunk that is timed (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="*", default=[""], help="serdes with one of these in their names")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: benchmarks/results/lmcache_serde.jsonl with a GPU, lmcache_serde_cpu.jsonl without",
    )
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chunks, heads, dim = read_chunks(options.kv)
    facts = {"commit": options.commit} if options.commit else circumstances()
    facts |= {"lmcache": version("lmcache"), "torch": torch.__version__}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    serdes, missing = all_serdes(heads, dim)
    print(*(f"not run: {reason}" for reason in missing), sep="\n")
    larger, _ = all_serdes(LARGE_HEADS, LARGE_DIM)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(shown), flush=True)

    for serde, large in zip(serdes, larger, strict=True):
        if not any(part in serde.name for part in options.only):
            continue
        try:
            add(measure(serde, large, chunks[-1], options.tokens, options.repeats))
        except Exception as error:  # whatever a peer's kernels raise, the others are measured
            print(f"not run: {serde.name} failed: {error!r}", flush=True)
    hard, values = large_chunk(outliers=True)[1], chunks[-1][1]
    add(
        {
            "serde": "uniform 4 bits",
            "value_error": relative(uniform_4_bits(values, dim), values),
            "outlier_value_error": relative(uniform_4_bits(hard, LARGE_DIM), hard) ** 2,
        }
    )
    if options.rates:
        from benchmarks.lmcache_links import measure_links  # needs what the store needs, which GPU hosts lack

        times = json.loads(options.kv.with_suffix(".json").read_text())
        for row in measure_links(chunks, heads, dim, options.rates, options.repeats, times):
            add(row)
    where = "" if torch.cuda.is_available() else "_cpu"
    out = options.out or RESULTS / f"lmcache_serde{where}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row | facts) + "\n" for row in rows))


if __name__ == "__main__":
    main()
