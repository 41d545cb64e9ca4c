"""The real model that connector tests share; tests that use it are marked `model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tq_connectors.hf.models import SMOLLM2, fetch_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; fetched if this machine does not have it."""
    return fetch_model(SMOLLM2.name)


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model in fp32 on the CPU and its tokenizer; shared, so tests leave it as they found it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    return model.eval(), AutoTokenizer.from_pretrained(smollm2_folder)
