"""What hooks decide, without SGLang: arguments, dtypes, sizes."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tq_connectors.sglang.hooks import (
    arguments,
    cell_size,
    command_line,
    dtype,
    pool,
    post_init,
    resolve_once,
)
from tq_connectors.sglang.hooks.arguments import BACKEND


def server_arguments(**given: Any) -> SimpleNamespace:
    unset = {
        "kv_cache_dtype": "tq4",
        "page_size": None,
        "attention_backend": None,
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "disable_prefill_cuda_graph": False,
        "speculative_algorithm": None,
        "dcp_size": 1,
    }
    return SimpleNamespace(**unset | given)


def test_a_dtype_of_ours_brings_its_page_size_and_its_backend() -> None:
    given = server_arguments()
    post_init.before_post_init(given)
    assert (given.page_size, given.attention_backend) == (64, BACKEND)
    assert given.disable_prefill_cuda_graph
    given = server_arguments(page_size=128, attention_backend=BACKEND)
    resolve_once.before_resolve_once(given)
    assert given.page_size == 128


def test_sealed_arguments_stay_as_they_are() -> None:
    given = server_arguments(_resolution_finished=True)
    resolve_once.before_resolve_once(given)
    assert given.page_size is None


def test_other_dtypes_are_left_alone() -> None:
    given = server_arguments(kv_cache_dtype="auto", speculative_algorithm="EAGLE", attention_backend="fa3")
    before = dict(vars(given))
    arguments.complete_arguments(given)
    assert vars(given) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"page_size": 1}, "--page-size must be 64 or 128, not 1"),
        ({"page_size": 16}, "--page-size must be 64 or 128, not 16"),
        ({"attention_backend": "fa3"}, "leave attention_backend=fa3 out"),
        (
            {"decode_attention_backend": BACKEND, "prefill_attention_backend": "fa3"},
            "in prefill and in decode",
        ),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding is not served"),
        ({"enable_deterministic_inference": True}, "not batch-invariant"),
        ({"dcp_size": 2}, "needs dcp_size to be 1"),
        ({"kv_cache_dtype": "auto", "attention_backend": BACKEND}, "serves the KV cache dtypes tq4"),
        ({"kv_cache_dtype": "auto", "decode_attention_backend": BACKEND}, "not auto"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments.complete_arguments(server_arguments(**given))


def test_preparing_a_step_inside_of_a_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    with pytest.raises(ValueError, match="prepares steps outside of graphs: unset SGLANG_ENABLE"):
        arguments.complete_arguments(server_arguments())


def test_names_of_ours_are_choices_of_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8_e5m2"])
    parser.add_argument("--device")
    command_line.after_add_cli_args(None, parser)
    for name in ("tq4", "k4v2", "auto"):
        assert parser.parse_args(["--kv-cache-dtype", name]).kv_cache_dtype == name


def test_elements_of_ours_are_bytes() -> None:
    def stock(**_: Any) -> tuple[str | None, torch.dtype]:
        return None, torch.bfloat16

    assert dtype.configure_dtype(stock, server_args_kv_cache_dtype="k8v4") == ("k8v4", torch.uint8)
    assert dtype.configure_dtype(stock, server_args_kv_cache_dtype="auto") == (None, torch.bfloat16)


def kv_configurator(**given: Any) -> SimpleNamespace:
    model = {"head_dim": 128, "v_head_dim": 128, "is_encoder_decoder": False}
    unset = {
        "kv_cache_dtype_str": "tq4",
        "use_mla_backend": False,
        "is_hybrid_swa": False,
        "mambaish_config": None,
        "page_size": 64,
    }
    named = {name: given.pop(name) for name in list(given) if name in model}
    model_config = SimpleNamespace(**model | named, get_num_kv_heads=lambda tp_size: 8 // tp_size)
    return SimpleNamespace(**unset | given, model_config=model_config)


def test_other_dtypes_keep_their_size() -> None:
    size = cell_size.compute_cell_size(
        lambda *_: 4096, None, kv_configurator(kv_cache_dtype_str="auto"), num_layers=2
    )
    assert size == 4096


def test_a_token_takes_what_its_rows_take() -> None:
    assert cell_size.bytes_of_token(kv_configurator(), num_layers=2, tp_size=2) == 2 * 4 * 136 + 17


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_mla_backend": True}, "latent vectors"),
        ({"is_hybrid_swa": True}, "sliding windows"),
        ({"mambaish_config": object()}, "linear attention"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"v_head_dim": 64}, "keys of 128 channels and values of 64"),
    ],
)
def test_models_with_other_caches_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cell_size.bytes_of_token(kv_configurator(**given), num_layers=2, tp_size=1)


def test_other_pools_are_built_as_ever() -> None:
    made = pool.build_pool(
        lambda configurator, **given: (configurator, given),
        SimpleNamespace(kv_cache_dtype_str="auto"),
        mha_pool_class=dict,
    )
    assert made[1] == {"mha_pool_class": dict}
