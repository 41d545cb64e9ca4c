"""Block keys for LMCache's objects: everything that its own keys leave out is put in here."""

import hashlib
from functools import lru_cache

from tq_connectors.lmcache.settings import SERDE_PREFIX, UNCODED, StoreSettings
from tq_kernels import preset
from tq_store.keys import BlockKey, Namespace


class ObjectNames:
    """Names objects in the store. A whole object of LMCache's is one block, its chunk hash the prefix hash.

    Args:
        settings: What makes this cache another one than those of the same model name.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._digest = lru_cache(maxsize=4096)(self._namespace_digest)

    def key(self, model: str, part: str, salt: str, chunk_hash: bytes) -> BlockKey:
        """Key of one object.

        Args:
            model: LMCache's name of the model.
            part: Which part of the model's cache: rank and group of layers.
            salt: LMCache's own salt, a tenant's for example.
            chunk_hash: Its hash of all tokens up to the end of the chunk.
        """
        return BlockKey(self._digest(model, part, salt) + hashlib.sha256(b"lmcache" + chunk_hash).digest())

    def _namespace_digest(self, model: str, part: str, salt: str) -> bytes:
        codec = self._settings.codec
        fingerprint = "none"
        if codec != UNCODED:
            fingerprint = preset(codec.removeprefix(SERDE_PREFIX)).fingerprint.hex()
        if codec.startswith(SERDE_PREFIX):
            fingerprint = SERDE_PREFIX + fingerprint
        lengths = f"{len(self._settings.salt)}:{len(salt)}"  # so that no two pairs of salts read the same
        return Namespace(
            model=model,
            revision=self._settings.revision,
            kv_dtype=self._settings.kv_dtype,
            codec_fingerprint=fingerprint,
            page_tokens=1,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            salt=f"lmcache object {part} {lengths} {self._settings.salt} {salt}",
        ).digest()
