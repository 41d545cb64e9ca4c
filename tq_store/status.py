"""What a server shows people of itself: the numbers of its status page and of `tq-store top`."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """One tier.

    Args:
        name: ``memory``, ``disk`` or ``redis``.
        num_blocks: Blocks in it.
        used_bytes: Bytes of those blocks.
        budget_bytes: Its limit, where it keeps one.
        hit_share: Share of the blocks that gets asked for which this tier had, over the window.
        evicted_blocks_per_s: Over the window.
        queue_bytes: Blocks waiting to be written to it; None for the top tier, which has no queue.
        queue_limit_bytes: Limit of that queue.
        errors: Calls to it that failed, since the start.
    """

    name: str
    num_blocks: int
    used_bytes: int
    budget_bytes: int | None
    hit_share: float | None
    evicted_blocks_per_s: float
    queue_bytes: int | None
    queue_limit_bytes: int | None
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStatus:
    """One method of the service, over the window.

    Args:
        method: Its name.
        calls_per_s: Calls that ended.
        p50_s: Half of them took no longer; the bound of a histogram's bucket. None where nothing is known.
        p99_s: The same for 99 of 100.
    """

    method: str
    calls_per_s: float
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStatus:
    """One of the busiest namespaces, since the server first saw it.

    Args:
        digest: The first digits of its digest: enough to tell it apart, too few to ask for a block.
        asked_keys: Keys of lookups.
        found_keys: Those of them that were hits.
        sent_bytes: Blocks sent.
        received_bytes: Blocks received.
    """

    digest: str
    asked_keys: int
    found_keys: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One step of the recent past.

    Args:
        sent_bytes_per_s: Blocks sent.
        received_bytes_per_s: Blocks received.
        hit_ratio: Of the keys of lookups; None where none was asked for.
    """

    sent_bytes_per_s: float
    received_bytes_per_s: float
    hit_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A server at one moment.

    Args:
        version: Of the server.
        uptime_s: Since it started.
        window_s: The time that rates, ratios and quantiles cover; 0 right after the start.
        step_s: Time between two moments of the history.
        hit_ratio: Share of the keys of lookups that were leading hits, over the window.
        total_hit_ratio: The same since the start.
        sent_bytes_per_s: Blocks sent, over the window.
        received_bytes_per_s: Blocks received, over the window.
        saved_bytes: What bf16 would have taken on top of the blocks that gets read, since the start.
        active_requests: Calls in flight.
        max_requests: Calls that may be.
        inflight_bytes: Declared bytes of blocks being received.
        max_inflight_bytes: Limit of that.
        troubles: What should stay at 0, by name, counted since the start.
        history: Oldest first.
    """

    version: str
    uptime_s: float
    window_s: float
    step_s: float
    hit_ratio: float | None
    total_hit_ratio: float | None
    sent_bytes_per_s: float
    received_bytes_per_s: float
    saved_bytes: int
    active_requests: int
    max_requests: int
    inflight_bytes: int
    max_inflight_bytes: int
    troubles: dict[str, int]
    tiers: list[TierStatus] = field(default_factory=list)
    calls: list[CallStatus] = field(default_factory=list)
    namespaces: list[NamespaceStatus] = field(default_factory=list)
    history: list[Moment] = field(default_factory=list)

    def to_json(self) -> str:
        """As text; `from_json` takes it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Status":
        """From text. Fields that only newer servers know are left out.

        Raises:
            ValueError: Not a status.
        """
        try:
            values = json.loads(text)
            parts: dict[str, type[Any]] = {
                "tiers": TierStatus,
                "calls": CallStatus,
                "namespaces": NamespaceStatus,
                "history": Moment,
            }
            for name, kind in parts.items():
                values[name] = [_build(kind, item) for item in values[name]]
            return _build(cls, values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError("not the status of a tq-store server") from error


def _build(kind: type[_T], values: dict[str, Any]) -> _T:
    known = {declared.name for declared in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})
