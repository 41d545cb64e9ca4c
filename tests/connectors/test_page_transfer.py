"""Pages made and read away from where they lie: what a launch reads was written on its own stream."""

import pytest
import torch

from tq_connectors import page_transfer
from tq_connectors.page_transfer import dequantize_on, quantize_on
from tq_kernels import PageLayout, preset

CPU = torch.device("cpu")
LAYOUT = PageLayout(spec=preset("tq4"), head_dim=32, num_kv_heads=2, page_tokens=16)


def test_no_launch_reads_slots_that_another_stream_wrote(monkeypatch):
    """Nothing orders streams, so slots made for one are not there yet for another."""
    slots_of_launches: list[torch.Tensor] = []
    monkeypatch.setattr(
        page_transfer, "quantize_slots", lambda keys, values, slots, *_: slots_of_launches.append(slots)
    )
    monkeypatch.setattr(
        page_transfer, "dequantize_pages", lambda *arguments: slots_of_launches.append(arguments[4])
    )
    tokens = torch.zeros(32, 2, 32)
    for _ in range(2):
        pages = quantize_on(CPU, tokens, tokens, LAYOUT)
        dequantize_on(CPU, pages, LAYOUT)
    assert all(torch.equal(slots, torch.arange(32)) for slots in slots_of_launches)
    assert len({slots.data_ptr() for slots in slots_of_launches}) == 4


@pytest.mark.parametrize("first_mode", [True, False])
def test_inference_mode_may_come_and_go(first_mode):
    tokens = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for mode in (first_mode, not first_mode):
        with torch.inference_mode(mode):
            keys, values = dequantize_on(CPU, quantize_on(CPU, tokens, tokens, LAYOUT), LAYOUT)
        for back in (keys, values):
            assert 0 < (back.float() - tokens.float()).square().mean() < 0.012
