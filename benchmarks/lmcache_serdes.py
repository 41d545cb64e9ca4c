"""What LMCache's chunks are packed with: its own serdes, the add-on's, and ours, behind one interface."""

import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde.fp8 import Fp8QuantizationDeserializer, Fp8QuantizationSerializer
from lmcache.v1.memory_management import TensorMemoryObj

from benchmarks.lmcache_objects import memory_object
from tq_connectors.lmcache.chunk_codec import ChunkCodec
from tq_connectors.lmcache.group_codecs import DeviceGroup
from tq_connectors.lmcache.serde import TQDeserializer, TQSerializer
from tq_connectors.lmcache.serde_settings import read_serde_settings
from tq_kernels import PageLayout

KEY = ObjectKey(chunk_hash=bytes(32), model_name="bench", kv_rank=0)
OURS = ("tq4", "k8v4", "tq3", "tq2")
Calls = tuple[Callable[[], Any], Callable[[], Any]]
BUILT_IN = ("turboquant_4bit_nc", "turboquant_k8v4", "turboquant_3bit_nc")


@dataclass(frozen=True)
class Serde:
    """One way to pack chunks; `pack` and `unpack` move whole chunks between buffers made once."""

    name: str
    serializer: Any
    deserializer: Any
    on_device: Callable[[torch.Tensor], Calls] | None = None
    """On a GPU: from a chunk there, calls that pack it and unpack it there, without a copy to the host."""

    def buffers(self, chunk: torch.Tensor) -> tuple[TensorMemoryObj, TensorMemoryObj, TensorMemoryObj]:
        """A chunk's object, one for its packed bytes, and one for what comes back."""
        layout = MemoryLayoutDesc(shapes=[chunk.shape], dtypes=[chunk.dtype])
        size = self.serializer.estimate_serialized_size(layout)
        packed = torch.zeros(size, dtype=torch.uint8)
        return memory_object(chunk), memory_object(packed), memory_object(torch.zeros_like(chunk))

    def pack(self, chunk: TensorMemoryObj, packed: TensorMemoryObj) -> int:
        """Bytes written."""
        return int(_call(self.serializer.serialize, chunk, packed))

    def unpack(self, packed: TensorMemoryObj, chunk: TensorMemoryObj) -> None:
        """Fill the chunk."""
        _call(self.deserializer.deserialize, packed, chunk)


class _Copy:
    """What LMCache calls naive: bytes as they are."""

    def estimate_serialized_size(self, layout: MemoryLayoutDesc) -> int:
        return layout.shapes[0].numel() * layout.dtypes[0].itemsize

    def serialize(self, src: TensorMemoryObj, dst: TensorMemoryObj) -> int:
        dst.raw_data.copy_(src.raw_data)
        return dst.raw_data.numel()

    def deserialize(self, src: TensorMemoryObj, dst: TensorMemoryObj) -> None:
        dst.raw_data.copy_(src.raw_data)


def all_serdes(num_kv_heads: int, head_dim: int) -> tuple[list[Serde], list[str]]:
    """Those that run here, and of the others why not."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    serdes = [
        Serde("naive", _Copy(), _Copy()),
        Serde("fp8", Fp8QuantizationSerializer(), Fp8QuantizationDeserializer()),
    ]
    missing = []
    for make in (_add_on, _built_in):
        try:
            serdes += make(head_dim)
        except (ImportError, RuntimeError) as error:
            missing.append(f"{make.__doc__} It {error}")
    for device in devices:
        for name in OURS:
            written = {"preset": name, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "device": device}
            settings = read_serde_settings(written)
            codec = ChunkCodec(settings)
            there = partial(_ours_on_device, settings.page_layout()) if device == "cuda" else None
            serdes.append(Serde(f"{name} ({device})", TQSerializer(codec), TQDeserializer(codec), there))
    return serdes, missing


def seconds(work: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    """Median time of a call."""
    work()
    times = []
    for _ in range(repeats):
        started = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - started)
    return statistics.median(times)


def _add_on(head_dim: int) -> list[Serde]:
    """lmcache-turbo-quant-serde."""
    from lmcache_turbo_quant_serde._v1_codec import TqaiDeserializer, TqaiSerializer

    return [Serde("add-on, 4 bits", TqaiSerializer(head_dim=head_dim, bits=4), TqaiDeserializer())]


def _built_in(head_dim: int) -> list[Serde]:
    """LMCache's turboquant."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU.")
    from lmcache.v1.distributed.serde.turboquant.turboquant import (
        TurboQuantDeserializer,
        TurboQuantSerdeConfig,
        TurboQuantSerializer,
    )

    serdes = []
    # at every call it asks nvidia-smi which GPU to take; LMCache's settings cannot tell it, a caller can
    for name, told, device in (
        *((name, "", "") for name in BUILT_IN),
        (BUILT_IN[0], ", told its GPU", "cuda"),
    ):
        config = TurboQuantSerdeConfig(
            preset=name, head_dim=head_dim, skip_first_layers=0, skip_last_layers=0, cuda_device=device
        )
        serdes.append(
            _built_in_serde(name + told, TurboQuantSerializer(config), TurboQuantDeserializer(config))
        )
    return serdes


def _built_in_serde(name: str, serializer: Any, deserializer: Any) -> Serde:
    def on_device(chunk: torch.Tensor) -> Calls:
        layout = MemoryLayoutDesc(shapes=[chunk.shape], dtypes=[chunk.dtype])
        size = serializer.estimate_serialized_size(layout)
        packed = memory_object(torch.zeros(size, dtype=torch.uint8, device=chunk.device))
        source, back = memory_object(chunk), memory_object(torch.zeros_like(chunk))
        return (
            partial(_call, serializer.serialize, source, packed),
            partial(_call, deserializer.deserialize, packed, back),
        )

    return Serde(f"LMCache's {name}", serializer, deserializer, on_device)


def _ours_on_device(layout: PageLayout, chunk: torch.Tensor) -> Calls:
    there = DeviceGroup(layout, chunk.device, chunk.shape, chunk.dtype)
    there.group.copy_(chunk)
    return there.quantize, there.dequantize


def _call(method: Callable[..., Any], *objects: TensorMemoryObj) -> Any:
    """Releases differ in whether a serde is told the key; the add-on is not, so 0.5.6 cannot use it."""
    takes_key = "key" in inspect.signature(method).parameters
    return method(*objects, KEY) if takes_key else method(*objects)
