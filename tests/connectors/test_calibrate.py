"""`tq-store calibrate` as an operator calls it: against a real server, with the real model."""

from pathlib import Path

import pytest
from store.running_server import running_server

from tq_connectors.engine.state import STATE_VARIABLE, load_state
from tq_connectors.hf.connector import TQConnector
from tq_connectors.hf.models import SMOLLM2, weights_revision
from tq_kernels import preset
from tq_store.cli import main
from tq_store.client import StoreClient

TEXT = Path(__file__).parents[2] / "benchmarks" / "documents" / "constitution.txt"


def arguments(address: str, *more: str) -> list[str]:
    model = ["--model", SMOLLM2.name, "--model-name", "m", "--dtype", "float32", "--tokens", "200"]
    return ["calibrate", "--address", address, *model, "--text", str(TEXT), *more]


@pytest.mark.model
def test_replicas_take_the_state_that_was_measured_first(smollm2, smollm2_folder, capsys):
    model, tokenizer = smollm2
    token_ids = tokenizer(TEXT.read_text())["input_ids"][300:400]
    with running_server() as server:
        assert main(arguments(server.address)) == 0
        digest = capsys.readouterr().out.split()[2].rstrip(",")
        revision = weights_revision(smollm2_folder)
        with (
            StoreClient(server.address) as client,
            TQConnector(model, client, preset("tq4"), model_name="m", revision=revision) as connector,
        ):
            connector.open_cache(token_ids)
            assert connector.state is not None
            assert connector.state.digest.startswith(digest)
        assert main(arguments(server.address, "--tokens", "100")) == 1
        assert f"already: {digest}" in capsys.readouterr().out


@pytest.mark.model
def test_a_state_for_engines_goes_into_a_file_without_a_store(tmp_path, capsys):
    file = tmp_path / "smollm2.state"
    assert main(arguments("127.0.0.1:9", "--save", str(file))) == 0
    state = load_state({STATE_VARIABLE: str(file)})
    assert state is not None
    assert state.key_balance.shape == (30, 3, 64)
    assert f"codec state {state.digest[:16]}, in {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "tq9"], "unknown preset"),
        (["--preset", "tq3+tq9:0"], "unknown preset 'tq9'"),
        (["--preset", "tq3+tq4"], "names no codec"),
        (["--model", "no-such-model"], "no model"),
        (["--text", "/nowhere.txt"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(more, message, capsys):
    assert main(arguments("127.0.0.1:9", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_store_that_is_full_says_so(capsys):
    with running_server(memory_budget_bytes=1000) as server:
        assert main(arguments(server.address)) == 2
    assert "did not keep the state" in capsys.readouterr().err
