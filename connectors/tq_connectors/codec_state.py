"""CodecState: the channel balance of a model's keys, on which all replicas of a namespace agree by the store.

The state lies in the store as one block of the namespace that does without it. Whoever finds none offers its
own, and takes what the store then has: the first writer wins. Pages made with a state are in a namespace of
their own, named by the state's digest, so pages of two states never meet.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tq_connectors.codec import CacheGeometry
from tq_kernels.balance import LARGEST_RATIO
from tq_kernels.spec import Code
from tq_store.block import BlockInfo, Buffer, pack_block, parse_header, payload_of, verify_block
from tq_store.client import StoreClient
from tq_store.errors import IdentityMismatch, InvalidHeader
from tq_store.keys import BlockKey, Namespace
from tq_store.results import PutOutcome

STATE_CODEC_ID = 4
_STATE_PREFIX = hashlib.sha256(b"tq-store codec state v1").digest()
"""In the place of a prefix hash; no tokens hash to it."""


@dataclass(frozen=True, slots=True)
class CodecState:
    """What readers and writers of a namespace must share beyond its codec.

    Args:
        key_balance: ``[num_layers, num_kv_heads, head_dim]`` float32 on the CPU: bfloat16 numbers within
            `tq_kernels.balance.LARGEST_RATIO` of 1.

    Raises:
        ValueError: Another shape or dtype, or a number that no balance has.
    """

    key_balance: torch.Tensor

    def __post_init__(self) -> None:
        balance = self.key_balance
        if balance.dim() != 3 or balance.dtype != torch.float32 or balance.device.type != "cpu":
            raise ValueError(
                f"a balance is [num_layers, num_kv_heads, head_dim] float32 on the CPU, "
                f"not {list(balance.shape)} {balance.dtype} on {balance.device}"
            )
        fits = (balance >= 1 / LARGEST_RATIO) & (balance <= LARGEST_RATIO)
        if not fits.all() or not torch.equal(balance, balance.bfloat16().float()):
            raise ValueError(
                f"a balance holds bfloat16 numbers from 1/{LARGEST_RATIO:.0f} to {LARGEST_RATIO:.0f}"
            )

    @property
    def payload(self) -> bytes:
        """The balance as little-endian bfloat16, layer after layer."""
        return self.key_balance.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()

    @property
    def digest(self) -> str:
        """SHA-256, hex, over what it is and its numbers: the namespace's `codec_state`."""
        return hashlib.sha256(b"key balance v1" + self.payload).hexdigest()

    @classmethod
    def of_layers(cls, balances: Sequence[torch.Tensor]) -> "CodecState":
        """From ``[num_kv_heads, head_dim]`` of each layer, as `tq_kernels.balance` estimates them."""
        return cls(torch.stack([balance.cpu() for balance in balances]))


def state_key(namespace: Namespace) -> BlockKey:
    """Where the state of a model lies; `namespace` is the one that does without a state."""
    return BlockKey(namespace.digest() + _STATE_PREFIX)


def pack_state(state: CodecState, namespace: Namespace, geometry: CacheGeometry) -> bytes:
    """The state as a block, one page of bfloat16 a layer."""
    return pack_block(_info(namespace, geometry), state.payload)


def unpack_state(block: Buffer, namespace: Namespace, geometry: CacheGeometry) -> CodecState:
    """The state from a block whose checksums have been verified.

    Raises:
        BlockFormatError: Not a state of this model.
    """
    info = parse_header(block)
    if info != _info(namespace, geometry):
        raise IdentityMismatch("the block under the state's key holds no codec state of this model")
    return _state_of(block, info)


def read_state(block: Buffer) -> CodecState:
    """The state in the bytes of `pack_state`, of whatever model it is.

    Raises:
        BlockFormatError: Not the bytes of a state.
    """
    info = verify_block(block)
    if (info.codec_id, info.prefix_hash) != (STATE_CODEC_ID, _STATE_PREFIX):
        raise IdentityMismatch("a block, but not one that holds a codec state")
    return _state_of(block, info)


def _state_of(block: Buffer, info: BlockInfo) -> CodecState:
    shape = (info.num_layers, info.num_kv_heads, info.head_dim)
    payload = payload_of(block)
    if len(payload) != 2 * math.prod(shape):
        raise InvalidHeader(f"{len(payload)} bytes hold no codec state of {shape}")
    numbers = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16)
    try:
        return CodecState(numbers.float().view(shape))
    except ValueError as error:
        raise InvalidHeader(f"the codec state is none: {error}") from error


def agree_on_state(
    client: StoreClient,
    namespace: Namespace,
    geometry: CacheGeometry,
    propose: Callable[[], CodecState | None],
) -> CodecState | None:
    """The state that the store has for a model, or this replica's if it has none.

    Args:
        client: Connection to the store.
        namespace: The model's, without a state.
        geometry: Shape of the model's KV cache.
        propose: Makes a state; called only when the store has none. None if it cannot.

    Returns:
        What all replicas of this store use from now on; None where it has no state and none was proposed, or
        the store did not keep it.

    Raises:
        RpcError: The store cannot be reached.
        BlockFormatError: What the store has is no state.
    """
    state = _fetch(client, namespace, geometry)
    if state is None and (proposal := propose()) is not None:
        key = state_key(namespace)
        (outcome,) = client.put([(key, pack_state(proposal, namespace, geometry))])
        if outcome in (PutOutcome.STORED, PutOutcome.PRESENT):
            state = _fetch(client, namespace, geometry)
    return state


def _fetch(client: StoreClient, namespace: Namespace, geometry: CacheGeometry) -> CodecState | None:
    ((_, block),) = client.get([state_key(namespace)])
    return None if block is None else unpack_state(block, namespace, geometry)


def _info(namespace: Namespace, geometry: CacheGeometry) -> BlockInfo:
    return BlockInfo(
        namespace=namespace.digest(),
        prefix_hash=_STATE_PREFIX,
        codec_fingerprint=bytes.fromhex(namespace.codec_fingerprint),
        rotation_seed=0,
        codec_id=STATE_CODEC_ID,
        packing_id=0,
        key_code=Code.BF16,
        value_code=0,
        rotation_id=0,
        key_center=0,
        page_bytes=2 * geometry.num_kv_heads * geometry.head_dim,
        num_tokens=1,
        page_tokens=1,
        head_dim=geometry.head_dim,
        first_layer=0,
        num_layers=geometry.num_layers,
        first_kv_head=0,
        num_kv_heads=geometry.num_kv_heads,
        total_kv_heads=geometry.num_kv_heads,
    )
