"""What the demo says when things do not go as planned; `tests/e2e/test_demo.py` has the main job."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from connectors.test_models import write_gguf
from rich.console import Console
from store.running_server import running_server
from transformers import LlamaConfig

from tq_connectors.demo import __main__ as demo
from tq_connectors.demo import replica
from tq_connectors.demo.report import demo_record, print_table
from tq_connectors.hf.gguf_weights import convert_gguf
from tq_store.client import StoreClient
from tq_store.errors import RpcUnavailable

DOCUMENT = "hi 12 hi. " * 8
PAGE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer and a chat template, as users have them."""
    path = tmp_path_factory.mktemp("model")
    write_gguf(path / "tiny.gguf")
    convert_gguf(path / "tiny.gguf", path / "tiny", lambda done, total: None)
    return path / "tiny"


def run_replica(monkeypatch, role, folder, server, **changes):
    """Exit status and events of one replica, in this process."""
    job = {
        "role": role,
        "model_folder": str(folder),
        "model_name": "tiny",
        "preset": "tq4",
        "page_tokens": PAGE,
        "server": server,
        "document": DOCUMENT,
        "document_tokens": 1000,
        "question": "hi?",
        "max_new_tokens": 3,
    } | changes
    events = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(job)))
    monkeypatch.setattr(sys, "stdout", events)
    status = replica.main()
    return status, [json.loads(line) for line in events.getvalue().splitlines()]


def shown(record):
    console = Console(file=io.StringIO(), width=200)
    print_table(record, console)
    return console.file.getvalue()


def test_what_replica_a_saves_replica_b_counts_as_hit(monkeypatch, folder):
    with running_server() as server:
        saved = run_replica(monkeypatch, "save", folder, server.address)[1][-1]
        answer = run_replica(monkeypatch, "answer", folder, server.address)[1][-1]
    assert saved["saved"] == answer["tokens_hit"] // PAGE == 3
    record = demo_record("tq4", answer)
    assert record["wire_bytes"] == saved["saved"] * record["bytes_per_token"] * PAGE
    assert f"of which {record['tokens_hit']} came from the store" in shown(record)


def test_without_a_hit_the_table_says_so(monkeypatch, folder):
    with running_server() as server:
        status, events = run_replica(monkeypatch, "answer", folder, server.address)
    record = demo_record("tq4", events[-1])
    assert (status, record["tokens_hit"], record["wire_bytes"], record["bytes_per_token"]) == (0, 0, 0, None)
    assert record["prompt_tokens"] > PAGE
    assert "no hit" in shown(record)


def test_pages_that_the_store_did_not_take_are_told(monkeypatch, folder):
    with running_server(memory_budget_bytes=100) as server:
        status, events = run_replica(monkeypatch, "save", folder, server.address)
    assert status == 0
    assert any("the store took 0 pages and lost" in event.get("text", "") for event in events)


@pytest.mark.parametrize("whole_paragraphs", [True, False])
def test_a_long_document_is_cut_between_paragraphs_if_it_has_any(monkeypatch, folder, whole_paragraphs):
    document = ("hi 12.\n\n\n\n" if whole_paragraphs else "hi 12 ") * 100
    with running_server() as server:
        events = run_replica(
            monkeypatch, "answer", folder, server.address, document=document, document_tokens=50
        )[1]
    assert 40 < events[-1]["prompt_tokens"] < 65


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[0]['content'] | upper }}", None],
)
def test_a_chat_template_without_room_for_a_document_gets_one_sentence(
    monkeypatch, folder, tmp_path, template
):
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with running_server() as server:
        status, events = run_replica(monkeypatch, "save", other, server.address)
    assert status == 1
    assert events[-1]["event"] == "error"
    assert "name another model with --model" in events[-1]["text"]


def test_a_model_folder_without_weights_gets_a_sentence(monkeypatch, folder, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    status, events = run_replica(monkeypatch, "save", tmp_path, "127.0.0.1:9")
    assert status == 1
    assert "model.safetensors" in events[-1]["text"]


def test_a_result_that_cannot_be_written_is_shown_all_the_same(monkeypatch, folder, tmp_path, capsys):
    with running_server() as server:
        answer = run_replica(monkeypatch, "answer", folder, server.address)[1][-1]
        monkeypatch.undo()
    monkeypatch.setattr(demo, "run", lambda arguments, console: demo_record("tq4", answer))
    (tmp_path / "file").write_text("in the way")
    assert demo.main(["--output", str(tmp_path / "file" / "demo.json")]) == 1
    output = capsys.readouterr()
    assert "no hit" in output.out
    assert "name another file with --output" in " ".join(output.err.split())


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_no_server_behind(folder, tmp_path, kind):
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT)
    command = [
        sys.executable,
        "-m",
        "tq_connectors.demo",
        "--model",
        str(folder),
        "--document",
        str(document),
    ]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "demo.json")],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split()[-1]
        assert "replica A" in process.stderr.readline()
        process.send_signal(kind)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "demo: interrupted" in said
    assert "Traceback" not in said
    with StoreClient(address) as client, pytest.raises(RpcUnavailable):
        client.ping()
