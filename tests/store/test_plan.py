import json
from pathlib import Path
from typing import Any

import pytest

from tq_store import plan
from tq_store.cli import main
from tq_store.errors import ConfigError
from tq_store.sizing import Model, block_bytes, block_sizes, page_bytes, read_model

LLAMA_8B = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
}


def config(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return read_model(config(tmp_path, LLAMA_8B))


def ask(model: Model, **changes: Any) -> plan.Question:
    return plan.Question(model=model, **({"context": 32_768, "hit_ratio": 1.0} | changes))


def test_a_config_gives_the_shape_of_the_cache_and_the_weights(tmp_path: Path) -> None:
    model = read_model(config(tmp_path, LLAMA_8B))
    assert model == read_model(tmp_path), "its folder will do"
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (32, 32, 8, 128)
    # 32 x (q and o of 4096 x 4096, k and v of 4096 x 1024, three of 4096 x 14336)
    assert model.active_weights == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 32}),
        ({"layer_types": ["full_attention", "linear_attention"] * 16}, {"num_layers": 16}),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, {"num_layers": 32}),
    ],
)
def test_what_models_write_differently_is_understood(
    tmp_path: Path, change: dict[str, Any], expected: dict[str, int]
) -> None:
    for content in (LLAMA_8B | change, {"text_config": LLAMA_8B | change}):
        model = read_model(config(tmp_path, content))
        assert {name: getattr(model, name) for name in expected} == expected


