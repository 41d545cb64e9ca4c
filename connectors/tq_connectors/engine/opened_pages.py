"""OpenedPages: pages that a step opens itself give no centre to others of that step."""

import torch


class OpenedPages:
    """Pages and the steps that opened them.

    An engine may find a prefix that another sequence computes in the very same step, or that is loaded while
    the step runs. The page before a new one is then written when its centre would be read.

    Args:
        num_pages: Of the pool.
        page_tokens: Tokens of a page.
        device: Where they are.
    """

    def __init__(self, num_pages: int, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._opened_at = torch.full((num_pages + 1,), -1, dtype=torch.int32, device=device)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self._opened_at) - 1

    def drop(
        self, seed_pages: torch.Tensor, slot_mapping: torch.Tensor, clock: int, *, num_decode_tokens: int
    ) -> None:
        """Take seeds away that are opened by this step; such a page has the mean of its own keys.

        Args:
            seed_pages: Changed: ``[num_tokens]`` int32.
            slot_mapping: ``[num_tokens]`` int64 page * page_tokens + offset, or -1.
            clock: Number of the step, another for each.
            num_decode_tokens: Tokens at the head of the batch that decode. Others bring keys enough for a
                mean of their own, and keep no seed at all.
        """
        seed_pages[num_decode_tokens:] = -1
        seed_pages = seed_pages[:num_decode_tokens]
        opens = (slot_mapping >= 0) & (slot_mapping % self._page_tokens == 0)
        self._opened_at[torch.where(opens, slot_mapping // self._page_tokens, self.num_pages)] = clock
        is_fresh = self._opened_at[seed_pages.clamp(min=0)] == clock
        seed_pages.masked_fill_(is_fresh, -1)
