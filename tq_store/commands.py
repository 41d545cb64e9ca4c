"""What each command of `tq-store` does; `cli` says how they are called."""

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from tq_store import plan as planning
from tq_store.arguments import given_settings
from tq_store.block import MAX_BLOCK_BYTES
from tq_store.client import StoreClient
from tq_store.config import ClientConfig, ServerConfig, load_config
from tq_store.describe import describe_block, describe_copies, describe_stats
from tq_store.errors import ConfigError, RpcUnavailable
from tq_store.keys import BLOCK_KEY_BYTES, parse_key
from tq_store.sizing import read_model

if TYPE_CHECKING:
    from tq_store.server.app import Server


class Exit(IntEnum):
    """Exit codes."""

    OK = 0
    NEGATIVE = 1
    USAGE = 2
    UNREACHABLE = 3


def fail(error: Exception | str, code: Exit) -> Exit:
    """Say on stderr what went wrong."""
    sys.stderr.write(f"tq-store: {error}\n")
    return code


def say(text: str) -> None:
    """Say it on stdout, now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def client_of(options: argparse.Namespace) -> StoreClient:
    """A client with the settings of a command."""
    arguments = given_settings(options)
    config = load_config(ClientConfig, arguments=arguments, file=options.config, environment=os.environ)
    return StoreClient(config=config)


def serve(options: argparse.Namespace) -> Exit:
    """Run a server until it is told to stop."""
    try:
        from tq_store.server.app import serve as run_server
        from tq_store.server.logs import JsonFormatter
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; run: pip install 'tq-store[server]'") from error
    config = load_config(
        ServerConfig, arguments=given_settings(options), file=options.config, environment=os.environ
    )
    if config.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    asyncio.run(run_server(config, _say_ready))
    return Exit.OK


def _say_ready(server: "Server") -> None:
    metrics = f", metrics on {server.metrics_url}" if server.metrics_url else ""
    say(f"tq-store serves on {server.address}{metrics}")


def ping(options: argparse.Namespace) -> Exit:
    """Say how fast a server answers."""
    with client_of(options) as client:
        first, second = client.ping(), client.ping()
        say(
            f"tq-store {second.version} at {client.address} answers in {second.latency_s * 1000:.2f} ms "
            f"({first.latency_s * 1000:.2f} ms with connecting)"
        )
    return Exit.OK


def stats(options: argparse.Namespace) -> Exit:
    """Show what a server holds and has counted."""
    with client_of(options) as client:
        stats = client.stats()
    say(json.dumps(dataclasses.asdict(stats)) if options.json else "\n".join(describe_stats(stats)))
    return Exit.OK


def top(options: argparse.Namespace) -> Exit:
    """Watch a server."""
    try:
        from tq_store import top as screen
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; run: pip install 'tq-store[server]'") from error
    try:
        if options.json:
            say(screen.fetch_status(options.url).to_json())
        elif options.once:
            screen.show(options.url)
        else:
            screen.watch(options.url, every_s=options.every)
    except RpcUnavailable as error:
        return fail(f"{error}; was it started with --metrics-port, and is --url right?", Exit.UNREACHABLE)
    return Exit.OK


def inspect(options: argparse.Namespace) -> Exit:
    """Explain one block, of a server or in a file."""
    target: str = options.target
    try:
        key = parse_key(target)
    except ValueError:
        is_sound, text = describe_block(_read_block(Path(target)))
    else:
        with client_of(options) as client:
            is_sound, text = describe_copies(client.inspect(key))
    say(text)
    return Exit.OK if is_sound else Exit.NEGATIVE


def _read_block(path: Path) -> bytes:
    """The file, or as much of it as decides that it is too long for a block."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BLOCK_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} is neither a block key of {2 * BLOCK_KEY_BYTES} hex digits nor a file that can "
            f"be read: {error.strerror}"
        ) from error


def purge(options: argparse.Namespace) -> Exit:
    """Remove blocks."""
    namespace = None if options.all else options.namespace
    what = "every block" if namespace is None else f"every block of namespace {namespace.hex()}"
    if not options.yes:
        return fail(f"this removes {what}; say --yes if that is meant", Exit.USAGE)
    with client_of(options) as client:
        num_blocks = client.purge(namespace)
    say(f"removed {num_blocks} blocks")
    return Exit.OK if num_blocks else Exit.NEGATIVE


def plan(options: argparse.Namespace) -> Exit:
    """Work out what a cache takes and saves."""
    question = planning.Question(
        model=read_model(options.model),
        context=options.context,
        replicas=options.replicas,
        link_gbit=options.link,
        hit_ratio=options.hit_ratio,
        preset=options.preset,
        page_tokens=options.page_tokens,
        prefill_tokens_per_s=options.prefill,
        tflops=options.tflops,
        client_gib_per_s=options.client,
    )
    say(json.dumps(planning.answer(question)) if options.json else "\n".join(planning.describe(question)))
    return Exit.OK


def new_token(options: argparse.Namespace) -> Exit:
    """Print a token, and its entry for the tenants file."""
    from tq_store.server.tokens import new_token

    token, entry = new_token()
    say(token)
    sys.stderr.write(
        f"shown this once; keep it in a file that only its user can read, for the client's token_file.\n"
        f'For the tenants file, among the tokens of [{options.tenant}]: "{entry}"\n'
    )
    return Exit.OK


def check_tenants(options: argparse.Namespace) -> Exit:
    """Print the tenants of a file."""
    from tq_store.server.tenants import load_tenants

    for name, tenant in load_tenants(options.file).by_name.items():
        say(f"{name}: {', '.join(entry.id for entry in tenant.tokens) or 'no token'}")
    return Exit.OK
