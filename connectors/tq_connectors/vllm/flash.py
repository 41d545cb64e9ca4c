"""FlashAttention as vLLM has it on this machine, for whole prompts and for chunks over a dense prefix."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils

from tq_connectors.vllm.batch import ColdPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashPrefill:
    """Causal attention over raw keys and values, called as vLLM's FLASH_ATTN calls it.

    Args:
        softmax_scale: Factor on the scores.
        sliding_window: Positions up to its own that a query sees, or all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``, or stay as they are.
        version: Of FlashAttention.
    """

    softmax_scale: float
    sliding_window: int | None
    softcap: float | None
    version: int

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        prompts: ColdPrompts,
        out: torch.Tensor,
    ) -> None:
        """Attend and write `out`; tensors are ``[tokens of the batch, heads, head_dim]``."""
        whole, longest = prompts.tokens, max(prompts.lengths)
        fa_utils.flash_attn_varlen_func(
            q=query[whole],
            k=keys[whole],
            v=values[whole],
            out=out[whole],
            cu_seqlens_q=prompts.starts,
            cu_seqlens_k=prompts.starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            **self._options,
        )

    def dense(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One sequence, as `inflate.DenseAttention` has it."""
        ends = torch.arange(2, dtype=torch.int32, device=query.device)
        out, lse = fa_utils.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=ends * len(query),
            cu_seqlens_k=ends * len(keys),
            max_seqlen_q=len(query),
            max_seqlen_k=len(keys),
            causal=causal,
            return_softmax_lse=True,
            **self._options,
        )
        return out, lse

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "softmax_scale": self.softmax_scale,
            "window_size": [-1, -1] if self.sliding_window is None else [self.sliding_window - 1, 0],
            "softcap": self.softcap or 0.0,
            "fa_version": self.version,
        }


def flash_prefill(
    head_dim: int, *, softmax_scale: float, sliding_window: int | None, softcap: float | None
) -> FlashPrefill | None:
    """FlashAttention in the version that vLLM takes for such heads, or None where it has none."""
    if not current_platform.is_cuda() or not fa_utils.is_flash_attn_varlen_func_available():
        return None
    version = fa_utils.get_flash_attn_version(head_size=head_dim, requires_softcap=softcap is not None)
    if version is None:
        return None
    return FlashPrefill(
        softmax_scale=softmax_scale, sliding_window=sliding_window, softcap=softcap, version=version
    )
