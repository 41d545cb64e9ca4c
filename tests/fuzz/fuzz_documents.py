"""Fuzz target over what others describe in text: a server's status, a model's config, LMCache's objects."""

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz.driver import mutated
from fuzz.fuzz_block import sealed

from tq_connectors.envelope import pack_object, unpack_object
from tq_connectors.lmcache.object_layout import parse_layout
from tq_store.block import HEADER_BYTES
from tq_store.errors import BlockFormatError, ConfigError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey
from tq_store.sizing import PRESETS, block_bytes, read_model
from tq_store.status import Status

_KEY = BlockKey(bytes(range(BLOCK_KEY_BYTES)))
_STATUS = Status(
    version="1",
    uptime_s=1.5,
    window_s=1.0,
    step_s=1.0,
    hit_ratio=0.5,
    total_hit_ratio=None,
    sent_bytes_per_s=1.0,
    received_bytes_per_s=0.0,
    saved_bytes=1 << 50,
    active_requests=1,
    max_requests=256,
    inflight_bytes=0,
    max_inflight_bytes=1,
    troubles={"misses": 1},
).to_json()
_MODEL = json.dumps(
    {
        "text_config": {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 2,
            "intermediate_size": 14336,
            "layer_types": ["full_attention", "sliding_attention"],
        }
    }
)
_OBJECT = pack_object(_KEY, "KV_2LTD torch.bfloat16[2, 4, 16, 8] bytes[7]", bytes(200))
_LAYOUT = "KV_2LTD torch.bfloat16[2, 4, 16, 8] torch.uint8[7]"
_PIECES = [
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b",",
        b":",
        b"null",
        b"1e999",
        b"-1",
        b"0",
        b"9" * 30,
        b"9" * 5000,
        b"[" * 5000,
    ),
    *(
        b"NaN",
        b"true",
        b"\xff",
        b'"text_config":',
        b'"num_hidden_layers": 1e300,',
        b"\\ud800",
        b" ",
        b"torch.int8",
    ),
]


def generate(rng: random.Random) -> bytes:
    """One of the documents, changed."""
    kind = rng.randrange(4)
    start = (_STATUS.encode(), _MODEL.encode(), _OBJECT, _LAYOUT.encode())[kind]
    data = mutated(rng, start, _PIECES)
    return bytes([kind]) + (sealed(data) if kind == 2 and rng.random() < 0.8 else data)


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With a file to write."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        yield lambda data: _outcomes(data, file)


def _outcomes(data: bytes, file: Path) -> Iterator[str]:
    kind, content = (data or b"\0")[0] % 4, data[1:]
    readers: tuple[Callable[[], str], ...] = (
        lambda: _status(content),
        lambda: _model(content, file),
        lambda: _object(content),
        lambda: _layout(content.decode("latin-1")),
    )
    refusals = (ValueError, ConfigError, BlockFormatError, ValueError)
    try:
        yield readers[kind]()
    except refusals[kind]:
        yield "refused"


def _status(content: bytes) -> str:
    Status.from_json(content)
    return "status"


def _model(content: bytes, file: Path) -> str:
    file.write_bytes(content)
    model = read_model(file)
    assert min(model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) > 0, "a size below 1"
    for name in PRESETS:
        assert block_bytes(model, name, 64) > 0, "a block without bytes"
    return "model"


def _object(content: bytes) -> str:
    found = unpack_object(_KEY, content)
    assert len(found.data) <= len(content) - HEADER_BYTES, "more bytes than the block has"
    return "object"


def _layout(text: str) -> str:
    layout = parse_layout(text)
    assert layout.num_bytes >= 0, "a negative size"
    assert parse_layout(layout.text()) == layout, "a layout that reads differently once written"
    return "layout"
