"""One flag instead of two: a cache dtype of ours selects our attention backend, any other dtype vLLM's.

vLLM has no hook for that. Its platforms choose from lists of their own, on which a registered backend is not,
and an explicit `--attention-backend TQ` is taken for every layer, also for those left in bf16. So the
platform's `get_attn_backend_cls` is wrapped, on the one object that this process asks. Its signature is that
of 0.26 to 0.33.
"""

from typing import Any

from tq_connectors.engine.layouts import DTYPES
from tq_connectors.vllm.releases import require_pages

_BACKEND_PATH = "tq_connectors.vllm.backend.TQAttentionBackend"


def register_backend() -> None:
    """Register the backend, officially, and let this process's platform choose it by the layer's dtype.

    Raises:
        ConfigError: This release is too old, or another plugin has its only name.
        Exception: Whatever a release of vLLM without a registry of backends raises.
    """
    from vllm.platforms import current_platform

    from tq_connectors.vllm.backend_name import backend_name, register_path

    require_pages()
    register_path(_BACKEND_PATH)
    if not isinstance(current_platform.get_attn_backend_cls, _ByDtype):
        current_platform.get_attn_backend_cls = _ByDtype(current_platform, backend_name())


class _ByDtype:
    """A platform's choice of an attention backend, with layers of our dtypes taken out of it."""

    def __init__(self, platform: Any, our_name: str) -> None:
        self._platform, self._our_name = platform, our_name
        self._choose = platform.get_attn_backend_cls

    def __call__(self, selected_backend: Any, attn_selector_config: Any, **kwargs: Any) -> str:
        is_ours_selected = selected_backend is not None and selected_backend.name == self._our_name
        if attn_selector_config.kv_cache_dtype not in DTYPES:
            # a layer left in the model's dtype gets what it would have without us
            selected_backend = None if is_ours_selected else selected_backend
        elif selected_backend is None or is_ours_selected:
            return self._ours(attn_selector_config)
        path: str = self._choose(selected_backend, attn_selector_config=attn_selector_config, **kwargs)
        return path

    def _ours(self, config: Any) -> str:
        # imported when a model is built: a plugin is loaded before vLLM is whole
        from vllm.config import get_current_vllm_config

        from tq_connectors.vllm.backend import backend_for

        backend = backend_for(config.kv_cache_dtype, get_current_vllm_config())
        reasons = backend.validate_configuration(
            device_capability=self._platform.get_device_capability(), **config._asdict()
        )
        if reasons:
            raise ValueError(
                f"--kv-cache-dtype {config.kv_cache_dtype} does not serve this model: {'; '.join(reasons)}"
            )
        return ".".join(backend.full_cls_name())
