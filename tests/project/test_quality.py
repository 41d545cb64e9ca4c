"""The quality harness: its methods, texts, metrics and rows."""

import bz2
import json
import os

import pytest
import torch
from connectors.test_models import write_gguf
from connectors.tiny_models import VOCABULARY, tiny_model, tokens
from project import readme_quality
from transformers import DynamicCache

from benchmarks.quality.__main__ import main
from benchmarks.quality.answers import answers_to, prompt_of
from benchmarks.quality.articles import plain_text, token_sequences
from benchmarks.quality.bars import judged
from benchmarks.quality.cache_view import CacheView
from benchmarks.quality.codec import measure_codec
from benchmarks.quality.conditions import Conditions
from benchmarks.quality.logits import compare, summary
from benchmarks.quality.measure import TEXT_METRICS, measure_ruler, measure_store, measure_texts
from benchmarks.quality.methods.base import Geometry, Place
from benchmarks.quality.methods.catalogue import catalogue, selected
from benchmarks.quality.methods.pages import Pages
from benchmarks.quality.models import LoadedModel, load_model
from benchmarks.quality.passes import states_of_text, view_of
from benchmarks.quality.report import main as report
from benchmarks.quality.report import page
from benchmarks.quality.retrieval import Retrieval, scored
from benchmarks.quality.rows import KEYS, merged, ordered, read_rows, write_rows
from benchmarks.quality.ruler.material import Material, Question, Template
from benchmarks.quality.ruler.scores import score
from benchmarks.quality.ruler.tasks import TASKS, Sample, sample_of
from benchmarks.quality.step_view import StepView
from benchmarks.quality.substitute import reading_through
from benchmarks.quality.tensors import layer_loss
from benchmarks.quality.wheel_data import ADJECTIVES, ESSAYS, NOUNS, RULER_TEMPLATES, SQUAD, WIKIPEDIA
from tq_kernels import PRESETS
from tq_kernels.codebook import LEVELS, TARGETS, distortion
from tq_store.errors import ConfigError

Pair = tuple[torch.Tensor, torch.Tensor]
GEOMETRY = Geometry(num_layers=6, num_kv_heads=2, head_dim=64)
METHODS = {method.name: method for method in catalogue(page_tokens=64)}
MIDDLE = Place(layer=3, num_layers=6, num_sinks=4)


def sides(num_tokens: int = 150, head_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, num_tokens, 2, head_dim, generator=generator)
    return keys, values


def error(side: torch.Tensor, read: torch.Tensor) -> float:
    return float((side - read).square().sum() / side.square().sum())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_back_about_what_it_was_given(name):
    keys, values = sides()
    method = METHODS[name]
    read_keys, read_values = method.read(
        keys, values, method.estimate(keys[4:100], keys[4:100], values[4:100]), MIDDLE
    )
    assert read_keys.shape == keys.shape
    for side, read in ((keys[4:], read_keys[4:]), (values[4:], read_values[4:])):
        assert error(side, read) < 0.25


@pytest.mark.parametrize("name", METHODS)
def test_a_token_depends_on_no_token_after_its_group(name):
    keys, values = sides(400)
    method = METHODS[name]
    state = method.estimate(keys[4:100], keys[4:100], values[4:100])
    whole = method.read(keys, values, state, MIDDLE)
    num_tokens = 256 if method.group_tokens > 1 else 100
    assert num_tokens % method.group_tokens == 0
    part = method.read(keys[:num_tokens], values[:num_tokens], state, MIDDLE)
    for long, short in zip(whole, part, strict=True):
        torch.testing.assert_close(long[4:num_tokens], short[4:])


@pytest.mark.parametrize(
    ("name", "key_error", "value_error"),
    [
        ("vllm-4bit_nc", 0.0092, 0.00996),
        ("vllm-3bit_nc", 0.034, 0.0458),
        ("tq4", 0.0083, 0.0083),
        ("tq3", 0.0325, 0.0325),
        ("paper-2.5", 0.096, 0.096),
    ],
)
def test_errors_on_gaussian_vectors_are_those_of_the_codes(name, key_error, value_error):
    keys, values = sides(1024, head_dim=128)
    method = METHODS[name]
    read_keys, read_values = method.read(keys, values, method.estimate(keys, keys, values), MIDDLE)
    assert error(keys[4:], read_keys[4:]) == pytest.approx(key_error, rel=0.06)
    assert error(values, read_values) == pytest.approx(value_error, rel=0.06)


