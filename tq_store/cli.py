"""`tq-store serve | ping | stats | plan | top | inspect | purge | token`.

Exit codes: 0 done, 1 a negative answer, 2 wrong usage or settings, 3 the server cannot be reached.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tq_store import commands as actions
from tq_store import plan
from tq_store.arguments import add_command, add_settings
from tq_store.client import StoreClient
from tq_store.commands import Exit, fail
from tq_store.config import ClientConfig, ServerConfig
from tq_store.errors import BackendError, ConfigError, RpcDenied, RpcError, RpcTimeout, RpcUnavailable
from tq_store.keys import DIGEST_BYTES
from tq_store.sizing import PRESETS

ClientCommand = Callable[[argparse.Namespace, StoreClient], int]
COMMANDS_GROUP = "tq_store.commands"
"""Entry points of packages that add commands: functions that are given `_add_client_command`, to call it with
a name, what runs, a text and an epilog, and to add arguments to the parser that comes back."""

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. Logging is configured here and nowhere else."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(options.run(options))
    except (RpcTimeout, RpcUnavailable) as error:
        return fail(f"{error}; is a server running there, and is --address right?", Exit.UNREACHABLE)
    except BackendError as error:
        return fail(error, Exit.UNREACHABLE)
    except (ConfigError, RpcDenied) as error:
        return fail(error, Exit.USAGE)
    except RpcError as error:
        return fail(error, Exit.NEGATIVE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tq-store",
        description="A store for compressed KV-cache blocks, shared by inference engines.",
        epilog="example:\n  tq-store serve --memory-budget 8GiB &\n  tq-store ping",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = add_command(
        commands,
        "serve",
        actions.serve,
        "Run a server until SIGTERM or Ctrl-C.",
        """\
examples:
  tq-store serve --memory-budget 8GiB --disk-path /var/lib/tq-store --disk-budget 200GiB
  tq-store serve --listen 0.0.0.0:7437 --tls-cert server.pem --tls-key server.key --token-file tokens
  tq-store serve --config tq-store.toml          with a [server] table, e.g. memory_budget = "8GiB"
""",
    )
    add_settings(serve, ServerConfig)

    ping = add_command(
        commands,
        "ping",
        actions.ping,
        "See whether a server answers, how fast, and which version it is.",
        "example:\n  tq-store ping --address 10.0.0.5:7437 --tls-ca ca.pem --token-file token\n",
    )
    stats = add_command(
        commands,
        "stats",
        actions.stats,
        "Show what a server's tiers hold and what it has counted.",
        "example:\n  tq-store stats --json | jq .counters.misses\n",
    )
    stats.add_argument("--json", action="store_true", help="for programs, with sizes in bytes")
    _add_plan(commands)
    top = add_command(
        commands,
        "top",
        actions.top,
        "Watch a server: hit ratios, throughput, evictions, queues, busiest namespaces.",
        """\
examples:
  tq-store top                                   the server on this machine, until Ctrl-C
  tq-store top --url http://127.0.0.1:9465 --once
  tq-store top --json | jq .hit_ratio
""",
    )
    top.add_argument("--url", default="http://127.0.0.1:9464", help="its metrics port (default: %(default)s)")
    top.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="pause (default: %(default)g)"
    )
    how = top.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="show it once, in colour only on a terminal")
    how.add_argument("--json", action="store_true", help="for programs, with sizes in bytes")
    inspect = add_command(
        commands,
        "inspect",
        actions.inspect,
        "Explain one block: where a server has it and what it is, or what is wrong with a file.",
        """\
examples:
  tq-store inspect 4f0c…  (128 hex digits)       asks the server; nothing is moved or repaired
  tq-store inspect /var/lib/tq-store/quarantine/4f0c…    reads the file; needs no server
