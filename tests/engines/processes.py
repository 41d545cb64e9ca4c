"""Processes of engines of several ranks, as tests tell them apart."""

import psutil


def rank_at(pid: int, port: int) -> psutil.Process:
    """The one of an engine's processes whose connection has this port; `pid` is of the first of them."""
    (rank,) = (process for process in _others(pid) if port in _ports(process))
    return rank


def rank_called(pid: int, title: str) -> psutil.Process:
    """The one of an engine's processes that has this in its title."""
    (rank,) = (process for process in _others(pid) if title in " ".join(process.cmdline()))
    return rank


def kill_all(pid: int) -> None:
    """`kill -9` of an engine: a rank without its peers would wait for them, busily and for ever."""
    processes = [psutil.Process(pid), *_others(pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes[1:], timeout=30)


def _others(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _ports(process: psutil.Process) -> list[int]:
    return [each.laddr.port for each in process.net_connections("tcp") if each.raddr]
