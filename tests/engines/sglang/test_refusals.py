"""The plugin in this process: SGLang takes our names, every hook took, and what is not served is refused."""

from dataclasses import replace
from typing import Any

import pytest
from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins

from tq_connectors.engine.layouts import DTYPES
from tq_connectors.sglang import installed
from tq_connectors.sglang.hooks import hooks_of_release
from tq_connectors.sglang.hooks.arguments import BACKEND


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    load_plugins()


def resolved(tiny_model: str, **given: Any) -> Any:
    """Arguments of an engine, as SGLang resolves them."""
    arguments = server_args.ServerArgs(model_path=tiny_model, device="cpu", kv_cache_dtype="tq4", **given)
    if hasattr(arguments, "resolve_once"):
        arguments.resolve_once()
    return arguments


def test_every_hook_took(caplog: pytest.LogCaptureFixture) -> None:
    installed.require_hooks.cache_clear()
    with caplog.at_level("INFO"):
        installed.require_hooks()
    assert "all 6 hooks took in SGLang" in caplog.text


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"target": "sglang.srt.server_args.absent"}, "is not there"),
        ({"function": print}, "is not hooked"),
        ({"parameters": ("self", "absent")}, "has no parameter absent"),
    ],
)
def test_a_hook_that_did_not_take_stops_the_start(
    hook: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = next(known for known in hooks_of_release() if known.is_needed)
    monkeypatch.setattr(installed, "hooks_of_release", lambda: (replace(known, **hook),))
    installed.require_hooks.cache_clear()
    with pytest.raises(RuntimeError, match=f"does not fit SGLang.*{message}"):
        installed.require_hooks()
    installed.require_hooks.cache_clear()


def test_an_engine_starts_without_a_hook_that_only_makes_it_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = next(hook for hook in hooks_of_release() if not hook.is_needed)
    monkeypatch.setattr(installed, "hooks_of_release", lambda: (replace(lost, function=print),))
    installed.require_hooks.cache_clear()
    installed.require_hooks()
    installed.require_hooks.cache_clear()
    assert f"goes on slower, without a hook: {lost.target} is not hooked" in caplog.text
    assert "hooks took" not in caplog.text


def test_names_are_choices_of_the_command_line(tiny_model: str) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    for name in DTYPES:
        parsed = parser.parse_args(
            ["--model-path", tiny_model, "--kv-cache-dtype", name, "--attention-backend", BACKEND]
        )
        assert parsed.kv_cache_dtype == name
    assert BACKEND in ATTENTION_BACKENDS


def test_a_dtype_alone_brings_the_rest(tiny_model: str) -> None:
    arguments = resolved(tiny_model)
    assert (arguments.page_size, arguments.attention_backend) == (64, BACKEND)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"page_size": 1}, "--page-size must be 64 or 128, not 1"),
        ({"attention_backend": "triton"}, "leave attention_backend=triton out"),
        ({"decode_attention_backend": BACKEND, "prefill_attention_backend": "triton"}, "in prefill and in"),
        ({"speculative_algorithm": "NGRAM"}, "speculative decoding is not served"),
    ],
)
def test_what_is_not_served_is_refused(given: dict[str, Any], message: str, tiny_model: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(tiny_model, **given)
