"""Bounds of the wire contract, the same on both sides; `block_store.proto` states them in words."""

MAX_KEYS = 4096
"""Keys or blocks that one call may name."""
MAX_FRAME_BYTES = 1 << 20
"""Block bytes in one frame."""
MAX_MESSAGE_BYTES = 2 << 20
"""Bytes of one message, enforced by grpc before anything is parsed."""
TICKET_BYTES = 32
"""What opens a pipe, once."""
PIPE_NAME_BYTES = 16
"""What names a pipe in calls."""
TICKET_LIFE_S = 5.0
MAX_PUT_BYTES = 1 << 30
"""Block bytes in one Put."""
