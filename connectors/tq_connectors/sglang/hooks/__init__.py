"""What of SGLang is hooked: one file each, which says for which releases."""

from tq_connectors.sglang.hooks import (
    cell_size,
    command_line,
    dtype,
    hicache_events,
    pool,
    post_init,
    resolve_once,
    unified_events,
)
from tq_connectors.sglang.hooks.hook import Hook


def hooks_of_release() -> tuple[Hook, ...]:
    """The hooks for the SGLang that is installed, in the order in which an engine comes by them."""
    from sglang.srt.server_args import ServerArgs

    is_sealed = hasattr(ServerArgs, "resolve_once")
    arguments, events = (resolve_once, unified_events) if is_sealed else (post_init, hicache_events)
    return command_line.HOOK, arguments.HOOK, dtype.HOOK, cell_size.HOOK, pool.HOOK, events.HOOK
