"""DecodeWorkspaces: room for decodes of every size that an engine captures, in the memory of the largest."""

import torch

from tq_kernels.decode_attention import DecodeWorkspace
from tq_kernels.decode_plan import DecodePlan, machine_of, plan_decode
from tq_kernels.layout import PageLayout


class DecodeWorkspaces:
    """Workspaces that share their memory, as layers and steps follow each other.

    All memory is taken at once, so that graphs which are captured with one workspace stay right when another
    is made.

    Args:
        layout: Of the pages.
        num_query_heads: Query heads of this process.
        max_seqs: Most sequences of a decode.
        max_tokens: Tokens of the longest sequence to be fast for.
        max_rows: Most query rows of a sequence: 1, and as many more as drafts are verified.
        device: Where the pages are.
    """

    def __init__(
        self,
        layout: PageLayout,
        *,
        num_query_heads: int,
        max_seqs: int,
        max_tokens: int,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self._layout = layout
        self._num_query_heads = num_query_heads
        self._max_pages = -(-max_tokens // layout.page_tokens)
        self._device = device
        self._made: dict[tuple[int, int], DecodeWorkspace] = {}
        sizes = [
            (num_seqs, self._plan(num_seqs, rows))
            for rows in range(1, max_rows + 1)
            for num_seqs in range(1, max_seqs + 1)
        ]
        heads, head_dim = layout.num_kv_heads, layout.head_dim
        columns = max(num_seqs * plan.padded_columns for num_seqs, plan in sizes)
        partials = max(num_seqs * plan.num_splits * plan.columns for num_seqs, plan in sizes)
        self._prepared = torch.empty(columns * heads * head_dim, dtype=torch.float16, device=device)
        self._positions = torch.empty(max_seqs, dtype=torch.int32, device=device)
        self._out = torch.empty(partials * heads * head_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(partials * heads, dtype=torch.float32, device=device)

    def get(self, num_seqs: int, rows: int = 1) -> DecodeWorkspace:
        """The workspace for so many sequences of so many query rows."""
        if (num_seqs, rows) not in self._made:
            plan = self._plan(num_seqs, rows)
            heads, head_dim = self._layout.num_kv_heads, self._layout.head_dim
            partial = (num_seqs, heads, plan.num_splits, plan.columns)
            self._made[num_seqs, rows] = DecodeWorkspace(
                layout=self._layout,
                plan=plan,
                prepared=_view(self._prepared, (num_seqs, heads, plan.padded_columns, head_dim)),
                positions=self._positions[:num_seqs],
                partial_out=_view(self._out, (*partial, head_dim)),
                partial_lse=_view(self._lse, partial),
            )
        return self._made[num_seqs, rows]

    def _plan(self, num_seqs: int, rows: int) -> DecodePlan:
        return plan_decode(
            self._layout,
            machine_of(self._device),
            num_seqs=num_seqs,
            num_query_heads=self._num_query_heads,
            max_pages=self._max_pages,
            rows=rows,
        )


def _view(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    size = 1
    for side in shape:
        size *= side
    return memory[:size].view(shape)
