"""What SGLang lacks on a CPU is there before it is imported, and its own warnings are let pass."""

import json

import engines.sglang.cpu  # noqa: F401
import pytest


def pytest_configure(config: pytest.Config) -> None:
    for module in ("sglang", "torch", "torchao", "transformers", "triton"):
        config.addinivalue_line("filterwarnings", f"ignore:::{module}")
    for swig in ("SwigPyPacked", "SwigPyObject", "swigvarlink"):
        config.addinivalue_line("filterwarnings", f"ignore:builtin type {swig}:DeprecationWarning")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that says what a model of two layers looks like; its weights are made up."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
