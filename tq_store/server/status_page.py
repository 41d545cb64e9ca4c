"""The status page: HTML drawn from a status, complete without scripts."""

from collections.abc import Iterable, Sequence
from html import escape

from tq_store.settings import format_duration, format_rate, format_ratio, format_size
from tq_store.status import Moment, Status, TierStatus

_GRAPH_WIDTH, _GRAPH_HEIGHT = 300, 100
_BAR_WIDTH, _BAR_HEIGHT = 90, 8


def render_page(status: Status) -> str:
    """The whole page. Style and script are files beside it, so that nothing inline has to be allowed."""
    troubles = _table(
        ("since the start", "count"),
        ((name, f"{count:,}") for name, count in status.troubles.items()),
        bad=True,
    )
    parts = (
        _number("prefix hit ratio", format_ratio(status.hit_ratio), _since_start(status)),
        _number("sent", format_rate(status.sent_bytes_per_s), "blocks to replicas"),
        _number("received", format_rate(status.received_bytes_per_s), "blocks from replicas"),
        _number("saved", format_size(status.saved_bytes), "of reads, against bf16"),
        _section("Throughput", _graph(status.history, status.step_s)),
        _section("Tiers", _tiers(status.tiers)),
        _section("Top namespaces", _namespaces(status)),
        _section("Calls", _calls(status), "half"),
        _section("Should stay at 0", troubles, "half"),
    )
    window = f"rates over the last {status.window_s:.0f} s" if status.window_s else "no rates yet"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>tq-store: status</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="status.css">
<script src="status.js" defer></script>
<noscript><meta http-equiv="refresh" content="5"></noscript>
</head>
<body data-step-seconds="{status.step_s:g}">
<header><h1>tq-store</h1>
<p id="stale" role="status">the server does not answer; these numbers are old</p></header>
<main>
<p>version {escape(status.version)}, up {format_duration(status.uptime_s)}, {window}</p>
{"".join(parts)}</main>
</body>
</html>
"""


def _since_start(status: Status) -> str:
    return f"{format_ratio(status.total_hit_ratio)} since the start"


def _number(title: str, value: str, note: str) -> str:
    return _section(title, f"<strong>{escape(value)}</strong><p>{escape(note)}</p>", "number")


def _section(title: str, body: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<section{attribute}><h2>{escape(title)}</h2>{body}</section>\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, bad: bool = False) -> str:
    """Cells are escaped, but for those that `_bar` drew. With `bad`, a last cell that is not 0 stands out."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = []
    for *cells, last in rows:
        mark = ' class="bad"' if bad and last != "0" else ""
        lines.append("".join(f"<td>{_cell(cell)}</td>" for cell in cells) + f"<td{mark}>{_cell(last)}</td>")
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class _Drawn(str):
    """Markup of ours, not to be escaped."""


def _cell(text: str) -> str:
    return text if isinstance(text, _Drawn) else escape(text)


def _bar(part: float, whole: float | None) -> str:
    if not whole:
        return ""
    filled = min(1.0, part / whole) * _BAR_WIDTH
    return _Drawn(
        f'<svg width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" aria-hidden="true">'
        f'<rect class="whole" width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" rx="2"/>'
        f'<rect class="part" width="{filled:.1f}" height="{_BAR_HEIGHT}" rx="2"/></svg>'
    )


def _tiers(tiers: Sequence[TierStatus]) -> str:
    heads = ("tier", "share of gets", "blocks", "used", "of", "", "evicted", "write queue", "errors")
    return _table(heads, map(_tier_cells, tiers), bad=True)


def _tier_cells(tier: TierStatus) -> tuple[str, ...]:
    has_queue = tier.queue_bytes is not None and tier.queue_limit_bytes is not None
    queue = f"{format_size(tier.queue_bytes or 0)} of {format_size(tier.queue_limit_bytes or 0)}"
    return (
        tier.name,
        format_ratio(tier.hit_share),
        f"{tier.num_blocks:,}",
        format_size(tier.used_bytes),
        "no limit" if tier.budget_bytes is None else format_size(tier.budget_bytes),
        _bar(tier.used_bytes, tier.budget_bytes),
        f"{tier.evicted_blocks_per_s:.1f}/s",
        queue if has_queue else "-",
        f"{tier.errors:,}",
    )


def _calls(status: Status) -> str:
    rows = (
        (
            call.method,
            f"{call.calls_per_s:.1f}/s",
            "-" if call.p50_s is None else f"{call.p50_s * 1000:g} ms",
            "-" if call.p99_s is None else f"{call.p99_s * 1000:g} ms",
        )
        for call in status.calls
    )
    busy = f"<p>{status.active_requests} of {status.max_requests} calls in flight, receiving "
    busy += f"{format_size(status.inflight_bytes)} of {format_size(status.max_inflight_bytes)}</p>"
    return _table(("method", "calls", "p50 below", "p99 below"), rows) + busy


def _namespaces(status: Status) -> str:
    if not status.namespaces:
        return "<p>none was used yet</p>"
    rows = (
        (
            f"{space.digest}…",
            format_ratio(space.found_keys / space.asked_keys if space.asked_keys else None),
            f"{space.asked_keys:,}",
            format_size(space.sent_bytes),
            format_size(space.received_bytes),
        )
        for space in status.namespaces
    )
    return _table(("namespace", "hit ratio", "keys asked", "sent", "received"), rows)


def _graph(history: Sequence[Moment], step_s: float) -> str:
    """Sent and received over the time that is kept, on one scale."""
    sent = [moment.sent_bytes_per_s for moment in history]
    received = [moment.received_bytes_per_s for moment in history]
    peak = max([*sent, *received, 1.0])
    return (
        f'<svg class="history" viewBox="0 0 {_GRAPH_WIDTH} {_GRAPH_HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="bytes sent and received over time">'
        f"{_path('first', sent, peak)}{_path('second', received, peak)}</svg>"
        f'<p><span class="key-first">sent</span>, <span class="key-second">received</span>; '
        f"peak {format_rate(peak if history else 0)} in the last {format_duration(len(history) * step_s)}</p>"
    )


def _path(kind: str, values: Sequence[float], peak: float) -> str:
    if not values:
        return ""
    step = _GRAPH_WIDTH / max(1, len(values) - 1)
    points = " L".join(
        f"{index * step:.1f} {_GRAPH_HEIGHT - 2 - (_GRAPH_HEIGHT - 4) * value / peak:.1f}"
        for index, value in enumerate(values)
    )
    return f'<path class="{kind}" d="M{points}"/>'