def test_of_experts_only_those_visited_count(tmp_path: Path) -> None:
    dense = read_model(config(tmp_path, LLAMA_8B)).active_weights
    sparse = LLAMA_8B | {"num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    fewer = read_model(config(tmp_path, sparse)).active_weights
    assert dense - fewer == 32 * 3 * 4096 * (14336 - 2 * 1024)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({"text_config": 5}, "is not a model's config.json"),
        (LLAMA_8B | {"num_hidden_layers": 10**15}, "makes no sense"),
        (LLAMA_8B | {"hidden_size": float("inf")}, "makes no sense"),
        ("[]", "is not a model's config.json"),
        ({}, "does not say 'hidden_size'"),
        (LLAMA_8B | {"kv_lora_rank": 512}, "multi-head latent attention"),
        (LLAMA_8B | {"num_attention_heads": 0}, "makes no sense"),
        (LLAMA_8B | {"hidden_size": "wide"}, "makes no sense"),
        (LLAMA_8B | {"num_hidden_layers": -1}, "makes no sense"),
        (LLAMA_8B | {"layer_types": ["linear_attention"]}, "makes no sense"),
    ],
)
def test_a_config_that_cannot_be_used_is_told(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_model(config(tmp_path, content))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model(tmp_path / "none.json")


def test_sizes_are_those_of_pages_and_blocks(model: Model) -> None:
    assert page_bytes(model, "raw", 64) == 64 * 8 * 128 * 4
    assert block_bytes(model, "raw", 64) == 256 + 32 * page_bytes(model, "raw", 64)
    # 128 bytes of codes, 4 of scales, and the page's centre of 256 over 64 tokens, aligned
    assert page_bytes(model, "tq4", 64) == 8 * 8704
    with pytest.raises(ConfigError, match="unknown preset 'tq5'; choose one of tq4"):
        page_bytes(model, "tq5", 64)
    table = block_sizes(model, "tq3+tq4:0-1,31", 64)
    assert table == tuple(
        256 + layers * page_bytes(model, name, 64) for layers, name in ((2, "tq4"), (29, "tq3"), (1, "tq4"))
    )
    assert block_sizes(model, "tq3+tq4:0-31", 64) == (block_bytes(model, "tq4", 64),)
    for page_tokens in (0, 8, 65):
        with pytest.raises(ConfigError, match="multiple of 16"):
            page_bytes(model, "tq4", page_tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"context": 0},
        {"replicas": 0},
        {"link_gbit": 0.0},
        {"link_gbit": float("inf")},
        {"hit_ratio": 1.5},
        {"hit_ratio": -0.1},
        {"tflops": -1.0},
        {"client_gib_per_s": 0.0},
        {"prefill_tokens_per_s": 0.0},
    ],
)
def test_numbers_that_mean_nothing_are_refused(model: Model, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ask(model, **change)


def test_a_transfer_goes_at_the_speed_of_the_link_or_of_the_client() -> None:
    assert plan.transfer_s(125e6, 1.0, 10.0) == pytest.approx(1.0)
    assert plan.transfer_s(2**30, 1000.0, 0.5) == pytest.approx(2.0)


def test_computing_costs_weights_and_attention(model: Model) -> None:
    question = ask(model)
    assert plan.compute_s(question, 32_768) == 0
    weights = 2 * model.active_weights * 32_768
    attention = 4 * 32 * 32 * 128 * 32_768**2 / 2
    assert plan.compute_s(question, 0) == pytest.approx((weights + attention) / 400e12)
    # the second half attends to the first: it costs more than half
    assert plan.compute_s(question, 16_384) > plan.compute_s(question, 0) / 2


def test_a_measured_prefill_takes_the_place_of_the_estimate(model: Model) -> None:
    measured = ask(model, prefill_tokens_per_s=10_000.0)
    assert plan.compute_s(measured, 0) == pytest.approx(3.2768)
    ratio = plan.compute_s(ask(model), 16_384) / plan.compute_s(ask(model), 0)
    assert plan.compute_s(measured, 16_384) == pytest.approx(3.2768 * ratio)


def test_only_whole_pages_are_loaded(model: Model) -> None:
    assert ask(model, context=1000, hit_ratio=0.5).hit_pages == 7
    assert plan.answer(ask(model, context=1000, hit_ratio=0.5))["cached_tokens"] == 448
    nothing = plan.answer(ask(model, context=100, hit_ratio=0.5))
    assert nothing["cached_tokens"] == 0
    assert nothing["pays_above_gbit"]["tq4"] is None


def test_where_loading_pays_both_ways_take_as_long(model: Model) -> None:
    question = ask(model, client_gib_per_s=1000.0)
    for preset in ("raw", "fp8", "tq4"):
        link_gbit = plan.pays_above_gbit(question, preset)
        assert link_gbit is not None
        assert plan.first_token_s(question, preset, link_gbit) == pytest.approx(plan.compute_s(question, 0))
    raw, tq4 = (plan.pays_above_gbit(question, preset) for preset in ("raw", "tq4"))
    assert raw is not None
    assert tq4 is not None
    assert raw / tq4 == pytest.approx(131_076 / 34_820)


def test_compression_pays_until_expanding_costs_what_it_saves(model: Model) -> None:
    question = ask(model)
    link_gbit = plan.compression_pays_below_gbit(question)
    saved_bytes = 131_076 - 34_820
    expand_s = 128.5e-6 / 32_768 * 32
    assert saved_bytes / (link_gbit * 1e9 / 8) == pytest.approx(expand_s)
    assert plan.compression_pays_below_gbit(ask(model, preset="raw")) == 0


def test_replicas_that_load_at_once_share_the_link(model: Model) -> None:
    times = plan.answer(ask(model, replicas=4, link_gbit=4.0))["first_token_s"]
    assert times["all_replicas_at_once"] == pytest.approx(4 * (times["alone"] - 0.002) + 0.002)


def test_memory_counts_what_each_tier_adds(model: Model) -> None:
    size = block_bytes(model, "tq4", 64)
    held = plan.memory_bytes(ask(model, context=650))
    assert held["gpu"] == 11 * (size - 256), "the last page is not full and stays on the GPU"
    assert held["memory"] == 10 * (size + 750)
    assert held["redis"] == 10 * (size + 300)
    assert held["disk"] == 10 * 545 * 4096
    assert size <= 545 * 4096 < size + 4096


def test_the_command_prints_for_people_and_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", str(config(tmp_path, LLAMA_8B)), "--context", "32768", "--link", "10"]
    assert main([*command, "--replicas", "4"]) == 0
    text = capsys.readouterr().out
    for part in (
        "32 attention layers, 8 KV heads of 128",
        "raw        131,076   1.00x",
        "tq4         34,820   3.76x",
        "one copy for 4 replicas",
        "if all replicas load at once",
        "loading raw   pays  above 19.37 Gbit/s, which is more than a client takes",
        "loading tq4   pays  above 5.15 Gbit/s",
        "compression pays    at every speed where attention reads the pages",
    ):
        assert part in text
    assert main([*command, "--prefill", "9000", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes_per_token"]["tq4"] == 34_820
    assert facts["first_token_s"]["without"] == pytest.approx(32_768 / 9000)
    assert main([*command, "--hit-ratio", "0"]) == 0
    assert "never: to compute takes no longer than to ask" in capsys.readouterr().out
    assert main([*command, "--preset", "tq3+tq4:0-1,31"]) == 0
    text = capsys.readouterr().out
    assert "3 blocks            64 tokens, 1.673 MiB" in text
    assert "tq3+tq4:0-1,31       27,404   4.78x" in text
    assert main([*command, "--preset", "tq3+tq4:32"]) == 2
    assert "tq3+tq4:32 names layer 32, and the model has 32 layers" in capsys.readouterr().err
    assert main([*command, "--preset", "tq9"]) == 2
    assert "unknown preset 'tq9'" in capsys.readouterr().err
