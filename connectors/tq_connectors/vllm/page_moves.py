"""What the two halves of our connector tell each other, and the engine's requests as they see them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tq_store.keys import BlockKey


class EngineRequest(Protocol):
    """What the connector needs to know of a request of the engine's."""

    request_id: str
    num_tokens: int
    num_prompt_tokens: int
    block_hashes: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class PageMove:
    """A page: the key of its block, and its blocks on the device, -1 for those to leave out."""

    key: BlockKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestMoves:
    """Pages of one request, in token order."""

    request_id: str
    pages: tuple[PageMove, ...]


@dataclass(slots=True)
class StepMoves:
    """What is to be moved beside a step of the engine.

    Args:
        loads: Pages to load; their requests wait.
        saves: Pages to save, once the step has been computed.
        held: Finished requests whose blocks the engine keeps until they are no longer read.
        overwrites: Whether blocks that are being read may be overwritten in this step.
    """

    loads: list[RequestMoves] = field(default_factory=list)
    saves: list[RequestMoves] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    overwrites: bool = False


def parts_of(pages: Sequence[PageMove], size: int) -> Iterator[Sequence[PageMove]]:
    """Pages in parts of so many."""
    for start in range(0, len(pages), size):
        yield pages[start : start + size]
