"""What a replica does with a store, without an engine: to see that a set-up works.

    python deploy/replica.py --config out/secrets/replica-a.toml

It has a prompt of 4,096 tokens, the same wherever it runs; `--prompt 2` is another. Pages that the store has
are loaded and compared with what they must be; the others are made and saved.
"""

import argparse
import hashlib
import os
import random
import sys
import time
from pathlib import Path

from tq_store.block import BlockInfo, pack_block
from tq_store.client import StoreClient
from tq_store.config import ClientConfig, load_config
from tq_store.errors import TQStoreError
from tq_store.keys import BlockKey, Namespace, block_keys, split_key

_PAGE_TOKENS = 64
_NUM_TOKENS = 4096
_FINGERPRINT = hashlib.sha256(b"deploy/replica.py").digest()
_NAMESPACE = Namespace(
    model="deploy/replica.py",
    revision="1",
    kv_dtype="bfloat16",
    codec_fingerprint=_FINGERPRINT.hex(),
    page_tokens=_PAGE_TOKENS,
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
)


def main() -> int:
    """Run once; 0 where every page was loaded or saved, and none was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="TOML file with a table [client]")
    parser.add_argument("--address", help="another server than the file's")
    parser.add_argument("--prompt", type=int, default=1, help="which prompt")
    options = parser.parse_args()
    keys = block_keys(_NAMESPACE, random.Random(options.prompt).choices(range(100_000), k=_NUM_TOKENS))
    try:
        arguments = {"address": options.address} if options.address else {}
        config = load_config(ClientConfig, arguments=arguments, file=options.config, environment=os.environ)
        with StoreClient(config=config) as client:
            started = time.perf_counter()
            num_hits = client.lookup(keys)
            loaded = {keys[position]: block for position, block in client.get(keys[:num_hits]) if block}
            load_s = time.perf_counter() - started
            missing = [key for key in keys if key not in loaded]
            outcomes = client.put((key, _block(key)) for key in missing)
    except TQStoreError as error:
        sys.stderr.write(f"replica: {error}\n")
        return 1
    num_wrong = sum(block != _block(key) for key, block in loaded.items())
    num_saved = sum(outcome.name in ("STORED", "PRESENT") for outcome in outcomes)
    sys.stdout.write(
        f"{len(keys)} pages: {len(loaded)} from the store in {load_s:.2f} s, {num_saved} made and saved, "
        f"{num_wrong} wrong\n"
    )
    return int(num_wrong > 0 or num_saved < len(missing))


def _block(key: BlockKey) -> bytes:
    """The block of a key, as large as for an 8B model in 4 bits; its bytes follow from the key."""
    _, prefix_hash = split_key(key)
    info = BlockInfo(
        namespace=_NAMESPACE.digest(),
        prefix_hash=prefix_hash,
        codec_fingerprint=_FINGERPRINT,
        rotation_seed=0,
        codec_id=1,
        packing_id=1,
        key_code=4,
        value_code=4,
        rotation_id=1,
        key_center=0,
        page_bytes=_PAGE_TOKENS * 8 * 134,
        num_tokens=_PAGE_TOKENS,
        page_tokens=_PAGE_TOKENS,
        head_dim=128,
        first_layer=0,
        num_layers=32,
        first_kv_head=0,
        num_kv_heads=8,
        total_kv_heads=8,
    )
    return pack_block(info, random.Random(prefix_hash).randbytes(info.payload_bytes))


if __name__ == "__main__":
    sys.exit(main())
