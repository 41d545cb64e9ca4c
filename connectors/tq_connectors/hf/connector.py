"""TQConnector: gives a transformers model caches that start from the store and are saved to it."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tq_connectors.codec import CacheGeometry
from tq_connectors.hf.attention import ATTENTION_NAME, register_attention
from tq_connectors.hf.cache import NUM_SINKS, TQCache
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels.layout import PageLayout
from tq_kernels.spec import CodecSpec
from tq_store.client import StoreClient
from tq_store.errors import ConfigError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose attention is causal softmax attention with rotary keys and nothing more."""
DEFAULT_PREFILL_TOKENS = 256


def cache_geometry(config: PreTrainedConfig, dtype: torch.dtype) -> CacheGeometry:
    """Shape of the KV cache of a model.

    Raises:
        ConfigError: The model type is not served.
    """
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model type {config.model_type!r} is not served; served are {', '.join(MODEL_TYPES)}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CacheGeometry(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        kv_dtype=str(dtype).removeprefix("torch."),
    )


class TQConnector:
    """Connects one model to one store; a context manager.

    The model's attention implementation is set to ``"tq"``; it then works with `TQCache` as described there
    and with any other cache as ``"sdpa"`` does. A store that is empty, slow, dead or lying costs misses.

    Args:
        model: A causal language model of one of `MODEL_TYPES`.
        client: Connection to the store, or None to only compress; owned by the caller.
        spec: The codec.
        model_name: Name of the model in the namespace.
        revision: What tells its weights from others of that name.
        page_tokens: Tokens in a page.
        salt: Keeps apart what only the caller knows to differ (a LoRA adapter, a tenant).

    Raises:
        ConfigError: The model or its shape is not served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: StoreClient | None,
        spec: CodecSpec,
        *,
        model_name: str,
        revision: str,
        page_tokens: int = 64,
        salt: str = "",
    ) -> None:
        geometry = cache_geometry(model.config, model.dtype)
        try:
            self.layout = PageLayout(
                spec=spec,
                head_dim=geometry.head_dim,
                num_kv_heads=geometry.num_kv_heads,
                page_tokens=page_tokens,
            )
        except ValueError as error:
            raise ConfigError(f"{model_name} cannot be cached with this codec: {error}") from error
        self.num_layers = geometry.num_layers
        self._model = model
        self.prefix_cache = (
            None
            if client is None
            else PrefixCache(client, self.layout, geometry, model=model_name, revision=revision, salt=salt)
        )
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)

    def __enter__(self) -> "TQConnector":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_cache(self, token_ids: Sequence[int]) -> TQCache:
        """A cache that holds the longest stored prefix of the prompt, short of its last token.

        Full pages of the prompt that the model then computes are saved as soon as they are complete.

        Args:
            token_ids: The whole prompt.
        """
        if self.prefix_cache is None:
            return TQCache(self.layout, self.num_layers)
        prefix_cache, keys = self.prefix_cache, self.prefix_cache.keys(token_ids)

        def save(index: int, page: torch.Tensor) -> None:
            if index < len(keys):
                prefix_cache.save(keys[index], page.cpu().numpy().data)

        cache = TQCache(self.layout, self.num_layers, on_page=save)
        reusable = (len(token_ids) - 1) // self.layout.page_tokens
        if reusable:
            # sinks depend on themselves alone: computing four tokens is cheaper than storing them raw
            self.prefill(token_ids[:NUM_SINKS], cache)
            cache.preload(prefix_cache.load(keys[:reusable]))
        return cache

    def save_generated(self, cache: TQCache, token_ids: Sequence[int]) -> None:
        """Save pages that were completed after the prompt, so that the next turn finds them.

        Args:
            cache: From `open_cache`.
            token_ids: Prompt and generated tokens whose keys and values the cache holds.
        """
        if self.prefix_cache is not None:
            for index, key in enumerate(self.prefix_cache.keys(token_ids)[: cache.num_pages]):
                self.prefix_cache.save(key, cache.page(index).cpu().numpy().data)

    def prefill(
        self,
        token_ids: Sequence[int],
        cache: TQCache,
        *,
        chunk_tokens: int = DEFAULT_PREFILL_TOKENS,
        on_chunk: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute what the cache does not hold, in chunks, so that pages are saved while it works.

        Chunks end at multiples of `chunk_tokens`, wherever the cache begins, so that a prefix of whole chunks
        from the store leaves what is raw and what is compressed for each later token as it was.

        Args:
            token_ids: The whole prompt; longer than what the cache holds.
            cache: From `open_cache`.
            chunk_tokens: Most tokens in one forward pass.
            on_chunk: Told the number of tokens the cache holds after each pass.

        Returns:
            Logits ``[num_computed, vocabulary]`` float32 of the positions that were computed.
        """
        logits = []
        with torch.inference_mode():
            while (start := cache.get_seq_length()) < len(token_ids):
                end = (start // chunk_tokens + 1) * chunk_tokens
                chunk = torch.tensor([token_ids[start:end]], device=self._model.device)
                logits.append(self._model(input_ids=chunk, past_key_values=cache).logits[0].float())
                if on_chunk is not None:
                    on_chunk(cache.get_seq_length())
        return torch.cat(logits)

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish saving as far as `timeout_s` allows. May be called twice."""
        if self.prefix_cache is not None:
            self.prefix_cache.close(timeout_s)
