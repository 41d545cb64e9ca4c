"""All fuzz targets by name."""

import logging

from fuzz import (
    fuzz_addresses,
    fuzz_block,
    fuzz_coded,
    fuzz_cold,
    fuzz_config,
    fuzz_disk,
    fuzz_documents,
    fuzz_frames,
    fuzz_messages,
    fuzz_pipes,
    fuzz_redis,
    fuzz_secrets,
    fuzz_service,
)
from fuzz.driver import Target

TARGETS: dict[str, Target] = {
    "block": fuzz_block,
    "coded": fuzz_coded,
    "frames": fuzz_frames,
    "messages": fuzz_messages,
    "redis": fuzz_redis,
    "cold": fuzz_cold,
    "config": fuzz_config,
    "secrets": fuzz_secrets,
    "addresses": fuzz_addresses,
    "documents": fuzz_documents,
    "disk": fuzz_disk,
    "pipes": fuzz_pipes,
    "service": fuzz_service,
}


def quiet() -> None:
    """Warnings are what a store says of each bad input; an error is something that nobody foresaw."""
    logging.basicConfig(level=logging.ERROR)
