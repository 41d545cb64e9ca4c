"""The fuzzer of cold pages for a few seconds, and proof that it would notice."""

import pytest
import torch
from fuzz import driver, fuzz_cold

from tq_kernels.cold_layout import ColdLayout


def test_mutated_pages_are_refused_or_finite() -> None:
    seen = driver.fuzz(fuzz_cold, seed=20, keep_going=lambda runs: runs < 150)

    assert set(seen) == {"refused", "read"}
    assert min(seen.values()) > 15, seen


def test_numbers_that_are_none_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(pages: torch.Tensor, layout: ColdLayout) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(float("nan")), torch.zeros(1)

    monkeypatch.setattr(fuzz_cold, "dequantize", careless)
    with pytest.raises(AssertionError, match=r"numbers that are none.* on run 0 of seed 1, input "):
        driver.fuzz(fuzz_cold, seed=1, keep_going=lambda runs: runs < 10)


def test_other_exceptions_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(pages: torch.Tensor, layout: ColdLayout) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(fuzz_cold, "dequantize", careless)
    with pytest.raises(AssertionError, match="shapes do not match"):
        driver.fuzz(fuzz_cold, seed=1, keep_going=lambda runs: runs < 10)
