"""Gets whose blocks come through a pipe beside grpc; what it leaves goes as a stream."""

import contextlib
from collections.abc import Iterator, Sequence

from tq_store.errors import RpcDenied, RpcError, RpcOverLimit, RpcTimeout, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.rpc import convert
from tq_store.rpc.connection import Attempts, Connection
from tq_store.rpc.lanes import Stop
from tq_store.rpc.pipe import Pipe, PipePool


class PipeRoad:
    """Gets by the pipes of a pool, as far as they go. Safe to use from several threads.

    Args:
        connection: Carries the calls.
        pipes: Carry the blocks.
    """

    def __init__(self, connection: Connection, pipes: PipePool) -> None:
        self._connection = connection
        self._pipes = pipes

    def get(self, keys: Sequence[BlockKey], stop: Stop, attempts: Attempts) -> Iterator[bytes | None]:
        """What the server has under the leading keys, unverified; for the others a stream has to be asked.

        Args:
            keys: Of one call.
            stop: Ends it from another thread.
            attempts: The deadline.

        Raises:
            RpcUnavailable, RpcTimeout, RpcDenied, RpcOverLimit: A stream would fare no better.
        """
        with self._pipes.lend(attempts.remaining_s) as pipe:
            if pipe is not None:
                yield from self._read(pipe, keys, stop, attempts)

    def _read(
        self, pipe: Pipe, keys: Sequence[BlockKey], stop: Stop, attempts: Attempts
    ) -> Iterator[bytes | None]:
        number, received = pipe.begin(), 0
        request = convert.pack_piped_get(pipe.name, number, keys)
        messages = self._connection.receive("GetPiped", request, timeout_s=attempts.remaining_s, stop=stop)
        with contextlib.closing(messages), stop.ends(pipe.shut):
            try:
                # until the server says so, nothing comes: a call that is refused writes nothing
                if next(messages, None) is None:
                    return
                for index in range(len(keys)):
                    block = pipe.receive_block(number, index, attempts.remaining_s)
                    received += 1
                    yield block
                _finish(messages, pipe)
            except GeneratorExit:
                if received == len(keys):  # a reader that has all may not ask for the end
                    _finish(messages, pipe)
                raise
            except (OSError, ValueError):
                self._connection.count("broken_pipes")
            except EOFError:
                self._connection.count("broken_pipes")
                _raise_why(messages)
            except RpcError as error:
                _raise_if_final(error)


def _finish(messages: Iterator[bytes], pipe: Pipe) -> None:
    """Hear that the server is done with the pipe."""
    with contextlib.suppress(RpcError):
        if next(messages, None) is None:
            pipe.end()


def _raise_why(messages: Iterator[bytes]) -> None:
    """What the server says of a call that it has given up."""
    try:
        next(messages, None)
    except RpcError as error:
        _raise_if_final(error)


def _raise_if_final(error: RpcError) -> None:
    if isinstance(error, RpcUnavailable | RpcTimeout | RpcDenied | RpcOverLimit):
        raise error
