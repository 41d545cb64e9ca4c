"""The attention backend among those of SGLang 0.5.17 to 0.5.23, by the functions that it has for that."""

from typing import Any

from tq_connectors.sglang.hooks.arguments import BACKEND


def add_backend() -> None:
    """Register the backend and its name, once."""
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(_create_backend)


def _create_backend(runner: Any) -> Any:
    from tq_connectors.sglang.backend import TurboQuantBackend

    return TurboQuantBackend(runner)
