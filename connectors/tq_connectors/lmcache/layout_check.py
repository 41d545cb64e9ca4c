"""A server module of LMCache's that says when a cache is registered that the serde cannot pack.

LMCache asks a serde for sizes at the first store only. A worker pings LMCache's server from its registration
on, every ten seconds; at its first ping this looks at what it registered, and at the serdes of all adapters:
``--server-module '{"module_path": "tq_connectors.lmcache.layout_check"}'``.
"""

import logging
import os
from typing import Any

from lmcache.v1.multiprocess.engine_context import MPCacheServerContext
from lmcache.v1.multiprocess.engine_module import EngineModule, InstanceLivenessTarget
from lmcache.v1.multiprocess.ext_server_module import ExtServerModuleBuildContext

from tq_connectors.engine.state import load_state
from tq_connectors.lmcache.chunk_codec import ChunkCodec
from tq_connectors.lmcache.serde import SERDE_NAME
from tq_connectors.lmcache.serde_settings import read_serde_settings
from tq_store.errors import BlockFormatError

logger = logging.getLogger(__name__)


class LayoutCheck(InstanceLivenessTarget):
    """Looks at each worker's cache once. Pings come one after the other, on a thread of LMCache's.

    Args:
        context: LMCache's.
        modules: LMCache's own, which know what workers registered.
    """

    def __init__(self, context: MPCacheServerContext, modules: tuple[EngineModule, ...]) -> None:
        self._context = context
        self._modules = modules
        self._refused: dict[int, str] = {}
        settings = [descriptor.config.serde_config for descriptor, _ in context.storage_manager.l2_adapters()]
        self._codecs = [
            ChunkCodec(read_serde_settings(serde.kwargs), load_state(os.environ))
            for serde in settings
            if serde is not None and serde.type == SERDE_NAME
        ]
        self._seen: set[int] = set()

    @property
    def context(self) -> MPCacheServerContext:
        """LMCache's."""
        return self._context

    def report_status(self) -> dict[str, Any]:
        """Why caches of workers cannot be packed, by worker."""
        return {"refused_layouts": dict(self._refused)}

    def close(self) -> None:
        """Nothing to release."""

    def touch_instance(self, instance_id: int) -> None:
        """A worker is there; at its first ping, look at its cache."""
        registered = None if instance_id in self._seen else self._registered(instance_id)
        if registered is None:
            return
        self._seen.add(instance_id)
        groups = self._context.layout_desc_registry.find_group_layout_descs(*registered) or {}
        for codec in self._codecs:
            for layout in groups.values():
                try:
                    codec.packed_bytes(layout.shapes, layout.dtypes)
                except (ValueError, BlockFormatError) as error:
                    self._refused[instance_id] = str(error)
                    logger.error("nothing of model %s will be stored: %s", registered[0], error)
                    return

    def drop_instance_state(self, instance_id: int) -> None:
        """A worker has gone."""
        self._seen.discard(instance_id)
        self._refused.pop(instance_id, None)

    def _registered(self, instance_id: int) -> tuple[str, int] | None:
        """Model and number of ranks, or None before the worker has registered."""
        for module in self._modules:
            status = module.report_status()
            for kind in ("cache_context_meta", "non_cuda_context_meta"):
                worker = status.get(kind, {}).get(str(instance_id))
                if worker is not None:
                    return worker["model_name"], worker["world_size"]
        return None


def build_server_modules(build: ExtServerModuleBuildContext) -> LayoutCheck:
    """What LMCache calls at its start."""
    return LayoutCheck(build.server_context, build.modules)
