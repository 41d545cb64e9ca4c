"""Quantize: keys and values of single tokens or whole chunks into packed pages, in one launch.

With R the rotation and c the centre of a key's page, z = R k - c for keys and z = R v for values; each
coordinate of z sqrt(d) t / |z| takes its nearest level L, or in launches of many tokens that of the best of
three cell sizes; the scale is |z| / |L|. `kernels/README.md` derives it; `reference_slots.py` is the same in
PyTorch.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from tq_kernels import reference_slots
from tq_kernels._compiled import launch
from tq_kernels._dispatch import has_nvidia_assembly, is_interpreted, takes_kernel
from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import PageShape, page_shape
from tq_kernels.codebook import LEVELS
from tq_kernels.decode_plan import choose_variant, machine_of
from tq_kernels.layout import PageLayout
from tq_kernels.reference import rotation_of
from tq_kernels.spec import Rotation

_LARGEST_APPEND = 512
"""Tokens up to which every token has a program to itself: decode batches, and chunks too short to matter."""
_SMALLEST_ROWS = 16
"""Tokens of the smallest tile; every page has as many."""
_WINDOW = 32
_PROGRAM_TOKENS = 256
"""Tokens that a program of whole pages looks at, so that it reads the rotation once for several pages."""
_LARGEST_TILE = 8192
"""Elements of a tile that four warps hold."""
_LARGEST_WIDTH = 128
"""Channels up to which four warps hold the rotation."""
_MAX_REGISTERS = 128
"""With these, four programs of four warps share a multiprocessor and hide each other's loads."""
_APPEND_WARPS = 2
"""The fastest of those that were timed; `benchmarks/NOTES.md` has the times."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How a launch cuts its tokens up.

    Args:
        variant: ``"append"`` for few tokens, ``"pages"`` for many, ``"hopper"`` for tokens of as many pages
            on such a machine.
        programs: Programs a KV head.
        windows: Windows a program looks at, one after the other.
        window: Tokens in a window, each of which may lead a run.
        rows: Tokens of a page that are rotated and packed at once.
        num_warps: Warps a program.
        search: Whether every vector tries all of `codebook.STEPS`. "append" does not: a decode step would
            wait for the search.
        max_registers: Registers a thread on NVIDIA, so that more programs share a multiprocessor, or None.
    """

    variant: str
    programs: int
    windows: int
    window: int
    rows: int
    num_warps: int
    search: bool
    max_registers: int | None


@dataclass(frozen=True, slots=True)
class Mode:
    """Compile-time facts of a launch; parts are those in which a float32 vector meets the rotation."""

    rows: int
    window: int
    windows: int
    seeded: bool
    balanced: bool
    search: bool
    key_parts: int
    value_parts: int
    ptx: bool


