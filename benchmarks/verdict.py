"""Rows held against the bar: what was reached, what fell short and by how much, what was not measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.registry import BARS, Bar, Case
from benchmarks.rows import Row, identity


@dataclass(frozen=True, slots=True)
class Judgement:
    """A bar, its worst row and whether that row reaches it.

    Args:
        bar: What was to be reached.
        worst: The value furthest from it, or None where no row says anything about it.
        where: The case of that value, with its baseline.
        num_met: Rows that reach the bar.
        num_rows: Rows that the bar speaks of and that exist.
        num_wanted: Rows that would exist if everything had been measured.
    """

    bar: Bar
    worst: float | None
    where: str
    num_met: int
    num_rows: int
    num_wanted: int

    @property
    def met(self) -> bool:
        """Whether every row exists and reaches the bar."""
        return self.num_met == self.num_wanted

    def __str__(self) -> str:
        if self.worst is None:
            return f"{'-':6} {self.bar.title}: not measured"
        word = "met" if self.met else "MISSED" if self.num_met < self.num_rows else "part"
        bound = "at most" if self.bar.measure == "median_us" else "at least"
        counts = f"{self.num_met} of {self.num_rows} measured, {self.num_wanted} wanted"
        return (
            f"{word:6} {self.bar.title}: worst {self.worst:.2f}, {bound} {self.bar.reach:.2f} "
            f"({counts}; {self.where})"
        )


def judged(rows: Sequence[Row]) -> list[Judgement]:
    """A judgement for every bar."""
    return [_judge(bar, rows) for bar in BARS]


def key_of(case: Case) -> tuple[object, ...]:
    """The identity of a case's rows."""
    return identity(
        {
            "op": case.op,
            "preset": case.preset,
            "batch": case.batch,
            "context": case.context,
            "q_heads": case.q_heads,
            "kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "page_tokens": case.page_tokens,
            **({"new_tokens": case.new_tokens} if case.new_tokens > 1 else {}),
        }
    )


def _judge(bar: Bar, rows: Sequence[Row]) -> Judgement:
    cases = {key_of(case): case for case in bar.cases()}
    at_most = bar.measure == "median_us"
    values = [
        (value, f"{cases[identity(row)].name} against {row['baseline']}")
        for row in rows
        if identity(row) in cases and row["baseline"] in bar.baselines
        for value in [_value(bar, row, rows)]
        if value is not None
    ]
    # a decode case has one row for the faster of several bf16 baselines, and one for each peer
    per_case = 1 if bar.baselines[0].endswith("bf16") else len(bar.baselines)
    worst = (max if at_most else min)(values, default=(None, ""))
    num_met = sum(value <= bar.reach if at_most else value >= bar.reach for value, _ in values)
    return Judgement(bar, worst[0], worst[1], num_met, len(values), per_case * len(cases))


def _value(bar: Bar, row: Row, rows: Sequence[Row]) -> float | None:
    """What the bar measures, of one row."""
    if bar.measure != "gbps_of_tq4":
        value: float | None = row[bar.measure]
        return value
    same_shape = (other for other in rows if identity(other) == identity({**row, "preset": "tq4"}))
    tq4 = next(same_shape, None)
    return None if tq4 is None else row["gbps"] / tq4["gbps"]
