"""The plugin where vLLM has no place for it; with vLLM, `make test-engines ENGINE=vllm_stock` calls it."""

import logging

from tq_connectors.vllm import plugin


def test_what_has_no_place_is_said_in_one_line_and_nothing_is_raised(caplog):
    with caplog.at_level(logging.WARNING, logger="vllm"):
        plugin.register()
        plugin.register()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8
    assert lines[:4] == lines[4:]
    assert all(line.startswith("tq-store: this vLLM (not there) has no place for ") for line in lines)
    assert all("\n" not in line for line in lines)
