"""Real servers for tests: ours on a thread of this process, any servicer on a port, and TLS files."""

import asyncio
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from tq_store.config import ServerConfig
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server.app import Server

WAIT_S = 20.0
TOKEN = "a-token-that-is-long-enough"


@contextmanager
def running_server(**settings: Any) -> Iterator[Server]:
    """Our server with these fields of `ServerConfig`, on a free port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(WAIT_S)

    try:
        server = run(Server.start(ServerConfig(**({"listen": "127.0.0.1:0", "grace_s": 0.1} | settings))))
        try:
            yield server
        finally:
            run(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def foreign_server(servicer: stubs.BlockStoreServicer) -> Iterator[str]:
    """A server that is not ours: a plain grpc one with this servicer; gives its address."""
    server = grpc.server(ThreadPoolExecutor(4))
    stubs.add_BlockStoreServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that another thread or process brings about, and cannot announce."""
    for _ in range(int(WAIT_S / 0.01)):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never became so")


def write_token(directory: Path, token: str = TOKEN) -> Path:
    path = directory / "token"
    path.write_text(token)
    path.chmod(0o600)
    return path


def make_certificates(directory: Path) -> None:
    """`ca.pem`, and signed by it `server.pem`/`.key` for 127.0.0.1 and `client.pem`/`.key`."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    fresh = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *fresh, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        openssl("req", *fresh, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        openssl("x509", "-req", *signed, "-extfile", "names", "-out", f"{name}.pem")
