"""How grpc moves bytes on both sides: options for large messages, and an allocator that keeps its memory."""

from tq_store.rpc.limits import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES

_LARGEST_READ_BYTES = 4 << 20
_KEPT_BYTES = 32 << 20

TRANSPORT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # one of our frames in one frame of HTTP/2, not in 64 of the usual 16 KiB, each with its own slice
    ("grpc.http2.max_frame_size", MAX_FRAME_BYTES),
    # and read with one system call, into one slice
    ("grpc.experimental.tcp_read_chunk_size", MAX_FRAME_BYTES),
    ("grpc.experimental.tcp_min_read_chunk_size", MAX_FRAME_BYTES),
    ("grpc.experimental.tcp_max_read_chunk_size", _LARGEST_READ_BYTES),
)
"""For channels and servers alike; what they are worth stands in `benchmarks/NOTES.md`."""


def keep_freed_memory() -> None:
    """Have glibc reuse freed buffers in place of giving each back to the kernel.

    Otherwise a process whose largest buffers are of one frame maps and faults in every frame anew, at three
    times the cost of copying it. glibc learns from the size of a buffer that is freed; this one is never
    touched, so it takes no memory. Elsewhere it does nothing.
    """
    bytes(_KEPT_BYTES - (64 << 10))  # glibc learns nothing from more than 32 MiB
