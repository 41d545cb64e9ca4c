"""One run on one device: checks a case, times it, and writes down the rows of its comparisons."""

import subprocess
from dataclasses import dataclass

import torch

from benchmarks.gpu.baselines import Bf16Attention
from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.prepared import Prepared, failures, prepare
from benchmarks.gpu.timing import Ceilings, Stopwatch, Timing
from benchmarks.peers import Answer
from benchmarks.registry import BF16, CASES, Case
from benchmarks.rows import Row


class WrongOutputError(RuntimeError):
    """A case's output disagrees with the reference, so its time means nothing."""


@dataclass(frozen=True, slots=True)
class _Measured:
    timing: Timing
    prepared: Prepared


def driver_version() -> str:
    """Of the NVIDIA driver, or `unknown` where `nvidia-smi` is not there."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def compile_case(name: str) -> str:
    """Run the kernels of a case once, on little memory, so that they are in Triton's cache.

    Returns:
        What went wrong, or nothing; in words, as not every exception survives the way between processes.
    """
    try:
        case = next(case for case in CASES if case.name == name)
        arena = Arena(torch.device("cuda"), l2_bytes=1, few=True)
        with torch.inference_mode():
            prepare(case, arena).calls[0]()
            torch.cuda.synchronize()
    except Exception as error:  # the run meets it again and reports it
        return repr(error)[:200]
    return ""


class Session:
    """What was measured on a device, against its ceilings.

    Args:
        watch: Of the device.
        ceilings: Measured with it.
        facts: `device`, `torch`, `triton` and `commit`, for the rows.
        remark: Added to the note of every row.
    """

    def __init__(self, watch: Stopwatch, ceilings: Ceilings, facts: dict[str, str], remark: str = "") -> None:
        self._watch, self._ceilings, self._facts, self._remark = watch, ceilings, facts, remark
        self._arena = Arena(watch.device, watch.l2_bytes)
        self._bf16 = Bf16Attention(self._arena, watch)
        self._measured: dict[str, _Measured] = {}

    def rows(self, case: Case) -> list[Row]:
        """A row for each thing that the case is compared with, peers left out.

        Raises:
            WrongOutputError: Its output is not that of the reference.
        """
        prepared = prepare(case, self._arena)
        wrong = failures(prepared.check())
        if wrong:
            raise WrongOutputError("; ".join(wrong))
        timing = self._watch.time_graph(prepared.calls)
        self._measured[case.name] = _Measured(timing, prepared)
        return [
            self._row(case, baseline, baseline_us, note)
            for against in case.against
            if against != "peers"
            for baseline, baseline_us, note in [self._baseline(case, against)]
        ]

    def peer_rows(self, case: Case, peer: str, answers: dict[str, Answer]) -> list[Row]:
        """The row of a case that was measured against a peer, from what the peer answered."""
        if case.name not in self._measured:
            return []
        if case.op == "decode":
            answer = answers[f"{case.batch}x{case.context}"]
            baseline_us = answer.decode_us
        else:
            encoders = [answer for answer in answers.values() if answer.encode_us is not None]
            answer = min(
                encoders, key=lambda answer: answer.encode_us or 0, default=next(iter(answers.values()))
            )
            baseline_us = answer.encode_us
        size = "" if answer.bytes_per_token is None else f", {answer.bytes_per_token} bytes a token"
        return [self._row(case, peer, baseline_us, f"{answer.note}{size}")]

    def _baseline(self, case: Case, against: str) -> tuple[str, float | None, str]:
        """Name, time and remark of a baseline."""
        if against == "bf16" or against in BF16:
            times = self._bf16.times(case)
            good = {name: timing for name, timing in times.items() if isinstance(timing, Timing)}
            note = ", ".join(
                f"{name} {timing.median_us:.1f} us" if isinstance(timing, Timing) else f"{name}: {timing}"
                for name, timing in times.items()
            )
            if against == "bf16":
                name = min(good, key=lambda name: good[name].median_us, default=BF16[0])
            else:
                name = against
            return name, good[name].median_us if name in good else None, note
        if against == "fp8-limit":
            return (
                against,
                self._ceilings.copy_us(case.bf16_bytes // 2),
                "half of bf16's bytes at copy bandwidth",
            )
        if against == "copy":
            return against, self._ceilings.copy_us(self._measured[case.name].prepared.num_bytes), "computed"
        return against, self._ceilings.launch_us, "an empty kernel in a graph"

    def _row(self, case: Case, baseline: str, baseline_us: float | None, note: str) -> Row:
        measured = self._measured[case.name]
        prepared, median_us = measured.prepared, measured.timing.median_us
        extra = {"new_tokens": case.new_tokens} if case.new_tokens > 1 else {}
        notes = [measured.timing.spread, note, self._remark]
        return {
            "op": case.op,
            "preset": case.preset,
            "batch": case.batch,
            "context": case.context,
            "q_heads": case.q_heads,
            "kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "page_tokens": case.page_tokens,
            **extra,
            "median_us": _short(median_us),
            "gbps": _short(prepared.num_bytes / median_us / 1e3),
            "roofline": _short(self._ceilings.least_us(prepared.num_bytes, prepared.flops) / median_us),
            "baseline": baseline,
            "baseline_us": None if baseline_us is None else _short(baseline_us),
            "speedup": None if baseline_us is None else _short(baseline_us / median_us),
            **self._facts,
            "note": "; ".join(filter(None, notes)),
        }


def _short(number: float) -> float:
    """Five digits: more than the spread of any measurement bears out."""
    return float(f"{number:.5g}")
