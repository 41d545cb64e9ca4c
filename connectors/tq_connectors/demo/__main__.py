"""`make demo`: two replicas share the compressed KV cache of one document through a store."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tq_connectors.demo.replica import Job
from tq_connectors.demo.report import Steps, demo_record, print_table
from tq_connectors.hf.models import SMOLLM2, fetch_model
from tq_kernels.spec import PRESETS
from tq_store.client import StoreClient
from tq_store.errors import TQStoreError

DEFAULT_DOCUMENT = Path("benchmarks/documents/constitution.txt")
DEFAULT_QUESTION = "Where shall all Bills for raising Revenue originate?"

_EPILOG = """\
examples:
  python -m tq_connectors.demo
  python -m tq_connectors.demo --preset k8v4
  python -m tq_connectors.demo --document notes.txt --question "What was decided?"
  python -m tq_connectors.demo --server 127.0.0.1:7437      use a store that runs already
"""


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence for the user."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tq_connectors.demo",
        description="Replica A prefills a document and saves its compressed KV blocks; replica B, a separate "
        "process, fetches them and answers a question about it, attending on the compressed blocks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", default="tq4", choices=PRESETS, help="codec preset (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default=SMOLLM2.name, help="known name or local folder (default: %(default)s)"
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=DEFAULT_DOCUMENT,
        metavar="FILE",
        help="text file (default: %(default)s)",
    )
    parser.add_argument(
        "--document-tokens",
        type=_at_least(1),
        default=2000,
        metavar="N",
        help="use as many paragraphs as fit N tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--question", default=DEFAULT_QUESTION, help="asked about the document (default: %(default)r)"
    )
    parser.add_argument(
        "--server", metavar="ADDRESS", help="a running tq-store (default: start one, and stop it at the end)"
    )
    parser.add_argument(
        "--page-tokens", type=_at_least(1), default=64, help="tokens in a page (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_at_least(1),
        default=48,
        help="length limit of the answer (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/demo.json"),
        metavar="FILE",
        help="result (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def read_document(path: Path) -> str:
    """The text of the document.

    Raises:
        DemoError: It cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(
            f"cannot read {path} as UTF-8 text ({error}); name another file with --document"
        ) from error
    if not text:
        raise DemoError(f"{path} is empty; name another file with --document")
    return text


@contextmanager
def running_server(address: str | None, steps: Steps) -> Iterator[str]:
    """Address of the store: the one named, once it answers, or one started here and stopped at the end.

    Raises:
        DemoError: The server does not answer or does not start.
    """
    if address is not None:
        try:
            with StoreClient(address) as client:
                client.ping()
        except TQStoreError as error:
            raise DemoError(
                f"no store answers at {address} ({error}); start one with `tq-store serve --listen {address}`"
            ) from error
        yield address
        return
    with tempfile.TemporaryDirectory(prefix="tq-store-demo-") as folder:
        command = [
            *(sys.executable, "-m", "tq_store", "serve", "--listen", "127.0.0.1:0"),
            *("--memory-budget", "1GiB", "--disk-path", folder, "--disk-budget", "2GiB"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            try:
                line = process.stdout.readline() if process.stdout else ""
                if "127.0.0.1:" not in line:
                    raise DemoError("the store did not start; what it said stands above")
                steps.note(line.strip())
                yield next(word for word in line.split() if word.startswith("127.0.0.1:")).rstrip(",;.")
            finally:
                process.terminate()


def run_replica(name: str, job: Job, steps: Steps) -> dict[str, Any]:
    """Run one replica as a process of its own, show its progress, and return its result.

    Raises:
        DemoError: It failed; the message is its own.
    """
    command = [sys.executable, "-m", "tq_connectors.demo.replica"]
    # threads that spin long at barriers starve the store on busy machines; ones that never spin are slow
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            json.dump(asdict(job), process.stdin)
            process.stdin.close()
            for line in process.stdout:
                event: dict[str, Any] = json.loads(line)
                match event.pop("event"):
                    case "progress":
                        steps.progress(f"{name}: {event['task']}", event["done"], event["total"])
                    case "step":
                        steps.note(f"{name}: {event['text']}")
                    case "error":
                        raise DemoError(f"{name}: {event['text']}")
                    case "result":
                        return event
        except KeyboardInterrupt:
            process.terminate()
            raise
    raise DemoError(f"{name} ended without a result; what it said stands above")


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole demo; returns the record that is written.

    Raises:
        DemoError: As the message says.
    """
    document = read_document(arguments.document)
    with Steps(console) as steps:
        try:
            folder = fetch_model(arguments.model, progress=steps.progress)
        except (ValueError, OSError, TQStoreError) as error:
            raise DemoError(str(error)) from error
        with running_server(arguments.server, steps) as address:
            common = {
                "model_folder": str(folder),
                "model_name": arguments.model,
                "preset": arguments.preset,
                "page_tokens": arguments.page_tokens,
                "server": address,
                "document": document,
                "document_tokens": arguments.document_tokens,
                "question": arguments.question,
                "max_new_tokens": arguments.max_new_tokens,
            }
            run_replica("replica A", Job(role="save", **common), steps)
            answer = run_replica("replica B", Job(role="answer", **common), steps)
    return demo_record(arguments.preset, answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, print the table and write the JSON file; exit status 1 with one sentence on failure."""
    parsed, console = parse_arguments(arguments), Console(stderr=True)
    try:
        record = run(parsed, console)
    except DemoError as error:
        console.print(f"demo: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("demo: interrupted; the store and the replicas it started have ended", style="red")
        return 130
    print_table(record, Console())
    try:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        console.print(
            f"demo: cannot write the result ({error}); name another file with --output",
            style="red",
            markup=False,
            highlight=False,
        )
        return 1
    console.print(f"written to {parsed.output}", highlight=False)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a demo that is killed ends what it started
    sys.exit(main())
