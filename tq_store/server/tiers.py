"""The tiers that a config names, opened."""

from contextlib import AsyncExitStack

from tq_store.backends.base import Backend
from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.config import ServerConfig


async def open_tiers(config: ServerConfig, opened: AsyncExitStack) -> list[Backend]:
    """From the fastest to the slowest; `opened` closes what was opened if the rest fails.

    Raises:
        ConfigError, BackendError: One cannot be opened.
    """
    tiers: list[Backend] = [MemoryBackend(budget_bytes=config.memory_budget_bytes)]
    if config.disk_path is not None and config.disk_budget_bytes is not None:
        tiers.append(await DiskBackend.open(config.disk_path, budget_bytes=config.disk_budget_bytes))
        opened.push_async_callback(tiers[-1].close)
    if config.redis_url is not None:
        tiers.append(await _open_redis(config.redis_url, config))
        opened.push_async_callback(tiers[-1].close)
    return tiers


def coded_tiers(config: ServerConfig) -> list[str]:
    """Names of those in which blocks are kept compressed."""
    codings = {"disk": config.disk_coding, "redis": config.redis_coding}
    return [name for name, coding in codings.items() if coding == "zstd"]


async def _open_redis(url: str, config: ServerConfig) -> RedisBackend:
    return await RedisBackend.open(
        url,
        limits=RedisLimits(
            timeout_s=config.redis_timeout_s,
            lookup_timeout_s=config.redis_lookup_timeout_s,
            ttl_s=config.redis_ttl_s,
        ),
        user=config.redis_user,
        password_file=config.redis_password_file,
        sentinel_user=config.redis_sentinel_user,
        sentinel_password_file=config.redis_sentinel_password_file,
        tls_ca=config.redis_tls_ca,
        tls_cert=config.redis_tls_cert,
        tls_key=config.redis_tls_key,
    )
