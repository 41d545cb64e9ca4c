"""TQConnector: gives a transformers model caches that start from the store and are saved to it."""

import copy
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tq_connectors.codec import CacheGeometry
from tq_connectors.codec_state import CodecState
from tq_connectors.hf.attention import ATTENTION_NAME, register_attention
from tq_connectors.hf.cache import NUM_SINKS, TQCache
from tq_connectors.model_layout import ModelLayout
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels.balance import estimate_balance
from tq_kernels.spec import CodecSpec
from tq_store.client import StoreClient
from tq_store.errors import ConfigError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose attention is causal softmax attention with rotary keys and nothing more."""
_LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")
"""With these a key depends on the length of the whole sequence, so a page belongs to no prefix."""
_NO_IDENTITY = ("_name_or_path", "transformers_version", "dtype")
DEFAULT_PREFILL_TOKENS = 256
STATE_TOKENS = 256
"""Tokens that a codec state is measured on, fewer where the first prompt is shorter."""
STATE_RETRY_S = 10.0
"""How long pages are made without a codec state before it is asked for again."""

logger = logging.getLogger(__name__)


def cache_geometry(config: PreTrainedConfig, dtype: torch.dtype) -> CacheGeometry:
    """Shape of the KV cache of a model.

    Raises:
        ConfigError: The model type or its rotary embedding is not served.
    """
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model type {config.model_type!r} is not served; served are {', '.join(MODEL_TYPES)}"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if rope_type in _LENGTH_DEPENDENT_ROPE_TYPES:
        raise ConfigError(
            f"rope_type {rope_type!r} is not served: its keys depend on what follows them, so prefixes "
            "cannot be shared; use 'linear', 'yarn' or 'llama3' scaling"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CacheGeometry(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        kv_dtype=str(dtype).removeprefix("torch."),
    )


def config_digest(config: PreTrainedConfig) -> str:
    """Digest, hex, of a configuration as the model runs it, changes made after loading included."""
    identity = {name: value for name, value in config.to_dict().items() if name not in _NO_IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


class _PageSaver:
    """Queues the pages of one cache for saving, each once, as far as their tokens are known."""

    def __init__(self, prefix_cache: PrefixCache, token_ids: Sequence[int]) -> None:
        self._prefix_cache = prefix_cache
        self._token_ids = list(token_ids)
        self._num_saved = 0
        self.keys = prefix_cache.keys(token_ids)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PageSaver":
        return copy.copy(self)  # a copied cache goes on with the same store

    def expect(self, token_ids: Sequence[int]) -> None:
        """Learn the tokens that follow those known so far.

        Raises:
            ValueError: The tokens are not those that the cache was opened for.
        """
        num_known = len(self._token_ids)
        if list(token_ids[:num_known]) != self._token_ids[: len(token_ids)]:
            raise ValueError("the cache was opened for other tokens; open one for this prompt")
        if len(token_ids) > num_known:
            self._token_ids, self.keys = list(token_ids), self._prefix_cache.keys(token_ids)

    def skip(self, num_pages: int) -> None:
        """Leave out the first so many pages, which came from the store."""
        self._num_saved = num_pages

    def __call__(self, cache: TQCache) -> None:
        for index in range(self._num_saved, min(cache.num_sound_pages, len(self.keys))):
            self._prefix_cache.save(self.keys[index], cache.page(index).numpy().data)
            self._num_saved = index + 1


class TQConnector:
    """Connects one model to one store; a context manager.

    The model's attention implementation is set to ``"tq"``; it then works with `TQCache` as described there
    and with any other cache as ``"sdpa"`` does. A store that is empty, slow, dead or lying costs misses.

    Args:
        model: A causal language model of one of `MODEL_TYPES`.
        client: Connection to the store, or None to only compress; owned by the caller.
        codec: One for all layers, or the name of a preset or of a table by layer, as in ``tq3+tq4:0-1,29``.
        model_name: Name of the model in the namespace.
        revision: What tells its weights from others of that name; the model's configuration is added to it.
        page_tokens: Tokens in a page.
        salt: Keeps apart what only the caller knows to differ (a LoRA adapter, a tenant).
        balanced: Divide keys by a channel balance, which replicas share through the store: the first one
            measures it on the first tokens it sees. Without it, or while it cannot be had, pages are made
            without, in a namespace of their own.

    Raises:
        ConfigError: The model or its shape is not served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: StoreClient | None,
        codec: CodecSpec | str,
        *,
        model_name: str,
        revision: str,
        page_tokens: int = 64,
        salt: str = "",
        balanced: bool = True,
    ) -> None:
        geometry = cache_geometry(model.config, model.dtype)
        try:
            self.layout = ModelLayout.for_codec(
                codec,
                num_layers=geometry.num_layers,
                num_kv_heads=geometry.num_kv_heads,
                head_dim=geometry.head_dim,
                page_tokens=page_tokens,
            )
        except ValueError as error:
            raise ConfigError(f"{model_name} cannot be cached with this codec: {error}") from error
        self.geometry = geometry
        self.state: CodecState | None = None
        self._agreeing = threading.RLock()
        self._proposal: CodecState | None = None
        self._next_try_s = 0.0
        self._model = model
        self.is_balanced = balanced and any(layout.spec.key.rotated for layout in self.layout.by_layer)
        self.prefix_cache: PrefixCache | None = None
        if client is not None:
            self.prefix_cache = PrefixCache(
                client,
                self.layout,
                geometry,
                model=model_name,
                revision=f"{revision} config {config_digest(model.config)}",
                salt=salt,
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
        balance, prefix_cache = self._conditions(token_ids)
        if prefix_cache is None:
            return TQCache(self.layout, key_balance=balance)
        saver = _PageSaver(prefix_cache, token_ids)
        cache = TQCache(self.layout, on_page=saver, key_balance=balance)
        reusable = (len(token_ids) - 1) // self.layout.page_tokens
        if reusable > 0:
            # sinks depend on themselves alone: computing four tokens is cheaper than storing them raw
            self.prefill(token_ids[:NUM_SINKS], cache, last_only=True)
            saver.skip(cache.preload(prefix_cache.load(saver.keys[:reusable])))
        return cache

    def measure_state(self, token_ids: Sequence[int]) -> CodecState | None:
        """A codec state from one forward pass over some tokens; None where they give no finite numbers."""
        balances: dict[int, torch.Tensor] = {}

        def probe(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
            balances[layer] = estimate_balance(
                queries, keys, page_tokens=self.layout.page_tokens, num_sinks=NUM_SINKS
            )

        cache = TQCache(self.layout, probe=probe)
        try:
            self.prefill(token_ids, cache, chunk_tokens=len(token_ids), last_only=True)
        except ValueError as error:
            logger.warning("no codec state can be measured, pages are made without one: %s", error)
            return None
        return CodecState.of_layers([balances[layer] for layer in range(self.geometry.num_layers)])

    def use_state(self, state: CodecState) -> None:
        """Make pages of caches that are opened from now on with this state; only while there is none.

        Raises:
            ValueError: There is one already, or the codec takes none.
        """
        with self._agreeing:
            if self.state is not None or not self.is_balanced:
                raise ValueError("a connector takes one codec state, and only for a preset with rotated keys")
            self.state = state
            if self.prefix_cache is not None:
                self.prefix_cache = self.prefix_cache.with_state(state)

    def _conditions(self, token_ids: Sequence[int]) -> tuple[torch.Tensor | None, PrefixCache | None]:
        """The balance of a new cache and the view of the store that goes with it, agreed on if need be."""
        with self._agreeing:
            wants = self.is_balanced and self.state is None and len(token_ids) >= self.layout.page_tokens
            if wants and time.monotonic() >= self._next_try_s:
                self._agree_on_state(token_ids[:STATE_TOKENS])
                self._next_try_s = time.monotonic() + STATE_RETRY_S
            return None if self.state is None else self.state.key_balance, self.prefix_cache

    def _agree_on_state(self, token_ids: Sequence[int]) -> None:
        def propose() -> CodecState | None:
            self._proposal = self._proposal or self.measure_state(token_ids)
            return self._proposal

        state = propose() if self.prefix_cache is None else self.prefix_cache.agree_on_state(propose)
        if state is not None:
            self.use_state(state)

    def save_generated(self, cache: TQCache, token_ids: Sequence[int]) -> None:
        """Save pages that were completed after the prompt, so that the next turn finds them.

        Args:
            cache: From `open_cache`.
            token_ids: Prompt and generated tokens whose keys and values the cache holds.

        Raises:
            ValueError: The tokens are not those that the cache was opened for.
        """
        if isinstance(cache.on_page, _PageSaver):
            cache.on_page.expect(token_ids)
            cache.on_page(cache)

    def prefill(
        self,
        token_ids: Sequence[int],
        cache: TQCache,
        *,
        chunk_tokens: int = DEFAULT_PREFILL_TOKENS,
        last_only: bool = False,
        on_chunk: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute what the cache does not hold, in chunks, so that pages are saved while it works.

        Chunks end at multiples of `chunk_tokens`, wherever the cache begins, so that a prefix of whole chunks
        from the store leaves what is raw and what is compressed for each later token as it was.

        Args:
            token_ids: The whole prompt; longer than what the cache holds.
            cache: From `open_cache` for these tokens or for their beginning.
            chunk_tokens: Most tokens in one forward pass, at least 1.
            last_only: Give the logits of the last position only; those of a long prompt take gigabytes.
            on_chunk: Told the number of tokens the cache holds after each pass.

        Returns:
            Logits ``[num_computed, vocabulary]`` float32 of the positions that were computed, or of the last.

        Raises:
            ValueError: Nothing is left to compute, or the cache was opened for other tokens.
        """
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
        if cache.get_seq_length() >= len(token_ids):
            raise ValueError(
                f"the cache holds {cache.get_seq_length()} tokens, of {len(token_ids)} nothing is left"
            )
        if isinstance(cache.on_page, _PageSaver):
            cache.on_page.expect(token_ids)
        logits: list[torch.Tensor] = []
        with torch.inference_mode():
            while (start := cache.get_seq_length()) < len(token_ids):
                end = (start // chunk_tokens + 1) * chunk_tokens
                chunk = torch.tensor([token_ids[start:end]], device=self._model.device)
                output = self._model(input_ids=chunk, past_key_values=cache, logits_to_keep=int(last_only))
                logits = [*([] if last_only else logits), output.logits[0].float()]
                if on_chunk is not None:
                    on_chunk(cache.get_seq_length())
        return torch.cat(logits)

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish saving as far as `timeout_s` allows. May be called twice."""
        if self.prefix_cache is not None:
            self.prefix_cache.close(timeout_s)
