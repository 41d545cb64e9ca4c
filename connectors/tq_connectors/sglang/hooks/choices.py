"""Names that SGLang's command line takes: the dtypes and the attention backend. SGLang 0.5.17 to 0.5.23."""

from typing import Any, get_args, get_type_hints

from tq_connectors.engine.layouts import DTYPES

BACKEND = "turboquant"


def add_choices() -> None:
    """Add the names, once.

    Raises:
        RuntimeError: This release of SGLang keeps its dtypes elsewhere.
    """
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    dtypes = _dtype_choices(server_args.ServerArgs)
    dtypes.extend(name for name in DTYPES if name not in dtypes)
    if BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([BACKEND])

    register_attention_backend(BACKEND)(_create_backend)


def _create_backend(runner: Any) -> Any:
    from tq_connectors.sglang.backend import TurboQuantBackend

    return TurboQuantBackend(runner)


def _dtype_choices(arguments: type) -> list[str]:
    """The list behind `--kv-cache-dtype`, for which SGLang has no function that adds to it."""
    hint = get_type_hints(arguments, include_extras=True)["kv_cache_dtype"]
    for note in get_args(hint)[1:]:
        if isinstance(choices := getattr(note, "choices", None), list):
            return choices
    raise RuntimeError("this release of SGLang keeps the choices of --kv-cache-dtype elsewhere")
