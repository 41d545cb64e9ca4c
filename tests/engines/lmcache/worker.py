"""What an engine's worker does with LMCache's multi-process server: register pages, save, look up, load."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

WAIT_S = 30.0
_numbers = itertools.count(1)


class Worker:
    """One rank of an engine whose pages lie in these tensors.

    Args:
        url: LMCache's server.
        pages: Tensor of each layer; its first dimension counts pages.
        page_tokens: Tokens of a page.
        model: What it calls the model.
        kv_layout: In which order the axes of its pages are, in LMCache's words.
        mode: ``engine_driven``, where it copies pages itself, or ``lmcache_driven``, where LMCache's server
            has them mapped and does.
    """

    def __init__(
        self,
        url: str,
        pages: Sequence[torch.Tensor],
        page_tokens: int,
        *,
        model: str = "org/model",
        kv_layout: str = "NHD",
        mode: str = "engine_driven",
    ) -> None:
        self._client = RequestClientFactory.create(url)
        self._pages = {f"layer.{number}": tensor for number, tensor in enumerate(pages)}
        self._page_tokens, self._model = page_tokens, model
        self._pages_per_chunk = self._client.get_chunk_size().result(timeout=WAIT_S) // page_tokens
        self._instance, self._mode = next(_numbers), mode
        self._context = create_transfer_context(
            self._pages, instance_id=self._instance, req_client=self._client, mode=mode
        )
        self._context.register(
            self._pages,
            model,
            1,
            self._pages_per_chunk,
            WAIT_S,
            layout_hints={"kv_layout": kv_layout},
        )

    def ping(self) -> None:
        """Say that it is there, as an engine does from its registration on."""
        assert self._client.ping(self._instance).result(timeout=WAIT_S)

    def save(self, tokens: Sequence[int], page_ids: Sequence[int], salt: str = "") -> bool:
        """Hand the pages of whole chunks to LMCache."""
        key = self._key(tokens, salt)
        future = self._context.submit_store(
            "request", key, self._pages, [list(page_ids)], self._event(), self._pages_per_chunk
        )
        return bool(future.result(timeout=WAIT_S))

    def look_up(self, tokens: Sequence[int], salt: str = "") -> int:
        """Leading tokens that LMCache has brought into its memory."""
        self._request = f"request-{next(_numbers)}"
        key = self._key(tokens, salt, self._request).no_worker_id_version()
        self._client.lookup(key, 1).result(timeout=WAIT_S)
        for _ in range(int(WAIT_S / 0.01)):
            chunks = self._client.query_prefetch_status(self._request).result(timeout=WAIT_S)
            if chunks is not None:
                return int(chunks) * self._pages_per_chunk * self._page_tokens
            time.sleep(0.01)
        raise AssertionError("the lookup never ended")

    def load(self, tokens: Sequence[int], page_ids: Sequence[int], salt: str = "") -> bool:
        """Fill pages with what a lookup found."""
        key = self._key(tokens, salt, self._request)
        future = self._context.submit_retrieve(
            self._request, key, self._pages, [list(page_ids)], self._event(), self._pages_per_chunk
        )
        return bool(future.result(timeout=WAIT_S))

    def forget(self) -> None:
        """Make LMCache drop what it has in memory."""
        self._client.clear(True).result(timeout=WAIT_S)

    def close(self) -> None:
        self._context.unregister()
        self._context.close()
        self._client.close()

    def _event(self) -> Any:
        """After which LMCache's server may touch the pages."""
        return self._context.create_recorded_event() if self._mode == "lmcache_driven" else None

    def _key(self, tokens: Sequence[int], salt: str, request: str = "request") -> IPCCacheServerKey:
        return IPCCacheServerKey(
            model_name=self._model,
            world_size=1,
            worker_id=0,
            token_ids=tuple(tokens),
            start=0,
            end=len(tokens),
            request_id=request,
            cache_salt=salt,
            num_kv_readers=1,
        )
