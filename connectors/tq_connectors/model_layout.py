"""ModelLayout: pages of a whole model, whose layers may differ in their codec and so in the size of a page.

Layers that follow each other and are laid out alike are a run. A block never reaches beyond a run, so its
header has one page size and one codec, whatever the layers of other blocks have.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from tq_connectors.reshard import join_pages
from tq_kernels.layout import PageLayout
from tq_kernels.spec import CodecSpec, preset
from tq_store.block import Buffer
from tq_store.keys import Part
from tq_store.layer_table import LayerTable


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """How the pages of each of a model's layers are laid out, all KV heads in each.

    Args:
        by_layer: One for each layer; they differ in nothing but their codec.

    Raises:
        ValueError: There is none, or they differ in more.
    """

    by_layer: tuple[PageLayout, ...]
    runs: tuple[range, ...] = field(init=False, repr=False, compare=False)
    """Layers laid out alike that follow each other, in order."""
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Bytes of one KV head in one page of all layers before each, and of all."""

    def __post_init__(self) -> None:
        if len({(each.head_dim, each.num_kv_heads, each.page_tokens) for each in self.by_layer}) != 1:
            raise ValueError("a model has layers, and they differ in nothing but their codec")
        lengths = (len(list(run)) for _, run in itertools.groupby(self.by_layer))
        cuts = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        object.__setattr__(self, "runs", tuple(range(start, stop) for start, stop in cuts))
        sizes = (each.section_bytes for each in self.by_layer)
        object.__setattr__(self, "_starts", tuple(itertools.accumulate(sizes, initial=0)))

    @classmethod
    def of(cls, layout: "PageLayout | ModelLayout", num_layers: int) -> "ModelLayout":
        """That of a model with one layout in all layers; a model's own comes back as it is.

        Raises:
            ValueError: It is that of a model with another number of layers.
        """
        layout = layout if isinstance(layout, ModelLayout) else cls((layout,) * num_layers)
        if len(layout.by_layer) != num_layers:
            raise ValueError(
                f"{len(layout.by_layer)} page layouts are not one for each of {num_layers} layers"
            )
        return layout

    @classmethod
    def for_codec(
        cls, codec: CodecSpec | str, *, num_layers: int, num_kv_heads: int, head_dim: int, page_tokens: int
    ) -> "ModelLayout":
        """That of a model under one codec, or under what a name says: a preset, or a table by layer.

        Raises:
            ConfigError: The name is none, or that of a table with layers which the model does not have.
            ValueError: There is no such preset, or a size cannot be packed.
        """
        if isinstance(codec, CodecSpec):
            specs = [codec] * num_layers
        else:
            specs = [preset(name) for name in LayerTable.parse(codec).by_layer(num_layers)]
        return cls(
            tuple(
                PageLayout(spec=spec, head_dim=head_dim, num_kv_heads=num_kv_heads, page_tokens=page_tokens)
                for spec in specs
            )
        )

    @property
    def page_tokens(self) -> int:
        """Tokens of a page, the same in all layers."""
        return self.by_layer[0].page_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer."""
        return self._starts[-1] * self.by_layer[0].num_kv_heads

    @property
    def layer_cuts(self) -> tuple[int, ...]:
        """Where runs begin, and the number of layers."""
        return (*(run.start for run in self.runs), len(self.by_layer))

    @property
    def fingerprint(self) -> bytes:
        """32 bytes: the codec's own where all layers have one, else a digest of the codecs of all layers."""
        fingerprints = [layout.spec.fingerprint for layout in self.by_layer]
        if len(self.runs) == 1:
            return fingerprints[0]
        return hashlib.sha256(b"tq-store codec by layer v1" + b"".join(fingerprints)).digest()

    def within_run(self, part: Part) -> PageLayout:
        """Layout of the layers of a part that lies within a run, with all the model's KV heads.

        Raises:
            ValueError: The part reaches beyond.
        """
        if not any(part.first_layer in run and part.last_layer in run for run in self.runs):
            raise ValueError(f"{part} has layers that are not laid out alike")
        return self.by_layer[part.first_layer]

    def join(self, pieces: Sequence[tuple[Part, Buffer]], wanted: Part) -> memoryview:
        """Pages of some layers and heads from pages of parts: `join_pages`, over runs.

        Without a copy where one part and one run hold what is wanted together. Pages lie layer after layer,
        one of each.

        Args:
            pieces: Parts and the pages of each; no two have anything in common, and what is not wanted of
                them is left out.
            wanted: Layers and heads in the result.

        Raises:
            ValueError: Pages have another length, parts have something in common, or some of `wanted` is
                lacking.
        """
        if not self._part(range(len(self.by_layer))).covers(wanted):
            raise ValueError(f"{wanted} does not lie within the model's {len(self.by_layer)} layers")
        joined = []
        for run in self.runs:
            if here := wanted.overlap(self._part(run)):
                held = [
                    (own, self._cut(pages, part, own))
                    for part, pages in pieces
                    if (own := part.overlap(self._part(run)))
                ]
                joined.append(join_pages(held, here, section_bytes=self.by_layer[run.start].section_bytes))
        return joined[0] if len(joined) == 1 else memoryview(b"".join(joined))

    def _part(self, layers: range) -> Part:
        """Some layers with all KV heads."""
        return Part(
            first_layer=layers.start,
            num_layers=len(layers),
            first_kv_head=0,
            num_kv_heads=self.by_layer[0].num_kv_heads,
        )

    def _cut(self, pages: Buffer, part: Part, own: Part) -> memoryview:
        """Pages of some of a part's layers, with all its heads."""
        view = memoryview(pages).cast("B")
        first, last = part.first_layer, part.last_layer
        begin, start, stop, end = (
            self._starts[layer] * part.num_kv_heads
            for layer in (first, own.first_layer, own.last_layer + 1, last + 1)
        )
        if len(view) != end - begin:
            raise ValueError(f"pages of {part} have {end - begin} bytes, not {len(view)}")
        return view[start - begin : stop - begin]
