"""A server in the terminal: its status, fetched from the metrics port and drawn again and again."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tq_store.errors import ConfigError, RpcUnavailable
from tq_store.settings import format_duration, format_rate, format_ratio, format_size
from tq_store.status import Status

_TIMEOUT_S = 5.0
_MAX_STATUS_BYTES = 1 << 20
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 60
_PIPE_COLUMNS = 100


def fetch_status(url: str) -> Status:
    """The status of the server whose metrics port is at this URL.

    Raises:
        ConfigError: Not an http or https URL, or what answers is no tq-store server.
        RpcUnavailable: Nobody answers.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"{url!r} is not the URL of a metrics port; write for example http://127.0.0.1:9464"
        )
    address = f"{url.rstrip('/')}/status.json"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:  # noqa: S310  # the scheme is checked
            return Status.from_json(answer.read(_MAX_STATUS_BYTES))
    except (ValueError, urllib.error.HTTPError, http.client.HTTPException) as error:
        raise ConfigError(f"{address} is not the status of a tq-store server") from error
    except OSError as error:
        raise RpcUnavailable(f"{address} does not answer: {getattr(error, 'reason', error)}") from error


def show(url: str) -> None:
    """Draw the status once.

    Raises:
        ConfigError, RpcUnavailable: As `fetch_status`.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_COLUMNS)
    console.print(draw(fetch_status(url)))


def watch(url: str, *, every_s: float) -> None:
    """Draw the status until Ctrl-C. A server that goes away leaves its last numbers, marked as old.

    Raises:
        ConfigError, RpcUnavailable: At the first try, as `fetch_status`.
    """
    shown = draw(fetch_status(url))
    with suppress(KeyboardInterrupt), Live(shown, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            try:
                shown = draw(fetch_status(url))
                live.update(shown, refresh=True)
            except RpcUnavailable as error:
                live.update(Group(Text(f"old numbers: {error}", style="bold red"), shown), refresh=True)


def draw(status: Status) -> RenderableType:
    """All of a status, for a terminal of 80 columns or more."""
    return Group(
        _summary(status),
        _sparks("sent", [moment.sent_bytes_per_s for moment in status.history]),
        _sparks("received", [moment.received_bytes_per_s for moment in status.history]),
        Text(),
        _tiers(status),
        Text(),
        _calls(status),
        Text(),
        _namespaces(status),
        Text(),
        _troubles(status),
    )


def _summary(status: Status) -> Text:
    numbers = (
        f"tq-store {status.version}",
        f"up {format_duration(status.uptime_s)}",
        f"hit ratio {format_ratio(status.hit_ratio)}",
        f"({format_ratio(status.total_hit_ratio)} since the start)",
        f"saved {format_size(status.saved_bytes)}",
    )
    return Text("  ".join(numbers), style="bold")


def _sparks(name: str, rates: Sequence[float]) -> Text:
    recent = rates[-_SPARK_WIDTH:]
    peak = max(recent, default=0.0)
    line = "".join(_SPARKS[round((len(_SPARKS) - 1) * rate / peak) if peak else 0] for rate in recent)
    now = recent[-1] if recent else 0.0
    return Text(f"{name:<10}{format_rate(now):>14} ").append(line, style="cyan")


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for position, head in enumerate(heads):
        table.add_column(head, justify="right" if position else "left", no_wrap=True)
    return table


def _tiers(status: Status) -> Table:
    table = _table("tier", "of gets", "blocks", "used", "of", "evicted", "queue", "errors")
    for tier in status.tiers:
        table.add_row(
            tier.name,
            format_ratio(tier.hit_share),
            f"{tier.num_blocks:,}",
            format_size(tier.used_bytes),
            "-" if tier.budget_bytes is None else format_size(tier.budget_bytes),
            f"{tier.evicted_blocks_per_s:.1f}/s",
            "-" if tier.queue_bytes is None else format_size(tier.queue_bytes),
            Text(f"{tier.errors:,}", style="bold red" if tier.errors else ""),
        )
    return table


def _calls(status: Status) -> Group:
    table = _table("method", "calls", "p50 below", "p99 below")
    for call in status.calls:
        bounds = ("-" if bound is None else f"{bound * 1000:g} ms" for bound in (call.p50_s, call.p99_s))
        table.add_row(call.method, f"{call.calls_per_s:.1f}/s", *bounds)
    busy = (
        f"{status.active_requests} of {status.max_requests} calls in flight, receiving "
        f"{format_size(status.inflight_bytes)} of {format_size(status.max_inflight_bytes)}"
    )
    return Group(table, Text(busy, style="dim"))


def _namespaces(status: Status) -> Table:
    table = _table("namespace", "hit ratio", "keys asked", "sent", "received")
    for space in status.namespaces:
        table.add_row(
            space.digest,
            format_ratio(space.found_keys / space.asked_keys if space.asked_keys else None),
            f"{space.asked_keys:,}",
            format_size(space.sent_bytes),
            format_size(space.received_bytes),
        )
    return table


def _troubles(status: Status) -> Text:
    found = [f"{name} {count:,}" for name, count in status.troubles.items() if count]
    if not found:
        return Text("no trouble since the start", style="green")
    return Text("since the start: " + ", ".join(found), style="bold red")
