"""CodecSpec: everything that decides the bytes of a page besides its shape, and the named presets."""

import hashlib
from dataclasses import dataclass
from enum import IntEnum

from tq_kernels.codebook import LEVELS, TARGETS

CODEC_ID = 1
PACKING_ID = 1


class Code(IntEnum):
    """How the numbers of keys or of values are written. The value is the byte in a block header."""

    LM2 = 2
    """Rotated, 2-bit Lloyd-Max index, one fp16 scale a vector."""
    LM3 = 3
    """Rotated, 3-bit Lloyd-Max index, one fp16 scale a vector."""
    LM4 = 4
    """Rotated, 4-bit Lloyd-Max index, one fp16 scale a vector."""
    E4M3_SCALED = 8
    """Rotated, FP8 e4m3 byte, one fp16 scale a vector."""
    E4M3 = 9
    """FP8 e4m3 cast of the value itself: what engines call an fp8 KV cache."""
    BF16 = 16
    """The value itself, as bfloat16."""

    @property
    def bits(self) -> int:
        """Bits per value, without scales."""
        return 8 if self is Code.E4M3 else int(self)

    @property
    def rotated(self) -> bool:
        """Whether vectors are rotated, normalised and given a scale."""
        return self <= Code.E4M3_SCALED


class KeyCenter(IntEnum):
    """What is subtracted from rotated keys before they are normalised."""

    NONE = 0
    PAGE = 1
    """The mean over the page, per KV head and channel, kept in the page as fp16."""


class Rotation(IntEnum):
    """The orthogonal map that makes coordinates look Gaussian."""

    NONE = 0
    HADAMARD2 = 1
    """Two rounds of random signs and a Hadamard matrix; Haar-like on any input, sparse ones included."""


DEFAULT_ROTATION_SEED = 0x7AB0_51DE_C0DE_0001


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSpec:
    """Frozen codec parameters. Equal specs give interchangeable pages, different ones never do.

    Args:
        key: Code of the keys.
        value: Code of the values.
        key_center: Centre taken out of keys; only for a rotated key code.
        rotation_seed: Seed of the signs, in ``[0, 2**64)``; ignored by codes that do not rotate.

    Raises:
        ValueError: A combination that means nothing; the message says which.
    """

    key: Code
    value: Code
    key_center: KeyCenter = KeyCenter.NONE
    rotation_seed: int = DEFAULT_ROTATION_SEED

    def __post_init__(self) -> None:
        if not isinstance(self.key, Code) or not isinstance(self.value, Code):
            raise ValueError(f"key and value must be members of Code, not {self.key!r} and {self.value!r}")
        if not isinstance(self.key_center, KeyCenter):
            raise ValueError(f"key_center must be a member of KeyCenter, not {self.key_center!r}")
        if self.key_center is not KeyCenter.NONE and not self.key.rotated:
            raise ValueError(
                f"key_center={self.key_center.name} needs a rotated key code, {self.key.name} is not"
            )
        if type(self.rotation_seed) is not int or not 0 <= self.rotation_seed < 1 << 64:
            raise ValueError(f"rotation_seed must be an integer in [0, 2**64), not {self.rotation_seed!r}")

    @property
    def rotation(self) -> Rotation:
        """The rotation that the codes imply."""
        return Rotation.HADAMARD2 if self.key.rotated or self.value.rotated else Rotation.NONE

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over every parameter, codebooks included: 32 bytes, part of a cache's identity."""
        parts = [f"codec={CODEC_ID}", f"packing={PACKING_ID}", f"center={self.key_center:d}"]
        for side, code in (("key", self.key), ("value", self.value)):
            levels = ",".join(str(level) for level in LEVELS.get(code, ()))
            parts.append(f"{side}={code:d}:[{levels}]/{TARGETS.get(code, 0)}")
        if self.rotation is not Rotation.NONE:
            parts.append(f"rotation={self.rotation:d}:{self.rotation_seed}")
        return hashlib.sha256(";".join(parts).encode()).digest()


PRESETS = {
    "tq4": CodecSpec(key=Code.LM4, value=Code.LM4, key_center=KeyCenter.PAGE),
    "tq3": CodecSpec(key=Code.LM3, value=Code.LM3, key_center=KeyCenter.PAGE),
    "tq2": CodecSpec(key=Code.LM2, value=Code.LM2, key_center=KeyCenter.PAGE),
    "k8v4": CodecSpec(key=Code.E4M3_SCALED, value=Code.LM4, key_center=KeyCenter.PAGE),
    "k4v3": CodecSpec(key=Code.LM4, value=Code.LM3, key_center=KeyCenter.PAGE),
    "k4v2": CodecSpec(key=Code.LM4, value=Code.LM2, key_center=KeyCenter.PAGE),
    "k3v4": CodecSpec(key=Code.LM3, value=Code.LM4, key_center=KeyCenter.PAGE),
    "k3v2": CodecSpec(key=Code.LM3, value=Code.LM2, key_center=KeyCenter.PAGE),
    "fp8": CodecSpec(key=Code.E4M3, value=Code.E4M3),
    "raw": CodecSpec(key=Code.BF16, value=Code.BF16),
}
"""Named specs. `fp8` and `raw` are honest baselines in the same format."""


def preset(name: str) -> CodecSpec:
    """The spec of a preset.

    Raises:
        ValueError: No such preset; the message lists them.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}") from None
