"""How pages of all layers appear as the key rows and value rows that SGLang moves.

SGLang moves a cache as two equal rows a token and layer, keys and values, in buffers of their own. A page of
ours holds both, in one run of bytes that kernels must find together. So two layers make one of SGLang's: the
pages of an even layer are its "keys", those of the odd layer after it its "values". A row is page_bytes /
page_tokens, and SGLang's host pools, storage, linker and transfers move whole pages without knowing it.
"""

from tq_connectors.engine.sink_pool import NUM_SINKS, rows_for
from tq_kernels import PageLayout

SINK_SHARE = 64
"""Of the bytes of a pool, one part in so many is set aside for raw sinks."""
_FEWEST_SINK_SEQS = 64


def row_bytes(layout: PageLayout) -> int:
    """Bytes a token in one layer; page_tokens of them, one after the other, are a page."""
    return layout.slot_bytes * layout.num_kv_heads


def num_pairs(num_layers: int) -> int:
    """Layers that SGLang sees; the last one has a spare half where layers are odd in number."""
    return -(-num_layers // 2)


def pair_of(layer: int) -> int:
    """The layer of SGLang's in which a layer, counted from the first of this rank, lies."""
    return layer // 2


def token_bytes(layout: PageLayout, num_layers: int) -> int:
    """Bytes that a token takes, over all layers: its rows, and its share of what raw sinks take."""
    rows = row_bytes(layout) * 2 * num_pairs(num_layers)
    return rows + -(-rows // SINK_SHARE)


def sink_rows(layout: PageLayout, pool_tokens: int, max_seqs: int, item_bytes: int) -> int:
    """Rows of raw sinks that a pool affords.

    Args:
        layout: Of the pages.
        pool_tokens: Tokens of the pool.
        max_seqs: Sequences that SGLang runs at once, at most.
        item_bytes: Bytes of a number in the model's dtype.
    """
    of_row = 2 * NUM_SINKS * layout.num_kv_heads * layout.head_dim * item_bytes
    afforded = pool_tokens * row_bytes(layout) // (SINK_SHARE * of_row)
    return min(rows_for(max_seqs), max(afforded, rows_for(_FEWEST_SINK_SEQS)))
