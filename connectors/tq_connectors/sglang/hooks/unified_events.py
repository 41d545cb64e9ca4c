"""The scheduler's look at HiCache leaves the interpreter to loads of ours for a moment. SGLang 0.5.23."""

from tq_connectors.sglang.hooks.hook import Hook
from tq_connectors.sglang.rests import rest_for_loads

HOOK = Hook(
    target="sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.check_hicache_events",
    kind="after",
    function=rest_for_loads,
    parameters=("self",),
    is_needed=False,
)
