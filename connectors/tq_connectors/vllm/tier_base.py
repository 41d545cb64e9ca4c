"""What TQStoreTier builds on: vLLM 0.31 and later know of back-pressure and of bytes moved, 0.30 does not.

Served: vLLM 0.30 to 0.33. Older ones can import it too, so that the tier can say that it is not served.
"""

from dataclasses import fields
from typing import Any

from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

_KNOWS_BYTES = "transfer_bytes" in {field.name for field in fields(JobResult)}


class TierBase(SecondaryTierManager):
    """vLLM's tier, made alike by all releases.

    Args:
        offloading_spec: The engine's.
        primary_kv_view: ``[num_chunks, row bytes]`` of host memory.
        tier_type: What vLLM calls this tier.
        backpressure_detector: vLLM's, where it has one.
    """

    if hasattr(base, "Medium"):
        medium = base.Medium.STORAGE

    def __init__(
        self,
        offloading_spec: base.OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
    ) -> None:
        detector = () if backpressure_detector is None else (backpressure_detector,)
        super().__init__(offloading_spec, primary_kv_view, tier_type, *detector)
        self.locality = base.Locality.REMOTE
        assert primary_kv_view.strides is not None
        self.row_bytes = primary_kv_view.strides[0]


def job_result(*, transfer_bytes: int, **facts: Any) -> JobResult:
    """How a job ended, with the bytes that it moved where vLLM asks for them."""
    return JobResult(**facts, **({"transfer_bytes": transfer_bytes} if _KNOWS_BYTES else {}))
