"""`python -m benchmarks.quality`: what a compressed KV cache costs a real model, method by method."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from benchmarks.circumstances import circumstances
from benchmarks.quality.articles import token_sequences
from benchmarks.quality.logits import LogitLoss
from benchmarks.quality.methods.base import Method
from benchmarks.quality.methods.catalogue import QUICK, catalogue, selected
from benchmarks.quality.models import load_model
from benchmarks.quality.rows import RESULTS, Row, merged, read_rows, write_rows
from benchmarks.quality.texts_run import Conditions, logit_row, measure_logits, states_of_text
from tq_connectors.hf.models import KNOWN_MODELS
from tq_store.errors import TQStoreError

_EPILOG = """\
Every method reads all tokens of a text from its own compressed form, at every layer and position, while
the reference run reads them as they are. All get the same raw first tokens (--sinks) and the same raw
newest tokens (--tail). KL is KL(reference || method) of the next-token distribution, in nats; bytes are
those that really hold a token: codes, scales, centres, padding, headers, and its share of the raw sinks.

examples:
  python -m benchmarks.quality --quick                       a minute: one short text, five methods
  python -m benchmarks.quality --only 'tq*' fp8              some methods, by glob
  python -m benchmarks.quality --model qwen2.5-coder-0.5b    the hard case; or a folder, or a .gguf file
  python -m benchmarks.quality --list                        what methods there are
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Measure what a compressed KV cache costs a language model: ours, and those of others.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(model.name for model in KNOWN_MODELS)
    parser.add_argument(
        "--model",
        nargs="+",
        default=[KNOWN_MODELS[0].name],
        metavar="NAME|FOLDER|GGUF",
        help=f"what to measure on: {names} or the beginning of one, a Hugging Face folder, a GGUF file",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="methods to measure")
    parser.add_argument("--quick", action="store_true", help="one text of 512 tokens and a few methods")
    parser.add_argument("--list", action="store_true", help="list the methods and stop")
    parser.add_argument("--tokens", type=int, help="length of each text (default: 1024)")
    parser.add_argument("--texts", type=int, help="how many texts (default: 2)")
    parser.add_argument("--sinks", type=int, default=4, help="raw first tokens (default: %(default)s)")
    parser.add_argument("--tail", type=int, default=0, help="raw newest tokens (default: %(default)s)")
    parser.add_argument("--page-tokens", type=int, default=64, help="of our pages (default: %(default)s)")
    parser.add_argument(
        "--state-from",
        choices=("other", "same"),
        default="other",
        help="whether a codec's state is learned on another text or on the same one (default: %(default)s)",
    )
    parser.add_argument(
        "--state-tokens", type=int, default=256, help="first tokens it is learned from (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", default="float32", help="of weights and activations (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    return parser.parse_args(arguments)


def measure_model(
    name: str, parsed: argparse.Namespace, methods: Sequence[Method], progress: Progress
) -> list[Row]:
    """Rows of one model."""
    device = torch.device(parsed.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(name, device=device, dtype=getattr(torch, parsed.dtype))
    conditions = Conditions(
        num_sinks=parsed.sinks,
        tail=parsed.tail,
        state_from=parsed.state_from,
        state_tokens=parsed.state_tokens,
    )
    *texts, other = token_sequences(loaded.tokenizer, parsed.texts + 1, parsed.tokens)
    states = states_of_text(loaded, other, methods, conditions) if parsed.state_from == "other" else None
    losses: dict[str, list[LogitLoss]] = {method.name: [] for method in methods}
    task = progress.add_task(f"{loaded.name}: logits", total=len(texts) * len(methods))
    for method, loss in measure_logits(loaded, texts, methods, conditions, states):
        losses[method.name].append(loss)
        progress.advance(task)
    context = {
        **{"measure": "text", "texts": parsed.texts, "tail": parsed.tail, "page_tokens": parsed.page_tokens},
        "state": f"{parsed.state_from} text, {parsed.state_tokens} tokens",
        **{"dtype": parsed.dtype, "device": device.type, **circumstances()},
        **{"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return [
        {
            **{"model": loaded.name, "preset": method.name, "tokens": parsed.tokens, "sinks": parsed.sinks},
            **logit_row(loaded, method, losses[method.name], parsed.sinks),
            **context,
        }
        for method in methods
    ]


def print_rows(rows: Sequence[Row]) -> None:
    """One line a row."""
    header = ("method", "B/token", "x bf16", "mean KL", "p99 KL", "top-1", "ppl", "ppl ref")
    print(("{:22}" + "{:>9}" * 7).format(*header))
    for row in rows:
        ratio = row["bytes_per_token_bf16"] / row["bytes_per_token"]
        print(
            f"{row['preset']:22}{row['bytes_per_token']:9.0f}{ratio:9.2f}{row['kl_mean']:9.4f}"
            f"{row['kl_p99']:9.3f}{row['top1']:9.1%}{row['ppl']:9.2f}{row['ppl_ref']:9.2f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; exit status 2 for what cannot be measured."""
    parsed = parse_arguments(arguments)
    transformers_logging.disable_progress_bar()
    parsed.tokens = parsed.tokens or (512 if parsed.quick else 1024)
    parsed.texts = parsed.texts or (1 if parsed.quick else 2)
    methods = catalogue(parsed.page_tokens)
    try:
        methods = selected(methods, parsed.only or (QUICK if parsed.quick else ()))
        if parsed.list:
            print(*(method.name for method in methods), sep="\n")
            return 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        for name in parsed.model:
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                rows = measure_model(name, parsed, methods, progress)
            print(f"{rows[0]['model']}, {parsed.texts} x {parsed.tokens} tokens, {parsed.sinks} sinks")
            print_rows(rows)
            write_rows(merged(read_rows(parsed.output), rows), parsed.output)
    except (ValueError, OSError, TQStoreError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
