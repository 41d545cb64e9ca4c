"""What vLLM calls in each of its processes: everything of ours that this release of vLLM has a place for."""

import importlib
import logging
import sys

logger = logging.getLogger(__name__)

_PARTS = {
    "--kv-cache-dtype": ("tq_connectors.vllm.dtypes", "register_dtypes"),
    "--attention-backend": ("tq_connectors.vllm.selector", "register_backend"),
    "the connector TQStoreConnector": ("tq_connectors.vllm.registries", "register_connector"),
    "the offloading TQOffloadingSpec": ("tq_connectors.vllm.registries", "register_offloading"),
}
"""What an operator writes, and the function that makes vLLM understand it."""


def register() -> None:
    """Register every part; may be called again, and never raises.

    A part that this vLLM has no place for is left out with one line; the others are still there.
    """
    _log_as_vllm_does()
    for flag, (module, function) in _PARTS.items():
        try:
            getattr(importlib.import_module(module), function)()
        except Exception as error:  # whatever a release lacks must not stop the engine
            version = getattr(sys.modules.get("vllm"), "__version__", "not there")
            logger.warning(
                "tq-store: this vLLM (%s) has no place for %s: %s: %s",
                version,
                flag,
                type(error).__name__,
                error,
            )


def _log_as_vllm_does() -> None:
    """Give what we log to vLLM's handlers, at its level: it configures its own loggers and no others.

    To the root's handlers it goes only where vLLM's own lines do, so that none is there twice.
    """
    ours, engines = logging.getLogger("tq_connectors"), logging.getLogger("vllm")
    if engines.handlers and not ours.handlers:
        ours.setLevel(engines.level)
        ours.propagate = engines.propagate
        for handler in engines.handlers:
            ours.addHandler(handler)