@pytest.mark.parametrize(
    ("name", "bytes_per_head"),
    [
        *(("bf16", 256), ("fp8", 128)),
        # slots of 70 and 54 bytes; stock keeps 4 of 6 layers at 256
        *(("vllm-4bit_nc-all", 70), ("vllm-3bit_nc-all", 54), ("vllm-4bit_nc", (2 * 70 + 4 * 256) / 6)),
        *(("kivi4", 64 + 8 + 2), ("kivi2", 32 + 8 + 2), ("kivi2-g32", 32 + 8 + 8)),
        ("paper-2.5", 2 * (18 + 4)),
        ("tq4", 70 + (256 / 64) / 12),
    ],
)
def test_sizes_are_real_bytes(name, bytes_per_head):
    total = METHODS[name].total_bytes(GEOMETRY, 1280, 0)
    assert total / 1280 / 12 == pytest.approx(bytes_per_head)
    more = METHODS[name].total_bytes(GEOMETRY, 1280, 4) - total
    assert 0 <= more <= 4 * GEOMETRY.raw_bytes_per_token


def test_stock_vllm_leaves_boundary_layers_raw():
    keys, values = sides()
    for layer, raw in ((0, True), (1, True), (2, False), (3, False), (4, True), (5, True)):
        place = Place(layer=layer, num_layers=6, num_sinks=0)
        read, _ = METHODS["vllm-3bit_nc"].read(keys, values, None, place)
        assert (error(keys, read) < 1e-4) is raw


def test_a_view_leaves_sinks_raw_and_learns_from_first_tokens():
    keys, values = sides()
    view = CacheView(METHODS["tq2"], 6, 4, state_tokens=64)
    seen_keys, seen_values = view(0, keys, keys, values)
    for raw, seen in ((keys, seen_keys), (values, seen_values)):
        assert torch.equal(raw[:4], seen[:4])
        assert not torch.equal(raw[4:8], seen[4:8])
    method = METHODS["tq2"]
    given = CacheView(method, 6, 4, states=[method.estimate(keys[4:64], keys[4:64], values[4:64])])
    torch.testing.assert_close(given(0, keys, keys, values), (seen_keys, seen_values))


