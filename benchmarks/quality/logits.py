"""What a cache costs the logits: KL, agreement on the best token, and paired perplexity."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.quality.rows import Row

_CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitLoss:
    """Per position of one or more texts.

    Args:
        kl: KL(reference || logits) in nats, ``[num_positions]``.
        same_best: Whether both have the same most likely token, ``[num_positions]``.
        nll: Negative log likelihood of the next token, ``[num_positions - num_texts]``.
        reference_nll: Likewise without any compression.
    """

    kl: torch.Tensor
    same_best: torch.Tensor
    nll: torch.Tensor
    reference_nll: torch.Tensor


def compare(reference: torch.Tensor, logits: torch.Tensor, token_ids: Sequence[int]) -> LogitLoss:
    """Compare logits ``[num_tokens, vocabulary]`` of one text; works in pieces, for vocabularies are long."""
    following = torch.tensor([*token_ids[1:], 0], device=logits.device)
    pieces = []
    for start in range(0, len(token_ids), _CHUNK):
        rows = slice(start, start + _CHUNK)
        expected, got = (side[rows].float().log_softmax(-1) for side in (reference, logits))
        kl = (expected.exp() * (expected - got)).sum(-1)
        nlls = (-side.gather(-1, following[rows, None]).squeeze(-1) for side in (got, expected))
        pieces.append((kl, expected.argmax(-1) == got.argmax(-1), *nlls))
    kl, same_best, nll, reference_nll = (torch.cat(parts).cpu() for parts in zip(*pieces, strict=True))
    return LogitLoss(kl=kl, same_best=same_best, nll=nll[:-1], reference_nll=reference_nll[:-1])


def summary(losses: Sequence[LogitLoss]) -> Row:
    """Entries of a row, over all positions of all texts."""
    kl = torch.cat([loss.kl for loss in losses]).double()
    nll = torch.cat([loss.nll for loss in losses]).double()
    reference = torch.cat([loss.reference_nll for loss in losses]).double()
    difference = nll - reference
    return {
        "kl_mean": float(kl.mean()),
        "kl_se": float(kl.std() / len(kl) ** 0.5),
        "kl_median": float(kl.median()),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
        "top1": float(torch.cat([loss.same_best for loss in losses]).double().mean()),
        "ppl": float(nll.mean().exp()),
        "ppl_ref": float(reference.mean().exp()),
        "ppl_ratio": float(difference.mean().exp()),
        "ppl_ratio_se": float(difference.mean().exp() * difference.std() / len(difference) ** 0.5),
    }
