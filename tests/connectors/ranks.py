"""Shapes, splits and pages of models that several ranks share."""

import itertools
import random

from hypothesis import strategies as st

from tq_connectors.codec import CacheGeometry
from tq_store.keys import Part

TP_SIZES = (1, 2, 4, 8, 16)


def geometry_of(num_layers: int, num_kv_heads: int, head_dim: int = 16) -> CacheGeometry:
    return CacheGeometry(
        num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, kv_dtype="bfloat16"
    )


@st.composite
def geometries(draw: st.DrawFn) -> CacheGeometry:
    """Up to 13 layers, and 1 to 16 heads that powers of two can be spread over."""
    return geometry_of(draw(st.integers(1, 13)), draw(st.sampled_from([1, 2, 4, 8, 16])))


@st.composite
def layer_splits(draw: st.DrawFn, num_layers: int) -> list[int]:
    """Layers of each of up to four stages, mostly uneven."""
    num_stages = draw(st.integers(1, min(4, num_layers)))
    cuts = draw(
        st.lists(
            st.integers(1, num_layers - 1), min_size=num_stages - 1, max_size=num_stages - 1, unique=True
        )
        if num_stages > 1
        else st.just([])
    )
    return [end - start for start, end in itertools.pairwise([0, *sorted(cuts), num_layers])]


def stages(split: list[int]) -> list[range]:
    """Layers of each stage."""
    return [range(start, end) for start, end in itertools.pairwise([0, *itertools.accumulate(split)])]


class ModelPages:
    """Random bytes for every section of a model's pages, of which any rank's are cut out one by one."""

    def __init__(self, geometry: CacheGeometry, section_bytes: int, pages_per_layer: int = 1, seed: int = 0):
        rng = random.Random(seed)
        self._pages = range(pages_per_layer)
        self._sections = {
            (layer, page, head): rng.randbytes(section_bytes)
            for layer in range(geometry.num_layers)
            for page in self._pages
            for head in range(geometry.num_kv_heads)
        }

    def of(self, part: Part) -> bytes:
        return b"".join(
            self._sections[layer, page, head]
            for layer in range(part.first_layer, part.first_layer + part.num_layers)
            for page in self._pages
            for head in range(part.first_kv_head, part.first_kv_head + part.num_kv_heads)
        )