def test_losses_of_equal_logits_are_none():
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(2))
    same = summary([compare(logits, logits, list(range(50)) * 2)])
    assert (same["kl_mean"], same["kl_max"], same["top1"], same["ppl_ratio"]) == (0, 0, 1, 1)
    other = logits.clone()
    other[7] = other[7].roll(1)
    loss = compare(logits, other, list(range(50)) * 2)
    expected = torch.nn.functional.kl_div(
        other[7].log_softmax(-1), logits[7].log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(loss.kl[7], expected)
    assert summary([loss])["top1"] == pytest.approx(0.99)


def test_markup_becomes_prose():
    markup = (
        "{{Infobox|a={{nested}}}}'''Bold''' is [[link|a label]] or [[plain]].&lt;ref&gt;gone&lt;/ref&gt;"
        "\n== Heading ==\n{| class=wikitable\n| cell\n|}\n"
        "* [[File:a.png|thumb|a [[nested]] link]]item [http://x y]"
    )
    assert plain_text(markup) == "Bold is a label or plain.\nHeading\nitem y"


def test_patterns_pick_methods_and_wrong_ones_are_named():
    assert [m.name for m in selected(64, ["fp8", "kivi?"])] == ["fp8", "kivi4", "kivi2"]
    assert [m.name for m in selected(64, [])] == list(METHODS)
    with pytest.raises(ValueError, match="'tq9'; there are none, bf16"):
        selected(64, ["tq9"])


def test_a_table_by_layer_is_a_method_under_its_own_name():
    tables = selected(64, ["tq3", "tq3+tq4:5,0-1", "tq3+tq4:0-1,5", "tq3+raw:2"])
    assert [m.name for m in tables] == ["tq3", "tq3+tq4:0-1,5", "tq3+raw:2"]
    assert [m.name for m in selected(64, ["tq3+tq4:0"])] == ["tq3+tq4:0"]
    with pytest.raises(ConfigError, match="names no codec"):
        selected(64, ["tq3+tq4:x"])
    with pytest.raises(ValueError, match="unknown preset 'tq9'"):
        selected(64, ["tq3+tq9:0"])


def test_each_layer_of_a_table_reads_what_its_preset_reads():
    (table,) = selected(64, ["tq3+tq4:0-1,5+raw:2"])
    keys, values = sides()
    state = table.estimate(keys[4:100], keys[4:100], values[4:100])
    for layer, name in enumerate(("tq4", "tq4", "raw", "tq3", "tq3", "tq4")):
        alone = METHODS[name] if name != "raw" else Pages("raw", PRESETS["raw"])
        place = Place(layer=layer, num_layers=6, num_sinks=4)
        expected = alone.read(keys, values, None if name == "raw" else state, place)
        for side, same in zip(table.read(keys, values, state, place), expected, strict=True):
            assert torch.equal(side, same)
    by_preset = {name: Pages(name, PRESETS[name]).total_bytes(GEOMETRY, 64, 0) - 256 for name in PRESETS}
    expected_bytes = (3 * by_preset["tq4"] + by_preset["raw"] + 2 * by_preset["tq3"]) / 6 + 4 * 256
    assert table.total_bytes(GEOMETRY, 64, 0) == expected_bytes
    assert table.group_tokens == 64


def test_rows_have_the_agreed_keys_first_and_replace_each_other(tmp_path):
    old = [{"preset": "tq4", "model": "m", "kl_mean": 1.0}, {"preset": "tq3", "model": "m"}]
    new = [{"preset": "tq4", "model": "m", "kl_mean": 2.0}]
    write_rows(merged(old, new), tmp_path / "rows.jsonl")
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [tuple(row) for row in rows] == [KEYS, KEYS]
    assert [(row["preset"], row["kl_mean"]) for row in rows] == [("tq3", None), ("tq4", 2.0)]
    (tmp_path / "rows.jsonl").write_text('{"preset": "tq4"}\n')
    with pytest.raises(ValueError, match="does not begin with"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_layer_that_reads_what_it_has_loses_nothing():
    keys, values = sides(200)
    queries = torch.randn(200, 6, 64, generator=torch.Generator().manual_seed(3))
    loss = layer_loss(queries, (keys, values), (keys, values), 0.125, 4)
    torch.testing.assert_close(loss.correlation, torch.ones(6, dtype=torch.float64))
    for losses in (loss.key_mse, loss.value_mse, loss.kl, loss.output_error):
        assert losses.abs().max() < 1e-6


def test_a_vector_added_to_all_keys_changes_errors_of_keys_and_nothing_else():
    keys, values = sides(200)
    queries = torch.randn(200, 6, 64, generator=torch.Generator().manual_seed(3))
    loss = layer_loss(queries, (keys, values), (keys + 1, values), 0.125, 0)
    torch.testing.assert_close(loss.correlation, torch.ones(6, dtype=torch.float64))
    assert loss.kl.abs().max() < 1e-5
    torch.testing.assert_close(loss.key_mse, torch.ones(2), rtol=0.02, atol=0)


def test_noise_lowers_the_correlation_as_much_as_it_must():
    keys, values = sides(400)
    noise = torch.randn(keys.shape, generator=torch.Generator().manual_seed(4))
    queries = torch.randn(400, 6, 64, generator=torch.Generator().manual_seed(3))
    loss = layer_loss(queries, (keys, values), (keys + noise, values + noise), 0.125, 0)
    torch.testing.assert_close(
        loss.correlation, torch.full((6,), 0.5**0.5, dtype=torch.float64), rtol=0.05, atol=0
    )
    assert loss.kl.min() > 0.3
    assert loss.output_error.min() > 0.5


@pytest.mark.parametrize(
    ("name", "bits", "searched"), [("tq4", 4, 0.852), ("tq3", 3, 0.93), ("tq2", 2, 1.057)]
)
def test_no_kind_of_vector_costs_a_preset_much_more_than_gaussian_ones(name, bits, searched):
    """`searched` is what three cell sizes and a gain make of the distortion; `kernels/README.md` has it."""
    row = measure_codec(METHODS[name], GEOMETRY, 4)
    theory = distortion(LEVELS[bits], TARGETS[bits], 64)
    assert row["codec_value_gaussian"] == pytest.approx(searched * theory, rel=0.05)
    assert max(row.values()) < 1.5 * theory


@pytest.mark.parametrize("name", METHODS)
def test_a_sequence_that_grows_is_read_bit_for_bit_as_one_that_is_read_again(name):
    """On the way groups of 1, 64 and 128 tokens are finished, and the view outgrows its first room.

    Those that rotate token by token are free in the last bits: BLAS may add up one row in another order than
    the same row among many.
    """
    free = {"rtol": 1e-5, "atol": 1e-5} if name.startswith(("vllm", "paper")) else {"rtol": 0, "atol": 0}
    keys, values = sides(540)
    method, parts = METHODS[name], [slice(4, 64)] * 3
    state = method.estimate(*(side[part] for side, part in zip((keys, keys, values), parts, strict=True)))
    view = CacheView(method, 6, 4, state_tokens=64)
    for num_tokens in (3, 150, 151, 191, 192, 193, 256, 540):
        raw = keys[:num_tokens], values[:num_tokens]
        seen = view(3, keys[:num_tokens], *raw)
        again = method.read(*raw, state, MIDDLE) if num_tokens > 4 else raw
        for side, read, expected in zip(raw, seen, again, strict=True):
            torch.testing.assert_close(read, torch.cat((side[:4], expected[4:])), **free)


def test_a_view_keeps_the_dtype_and_little_more_than_the_sequence():
    keys, values = (side.bfloat16() for side in sides(300))
    view = CacheView(METHODS["tq4"], 6, 4, state_tokens=64)
    seen = view(0, keys, keys, values)
    for side in seen:
        assert side.dtype == torch.bfloat16
        assert side.untyped_storage().nbytes() <= 2 * (300 + 512) * keys[0].numel()


def test_a_tail_is_read_raw_by_each_query():
    model = tiny_model("qwen2")
    batch = torch.tensor([tokens(90)])
    with torch.inference_mode():
        plain = model(input_ids=batch).logits
        for read, tail, same in (
            (None, 0, True),
            (None, 20, True),
            (_doubled, 90, True),
            (_doubled, 20, False),
        ):
            with reading_through(model, read, tail=tail):
                logits = model(input_ids=batch).logits
            assert torch.allclose(logits, plain, atol=1e-4) is same
            assert torch.allclose(logits[:, :tail], plain[:, :tail], atol=1e-4) or not tail
    assert model.config._attn_implementation == "sdpa"


def _doubled(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
    return 2 * keys, 2 * values


class Letters:
    """A tokenizer with a token for each character."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(index) for index in ids)


MATERIAL = Material(
    templates={
        "niah": Template(
            question="Some {type_needle_v} are in {context}. What are all {type_needle_v} for {query}?",
            answer_prefix=" The {type_needle_v} for {query} are",
            max_new_tokens=9,
        ),
        "variable_tracking": Template(
            question="Track.\n{context}\nWhich are {query}?",
            answer_prefix=" These {num_v}:",
            max_new_tokens=9,
        ),
        "qa": Template(question="{context}\nQuestion: {query}", answer_prefix=" Answer:", max_new_tokens=9),
    },
    essay_words=["One", "two", "three.", "Four", "five."] * 400,
    adjectives=["red", "green", "blue"],
    nouns=["tree", "sea", "stone", "star"],
    questions=[Question(text="Who?", answers=["she", "her"], document=1, related=[0])] * 2,
    documents=["he was", "she was", "it was", "they were"],
)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_they_may_be_and_hold_the_answer(task):
    def count(sample: Sample) -> int:
        return len(prompt_of(Letters(), sample))

    for num_tokens in (1500, 3000):
        sample = sample_of(task, MATERIAL, 0, num_tokens, count)
        assert count(sample) + 9 <= num_tokens
        assert task == "qa_1" or count(sample) > num_tokens - 150
        assert any(answer in sample.user for answer in sample.answers)
        assert sample == sample_of(task, MATERIAL, 0, num_tokens, count)
    if task.startswith("niah"):
        assert sample.user.startswith("A number is in")
        assert sample.user.count("One of the special magic numbers for") == {"niah_single_2": 1}.get(task, 4)
    if task == "vt":
        assert sample.user.count("VAR") == 2 * 9
        assert all(name in sample.user for name in sample.answers)
    with pytest.raises(ValueError, match="too few"):
        sample_of(task, MATERIAL, 0, 20, count)


def test_scores_are_those_of_ruler():
    assert score("vt", " abc, def", ["ABC", "DEF", "GHI", "JKL"]) == 0.5
    assert score("qa_1", "It was Her.", ["she", "her"]) == 1
    assert score("qa_1", "It was him.", ["she", "her"]) == 0
    assert score("niah_single_2", "12\x0034567", ["1234567"]) == 0


@pytest.fixture
def loaded(tmp_path) -> LoadedModel:
    model = tiny_model("llama", head_dim=64)
    model.save_pretrained(tmp_path / "model")
    geometry = Geometry(num_layers=3, num_kv_heads=2, head_dim=64)
    folder = tmp_path / "model"
    return LoadedModel(
        name="tiny",
        source=str(folder),
        folder=folder,
        model=model,
        tokenizer=Letters(),
        geometry=geometry,
    )


@pytest.fixture
def texts(monkeypatch) -> None:
    def of_length(tokenizer: object, count: int, num_tokens: int) -> list[list[int]]:
        return [tokens(num_tokens, seed) for seed in range(count)]

    for module in ("measure", "retrieval"):
        monkeypatch.setattr(f"benchmarks.quality.{module}.token_sequences", of_length)


def test_a_whole_run_makes_rows_and_a_report(loaded, texts, tmp_path, capsys):
    names = ["none", "fp8", "vllm-4bit_nc-all", "tq4", "tq2"]
    steps = []
    rows = measure_texts(
        loaded,
        [METHODS[name] for name in names],
        Conditions(num_texts=2, num_tokens=192, state_tokens=64),
        TEXT_METRICS,
        lambda *step: steps.append(step),
    )
    assert [row["preset"] for row in rows] == names
    losses = [row["kl_mean"] for row in rows]
    assert losses[0] < 1e-6 < losses[1] < losses[3] < losses[4]
    assert rows[4]["worst_layer_corr"] < rows[3]["worst_layer_corr"] < rows[0]["worst_layer_corr"] + 1e-9
    assert {metric: (done, total) for metric, done, total in steps} == {"tensor": (6, 6), "logits": (12, 12)}
    write_rows(rows, tmp_path / "quality.jsonl")
    arguments = ["--rows", str(tmp_path / "quality.jsonl"), "--folder", str(tmp_path)]
    pages = []
    for _ in range(2):
        assert report(arguments) == 0
        pages.append((tmp_path / "quality.html").read_bytes())
    assert pages[0] == pages[1]
    assert pages[0].count(b"<svg") == 3
    for name in names:
        assert f"<td>{name}</td>".encode() in pages[0]
    assert (tmp_path / "quality.svg").read_text().count("tiny") == 1
    assert "quality.svg" in capsys.readouterr().out


def test_the_table_of_the_readme_is_the_measured_one():
    assert readme_quality.parts()[1] == readme_quality.table(read_rows()), (
        "run `python -m tests.project.readme_quality`"
    )


def test_the_table_has_a_line_for_each_method_and_columns_for_each_model():
    row = {"measure": "text", "tokens": 1024, "texts": 2, "sinks": 4, "tail": 0, "bytes_per_token": 1.0}
    row |= {"bytes_per_token_bf16": 4, "kl_mean": 0.01234, "top1": 0.95, "ppl_ratio": 1.02, "device": "cpu"}
    row |= {"torch": "2", "commit": "abc1234"}
    rows = [{**row, "model": model, "preset": name} for model in ("a", "b") for name in ("fp8", "tq4")]
    lines = readme_quality.table([*rows, {**row, "model": "a", "preset": "kivi2"}]).splitlines()
    cells = "4.00x | 0.0123 | 95.0% | +2.0%"
    assert f"| `tq4` | {cells} | {cells} |" in lines
    assert f"| kivi2 | {cells} |  |  |  |  |" in lines
    assert "abc1234" in lines[-1]
    assert "make bench-quality" in readme_quality.table([])


def test_the_command_measures_a_gguf_file(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TQ_CONNECTORS_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "small.gguf", "qwen2")
    options = ["--model", str(tmp_path / "small.gguf"), "--output", str(tmp_path / "out" / "quality.jsonl")]
    options += ["--only", "fp8", "tq4", "--tokens", "128", "--texts", "1", "--state-tokens", "64"]
    for metrics in (["logits"], ["codec", "tensor", "logits"]):
        assert main([*options, "--metrics", *metrics]) == 0
        rows = read_rows(tmp_path / "out" / "quality.jsonl")
        assert [(row["model"], row["preset"]) for row in rows] == [("small", "fp8"), ("small", "tq4")]
        assert all(row["kl_mean"] > 0 for row in rows)
        assert all((row["worst_layer_corr"] is not None) == ("tensor" in metrics) for row in rows)
    assert (tmp_path / "out" / "quality.html").exists()
    assert "small, 1 x 128 tokens, 4 sinks, tail of 0" in capsys.readouterr().out


def test_transformers_reads_gguf_files_that_our_converter_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_CONNECTORS_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "small.gguf", "mistral")
    asked = []

    def load(folder: object, **options: object) -> object:
        asked.append((folder, options.get("gguf_file")))
        return tiny_model("mistral")

    for loader in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"benchmarks.quality.models.{loader}.from_pretrained", load)
    loaded = load_model(str(tmp_path / "small.gguf"), device=torch.device("cpu"), dtype=torch.float32)
    assert asked == [(tmp_path, "small.gguf")] * 2
    assert (loaded.name, loaded.geometry) == ("small", Geometry(num_layers=3, num_kv_heads=2, head_dim=32))
    assert os.listdir(tmp_path / "cache" / "models") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "tq9"], "no method is called 'tq9'"),
        (["--only", "tq4", "--page-tokens", "30"], "page_tokens must be a positive multiple of 16"),
        (["--model", "nothing"], "no model 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    options, message, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TQ_CONNECTORS_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "small.gguf", "qwen2")
    if "--model" not in options:
        options = [
            *options,
            "--model",
            str(tmp_path / "small.gguf"),
            "--tokens",
            "64",
            "--state-tokens",
            "32",
        ]
    assert main([*options, "--output", str(tmp_path / "rows")]) == 2
    assert message in capsys.readouterr().err


def test_articles_come_in_order_and_only_if_they_are_long_enough(tmp_path):
    redirect, short = "#REDIRECT [[Other]]", "Short."
    long, longer = "Long words. " * 20, "Longer words. " * 30
    xml = "".join(
        f'<page><text xml:space="preserve">{text}</text></page>' for text in (redirect, long, short, longer)
    )
    (tmp_path / "extract.bz2").write_bytes(bz2.compress(xml.encode()))
    first, second = token_sequences(Letters(), 2, 100, tmp_path / "extract.bz2")
    assert Letters().decode(first, True)[:4] == "".join(chr(ord(letter) % VOCABULARY) for letter in "Long")
    assert len(first) == len(second) == 100
    with pytest.raises(ValueError, match="only 2 articles have 100 tokens"):
        token_sequences(Letters(), 3, 100, tmp_path / "extract.bz2")


def test_bars_are_judged_where_rows_say_something():
    row = {"measure": "text", "tokens": 1024, "texts": 2, "sinks": 4, "tail": 0}
    row |= {"model": "qwen2.5-coder-0.5b-instruct", "kl_mean": 0.0135, "worst_layer_corr": 0.991}
    scores = {"measure": "retrieval", "model": "m", "tokens": 1024}
    rows = [{**row, "preset": preset} for preset in ("tq4", "k4v3", "fp8")]
    rows += [{**scores, "preset": "bf16", "ruler": {"vt": 70.0, "qa_1": 50.0}}]
    rows += [{**scores, "preset": "tq4", "ruler": {"vt": 69.0, "qa_1": 40.0}}]
    assert [" ".join(line.split()) for line in judged(rows)] == [
        "MISSED qwen2.5-coder-0.5b-instruct tq4: kl_mean 0.0135, at most 0.013",
        "met qwen2.5-coder-0.5b-instruct tq4: worst_layer_corr 0.9910, at least 0.99",
        "met qwen2.5-coder-0.5b-instruct k4v3: kl_mean 0.0135, at most 0.02",
        "met m tq4: vt at 1024 69.0, bf16 70.0",
    ]


def test_without_rows_there_is_no_report(tmp_path, capsys):
    assert report(["--rows", str(tmp_path / "nothing"), "--folder", str(tmp_path)]) == 1
    assert "benchmarks.quality" in capsys.readouterr().err


def test_a_second_half_is_decoded_on_blocks_from_a_store(loaded, texts):
    methods = [METHODS[name] for name in ("vllm-4bit_nc", "fp8", "tq4", "tq4-stateless")]
    methods += selected(64, ["tq4+tq3:0"])
    conditions = Conditions(num_texts=1, num_tokens=256)
    rows = measure_store(loaded, methods, conditions, lambda *_: None)
    assert [(row["preset"], row["blocks"]) for row in rows] == [("fp8", 2), ("tq4", 2), ("tq4+tq3:0", 4)]
    assert all(0 < row["kl_mean"] < 0.2 for row in rows)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert page([ordered(row) for row in rows]).count("<td>tq4</td>") == 1


def test_retrieval_is_scored_for_every_method(loaded, texts, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.retrieval._material", lambda: MATERIAL)
    methods, steps = [METHODS["fp8"], METHODS["tq4"]], []
    retrieval = Retrieval(
        tasks=("niah_single_2", "qa_1"), contexts=(700, 900), num_samples=2, batch_samples=1
    )
    rows = measure_ruler(loaded, methods, Conditions(), retrieval, lambda *step: steps.append(step))
    assert [(row["tokens"], row["preset"]) for row in rows] == [
        *((700, "fp8"), (700, "tq4"), (900, "fp8"), (900, "tq4"))
    ]
    assert all({len(scores) for scores in row["ruler_scores"].values()} == {2} for row in rows)
    assert all(set(row["ruler"]) == {"niah_single_2", "qa_1"} and row["samples"] == 2 for row in rows)
    assert all(tuple(ordered(row))[: len(KEYS)] == KEYS for row in rows)
    assert steps == [("retrieval", done, 16) for done in range(1, 17)]
    assert page(rows).count("<td>tq4</td>") == 1


@pytest.mark.parametrize(
    ("name", "tail", "state_from"),
    [
        *(("bf16", 0, "other"), ("kivi2", 0, "other"), ("tq3", 0, "other"), ("tq3", 40, "same")),
        *(("vllm-3bit_nc", 40, "same"), ("paper-2.5", 40, "same"), ("tq2-cold", 40, "same")),
    ],
)
def test_answers_in_step_are_those_of_one_prompt_after_the_other(loaded, name, tail, state_from):
    conditions = Conditions(tail=tail, state_from=state_from, state_tokens=64)
    states = states_of_text(loaded, tokens(64, 9), [METHODS[name]], conditions)
    if state_from == "same":
        states = None
    samples = [
        Sample(user=Letters().decode(tokens(count, count), True), answer_prefix=">", answers=answers, **most)
        for count, answers, most in (
            (188, ["never written"], {"max_new_tokens": 12}),
            (150, ["never written"], {"max_new_tokens": 9}),
            (255, [""], {"max_new_tokens": 12}),
            (170, ["never written"], {"max_new_tokens": 2}),
        )
    ]
    one_by_one = [_answer(loaded, sample, METHODS[name], states, conditions) for sample in samples]
    assert [len(text) for text in one_by_one] == [12, 9, 1, 2]
    assert answers_to(loaded, samples, METHODS[name], states, conditions) == one_by_one
    assert loaded.model.config._attn_implementation == "sdpa"


def _answer(loaded, sample, method, states, conditions) -> str:
    """One answer with a cache of transformers: a slower way to the same."""
    view, cache = view_of(loaded, method, states, conditions), DynamicCache(config=loaded.model.config)
    inputs, written = prompt_of(loaded.tokenizer, sample), []
    with torch.inference_mode(), reading_through(loaded.model, view, tail=conditions.tail):
        while len(written) < sample.max_new_tokens:
            logits = loaded.model(input_ids=torch.tensor([inputs]), past_key_values=cache).logits
            inputs = [int(logits[0, -1].argmax())]
            written += inputs
            text = loaded.tokenizer.decode(written, True)
            if sample.answers[0] in text:
                break
    return text


def test_answers_end_at_the_end_token(loaded, monkeypatch):
    user = Letters().decode(tokens(188, 188), True)
    sample = Sample(user=user, answer_prefix=">", answers=["never written"], max_new_tokens=12)
    arguments = METHODS["bf16"], None, Conditions()
    (text,) = answers_to(loaded, [sample], *arguments)
    end = next(letter for letter in text if letter != text[0])
    monkeypatch.setattr(Letters, "eos_token_id", ord(end))
    assert answers_to(loaded, [sample], *arguments) == [text[: text.index(end)]]


def test_a_step_before_the_first_token_is_refused():
    view = StepView(METHODS["bf16"], 3, Conditions(), [100], 4)
    with pytest.raises(ValueError, match="advance before the first step"):
        view.step(0, *sides(1))


def test_sliding_windows_hide_old_tokens_in_steps_too(tmp_path):
    model = tiny_model("mistral")
    geometry = Geometry(num_layers=3, num_kv_heads=2, head_dim=32)
    loaded = LoadedModel(
        name="m", source="m", folder=tmp_path, model=model, tokenizer=Letters(), geometry=geometry
    )
    sample = Sample(user="abcdefg" * 20, answer_prefix=">", answers=["never written"], max_new_tokens=8)
    with torch.inference_mode():
        ids = prompt_of(Letters(), sample)
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    (text,) = answers_to(loaded, [sample], METHODS["none"], None, Conditions())
    assert text == Letters().decode(ids[-8:], True)


def test_several_processes_score_as_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TQ_CONNECTORS_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "small.gguf", "qwen2")
    words = " ".join(f"Word {number} is a word." for number in range(600))
    paragraph = {"context": "She was.", "qas": [{"question": "Who?", "answers": [{"text": "she"}]}]}
    paragraph["qas"][0]["is_impossible"] = False
    template = "{{'niah': {niah}, 'qa': {qa}}}".format(
        **{
            kind: {
                "template": f"{{context}} {query}",
                "answer_prefix": " It is",
                "tokens_to_generate": 5,
            }
            for kind, query in (("niah", "Some {type_needle_v} for {query} are"), ("qa", "{query}"))
        }
    )
    wiki = f'<page><text xml:space="preserve">{words}</text></page>'
    for file, content in (
        (ESSAYS, json.dumps({"text": words}).encode()),
        (SQUAD, json.dumps({"data": [{"paragraphs": [paragraph] * 4}]}).encode()),
        (RULER_TEMPLATES, f"TASKS = {template}".encode()),
        (NOUNS, b"tree\nsea\nstone\nstar"),
        (ADJECTIVES, b"red\ngreen"),
        (WIKIPEDIA, bz2.compress(wiki.encode())),
    ):
        path = tmp_path / "cache" / "data" / f"{file.sha256[:12]}-{file.member.rpartition('/')[2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    options = ["--model", str(tmp_path / "small.gguf"), "--metrics", "retrieval", "--only", "fp8", "tq4"]
    options += ["--tasks", "niah_single_2", "niah_multikey_1", "--contexts", "512", "--samples", "3"]
    options += ["--batch", "2", "--state-tokens", "64"]
    rows = []
    for number_jobs in ("1", "2"):
        output = tmp_path / number_jobs / "quality.jsonl"
        assert main([*options, "--jobs", number_jobs, "--output", str(output)]) == 0
        rows.append(read_rows(output))
    assert rows[0] == rows[1]
    assert [row["samples"] for row in rows[0]] == [3, 3]
    assert "niah" not in capsys.readouterr().err


def _die(*arguments: object) -> None:
    os._exit(1)


def test_a_process_that_dies_is_named(loaded, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.retrieval._scores_elsewhere", _die)
    batches = Retrieval(num_samples=2, batch_samples=1, contexts=(600,), num_jobs=2).batches(
        [METHODS["bf16"]], Conditions()
    )
    with pytest.raises(OSError, match="a process that answers died"):
        list(scored(loaded, batches, 2))