def plan_quantize(
    num_tokens: int, shape: PageShape, *, wide: bool = False, hopper: bool = False
) -> LaunchPlan:
    """The plan for a number of tokens.

    Args:
        num_tokens: Tokens in the launch.
        shape: Of the pages.
        wide: Whether rows are float32 before they are rotated, by their dtype or by a balance.
        hopper: Whether a warp may take a token, as `hopper_appends` says.
    """
    if hopper and num_tokens <= _LARGEST_APPEND:
        return LaunchPlan(
            variant="hopper",
            programs=2 * num_tokens,
            windows=1,
            window=1,
            rows=1,
            num_warps=1,
            search=True,
            max_registers=None,
        )
    is_broad = shape.tile_dim > _LARGEST_WIDTH
    max_registers = None if wide or is_broad else _MAX_REGISTERS
    if num_tokens <= _LARGEST_APPEND:
        return LaunchPlan(
            variant="append",
            programs=num_tokens,
            windows=1,
            window=1,
            rows=_SMALLEST_ROWS,
            num_warps=8 if is_broad else _APPEND_WARPS,
            search=False,
            max_registers=max_registers,
        )
    rows = _SMALLEST_ROWS if wide and is_broad else shape.page_tokens
    window = min(_WINDOW, shape.page_tokens)
    return LaunchPlan(
        variant="pages",
        programs=-(-num_tokens // _PROGRAM_TOKENS),
        windows=_PROGRAM_TOKENS // window,
        window=window,
        rows=rows,
        num_warps=8 if is_broad or rows * shape.tile_dim > _LARGEST_TILE else 4,
        search=True,
        max_registers=max_registers,
    )


def hopper_appends(device: torch.device, layout: PageLayout) -> bool:
    """Whether tokens that share no page have a kernel of their own on a device."""
    coded = layout.spec.key.rotated and layout.spec.key in LEVELS
    return coded and takes_kernel(device) and choose_variant(machine_of(device), layout) == "hopper"


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
            faster, and makes other bytes where tokens of few launches try fewer cell sizes.
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
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.stride(0) * layout.page_tokens >= 1 << 31:
            raise ValueError(
                f"{name} has a stride of {tensor.stride(0)}, too large for 32-bit offsets in a page"
            )
    _check_sinks(sink_slots, sink_keys, sink_values, num_tokens, layout, pages.device)
    shape = page_shape(layout)
    if not num_tokens:
        return
    wide = keys.dtype is torch.float32 or key_balance is not None
    hopper = one_per_page and hopper_appends(pages.device, layout)
    plan = plan_quantize(num_tokens, shape, wide=wide, hopper=hopper)
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
    _launch(plan, keys, values, slot_mapping, pages, layout, seed_pages, key_balance, sinks)


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


def _launch(
    plan: LaunchPlan,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    seed_pages: torch.Tensor | None,
    key_balance: torch.Tensor | None,
    sinks: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> None:
    from tq_kernels.device.quantize import quantize_runs

    ptx = has_nvidia_assembly(pages.device)
    key_parts, value_parts, rotation_dtype = _parts(keys.dtype, key_balance is not None)
    mode = Mode(
        rows=plan.rows,
        window=plan.window,
        windows=plan.windows,
        seeded=seed_pages is not None,
        balanced=key_balance is not None,
        search=plan.search,
        key_parts=key_parts,
        value_parts=value_parts,
        ptx=ptx,
    )
    launch(
        quantize_runs,
        (layout.num_kv_heads, plan.programs),
        p_keys=keys,
        p_values=values,
        p_slots=slot_mapping,
        p_seeds=seed_pages,
        p_balance=key_balance,
        p_rotation=_rotation_tile(layout, pages.device, rotation_dtype),
        p_pages=pages,
        p_sink_slots=sinks[0],
        p_sink_keys=sinks[1],
        p_sink_values=sinks[2],
        num_tokens=keys.shape[0],
        key_token_stride=keys.stride(0),
        key_head_stride=keys.stride(1),
        value_token_stride=values.stride(0),
        value_head_stride=values.stride(1),
        page_stride=pages.stride(0),
        sink_token_stride=0 if sinks[1] is None else sinks[1].stride(0),
        sink_head_stride=0 if sinks[1] is None else sinks[1].stride(1),
        SHAPE=page_shape(layout),
        MODE=mode,
        num_warps=plan.num_warps,
        num_stages=1,
        **({"maxnreg": plan.max_registers} if ptx else {}),
    )


def _parts(dtype: torch.dtype, balanced: bool) -> tuple[int, int, torch.dtype]:
    """Parts of keys, parts of values, and the dtype of the parts and the rotation.

    A bfloat16 holds 8 bits and the range of float32: 3 parts are a float32, 2 are a float16 or a quotient of
    half-precision numbers within 2^-17.
    """
    if is_interpreted():
        return 0, 0, torch.float32
    if dtype is torch.float32:
        return 3, 3, torch.bfloat16
    if balanced:
        return 2, 1 if dtype is torch.bfloat16 else 2, torch.bfloat16
    return 1, 1, dtype


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rotation_tile(layout: PageLayout, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """The integer matrix (d R)^T, ``[tile_dim, tile_dim]``, columns in the order of the kernel's tiles.

    Rows and columns beyond head_dim are zero. Its integers are at most head_dim in size, which bfloat16 holds
    exactly up to 256. None for a codec that does not rotate.
    """
    if layout.spec.rotation is Rotation.NONE:
        return None
    shape = page_shape(layout)
    integers = (rotation_of(layout, torch.device("cpu")) * layout.head_dim).round().T
    column = torch.arange(shape.tile_dim)
    quads = layout.head_dim // (4 * shape.key_groups)
    word = column // 2 % 4 * (shape.tile_dim // (16 * shape.key_groups)) + column // (16 * shape.key_groups)
    quad = column // 16 % shape.key_groups * quads + word
    channel = 4 * quad + column // 8 % 2 * 2 + column % 2
    tile = torch.zeros(shape.tile_dim, shape.tile_dim)
    tile[: layout.head_dim, word < quads] = integers[:, channel[word < quads]]
    return tile.to(device, dtype)
