"""An SGLang engine as a process that tests talk to."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from store.running_server import wait_until

PACKED = {"kv_cache_dtype": "tq4", "attention_backend": None}
"""Arguments of an engine whose cache is compressed, which chooses its attention backend itself."""
WORKER = Path(__file__).with_name("replica_worker.py")


class EngineProcess:
    """An engine with these arguments. Started again it has nothing in its caches.

    Args:
        log: File for what it prints.
        arguments: Of `sglang.Engine`, beside those of `replica_worker`.
    """

    def __init__(self, log: Path, **arguments: Any) -> None:
        self._log = log
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(self._arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._is_ready = False

    def wait_until_ready(self) -> "EngineProcess":
        if not self._is_ready:
            assert self._answer() == "ready"
            self._is_ready = True
        return self

    @property
    def pid(self) -> int:
        """Of the process that started the engine's others."""
        return self._process.pid

    def fails_to_start(self) -> bool:
        return self._process.stdout.readline() == ""

    def generate(self, tokens: list[int], num_new: int = 4) -> dict[str, Any]:
        """New tokens, and how many of the prompt's were cached, in all and from storage."""
        return self._ask("generate", tokens=tokens, num_new=num_new)

    def flush(self) -> None:
        """Empty the caches of device and host, as soon as SGLang has nothing under way."""
        wait_until(lambda: self.control("flush_cache")["success"])

    def control(self, name: str, **arguments: Any) -> dict[str, Any]:
        return self._ask("control", name=name, **arguments)

    def attach(self, **extra: Any) -> dict[str, Any]:
        """Use our storage backend with these settings, in place of what it was used with before."""
        self.detach()
        self.flush()
        return self.control(
            "attach_hicache_storage",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config_json=json.dumps(storage(**extra)),
            hicache_storage_prefetch_policy="wait_complete",
        )

    def detach(self) -> None:
        wait_until(lambda: self.control("detach_hicache_storage")["success"])

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait_until_ready()

    def _ask(self, call: str, **arguments: Any) -> Any:
        self.wait_until_ready()
        self._process.stdin.write(json.dumps([call, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            pytest.fail(f"the engine has ended:\n{self.log()[-4000:]}")
        return json.loads(line)


def storage(**extra: Any) -> dict[str, Any]:
    """What an operator writes as `--hicache-storage-backend-extra-config`."""
    return {
        "backend_name": "tq-store",
        "module_path": "tq_connectors.sglang.hicache_storage",
        "class_name": "TQHiCacheStorage",
        "interface_v1": 1,
        "prefetch_threshold": 16,
        "revision": "r1",
        "codec": "none",
        "lookup_timeout": "1s",
        "transfer_timeout": "10s",
    } | extra
