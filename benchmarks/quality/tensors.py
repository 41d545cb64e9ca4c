"""What a method does to keys, values and attention inside a layer, with everything before it uncompressed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.quality.cache_view import CacheView
from benchmarks.quality.models import LoadedModel
from benchmarks.quality.passes import observe_pass
from benchmarks.quality.rows import Row
from benchmarks.quality.substitute import distances

_FIRST_QUERY = 128
_MAX_QUERIES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoss:
    """One layer of one text under one method.

    Args:
        key_mse: Squared error of keys over their spread about their mean, sinks left out, per KV head.
        value_mse: Squared error of values over their energy, sinks left out, per KV head.
        correlation: Of scores with true scores, both less their mean over what a query sees, per query head.
        kl: Mean KL(p || p read) of attention probabilities in nats, per query head.
        output_error: Length of the error of the output over its length, per query head.
    """

    key_mse: torch.Tensor
    value_mse: torch.Tensor
    correlation: torch.Tensor
    kl: torch.Tensor
    output_error: torch.Tensor


@dataclass(frozen=True, slots=True)
class TensorLosses:
    """Losses of one method by layer, one entry a text."""

    by_layer: dict[int, list[LayerLoss]] = field(default_factory=dict)

    def add(self, layer: int, loss: LayerLoss) -> None:
        """Take in the loss of one layer on one text."""
        self.by_layer.setdefault(layer, []).append(loss)

    def per_layer(self, name: str) -> torch.Tensor:
        """A loss averaged over heads and texts: ``[num_layers]``."""
        return torch.stack([heads.mean() for heads in self._heads(name)])

    def _heads(self, name: str) -> list[torch.Tensor]:
        """A loss averaged over texts: per layer ``[num_heads]``."""
        layers = sorted(self.by_layer)
        return [
            torch.stack([getattr(loss, name) for loss in self.by_layer[layer]]).mean(0) for layer in layers
        ]

    def summary(self) -> Row:
        """Entries of a row."""
        correlation, kl, output = (self.per_layer(name) for name in ("correlation", "kl", "output_error"))
        key_mse, value_mse = self.per_layer("key_mse"), self.per_layer("value_mse")
        return {
            "worst_layer_corr": float(correlation.min()),
            "worst_head_corr": float(
                torch.stack([heads.min() for heads in self._heads("correlation")]).min()
            ),
            "layer_corr": [round(value, 5) for value in correlation.tolist()],
            **{"key_mse": float(key_mse.mean()), "key_mse_worst_layer": float(key_mse.max())},
            **{"value_mse": float(value_mse.mean()), "value_mse_worst_layer": float(value_mse.max())},
            **{"attention_kl": float(kl.mean()), "attention_kl_worst_layer": float(kl.max())},
            **{"output_error": float(output.mean()), "output_error_worst_layer": float(output.max())},
        }


def measure_tensors(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    views: Mapping[str, CacheView],
    num_sinks: int,
    take: Callable[[int, dict[str, LayerLoss]], None],
) -> None:
    """Losses of every method on one text, in one uncompressed pass.

    Args:
        loaded: The model.
        token_ids: The text.
        views: What attention sees, by name of the method.
        num_sinks: See `layer_loss`.
        take: Given every layer and its losses by name of the method.
    """

    def observe(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        raw = keys, values
        take(
            layer,
            {
                name: layer_loss(queries, raw, view(layer, queries, *raw), scale, num_sinks)
                for name, view in views.items()
            },
        )

    observe_pass(loaded, token_ids, observe)


def layer_loss(
    queries: torch.Tensor,
    raw: tuple[torch.Tensor, torch.Tensor],
    seen: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    num_sinks: int,
) -> LayerLoss:
    """Compare what a layer has with what attention reads.

    Args:
        queries: ``[num_tokens, num_heads, head_dim]``.
        raw: Keys and values ``[num_tokens, num_kv_heads, head_dim]``.
        seen: What is read in their place.
        scale: Of the softmax.
        num_sinks: Left out of the errors of tensors; they stay in the scores, as softmax sees them.
    """
    (raw_keys, raw_values), (keys, values) = ([side.float() for side in pair] for pair in (raw, seen))
    num_tokens, num_heads = queries.shape[:2]
    first = min(_FIRST_QUERY, num_tokens // 2)
    rows = torch.arange(first, num_tokens, max(1, -(-(num_tokens - first) // _MAX_QUERIES)))
    picked = queries[rows.to(queries.device)].float().transpose(0, 1) * scale
    visible = (distances(num_tokens, num_tokens, queries.device) >= 0)[rows]
    group = num_heads // raw_keys.shape[1]
    correlation, kl, output_error = [], [], []
    for head in range(num_heads):
        true, got = (picked[head] @ side[:, head // group].T for side in (raw_keys, keys))
        correlation.append(_correlation(true, got, visible))
        log_true, log_got = (
            scores.masked_fill(~visible, -torch.inf).log_softmax(-1) for scores in (true, got)
        )
        p = log_true.exp()
        kl.append((p * (log_true - log_got).masked_fill(~visible, 0)).sum(-1).mean())
        output, read = p @ raw_values[:, head // group], log_got.exp() @ values[:, head // group]
        output_error.append((read - output).norm() / output.norm())
    after = slice(num_sinks, None)
    spread = (raw_keys[after] - raw_keys[after].mean(0)).square().sum((0, 2))
    return LayerLoss(
        key_mse=((keys - raw_keys)[after].square().sum((0, 2)) / spread).cpu(),
        value_mse=(
            (values - raw_values)[after].square().sum((0, 2)) / raw_values[after].square().sum((0, 2))
        ).cpu(),
        correlation=torch.stack(correlation).cpu(),
        kl=torch.stack(kl).cpu(),
        output_error=torch.stack(output_error).cpu(),
    )


def _correlation(true: torch.Tensor, got: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Pearson's over all visible pairs, each query's scores less their own mean, which softmax ignores."""
    count = visible.sum(-1, keepdim=True)
    centred = []
    for scores in (true, got):
        shown = scores.masked_fill(~visible, 0)
        centred.append((shown - shown.sum(-1, keepdim=True) / count).masked_fill(~visible, 0).double())
    first, second = centred
    return (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()
