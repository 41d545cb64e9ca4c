"""Names that engines give their KV cache dtype, and the pages that they stand for."""

from tq_kernels import PRESETS, PageLayout, preset

DTYPES = tuple(name for name, spec in PRESETS.items() if spec.key.rotated)
"""What `--kv-cache-dtype` may say for pages of ours; `fp8` and `raw` are the engines' own."""

PAGE_TOKENS = (64, 128)
"""Tokens of a page, and so of an engine's block or page; the first is the default."""


def layout_for(
    dtype: str, *, head_dim: int, num_kv_heads: int, page_tokens: int = PAGE_TOKENS[0]
) -> PageLayout:
    """The layout of a dtype's pages.

    Args:
        dtype: One of `DTYPES`.
        head_dim: Channels of a key and of a value.
        num_kv_heads: KV heads that this process has.
        page_tokens: Tokens of a page.

    Raises:
        ValueError: Pages that there are not; the message says what to choose.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown KV cache dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if page_tokens not in PAGE_TOKENS:
        raise ValueError(
            f"pages of {dtype} have {' or '.join(map(str, PAGE_TOKENS))} tokens, not {page_tokens}: "
            "choose that block or page size"
        )
    return PageLayout(
        spec=preset(dtype), head_dim=head_dim, num_kv_heads=num_kv_heads, page_tokens=page_tokens
    )
