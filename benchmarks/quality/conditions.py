"""What is the same for all methods of a run."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.quality.rows import Row

StateFrom = Literal["other", "same"]
"""Whether states come from the start of another text or of the sequence itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Conditions of a run.

    Args:
        num_texts: Texts.
        num_tokens: Tokens of each.
        num_sinks: First tokens that stay raw.
        tail: Newest tokens that every query sees raw.
        page_tokens: Tokens in our pages.
        state_from: Where states come from.
        state_tokens: From how many tokens, sinks included.
    """

    num_texts: int = 2
    num_tokens: int = 1024
    num_sinks: int = 4
    tail: int = 0
    page_tokens: int = 64
    state_from: StateFrom = "other"
    state_tokens: int = 256

    def row(self) -> Row:
        """Entries of a row."""
        return {
            **{"tokens": self.num_tokens, "texts": self.num_texts, "sinks": self.num_sinks},
            **{"tail": self.tail, "page_tokens": self.page_tokens},
            "state": f"{self.state_from} text, {self.state_tokens} tokens",
        }
