"""Pages that a step opens seed no others of that step."""

import torch

from tq_connectors.engine.opened_pages import OpenedPages


def test_a_seed_that_is_opened_in_the_same_step_is_none() -> None:
    opened = OpenedPages(8, 16, torch.device("cpu"))
    slots = torch.tensor([3 * 16, 3 * 16 + 1, 5 * 16, -1, 7 * 16 + 4])
    seeds = torch.tensor([2, -1, 3, -1, 7], dtype=torch.int32)
    opened.drop(seeds, slots, clock=4, num_decode_tokens=5)
    assert seeds.tolist() == [2, -1, -1, -1, 7]
    seeds = torch.tensor([3, 5, -1, 0, 6], dtype=torch.int32)
    opened.drop(seeds, torch.tensor([6 * 16, -1, -1, -1, -1]), clock=5, num_decode_tokens=5)
    assert seeds.tolist() == [3, 5, -1, 0, -1]


def test_what_does_not_decode_has_no_seed_and_opens_pages_all_the_same() -> None:
    opened = OpenedPages(8, 16, torch.device("cpu"))
    slots = torch.tensor([4 * 16, 6 * 16, 2 * 16])
    seeds = torch.tensor([2, 5, 1], dtype=torch.int32)
    opened.drop(seeds, slots, clock=1, num_decode_tokens=2)
    assert seeds.tolist() == [-1, 5, -1]
