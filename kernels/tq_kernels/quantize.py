"""Quantize: keys and values of single tokens or whole chunks into packed pages, in one launch.

With R the rotation and c the centre of a key's page, z = R k - c for keys and z = R v for values; each
coordinate of z sqrt(d) t / |z| takes its nearest level L, or where a plan says so that of the best of three
cell sizes; the scale is |z| / |L|. `kernels/README.md` derives it; `reference_slots.py` is the same in
PyTorch.
"""

import torch

from tq_kernels import hopper_quantize, reference_slots
from tq_kernels._dispatch import takes_kernel
from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import page_shape
from tq_kernels.codebook import LEVELS
from tq_kernels.decode_plan import choose_variant, machine_of
from tq_kernels.layout import PageLayout
from tq_kernels.quantize_plan import LARGEST_APPEND, plan_quantize


def hopper_appends(device: torch.device, layout: PageLayout) -> bool:
    """Whether tokens that share no page have a kernel of their own on a device."""
    coded = layout.spec.key.rotated and layout.spec.key in LEVELS
    return coded and takes_kernel(device) and choose_variant(machine_of(device), layout) == "hopper"


def hopper_packs(
    layout: PageLayout, keys: torch.Tensor, values: torch.Tensor, key_balance: torch.Tensor | None
) -> bool:
    """Whether many such tokens have a kernel of their own where they are."""
    return (
        hopper_quantize.serves(layout, keys, values, balanced=key_balance is not None)
        and takes_kernel(keys.device)
        and choose_variant(machine_of(keys.device), layout) == "hopper"
    )