""",
    )
    inspect.add_argument("target", metavar="KEY|FILE", help="a block key in hex, or a file with a block")
    purge = add_command(
        commands,
        "purge",
        actions.purge,
        "Remove blocks from all tiers of a server.",
        "example:\n  tq-store purge --namespace 9a41…  --yes      (64 hex digits, the first half of a key)\n",
    )
    scope = purge.add_mutually_exclusive_group(required=True)
    scope.add_argument("--namespace", type=_namespace, metavar="HEX", help="blocks of one namespace digest")
    scope.add_argument("--all", action="store_true", help="all blocks, in a shared Redis too")
    purge.add_argument("--yes", action="store_true", help="really do it")
    _add_token(commands)
    for command in (ping, stats, inspect, purge):
        add_settings(command, ClientConfig)
    for extension in entry_points(group=COMMANDS_GROUP):
        try:
            add = extension.load()
        except ImportError as error:  # a server's image has no connectors, and needs none
            logger.debug("no command %s here: %s", extension.name, error)
        else:
            add(partial(_add_client_command, commands))
    return parser


def _add_plan(commands: Any) -> None:
    command = add_command(
        commands,
        "plan",
        actions.plan,
        "Work out what a shared cache takes and saves: bytes, memory, time to first token, links that pay.",
        """\
examples:
  tq-store plan --model Llama-3.1-8B/config.json --context 32768 --replicas 4 --link 25
  tq-store plan --model config.json --context 8192 --hit-ratio 0.5 --preset k4v3 --prefill 12000
  tq-store plan --model config.json --context 32768 --json | jq .pays_above_gbit

An estimate: transfers at the speed of the link or of the client, whichever is less, then the computing of
what is missing; nothing overlaps. --prefill and --client take numbers that you have measured.
""",
    )
    command.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="CONFIG",
        help="a Hugging Face config.json, or its folder",
    )
    command.add_argument("--context", type=int, required=True, metavar="N", help="tokens of a prompt")
    command.add_argument("--replicas", type=int, default=1, metavar="R", help="engines that share the store")
    command.add_argument(
        "--link",
        type=float,
        default=10.0,
        metavar="GBIT",
        help="the store's link, Gbit/s (default: %(default)g)",
    )
    command.add_argument(
        "--hit-ratio",
        type=float,
        default=0.9,
        metavar="H",
        help="part of the prompt, from its beginning, that is stored (default: %(default)g)",
    )
    command.add_argument(
        "--preset",
        default="tq4",
        metavar="P",
        help=f"{', '.join(PRESETS)}, or a table by layer, e.g. tq3+tq4:0-1,29 (default: tq4)",
    )
    command.add_argument("--page-tokens", type=int, default=64, metavar="N", help="(default: %(default)d)")
    command.add_argument(
        "--prefill", type=float, metavar="TOKENS", help="prefill speed of a replica at this context, tokens/s"
    )
    command.add_argument(
        "--tflops",
        type=float,
        default=plan.DEFAULT_TFLOPS,
        help="without --prefill: what a replica reaches, 10^12 operations/s (default: %(default)g, an H100)",
    )
    command.add_argument(
        "--client",
        type=float,
        default=plan.DEFAULT_CLIENT_GIB_PER_S,
        metavar="GIB",
        help="what one client takes, GiB/s: `load` of `make bench-store` (default: %(default)g)",
    )
    command.add_argument("--json", action="store_true", help="for programs; bytes, seconds, Gbit/s")


def _add_token(commands: Any) -> None:
    token = commands.add_parser("token", help="Make a tenant's token, or check a tenants file.")
    token_commands = token.add_subparsers(metavar="COMMAND", required=True)
    new = token_commands.add_parser(
        "new",
        help="Print a new token, and its entry for the tenants file.",
        description="Print a new token to stdout, once, and its entry for the tenants file to stderr.",
        epilog="example:\n  (umask 077; tq-store token new search > search.token)\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("tenant", metavar="TENANT", help="whom it will stand for")
    new.set_defaults(run=actions.new_token)
    check = token_commands.add_parser("check", help="Read a tenants file; print tenants and token ids.")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=actions.check_tenants)


def _add_client_command(
    commands: Any, name: str, run: ClientCommand, text: str, epilog: str
) -> argparse.ArgumentParser:
    """A command of another package: it gets its arguments and a client, and returns an exit code."""

    def with_client(options: argparse.Namespace) -> int:
        with actions.client_of(options) as client:
            return run(options, client)

    command = add_command(commands, name, with_client, text, epilog)
    add_settings(command, ClientConfig)
    return command


def _namespace(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES:
        raise argparse.ArgumentTypeError(f"a namespace is written as {2 * DIGEST_BYTES} hex digits")
    return digest


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("a pause lies in 0.1 to 3600 seconds")
    return seconds
