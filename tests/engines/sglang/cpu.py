"""What SGLang lacks where there is no GPU: imported before it, in every process of an engine.

SGLang's own Triton kernels run in Triton's interpreter, for which any true value of TRITON_INTERPRET will do.
`tq_kernels` interprets its kernels for the value "1" alone, and takes PyTorch's reference, which is faster.
"""

import importlib.machinery
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "true"
os.environ.setdefault("SGLANG_HOST_IP", "127.0.0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch

torch.set_num_threads(1)

# the registry's torchvision is built for CUDA and describes kernels of operators that it then does not have
_OPERATORS = (
    "torchvision::nms",
    "torchvision::qnms",
)
for _operator in _OPERATORS:
    torch.library.define(_operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# rotary embeddings off CUDA import vLLM's kernel, and then never call it
for _name in ("vllm", "vllm._custom_ops"):
    _module = types.ModuleType(_name)
    _module.__spec__ = importlib.machinery.ModuleSpec(_name, None)
    sys.modules.setdefault(_name, _module)
sys.modules["vllm._custom_ops"].rotary_embedding = None  # type: ignore[attr-defined]
