"""Decode through the store: a replica saves blocks to a real server, another attends on what it fetches."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.quality.logits import LogitLoss, compare
from benchmarks.quality.models import LoadedModel
from tq_connectors.hf.connector import TQConnector
from tq_connectors.hf.models import weights_revision
from tq_store.client import StoreClient


@contextmanager
def running_store() -> Iterator[str]:
    """Address of a store of its own process, which ends with the block.

    Raises:
        OSError: It did not start.
    """
    command = [
        sys.executable,
        "-m",
        "tq_store",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--memory-budget",
        "4GiB",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            line = process.stdout.readline() if process.stdout else ""
            words = [word.rstrip(",;.") for word in line.split() if word.startswith("127.0.0.1:")]
            if not words:
                raise OSError("the store did not start; what it said stands above")
            yield words[0]
        finally:
            process.terminate()


def decode_through_store(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    codec: str,
    address: str,
    *,
    page_tokens: int,
    reference: torch.Tensor,
) -> tuple[LogitLoss, int]:
    """Loss over the second half of a text, decoded token by token on blocks of the first half from the store.

    Args:
        loaded: The model.
        token_ids: The text.
        codec: Name of a preset, or of a table by layer.
        address: A running store.
        page_tokens: Tokens in a page.
        reference: Logits ``[num_tokens, vocabulary]`` of the text without any cache.

    Returns:
        The loss, and how many blocks were fetched.

    Raises:
        ValueError: The store did not give back what was saved.
    """
    before = loaded.model.config._attn_implementation  # noqa: SLF001 - there is no public way to read it
    half = len(token_ids) // 2 // page_tokens * page_tokens
    try:
        with _connected(loaded, codec, address, page_tokens) as saving:
            saving.prefill(
                token_ids[:half],
                saving.open_cache(token_ids[:half]),
                chunk_tokens=page_tokens,
                last_only=True,
            )
        with _connected(loaded, codec, address, page_tokens) as loading:
            cache = loading.open_cache(token_ids)
            if cache.num_pages != half // page_tokens:
                raise ValueError(
                    f"{cache.num_pages} pages came back of {half // page_tokens} that were saved"
                )
            num_blocks = cache.num_pages * len(loading.layout.runs)
            logits = loading.prefill(token_ids, cache, chunk_tokens=1)
    finally:
        loaded.model.set_attn_implementation(before)
    return compare(reference[half:], logits, token_ids[half:]), num_blocks


@contextmanager
def _connected(loaded: LoadedModel, codec: str, address: str, page_tokens: int) -> Iterator[TQConnector]:
    """A replica with a connection of its own; what it saves has been sent when the block ends."""
    with (
        StoreClient(address) as client,
        TQConnector(
            loaded.model,
            client,
            codec,
            model_name=loaded.name,
            revision=weights_revision(loaded.folder),
            page_tokens=page_tokens,
        ) as connector,
    ):
        yield connector
