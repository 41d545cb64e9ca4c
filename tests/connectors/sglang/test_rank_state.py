"""Ranks of one engine have one codec state, whichever of them reaches the store."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from connectors.sglang.saved_pages import GEOMETRY

from tq_connectors.codec import namespace_for
from tq_connectors.codec_state import CodecState, agree_on_state
from tq_connectors.sglang.rank_state import of_first_rank
from tq_kernels import PageLayout, preset

NOBODY = "127.0.0.1:1"
OF_HEADS = (2.0, 4.0)
"""What keys of each head, and so of each rank, are divided by."""
STATE = CodecState(torch.tensor(OF_HEADS)[None, :, None].expand(2, 2, 32).contiguous())


def states_of_ranks(folder: Path, addresses: list[str]) -> list[list[str]]:
    """Digest and first number of the balance, as each rank has them."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "connectors.sglang.state_rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "rendezvous"), address],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank, address in enumerate(addresses)
    ]
    try:
        return [rank.communicate(timeout=60)[0].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("reached_by", "digest", "balances"), [(0, [STATE.digest], OF_HEADS), (1, [], (None, None))]
)
def test_all_ranks_have_the_state_of_the_first(client, server, tmp_path, reached_by, digest, balances):
    layout = PageLayout(spec=preset("tq3"), head_dim=32, num_kv_heads=2, page_tokens=16)
    agree_on_state(
        client, namespace_for(layout, GEOMETRY, model="model", revision="v1"), GEOMETRY, lambda: STATE
    )
    addresses: list[Any] = [NOBODY, NOBODY]
    addresses[reached_by] = server.address
    assert states_of_ranks(tmp_path, addresses) == [[*digest, str(balance)] for balance in balances]


def test_a_process_that_is_alone_has_its_own():
    assert of_first_rank(lambda: STATE, None) is STATE
