"""The sum in the runbook: the memory that a server may come to hold."""

from tq_store.config import ServerConfig

_EMPTY_PROCESS_BYTES = 256 << 20


def memory_needed(config: ServerConfig) -> int:
    """Bytes: the budget and 15 %, blocks on their way in and out, a write queue a lower tier, the process."""
    num_queues = (config.disk_path is not None) + (config.redis_url is not None)
    moving_bytes = config.max_inflight_bytes + config.max_outflight_bytes
    queue_bytes = num_queues * config.write_queue_bytes
    return int(1.15 * config.memory_budget_bytes) + moving_bytes + queue_bytes + _EMPTY_PROCESS_BYTES
