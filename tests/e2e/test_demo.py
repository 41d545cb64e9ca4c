"""`make demo` on the real model, a real server process and two replica processes; and its bad inputs."""

import json
from pathlib import Path

import pytest
from store.running_server import running_server

from tq_connectors.demo.__main__ import main
from tq_store.client import StoreClient

KEYS = [
    "preset",
    "prompt_tokens",
    "tokens_hit",
    "bytes_per_token",
    "bytes_per_token_bf16",
    "bytes_per_token_fp8",
    "wire_bytes",
    "ttft_cold_s",
    "ttft_warm_s",
    "kl_mean",
    "top1",
    "answer_cached",
    "answer_uncached",
]


def run(tmp_path: Path, *arguments: str) -> dict:
    output = tmp_path / "out" / "demo.json"
    assert main(["--output", str(output), *arguments]) == 0
    return json.loads(output.read_text())


@pytest.mark.model
def test_the_demo_does_the_main_job(tmp_path, capsys):
    record = run(tmp_path)
    assert list(record) == KEYS
    assert record["preset"] == "tq4"
    assert record["prompt_tokens"] > 1500
    assert record["tokens_hit"] == 1984  # 31 of 31 full pages of the document
    assert record["bytes_per_token_bf16"] == 2 * record["bytes_per_token_fp8"] == 30 * 2 * 3 * 64 * 2
    assert record["bytes_per_token"] == record["wire_bytes"] / record["tokens_hit"]
    assert record["bytes_per_token_bf16"] / record["bytes_per_token"] >= 3.6
    assert record["ttft_warm_s"] < record["ttft_cold_s"]
    assert record["kl_mean"] <= 0.06
    assert record["top1"] > 0.8
    assert "House of Representatives" in record["answer_cached"]
    table = capsys.readouterr().out
    assert "1984 came from the store" in table
    assert "3.65x" in table


@pytest.mark.model
def test_a_running_server_and_ones_own_document_are_used(tmp_path):
    document = tmp_path / "notes.txt"
    document.write_text("The meeting decided to paint the bridge green.\n\n" * 40)
    with running_server() as server:
        record = run(
            tmp_path,
            *("--server", server.address, "--document", str(document), "--preset", "k8v4"),
            *("--question", "What was decided?", "--page-tokens", "32", "--max-new-tokens", "4"),
        )
        with StoreClient(server.address) as client:
            assert client.stats().tiers["memory"].num_blocks >= record["tokens_hit"] // 32 > 5
    assert record["preset"] == "k8v4"
    assert record["kl_mean"] <= 0.02


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--document", "/does/not/exist"], "name another file with --document"),
        (["--server", "127.0.0.1:9"], "tq-store serve --listen 127.0.0.1:9"),
        (["--model", "no-such-model"], "write one of smollm2-135m-instruct"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, capsys, arguments, sentence):
    output = tmp_path / "demo.json"
    assert main(["--output", str(output), *arguments]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert sentence in message
    assert "Traceback" not in message
    assert not output.exists()


def test_an_empty_document_gets_one_sentence(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert main(["--document", str(empty)]) == 1
    assert "is empty" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments", [["--preset", "tq5"], ["--page-tokens", "0"], ["--max-new-tokens", "x"]]
)
def test_a_bad_argument_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.model
def test_a_page_size_that_cannot_be_packed_is_named_by_the_replica(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "x.json"), "--page-tokens", "24"]) == 1
    assert "page_tokens must be a positive multiple of 16, not 24" in " ".join(
        capsys.readouterr().err.split()
    )