def quantize_slots(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    *,
    one_per_page: bool = False,
    seed_pages: torch.Tensor | None = None,
    key_balance: torch.Tensor | None = None,
    sink_slots: torch.Tensor | None = None,
    sink_keys: torch.Tensor | None = None,
    sink_values: torch.Tensor | None = None,
) -> None:
    """Write tokens into packed pages, in place; bits of other tokens stay as they are.

    Tokens of one page form a run, and must stand within page_tokens positions of each other. A run that
    holds offset 0 opens its page: it sets the centre, to the mean of its rotated keys or, where `seed_pages`
    names a page for the token at offset 0 and the run does not fill its page, to the centre of that page; and
    it zeroes the padding. Any other run takes the centre that is there. A page filled by one run equals
    `reference.quantize`, but for what the order of sums may change.

    Nothing is allocated after the first call for a layout and dtype, and nothing waits for the device: later
    calls may be captured in a CUDA graph.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_dim]``, bf16, fp16 or fp32, last dimension contiguous.
        values: The same shape and dtype.
        slot_mapping: ``[num_tokens]`` int64 or int32: page * page_tokens + offset, different for every token,
            or -1 to skip the token.
        pages: ``[num_pages, page_bytes]`` uint8.
        layout: Page geometry and codec; page_tokens a power of two up to 128.
        one_per_page: The caller's word that no two tokens have the same page, as in a decode step; it is
            faster on Hopper, and tries all cell sizes there, where other launches of few tokens try one.
        seed_pages: ``[num_tokens]`` int32 page whose centre a page opened by this token takes, or -1. The
            launch must not open that page itself.
        key_balance: ``[num_kv_heads, head_dim]`` float32, by which keys are divided before anything else.
        sink_slots: ``[num_tokens]`` int32 place in `sink_keys` and `sink_values` where a token is kept as it
            is besides, or -1; a token that is kept is different from all others that are.
        sink_keys: ``[num_sink_slots, num_kv_heads, head_dim]``, bf16, fp16 or fp32.
        sink_values: The same shape, dtype and strides; all three come together.

    Raises:
        ValueError: An argument of another shape, dtype or device, or a size that kernels do not serve.
    """
    check_pages(pages, layout)
    num_tokens = keys.shape[0]
    shape_of_tokens = (num_tokens, layout.num_kv_heads, layout.head_dim)
    check_tensor("keys", keys, shape_of_tokens, FLOATS, pages.device)
    check_tensor("values", values, shape_of_tokens, (keys.dtype,), pages.device)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), (torch.int64, torch.int32), pages.device)
    if seed_pages is not None:
        check_tensor("seed_pages", seed_pages, (num_tokens,), (torch.int32,), pages.device)
    if key_balance is not None:
        balance_shape = (layout.num_kv_heads, layout.head_dim)
        check_tensor(
            "key_balance", key_balance, balance_shape, (torch.float32,), pages.device, contiguous_dims=2
        )
    _check_strides(keys, values, layout)
    _check_sinks(sink_slots, sink_keys, sink_values, num_tokens, layout, pages.device)
    shape = page_shape(layout)
    if not num_tokens:
        return
    wide = keys.dtype is torch.float32 or key_balance is not None
    hopper = one_per_page and hopper_appends(pages.device, layout)
    many = num_tokens > LARGEST_APPEND and hopper_packs(layout, keys, values, key_balance)
    plan = plan_quantize(num_tokens, shape, wide=wide, hopper=hopper, hopper_pages=many)
    if not takes_kernel(pages.device):
        reference_slots.quantize_slots(
            keys,
            values,
            slot_mapping,
            pages,
            layout,
            seed_pages=seed_pages,
            key_balance=key_balance,
            search=plan.search,
        )
        if sink_slots is not None and sink_keys is not None and sink_values is not None:
            reference_slots.keep_sinks(keys, values, sink_slots, sink_keys, sink_values)
        return
    sinks = (sink_slots, sink_keys, sink_values)
    if plan.variant == "hopper":
        from tq_kernels.hopper_launch import launch_append  # Gluon is a part of some Triton releases only

        launch_append(
            keys,
            values,
            slot_mapping,
            pages,
            layout,
            seed_pages=seed_pages,
            key_balance=key_balance,
            sinks=sinks,
        )
        return
    if plan.variant == "hopper_pages":
        from tq_kernels.hopper_launch_quantize import launch_windows  # Gluon again

        launch_windows(
            keys,
            values,
            slot_mapping,
            pages,
            layout,
            seed_pages=seed_pages,
            key_balance=key_balance,
            sinks=sinks,
        )
        return
    from tq_kernels._launch_quantize import launch_quantize  # Triton is imported where it is used

    launch_quantize(
        plan,
        keys,
        values,
        slot_mapping,
        pages,
        layout,
        seed_pages=seed_pages,
        key_balance=key_balance,
        sinks=sinks,
    )


def _check_strides(keys: torch.Tensor, values: torch.Tensor, layout: PageLayout) -> None:
    for name, tensor in (("keys", keys), ("values", values)):
        stride = tensor.stride(0)
        if stride * layout.page_tokens >= 1 << 31:
            raise ValueError(f"{name} has a stride of {stride}, too large for 32-bit offsets in a page")


def _check_sinks(
    sink_slots: torch.Tensor | None,
    sink_keys: torch.Tensor | None,
    sink_values: torch.Tensor | None,
    num_tokens: int,
    layout: PageLayout,
    device: torch.device,
) -> None:
    if sink_slots is None or sink_keys is None or sink_values is None:
        if not sink_slots is sink_keys is sink_values:
            raise ValueError("sink_slots, sink_keys and sink_values come together")
        return
    check_tensor("sink_slots", sink_slots, (num_tokens,), (torch.int32,), device)
    shape = (None, layout.num_kv_heads, layout.head_dim)
    check_tensor("sink_keys", sink_keys, shape, FLOATS, device)
    check_tensor("sink_values", sink_values, tuple(sink_keys.shape), (sink_keys.dtype,), device)
    if sink_keys.stride() != sink_values.stride():
        raise ValueError(
            f"sink_keys and sink_values must have equal strides, not {sink_keys.stride()} and "
            f"{sink_values.stride()}"
        )
