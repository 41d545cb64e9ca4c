"""Names for what else there is of ours: vLLM's JSON may then leave out where it is."""

from typing import Any

from tq_connectors.vllm.releases import require_offloading


def register_connector() -> None:
    """``"kv_connector": "TQStoreConnector"``.

    Raises:
        Exception: Whatever a release without the registry raises.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    _add(KVConnectorFactory.register_connector, "TQStoreConnector", "kv_connector")


def register_offloading() -> None:
    """``"spec_name": "TQOffloadingSpec"``, and ``{"type": "TQStoreTier"}`` among the secondary tiers.

    Where they are not served, they say so when they are made.

    Raises:
        ConfigError: This release's framework is another one.
        Exception: Whatever a release without these registries raises.
    """
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    _add(OffloadingSpecFactory.register_spec, "TQOffloadingSpec", "offload_spec")
    _add(SecondaryTierFactory.register_tier, "TQStoreTier", "secondary_tier")
    require_offloading()


def _add(register: Any, name: str, module: str) -> None:
    """A name, unless the registry has it: plugins are called in every process, and may be called twice."""
    if name not in register.__self__._registry:  # noqa: SLF001  # nothing else tells
        register(name, f"tq_connectors.vllm.{module}", name)
