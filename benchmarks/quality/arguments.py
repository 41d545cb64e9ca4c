"""The command line of `python -m benchmarks.quality`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.conditions import Conditions
from benchmarks.quality.measure import TEXT_METRICS
from benchmarks.quality.retrieval import Retrieval
from benchmarks.quality.rows import RESULTS
from benchmarks.quality.ruler.tasks import TASKS
from tq_connectors.hf.models import KNOWN_MODELS

_METRICS = {
    "codec": "squared error on made-up vectors: Gaussian, sparse, with an outlier, with a common offset",
    "tensor": "inside each layer: errors of keys and values, correlation of scores, attention KL, output",
    "logits": "KL to the uncompressed run, agreement on the best token, paired perplexity",
    "store": "logits of the second half of a text, decoded on blocks that came from a running tq-store",
    "retrieval": "RULER's tasks niah_single_2, niah_multikey_1, vt and qa_1, scored as RULER does",
}

_QUICK_RESULTS = Path("out/quality/quality.jsonl")

_EPILOG = """\
Every method reads all tokens of a text from its own compressed form, at every layer and position, while
the reference run reads them as they are. All get the same raw first tokens (--sinks) and the same raw
newest tokens (--tail). KL is KL(reference || method) of the next-token distribution, in nats; bytes are
those that really hold a token: codes, scales, centres, padding, headers, and its share of the raw sinks.

metrics:
{metrics}

examples:
  python -m benchmarks.quality --quick                       a minute: one short text, a few methods
  python -m benchmarks.quality --only 'tq*' fp8              some methods, by glob
  python -m benchmarks.quality --only tq3 tq3+tq4:0-1,29     tq3, and tq4 in three of its layers
  python -m benchmarks.quality --model qwen2.5-coder-0.5b    the hard case; or a folder, or a .gguf file
  python -m benchmarks.quality --metrics logits --tail 128   as KIVI and others report themselves
  python -m benchmarks.quality --metrics retrieval --only bf16 fp8 'tq?' --contexts 1024 2048
  python -m benchmarks.quality --metrics store --only 'tq?'  blocks saved, fetched and attended on
  python -m benchmarks.quality --list                        what methods there are
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    default_metrics = " ".join(TEXT_METRICS)
    metrics = "\n".join(f"  {name:10}{text}" for name, text in _METRICS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Measure what a compressed KV cache costs a language model: ours, and those of others.",
        epilog=_EPILOG.format(metrics=metrics),
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
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB|TABLE", help="methods to measure")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=_METRICS,
        default=TEXT_METRICS,
        help=f"(default: {default_metrics})",
    )
    parser.add_argument("--quick", action="store_true", help="one text of 512 tokens and a few methods")
    parser.add_argument("--list", action="store_true", help="list the methods and stop")
    defaults = Conditions()
    for name, least, default, meaning in (
        ("tokens", 32, None, f"length of each text (default: {defaults.num_tokens})"),
        ("texts", 1, None, f"how many texts (default: {defaults.num_texts})"),
        ("sinks", 0, defaults.num_sinks, "raw first tokens (default: %(default)s)"),
        ("tail", 0, defaults.tail, "raw newest tokens in logits and retrieval (default: %(default)s)"),
        ("page-tokens", 16, defaults.page_tokens, "tokens in our pages (default: %(default)s)"),
        ("state-tokens", 16, defaults.state_tokens, "of which state is learned (default: %(default)s)"),
    ):
        parser.add_argument(f"--{name}", type=_at_least(least), default=default, metavar="N", help=meaning)
    parser.add_argument(
        "--state-from",
        choices=("other", "same"),
        default=defaults.state_from,
        help="learn a codec's state on another text or on the start of the same one (default: %(default)s)",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of RULER (default: all)")
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=_at_least(512),
        default=Retrieval().contexts,
        metavar="N",
        help="tokens of RULER's prompts with their answers (default: 1024 2048)",
    )
    parser.add_argument(
        "--samples", type=_at_least(1), default=25, metavar="N", help="of each task (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=_at_least(1),
        default=Retrieval().batch_samples,
        metavar="N",
        help="samples that are answered together (default: %(default)s; a GPU takes 50)",
    )
    parser.add_argument(
        "--jobs",
        type=_at_least(1),
        default=Retrieval().num_jobs,
        metavar="N",
        help="processes that answer, each with the model in its memory (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="rows, which replace those of the same measurement; quality.html and quality.svg go beside them "
        f"(default: {RESULTS}, or {_QUICK_RESULTS} when --quick)",
    )
    parsed = parser.parse_args(arguments)
    parsed.output = parsed.output or (_QUICK_RESULTS if parsed.quick else RESULTS)
    return parsed


def conditions_of(parsed: argparse.Namespace) -> Conditions:
    """What the command line says of conditions."""
    return Conditions(
        num_texts=parsed.texts or (1 if parsed.quick else Conditions().num_texts),
        num_tokens=parsed.tokens or (512 if parsed.quick else Conditions().num_tokens),
        num_sinks=parsed.sinks,
        tail=parsed.tail,
        page_tokens=parsed.page_tokens,
        state_from=parsed.state_from,
        state_tokens=parsed.state_tokens,
    )


def retrieval_of(parsed: argparse.Namespace) -> Retrieval:
    """What the command line says of retrieval."""
    return Retrieval(
        tasks=parsed.tasks,
        contexts=parsed.contexts,
        num_samples=parsed.samples,
        batch_samples=parsed.batch,
        num_jobs=parsed.jobs,
    )


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number
