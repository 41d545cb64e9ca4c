"""Real arrangements of several Redis or Valkey servers: a cluster, and a master watched by sentinels."""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from redis.crc import key_slot
from store.redis_process import RedisProcess, cli, server_binary, started, stop
from store.running_server import wait_until

_SLOTS = 16384


def free_port() -> int:
    """A port whose cluster bus port, 10,000 above, is free too."""
    while True:
        port = random.randrange(20_000, 50_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


class RedisCluster:
    """Three masters, each with a replica. `nodes` are the masters, then the replicas in the same order."""

    def __init__(self, nodes: list[RedisProcess]) -> None:
        self.nodes = nodes
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)

    def flush(self) -> None:
        """Remove everything, and wait for the last test's connections to go: they count as memory."""
        for node in self.nodes[:3]:
            node.command("FLUSHALL")
            wait_until(lambda node=node: _num_callers(node) == 0)

    def master_of(self, key: str) -> RedisProcess:
        """Who owns a key, by the layout that the cluster was made with."""
        return self.nodes[_share_of(key_slot(key.encode()))]

    def wait_for_replicas(self) -> None:
        """Until they have what the masters have."""
        for master in self.nodes[:3]:
            wait_until(lambda node=master: _offset(node, "slave0") == _offset(node, "master_repl_offset"))


def _num_callers(node: RedisProcess) -> int:
    """Clients besides the one that asks, and the other nodes, which keep what MIGRATE opened for 10 s."""
    lines = node.command("CLIENT", "LIST", "TYPE", "normal").splitlines()
    return sum("cmd=restore" not in line for line in lines) - 1


def _share_of(slot: int) -> int:
    return next(share for share in range(3) if slot < _first_slot(share + 1))


def _first_slot(share: int) -> int:
    return share * _SLOTS // 3


def _offset(master: RedisProcess, name: str) -> int:
    for line in master.command("INFO", "replication").splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return int(value.partition("offset=")[2].partition(",")[0] or value)
    return -1


@contextmanager
def running_cluster(
    directory: Path, *, node_timeout_ms: int, certificates: Path | None = None
) -> Iterator[RedisCluster]:
    """A failover takes the timeout, and two or three seconds."""
    options = (
        *("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms)),
        *("--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0"),
        *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
        *(() if certificates is None else ("--tls-cluster", "yes")),
    )
    with ExitStack() as stack:
        nodes = []
        for number in range(6):
            place = directory / str(number)
            nodes.append(RedisProcess(place, *options, port=free_port(), certificates=certificates))
            stack.callback(nodes[-1].kill)
        for share, master in enumerate(nodes[:3]):
            master.command("CLUSTER", "SET-CONFIG-EPOCH", str(share + 1))
            slots = range(_first_slot(share), _first_slot(share + 1))
            master.command("CLUSTER", "ADDSLOTS", *map(str, slots))
        for node in nodes[1:]:
            nodes[0].command("CLUSTER", "MEET", "127.0.0.1", str(node.port))
        for node in nodes:
            wait_until(lambda node=node: len(node.command("CLUSTER", "NODES").splitlines()) == 6)
        for master, replica in zip(nodes[:3], nodes[3:], strict=True):
            replica.command("CLUSTER", "REPLICATE", master.command("CLUSTER", "MYID"))
        for node in nodes:
            wait_until(lambda node=node: "cluster_state:ok" in node.command("CLUSTER", "INFO"))
        for replica in nodes[3:]:
            wait_until(lambda node=replica: "master_link_status:up" in node.command("INFO", "replication"))
        yield RedisCluster(nodes)


class WatchedMaster:
    """A master, its replica and three sentinels that call them ``blocks``; all of them want a password."""

    SERVICE = "blocks"
    PASSWORD = "of-the-servers"
    SENTINEL_PASSWORD = "of-the-sentinels"

    def __init__(self, master: RedisProcess, replica: RedisProcess, sentinel_ports: list[int]) -> None:
        self.master = master
        self.replica = replica
        sentinels = ",".join(f"127.0.0.1:{port}" for port in sentinel_ports)
        self.url = f"redis+sentinel://:{self.PASSWORD}@{sentinels}/{self.SERVICE}"


@contextmanager
def running_sentinels(directory: Path) -> Iterator[WatchedMaster]:
    word = WatchedMaster.PASSWORD
    options = ("--requirepass", word, "--masterauth", word, "--repl-diskless-sync-delay", "0")
    with ExitStack() as stack:
        master = RedisProcess(directory / "master", *options, port=free_port())
        stack.callback(master.kill)
        replica = RedisProcess(
            directory / "replica", *options, "--replicaof", f"127.0.0.1 {master.port}", port=free_port()
        )
        stack.callback(replica.kill)
        wait_until(lambda: "master_link_status:up" in replica.command("-a", word, "INFO", "replication"))
        ports = []
        for number in range(3):
            ports.append(free_port())
            place = directory / f"sentinel{number}"
            place.mkdir()
            settings = place / "sentinel.conf"
            settings.write_text(
                f"port {ports[-1]}\nbind 127.0.0.1\ndir {place}\n"
                f"requirepass {WatchedMaster.SENTINEL_PASSWORD}\n"
                f"sentinel monitor {WatchedMaster.SERVICE} 127.0.0.1 {master.port} 2\n"
                f"sentinel auth-pass {WatchedMaster.SERVICE} {word}\n"
                f"sentinel down-after-milliseconds {WatchedMaster.SERVICE} 1000\n"
                f"sentinel failover-timeout {WatchedMaster.SERVICE} 3000\n"
            )
            stack.callback(stop, started([server_binary(), str(settings), "--sentinel"]))
        for port in ports:
            wait_until(lambda port=port: _watches_all(port))
        yield WatchedMaster(master, replica, ports)


def _watches_all(sentinel_port: int) -> bool:
    """Whether a sentinel knows the replica and both other sentinels, so that a failover can be agreed on."""
    asked = ("SENTINEL", "MASTER", WatchedMaster.SERVICE)
    lines = cli("-p", str(sentinel_port), "-a", WatchedMaster.SENTINEL_PASSWORD, *asked).splitlines()
    master = dict(zip(lines[::2], lines[1::2], strict=True))
    return (master["num-slaves"], master["num-other-sentinels"]) == ("1", "2")
