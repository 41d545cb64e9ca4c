"""The name of our attention backend: TQ; for vLLM 0.29 to 0.31 CUSTOM, the only one those have to give."""

from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tq_store.errors import ConfigError

_NAME, _STRANGER = "TQ", "CUSTOM"


def backend_name() -> str:
    """What an operator may write after `--attention-backend`, and what vLLM calls it."""
    return _NAME if _takes_names() else _STRANGER


def register_path(path: str) -> None:
    """Give the name to a class. May be called again.

    Raises:
        ConfigError: Another plugin has the only name there is.
    """
    if not _takes_names():
        stranger = AttentionBackendEnum[_STRANGER]
        if stranger.is_overridden() and stranger.get_path() != path:
            raise ConfigError(f"its backend {_STRANGER} is {stranger.get_path()} already")
        registry.register_backend(stranger, path)
    elif _NAME not in AttentionBackendEnum.__members__:
        registry.register_backend(_NAME, path)


def _takes_names() -> bool:
    return hasattr(AttentionBackendEnum, "register")
