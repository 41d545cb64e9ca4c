"""Make the modules of a peer importable from the folder that holds it, without the engine around them."""

import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

_FOLDERS = {"vllm-soa": "vllm"}
_BARE_PACKAGES = {
    "vllm": ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops"),
    "vllm-soa": (
        "vllm",
        "vllm.v1",
        "vllm.v1.attention",
        "vllm.v1.attention.ops",
        "vllm.v1.attention.ops.turboquant_soa",
    ),
    "turboquant-vllm": ("turboquant_vllm", "turboquant_vllm.triton"),
}
"""Packages whose own `__init__` would import a whole engine: empty ones of the same name stand in."""


def open_folder(peer: str, folder: Path) -> None:
    """Make the peer's modules importable."""
    own = folder / _FOLDERS.get(peer, peer)
    if not own.is_dir():
        raise FileNotFoundError(f"{own} does not exist")
    sys.path.insert(0, str(own))
    for name in _BARE_PACKAGES.get(peer, ()):
        _module(name, __path__=[str(own.joinpath(*name.split(".")))])
    if peer == "turbo-attn":
        os.environ.setdefault("TKV_KERNEL_STORE_URL", "off")
        built = own / "built"
        if built.is_dir():
            os.environ.setdefault("TKV_BAKED_KERNEL_DIR", str(built))
            os.environ.setdefault("TKV_NO_JIT", "1")  # a variant that is not there takes minutes to build
    if peer.startswith("vllm"):
        _stand_in_for_vllm()


def _stand_in_for_vllm() -> None:
    """The few names of vLLM that its kernels touch when they are imported."""
    import triton
    import triton.language as tl

    class Platform:
        def is_cuda(self) -> bool:
            return True

        def is_cuda_alike(self) -> bool:
            return True

        def fp8_dtype(self) -> torch.dtype:
            return torch.float8_e4m3fn

        def __getattr__(self, name: str) -> Callable[..., bool]:
            return lambda *_, **__: False

    class KVQuantMode:
        NONE = 0

        def __class_getitem__(cls, name: str) -> int:
            return 0

    _module("vllm.platforms", current_platform=Platform())
    _module("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True, tldevice=None)
    _module("vllm.logger", init_logger=logging.getLogger)
    sys.modules["vllm"].envs = _module("vllm.envs", __getattr__=lambda _: False)  # type: ignore[attr-defined]
    _module("vllm.v1.kv_cache_interface", KVQuantMode=KVQuantMode)


def _module(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module
