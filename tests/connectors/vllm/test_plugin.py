"""The plugin where vLLM has no place for it; with vLLM, `make test-engines ENGINE=vllm_stock` calls it."""

import logging

from tq_connectors.vllm import plugin


def test_what_has_no_place_is_said_in_one_line_and_nothing_is_raised(caplog):
    with caplog.at_level(logging.WARNING, logger="tq_connectors"):
        plugin.register()
        plugin.register()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8
    assert lines[:4] == lines[4:]
    assert all(line.startswith("tq-store: this vLLM (not there) has no place for ") for line in lines)
    assert all("\n" not in line for line in lines)


def test_messages_go_where_those_of_vllm_go():
    ours, engines = logging.getLogger("tq_connectors"), logging.getLogger("vllm")
    before, handler = [(name.level, name.propagate) for name in (ours, engines)], logging.StreamHandler()
    engines.addHandler(handler)
    engines.setLevel(logging.INFO)
    engines.propagate = False
    try:
        plugin.register()
        plugin.register()
        assert ours.handlers.count(handler) == 1
        assert not ours.propagate
        assert logging.getLogger("tq_connectors.engine.warm_up").isEnabledFor(logging.INFO)
    finally:
        engines.removeHandler(handler)
        ours.removeHandler(handler)
        for name, (level, propagates) in zip((ours, engines), before, strict=True):
            name.setLevel(level)
            name.propagate = propagates


def test_messages_go_to_the_root_where_vllm_configures_nothing():
    ours = logging.getLogger("tq_connectors")
    plugin.register()
    assert ours.propagate
    assert not ours.handlers
