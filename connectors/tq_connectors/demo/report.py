"""What the demo shows: progress on long steps, one table, and the record behind it."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


class Steps:
    """Progress bars by name on a terminal, one line a step elsewhere; a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Steps":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Say that a step has begun."""
        self._progress.console.print(text, highlight=False, markup=False)

    def progress(self, name: str, done: int, total: int | None) -> None:
        """Show how far the step of that name is."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
            if not self._console.is_terminal:
                self.note(name)
        self._progress.update(self._tasks[name], completed=done, total=total)


def demo_record(preset: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The content of ``out/demo.json`` from the result of replica B.

    Bytes per token are those of the blocks that came over the wire, headers and scales included.
    """
    hit = answer["tokens_hit"]
    return {
        "preset": preset,
        "prompt_tokens": answer["prompt_tokens"],
        "tokens_hit": hit,
        "bytes_per_token": answer["wire_bytes"] / hit if hit else None,
        "bytes_per_token_bf16": 2 * answer["kv_values_per_token"],
        "bytes_per_token_fp8": answer["kv_values_per_token"],
        "wire_bytes": answer["wire_bytes"],
        "ttft_cold_s": answer["ttft_cold_s"],
        "ttft_warm_s": answer["ttft_warm_s"],
        "kl_mean": answer["kl_mean"],
        "top1": answer["top1"],
        "answer_cached": answer["answer_cached"],
        "answer_uncached": answer["answer_uncached"],
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """One table for people."""
    per_token = record["bytes_per_token"]
    rows = {
        "preset": record["preset"],
        "prompt tokens": f"{record['prompt_tokens']}, of which {record['tokens_hit']} came from the store",
        "bytes per token": "no hit"
        if per_token is None
        else f"{per_token:.1f} (bf16 {record['bytes_per_token_bf16']}, "
        f"{record['bytes_per_token_bf16'] / per_token:.2f}x; fp8 {record['bytes_per_token_fp8']}, "
        f"{record['bytes_per_token_fp8'] / per_token:.2f}x)",
        "bytes on the wire": f"{record['wire_bytes']:,}",
        "time to first token": f"{record['ttft_warm_s']:.2f} s warm, {record['ttft_cold_s']:.2f} s cold",
        "logit KL to no cache": f"{record['kl_mean']:.4f} nats, top-1 agreement {record['top1']:.1%}",
        "answer, cached": record["answer_cached"],
        "answer, no cache": record["answer_uncached"],
    }
    table = Table(title="one document, two replicas", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table, highlight=False, markup=False)
