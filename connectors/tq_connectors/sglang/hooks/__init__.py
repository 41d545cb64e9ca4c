"""What of SGLang is hooked: one file each, which says for which releases."""

from tq_connectors.sglang.hooks import cell_size, command_line, dtype, pool, post_init, resolve_once
from tq_connectors.sglang.hooks.hook import Hook


def hooks_of_release() -> tuple[Hook, ...]:
    """The hooks for the SGLang that is installed, in the order in which an engine comes by them."""
    from sglang.srt.server_args import ServerArgs

    arguments = resolve_once if hasattr(ServerArgs, "resolve_once") else post_init
    return command_line.HOOK, arguments.HOOK, dtype.HOOK, cell_size.HOOK, pool.HOOK
