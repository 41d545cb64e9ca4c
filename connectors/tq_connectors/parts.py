"""Who saves and loads what: how a model's cache is divided into parts, and what each rank of an engine holds.

Ranks that save on their own save parts: one block each, named by the layers and heads in it and by nothing
of the engine that made it. A page counts as stored when all parts of its division are, so a rank that dies on
the way leaves parts that nobody is told of, never half a page.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tq_connectors.codec import CacheGeometry
from tq_store.errors import ConfigError
from tq_store.keys import BlockKey, Part, part_key


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank of an engine holds.

    Args:
        part: Its layers and KV heads.
        is_saver: False for all but the first of several ranks that hold the same.
    """

    part: Part
    is_saver: bool = True


def shard_of(
    geometry: CacheGeometry, *, tp_rank: int = 0, tp_size: int = 1, layers: range | None = None
) -> Shard:
    """The shard of a tensor-parallel rank, as engines cut them: equal runs of heads, in the order of ranks.

    With more ranks than heads every head is held by as many ranks, one after the other.

    Args:
        geometry: Shape of the whole model's cache.
        tp_rank: Which rank, from 0.
        tp_size: How many there are.
        layers: Attention layers of the rank's pipeline stage; None for all.

    Raises:
        ConfigError: There is no such rank, or no such layers; or heads and ranks do not divide evenly.
    """
    num_heads = geometry.num_kv_heads
    layers = range(geometry.num_layers) if layers is None else layers
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"there is no rank {tp_rank} of {tp_size}")
    if num_heads % tp_size and tp_size % num_heads:
        raise ConfigError(f"{num_heads} KV heads cannot be spread evenly over {tp_size} ranks")
    if not 0 <= layers.start < layers.stop <= geometry.num_layers or layers.step != 1:
        raise ConfigError(f"{layers} are not consecutive layers of the model's {geometry.num_layers}")
    replicas = max(1, tp_size // num_heads)
    heads = max(1, num_heads // tp_size)
    head = tp_rank // replicas * heads
    part = _part(layers.start, layers.stop, head, head + heads)
    return Shard(part, is_saver=tp_rank % replicas == 0)


@dataclass(frozen=True, slots=True)
class Division:
    """How the blocks of a namespace cut a model into parts; all engines that share blocks use the same one.

    It decides what is found, never what is right: a part is named by what it holds, so engines of different
    divisions miss each other's blocks and cannot mistake them. `parts` are in the order of layers, then of
    heads; `whole` is all of them.

    Args:
        layer_cuts: Where parts begin and end: 0, any layers between, and the number of layers.
        head_cuts: The same of KV heads.

    Raises:
        ConfigError: The cuts do not ascend from 0.
    """

    layer_cuts: tuple[int, ...]
    head_cuts: tuple[int, ...]
    whole: Part = field(init=False, repr=False, compare=False)
    parts: tuple[Part, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, cuts in (("layers", self.layer_cuts), ("KV heads", self.head_cuts)):
            if len(cuts) < 2 or cuts[0] != 0 or any(a >= b for a, b in itertools.pairwise(cuts)):
                raise ConfigError(f"a division of {name} ascends from 0, not {cuts}")
        object.__setattr__(self, "whole", _part(0, self.layer_cuts[-1], 0, self.head_cuts[-1]))
        parts = (
            _part(*layers, *heads)
            for layers in itertools.pairwise(self.layer_cuts)
            for heads in itertools.pairwise(self.head_cuts)
        )
        object.__setattr__(self, "parts", tuple(parts))

    @classmethod
    def undivided(cls, geometry: CacheGeometry) -> "Division":
        """One block for all layers and heads: for savers that see all of them."""
        return cls((0, geometry.num_layers), (0, geometry.num_kv_heads))

    @classmethod
    def for_ranks(
        cls,
        geometry: CacheGeometry,
        *,
        tp_sizes: Iterable[int],
        layer_splits: Iterable[Sequence[int]] = (),
    ) -> "Division":
        """The coarsest division in which every rank of these engines holds whole parts.

        Args:
            geometry: Shape of the whole model's cache.
            tp_sizes: Numbers of tensor-parallel ranks that engines have.
            layer_splits: Layers of each pipeline stage, for every way in which engines cut them.

        Raises:
            ConfigError: Heads or layers cannot be spread like this.
        """
        head_cuts = {0, geometry.num_kv_heads}
        for tp_size in tp_sizes:
            ranks = range(tp_size)
            head_cuts |= {
                shard_of(geometry, tp_rank=rank, tp_size=tp_size).part.first_kv_head for rank in ranks
            }
        layer_cuts = {0, geometry.num_layers}
        for split in layer_splits:
            if min(split, default=0) < 1 or sum(split) != geometry.num_layers:
                raise ConfigError(f"stages of {list(split)} layers do not make up {geometry.num_layers}")
            layer_cuts |= set(itertools.accumulate(split))
        return cls(tuple(sorted(layer_cuts)), tuple(sorted(head_cuts)))

    def cut_at(self, layers: Iterable[int]) -> "Division":
        """The same, with parts that begin at these layers too; the number of layers may be among them."""
        return Division(tuple(sorted({*self.layer_cuts, *layers})), self.head_cuts)

    def key(self, key: BlockKey, part: Part) -> BlockKey:
        """Key of the block that holds this part of a page; `key` is that of the page with all of them."""
        return part_key(key, part, self.whole)

    def keys(self, key: BlockKey) -> list[BlockKey]:
        """Keys of all parts of a page: all of them are stored, or the page is not."""
        return [self.key(key, part) for part in self.parts]

    def loaded_by(self, shard: Shard) -> list[Part]:
        """Parts that hold something of a shard: what its rank gets, whatever it needs of each."""
        return [part for part in self.parts if part.overlap(shard.part)]

    def saved_by(self, shard: Shard) -> list[Part]:
        """Parts that a rank puts: those in its shard, or none where a part would reach beyond it.

        An engine with such a rank loads what others saved, and saves nothing that anybody finds.
        """
        parts = self.loaded_by(shard)
        return parts if shard.is_saver and all(map(shard.part.covers, parts)) else []


def _part(layer: int, layer_end: int, head: int, head_end: int) -> Part:
    return Part(
        first_layer=layer, num_layers=layer_end - layer, first_kv_head=head, num_kv_heads=head_end - head
    )
