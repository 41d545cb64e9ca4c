"""What vLLM asks of an attention backend before it has one: what is served, page sizes, classes."""

import dataclasses
from itertools import product
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from tq_connectors.engine.layouts import DTYPES, PAGE_TOKENS, layout_for
from tq_connectors.vllm.backend_name import backend_name

_SMALLEST_HEAD, _LARGEST_HEAD = 32, 256
"""Channels for which there are kernels, and a centre that can mark a page."""


def page_tokens_of(config: VllmConfig) -> int:
    """Tokens of a page: 128 where the operator asked for blocks of a multiple of it, else 64.

    Where layers of other kinds share the pool, vLLM raises block sizes on its own, by the size of a token in
    a page of ours, so that must not depend on what comes out: pages are of 64 tokens then.
    """
    cache, model = config.cache_config, config.model_config
    if cache.kv_cache_dtype_skip_layers or (model is not None and model.is_hybrid):
        return PAGE_TOKENS[0]
    asked = cache.block_size if cache.user_specified_block_size else PAGE_TOKENS[0]
    return PAGE_TOKENS[1] if asked % PAGE_TOKENS[1] == 0 else PAGE_TOKENS[0]


class TQAttentionBackend(AttentionBackend):
    """Attention on compressed pages, for any dtype of ours.

    vLLM asks for the bytes of a token by a spec that tells neither the dtype's name nor the page's size, so
    each pair of them has a subclass. This class is the door to them: `full_cls_name`, by which vLLM finds a
    backend's class, names the one that the current configuration asks for.
    """

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(DTYPES)
    page_tokens: ClassVar[int | None] = None

    @staticmethod
    def get_name() -> str:
        """The name under which the backend is registered, whichever subclass it is."""
        return backend_name()

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """The class of a layer's attention."""
        from tq_connectors.vllm.attention import TQAttentionImpl

        return TQAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class that prepares a step."""
        from tq_connectors.vllm.metadata import TQMetadataBuilder

        return TQMetadataBuilder

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and name of the subclass for the current configuration."""
        if cls.page_tokens is not None:
            return cls.__module__, cls.__qualname__
        config = get_current_vllm_config()
        return backend_for(config.cache_config.cache_dtype, config).full_cls_name()

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a page."""
        return list(PAGE_TOKENS) if cls.page_tokens is None else [cls.page_tokens]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which the bytes of a page lie together; their order within is the kernels' business."""
        return (KVCacheLayout.LBHNC, *(each for each in KVCacheLayout if _keeps_pages(each)))

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windowed layers are compressed like all others."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Steps are planned by the lengths of queries that the host knows."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        *others: Any,
        **more: Any,
    ) -> str | None:
        """Why pages cannot hold such heads or blocks, in a sentence, or None where they can."""
        if block_size is not None and block_size % PAGE_TOKENS[0]:
            return f"pages are of 64 or 128 tokens, --block-size {block_size} is no multiple of 64"
        if not _SMALLEST_HEAD <= head_size <= _LARGEST_HEAD:
            return f"heads have {_SMALLEST_HEAD} to {_LARGEST_HEAD} channels, not {head_size}"
        try:
            layout_for(kv_cache_dtype, head_dim=head_size, num_kv_heads=1)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec with the bytes that a token has in a page, keys, values and statistics.

        Raises:
            ValueError: Keys and values are of different sizes.
        """
        if cls.page_tokens is None or spec.state_content_bytes is not None or spec.dtype != torch.uint8:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"a page holds keys and values of one size, not {spec.head_size} and {spec.head_size_v}"
            )
        (dtype_name,) = cls.supported_kv_cache_dtypes
        layout = layout_for(
            dtype_name,
            head_dim=spec.head_size,
            num_kv_heads=spec.num_kv_heads,
            page_tokens=cls.page_tokens,
        )
        return dataclasses.replace(spec, state_content_bytes=layout.slot_bytes)


def backend_for(dtype_name: str, config: VllmConfig) -> type[TQAttentionBackend]:
    """The backend for layers of a dtype of ours."""
    return BACKENDS[dtype_name, page_tokens_of(config)]


def _keeps_pages(layout: KVCacheLayout) -> bool:
    return layout.is_block_compact and layout is not KVCacheLayout.LBHNC


def _subclass(dtype_name: str, page_tokens: int) -> type[TQAttentionBackend]:
    name = f"TQAttentionBackend_{dtype_name}_{page_tokens}"
    facts = {"supported_kv_cache_dtypes": [dtype_name], "page_tokens": page_tokens, "__module__": __name__}
    return type(name, (TQAttentionBackend,), facts)


BACKENDS = {pair: _subclass(*pair) for pair in product(DTYPES, PAGE_TOKENS)}
"""The backend of each dtype and page size; vLLM finds them by name in this module."""
globals().update({backend.__name__: backend for backend in BACKENDS.values()})
