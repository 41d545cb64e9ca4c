"""Everything of vLLM's that ours overrides or calls is there, and takes what is passed."""

import ast
import inspect
import logging
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import vllm
from engines.signatures import overrides_in, what_differs
from vllm.config import cache as cache_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils, registry, utils
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

import tq_connectors.vllm
from tq_connectors.engine.layouts import DTYPES
from tq_connectors.vllm import dtypes, literal_dtypes, plugin
from tq_connectors.vllm.backend import BACKENDS
from tq_connectors.vllm.metadata import TQMetadataBuilder

OVERRIDES = {
    f"{ours.__name__}.{name}": (ours, name, theirs)
    for ours, name, theirs in overrides_in(tq_connectors.vllm, "vllm")
}


def test_the_wheel_is_the_one_that_the_matrix_names():
    assert version("vllm") == "0.33.0"


def test_overrides_were_found():
    named = {override.partition(".")[0] for override in OVERRIDES}
    assert {"TQAttentionBackend", "TQAttentionImpl", "TQMetadataBuilder"} <= named
    assert len(OVERRIDES) > 20


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_takes_every_call_of_what_it_overrides(override):
    assert what_differs(*OVERRIDES[override]) == []


OURS = {ours for ours, _, _ in OVERRIDES.values()}
MADE = {ours for ours in OURS if not any(each is not ours and issubclass(each, ours) for each in OURS)}


@pytest.mark.parametrize("ours", sorted(MADE, key=lambda each: each.__name__))
def test_nothing_abstract_is_left(ours):
    assert not inspect.isabstract(ours)


def parameters(function):
    return set(inspect.signature(function).parameters)


def written_parameters(file, function):
    """Read, not imported: what is for a device wants its libraries."""
    tree = ast.parse(Path(vllm.__file__).parent.joinpath(file).read_text())
    (found,) = [
        node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    assert not found.kwonlyargs
    return [each.arg for each in found.args]


def test_what_is_called_takes_what_is_passed():
    assert {"name"} == parameters(cache_config.register_kv_cache_dtype)
    assert {"backend", "class_path"} <= parameters(registry.register_backend)
    assert {"common_attn_metadata", "decode_threshold"} <= parameters(utils.split_decodes_and_prefills)
    assert {"head_size", "requires_softcap"} <= parameters(fa_utils.get_flash_attn_version)
    assert {
        *("q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *("softmax_scale", "causal", "window_size", "softcap", "fa_version"),
    } <= set(written_parameters("vllm_flash_attn/flash_attn_interface.py", "flash_attn_varlen_func"))
    assert {"kv_cache_dtype", "head_size"} <= set(AttentionSelectorConfig._fields)
    assert {"state_content_bytes", "head_size_v", "dtype"} <= parameters(AttentionSpec)
    assert {
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs"),
        *("num_actual_tokens", "block_table_tensor", "slot_mapping", "causal"),
    } <= parameters(CommonAttentionMetadata)


@pytest.mark.parametrize("platform", ["interface", "cuda", "rocm", "xpu", "cpu"])
def test_platforms_are_asked_as_the_selector_expects(platform):
    taken = written_parameters(f"platforms/{platform}.py", "get_attn_backend_cls")
    assert taken == ["cls", "selected_backend", "attn_selector_config", "num_heads"]


def test_backends_are_found_by_name_and_promise_graphs_of_decodes():
    plugin.register()
    assert registry.AttentionBackendEnum["TQ"].get_class().get_name() == "TQ"
    assert set(DTYPES) <= set(cache_config.KV_CACHE_DTYPES)
    for (dtype, page_tokens), backend in BACKENDS.items():
        assert registry.resolve_obj_by_qualname(".".join(backend.full_cls_name())) is backend
        assert backend.get_preferred_block_size(16) == page_tokens
        assert backend.supports_kv_cache_dtype(dtype)
    assert TQMetadataBuilder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH


def test_registering_twice_changes_nothing(monkeypatch, caplog):
    plugin.register()
    monkeypatch.setattr(logging.getLogger("tq_connectors"), "propagate", True)  # to caplog's handler
    before = list(cache_config.KV_CACHE_DTYPES), dict(registry.AttentionBackendEnum.__members__)
    plugin.register()
    assert (list(cache_config.KV_CACHE_DTYPES), dict(registry.AttentionBackendEnum.__members__)) == before
    assert not [record for record in caplog.records if "tq-store" in record.getMessage()]
    assert cache_config.get_kv_cache_dtype_handler("tq4").torch_dtype() == torch.uint8


def test_connector_spec_and_tier_are_found_by_name_alone():
    plugin.register()
    found = [
        KVConnectorFactory.get_connector_class_by_name("TQStoreConnector"),
        OffloadingSpecFactory.get_spec_cls({"spec_name": "TQOffloadingSpec"}),
        SecondaryTierFactory._registry["TQStoreTier"](),
    ]
    assert [each.__name__ for each in found] == ["TQStoreConnector", "TQOffloadingSpec", "TQStoreTier"]
    assert all(each.__module__.startswith("tq_connectors.vllm.") for each in found)


def test_a_release_without_the_hook_has_its_literal_extended(monkeypatch):
    monkeypatch.delattr(cache_config, "register_kv_cache_dtype")
    extended = []
    monkeypatch.setattr(literal_dtypes, "extend_literal", extended.append)
    dtypes.register_dtypes()
    assert extended == [DTYPES]
