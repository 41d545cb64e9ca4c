"""The GPU harness, as far as it goes without a GPU."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from project import readme_gpu

from benchmarks import peers, run
from benchmarks.gpu.inputs import Arena, random_pages
from benchmarks.gpu.prepared import failures
from benchmarks.gpu.session import Session, WrongOutputError
from benchmarks.gpu.timing import Ceilings, Timing
from benchmarks.plot import draw, speedups
from benchmarks.plot import main as plot
from benchmarks.registry import BARS, BF16, CASES, PEERS, QUANTIZED, Case, selected
from benchmarks.rows import RESULTS, check_row, identity, merged, read_rows, write_rows
from benchmarks.rows import main as take_over
from benchmarks.verdict import judged, key_of
from tq_kernels import PRESETS, PageLayout
from tq_kernels.reference import dequantize

ROOT = Path(__file__).parents[2]
LLAMA = "32q8kv128d/p128"
FACTS = {"device": "H100", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}


def row_of(
    case: Case, baseline: str, median_us: float = 100.0, speedup: float | None = 2.0
) -> dict[str, object]:
    """A row as a run would write it."""
    extra = {"new_tokens": case.new_tokens} if case.new_tokens > 1 else {}
    return {
        "op": case.op,
        "preset": case.preset,
        "batch": case.batch,
        "context": case.context,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "page_tokens": case.page_tokens,
        **extra,
        "median_us": median_us,
        "gbps": 2000.0,
        "roofline": 0.8,
        "baseline": baseline,
        "baseline_us": None if speedup is None else median_us * speedup,
        "speedup": speedup,
        **FACTS,
        "note": "",
    }


def baselines_of(case: Case) -> list[str]:
    """Baselines of the rows that a run of the case writes."""
    several = {"peers": PEERS, "bf16": BF16[:1]}
    return [name for against in case.against for name in several.get(against, (against,))]


def whole_run(**numbers: float) -> list[dict[str, object]]:
    """A row for every comparison of every case."""
    return [row_of(case, baseline, **numbers) for case in CASES for baseline in baselines_of(case)]


def names(bar_title: str) -> set[str]:
    bar = next(bar for bar in BARS if bar.title.startswith(bar_title))
    return {case.name for case in bar.cases()}


def test_the_registry_lists_every_row_of_the_bar():
    assert names("decode tq4 32x32768") == {f"decode/tq4/{s}/{LLAMA}" for s in ("32x32768", "64x8192")}
    for title in ("decode tq4 8x8192 and 1x131072 over", "decode tq4 8x8192 and 1x131072, share"):
        assert names(title) == {f"decode/tq4/{s}/{LLAMA}" for s in ("8x8192", "1x131072")}
    qwen = names("decode tq4 at Qwen2.5 shapes, anywhere")
    for heads in ("12q2kv128d", "14q2kv64d"):
        shapes = {name.split("/")[2] for name in qwen if heads in name}
        assert {"1x4096", "64x4096", "1x131072", "64x131072"} <= shapes
    large = names("decode tq4 at Qwen2.5 shapes, bf16 KV above 256 MB")
    assert large < qwen
    assert "decode/tq4/64x131072/14q2kv64d/p128" in large
    assert "decode/tq4/1x4096/12q2kv128d/p128" not in large
    assert {name.split("/")[1] for name in names("decode tq3, tq2")} == {"tq3", "tq2", "k8v4", "k4v2"}
    limits = names("decode, any preset")
    assert {name.split("/")[1] for name in limits} == set(QUANTIZED)
    assert {f"decode/{preset}/8x8192/{LLAMA}" for preset in QUANTIZED} <= limits
    for title in ("decode tq4 over stock", "decode tq4 over turbo-attn", "decode tq4 over vLLM's SoA"):
        assert names(title) == {f"decode/tq4/{s}/{LLAMA}" for s in ("32x8192", "1x131072")}
    assert names("quantize tq4, 32k") == {f"quantize/tq4/1x32768/0q8kv128d/p{p}" for p in (64, 128)}
    assert names("quantize tq4, one token") == {"append/tq4/64x8192/0q8kv128d/p128"}
    assert names("dequantize tq4") == {"dequantize/tq4/1x32768/0q8kv128d/p128"}
    assert names("extend tq4, 512") == {f"extend/tq4/1x32768+512/{LLAMA}"}


def test_every_bar_can_be_judged_by_what_its_cases_are_compared_with():
    for bar in BARS:
        for case in bar.cases():
            compared = {*baselines_of(case), *(BF16 if "bf16" in case.against else ())}
            assert compared.issuperset(bar.baselines), (bar.title, case.name)


def test_names_are_unique_and_so_are_identities():
    assert len({case.name for case in CASES}) == len({key_of(case) for case in CASES}) == len(CASES)


def test_cases_that_share_pages_follow_each_other():
    order = [(case.layout, case.q_heads) for case in CASES if case.op == "decode"]
    changes = sum(before != after for before, after in itertools.pairwise(order))
    assert changes == len(set(order)) - 1


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("decode/tq4/8x8192/", 1), ("append/*", 4), ("extend", 4), ("quantize/tq3", 1), ("nothing", 0)],
)
def test_a_pattern_is_a_glob_or_begins_a_part_of_a_name(pattern, count):
    assert len(selected([pattern])) == count


def test_without_a_pattern_all_cases_are_selected():
    assert selected([]) == list(CASES)


def test_the_list_needs_neither_a_gpu_nor_torch():
    code = "import sys; from benchmarks.run import main; main(['--list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *listed, torch_was_imported = done.stdout.splitlines()
    assert torch_was_imported == "False"
    assert [line.split()[0] for line in listed[: len(CASES)]] == [case.name for case in CASES]
    assert sum(line.startswith("  ") for line in listed) == len(BARS)


def test_without_a_gpu_a_run_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--out", str(tmp_path / "rows")]) == 2
    assert capsys.readouterr().err == run.NO_GPU + "\n"
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_matches_nothing_is_an_error(capsys):
    assert run.main(["--only", "nothing"]) == 2
    assert "--list" in capsys.readouterr().err


def test_no_number_is_taken_on_a_red_test(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "tests" / "kernels" / "test_decode_red.py").write_text("def test_red():\n    assert False\n")
    assert run.main(["--only", "decode", "--out", str(tmp_path / "rows"), "--jobs", "1"]) == 1
    assert "no number" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_an_op_without_tests_is_as_bad_as_a_red_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main(["--only", "extend", "--out", str(tmp_path / "rows")]) == 1
    assert "there is no tests/kernels/test_*extend*.py" in capsys.readouterr().err


def test_every_op_names_its_tests():
    assert {case.op for case in CASES} == set(run.TESTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_us": None}, "median_us"),
        ({"batch": 1.0}, "batch"),
        ({"spread": 1.0}, "unknown"),
        ({"median_us": -1.0}, "positive"),
        ({"speedup": None}, "together"),
        ({"speedup": 3.0}, "baseline_us / median_us"),
    ],
)
def test_a_row_that_is_not_as_declared_is_refused(change, message):
    row = row_of(CASES[0], "cudnn-bf16")
    check_row(row)
    with pytest.raises(ValueError, match=message):
        check_row({**row, **change})


def test_a_row_without_a_key_is_refused():
    row = row_of(CASES[0], "cudnn-bf16")
    with pytest.raises(ValueError, match="lacks"):
        check_row({key: value for key, value in row.items() if key != "commit"})


def test_a_baseline_without_a_time_is_a_row():
    check_row(row_of(CASES[0], "turbo-attn", speedup=None))


def test_rows_survive_a_file(tmp_path):
    rows = whole_run()
    write_rows(rows, tmp_path / "new" / "rows.jsonl")
    assert read_rows(tmp_path / "new" / "rows.jsonl") == rows
    assert read_rows(tmp_path / "nothing.jsonl") == []


def test_new_rows_replace_those_of_the_same_configuration():
    old = [row_of(CASES[0], "cudnn-bf16"), row_of(CASES[0], "fp8-limit"), row_of(CASES[1], "fp8-limit")]
    new = [row_of(CASES[0], "flash-bf16", median_us=50.0)]
    assert merged(old, new) == [old[2], *new]


def test_rows_of_another_machine_are_taken_over(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    kept, replaced = row_of(CASES[1], "fp8-limit"), row_of(CASES[0], "fp8-limit")
    new = row_of(CASES[0], "fp8-limit", median_us=50.0)
    write_rows([kept, replaced], here)
    write_rows([new], there)
    take_over([str(there), "--into", str(here)])
    assert read_rows(here) == [kept, new]
    take_over([str(there), "--into", str(here), "--replace"])
    assert read_rows(here) == [new]
    assert "1 rows taken over" in capsys.readouterr().out


def test_the_committed_rows_are_as_declared():
    cases = {key_of(case) for case in CASES}
    for row in read_rows(RESULTS):
        assert identity(row) in cases, row


@pytest.mark.parametrize(("speedup", "roofline", "word"), [(20.0, 0.8, "met"), (0.5, 0.1, "MISSED")])
def test_bars_are_judged_by_their_worst_row(speedup, roofline, word):
    rows = [{**row, "roofline": roofline} for row in whole_run(speedup=speedup, median_us=5.0)]
    for judgement in judged(rows):
        assert judgement.num_rows == judgement.num_wanted, judgement
        by_speed = judgement.bar.measure == "speedup"
        expected = word if by_speed or judgement.bar.measure == "roofline" else "met"
        assert str(judgement).startswith(expected), judgement


def test_a_bar_with_a_row_missing_is_met_in_part_only():
    rows = [row for row in whole_run(speedup=20.0) if (row["batch"], row["context"]) != (64, 8192)]
    judgement = judged(rows)[0]
    assert str(judgement).startswith("part")
    assert not judgement.met


def test_a_bar_without_rows_is_not_measured():
    assert all("not measured" in str(judgement) for judgement in judged([]))


def test_gigabytes_a_second_are_held_against_tq4_at_the_same_shape():
    rows = whole_run()
    slow = next(
        row for row in rows if row["preset"] == "k4v2" and row["context"] == 8192 and row["batch"] == 32
    )
    slow["gbps"] = 1000.0
    judgement = next(one for one in judged(rows) if one.bar.measure == "gbps_of_tq4")
    assert judgement.worst == pytest.approx(0.5)
    assert "k4v2/32x8192" in judgement.where


def test_the_tables_of_the_readme_are_the_measured_ones():
    expected = readme_gpu.tables(read_rows())
    assert readme_gpu.parts()[1] == expected, "run `python -m tests.project.readme_gpu`"


def test_tables_hold_every_shape_preset_op_and_peer():
    text = readme_gpu.tables(whole_run())
    for word in ("64 x 8,192", "1 x 131,072", *(f"`{name}`" for name in PRESETS), *PEERS):
        assert f"| {word} |" in text, word
    for op in ("quantize", "append", "dequantize", "extend"):
        assert f"| {op} |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert "abc1234" in text


def test_the_plot_is_drawn_and_is_the_same_every_time(tmp_path):
    write_rows(whole_run(), tmp_path / "rows.jsonl")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        assert plot(["--rows", str(tmp_path / "rows.jsonl"), "--folder", str(tmp_path / folder)]) == 0
    first, second = ((tmp_path / folder / "decode_speedup.svg").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert first.lstrip().startswith(b"<?xml")
    assert len(first) < 200_000
    assert (tmp_path / "a" / "decode_speedup.png").stat().st_size < 200_000


def test_without_rows_there_is_no_plot(tmp_path, capsys):
    assert plot(["--rows", str(tmp_path / "nothing"), "--folder", str(tmp_path)]) == 1
    assert "make bench-gpu" in capsys.readouterr().err


def test_the_plot_takes_each_preset_at_every_context():
    points = speedups(whole_run())
    assert list(points) == list(PRESETS)
    assert all(
        [context for context, _ in pairs] == [2048, 4096, 8192, 16384, 32768] for pairs in points.values()
    )


def test_a_plot_of_one_point_is_no_error(tmp_path):
    draw({"tq4": [(8192, 2.0)]}, "one", [tmp_path / "one.svg"])
    assert (tmp_path / "one.svg").exists()


def test_a_peer_that_is_not_there_ends_nothing_but_itself(tmp_path):
    answers = peers.ask("aither", tmp_path, ["32x8192", "1x131072"], (32, 8, 128))
    assert set(answers) == {"32x8192", "1x131072"}
    for answer in answers.values():
        assert answer.decode_us is None
        assert "does not exist" in answer.note


def test_the_last_line_about_a_shape_counts(monkeypatch, tmp_path):
    lines = [
        {"shape": "1x64", "decode_us": 3.0},
        {"shape": "1x64", "decode_us": 2.0, "note": "best"},
        {"shape": "2x64", "note": "broken"},
    ]
    output = "noise\n" + "".join(json.dumps(line) + "\n" for line in lines)
    crash = subprocess.CompletedProcess([], -11, output, "Segmentation fault\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: crash)
    answers = peers.ask("vllm", tmp_path, ["1x64", "2x64", "3x64"], (32, 8, 128))
    assert (answers["1x64"].decode_us, answers["1x64"].note) == (2.0, "best")
    assert answers["2x64"].note == "broken"
    assert answers["3x64"].note == "exit status -11: Segmentation fault"


@pytest.mark.parametrize("preset", PRESETS)
def test_random_pages_are_valid_and_of_unit_size(preset):
    layout = PageLayout(spec=PRESETS[preset], head_dim=64, num_kv_heads=2, page_tokens=64)
    pages = random_pages(layout, 8, torch.Generator().manual_seed(1))
    for side in dequantize(pages, layout):
        assert side.isfinite().all()
        assert 0.5 < side.std() < 2.0


def test_block_tables_of_all_sets_share_no_page():
    case = selected(["decode/tq4/1x4096/14q2kv64d/p128"])[0]
    arena = Arena(torch.device("cpu"), l2_bytes=1 << 20)
    tables = arena.block_tables(case, arena.num_sets(case) * case.pages_per_seq)
    assert arena.num_sets(case) == len(tables) == 4
    assert torch.cat(tables).unique().numel() == 4 * case.pages_per_seq


def test_an_arena_for_compiling_stays_small():
    case = selected(["decode/tq4/64x131072/12q2kv128d/p128"])[0]
    arena = Arena(torch.device("cpu"), l2_bytes=1 << 20, few=True)
    pages = arena.pages(case.layout, case.batch * case.pages_per_seq)
    (table,) = arena.block_tables(case, len(pages))
    assert len(pages) <= 64
    assert table.max() < len(pages)
    assert arena.num_sets(case) == 1


def test_make_help_names_the_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert any(line.startswith("bench-gpu ") for line in done.stdout.splitlines())


class FakeWatch:
    """Runs every call once and says that it took 10 us."""

    device = torch.device("cpu")
    l2_bytes = 1 << 16

    def time_graph(self, calls):
        for call in calls:
            call()
        return Timing(10.0, 9.0, 11.0)


SMALL = {
    "decode": {"batch": 3, "q_heads": 8, "against": ("bf16", "fp8-limit", "peers")},
    "verify": {"batch": 2, "q_heads": 8, "new_tokens": 4, "against": ("bf16",)},
    "extend": {"batch": 1, "q_heads": 8, "new_tokens": 40, "against": BF16},
    "quantize": {"batch": 1, "q_heads": 0, "against": ("copy", "peers")},
    "append": {"batch": 3, "q_heads": 0, "against": ("launch",)},
    "dequantize": {"batch": 1, "q_heads": 0, "against": ("copy",)},
}


def small_case(op: str) -> Case:
    return Case(op=op, preset="tq4", context=256, kv_heads=2, head_dim=64, **SMALL[op])


@pytest.fixture
def session(monkeypatch) -> Session:
    """A run on the CPU, by the reference: other tests may have asked for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ceilings = Ceilings(copy_gbps=1000.0, product_tflops=100.0, launch_us=2.0)
    return Session(FakeWatch(), ceilings, FACTS, "a remark")


@pytest.mark.parametrize("op", SMALL)
def test_every_op_is_checked_against_the_reference_before_it_is_timed(session, op):
    case = small_case(op)
    rows = session.rows(case)
    for row in rows:
        check_row(row)
        assert identity(row) == key_of(case)
        assert row["median_us"] == 10.0
        assert "9.0-11.0 us" in row["note"]
        assert row["note"].endswith("; a remark")
    compared = {row["baseline"] for row in rows}
    wanted = {name for name in case.against if name not in ("peers", "bf16")}
    assert compared - set(BF16) == wanted - set(BF16)


def test_bytes_and_ceilings_make_the_numbers_of_a_row(session):
    case = small_case("decode")
    bf16, limit = session.rows(case)
    num_bytes = 3 * 2 * case.layout.page_bytes + 2 * 2 * 3 * 8 * 64
    assert bf16["gbps"] == pytest.approx(num_bytes / 10.0 / 1e3, rel=1e-4)
    assert bf16["roofline"] == pytest.approx(num_bytes / 1000.0 / 1e3 / 10.0, rel=1e-4)
    # on a CPU torch has no cuDNN, so FlashAttention's time is the baseline and the note says why
    assert (bf16["baseline"], bf16["speedup"]) == ("flash-bf16", 1.0)
    assert "cudnn-bf16: " in bf16["note"]
    assert limit["baseline_us"] == pytest.approx(2 * 3 * 256 * 2 * 64 / 1000.0 / 1e3, rel=1e-4)


def test_a_peer_is_held_against_the_case_it_was_asked_for(session):
    case = small_case("decode")
    answer = peers.Answer(shape="3x256", decode_us=50.0, bytes_per_token=272, note="tile 8")
    assert session.peer_rows(case, "turbo-attn", {"3x256": answer}) == []
    session.rows(case)
    (row,) = session.peer_rows(case, "turbo-attn", {"3x256": answer})
    check_row(row)
    assert (row["baseline"], row["speedup"]) == ("turbo-attn", 5.0)
    assert "tile 8, 272 bytes a token" in row["note"]
    (row,) = session.peer_rows(case, "vllm", {"3x256": peers.Answer(shape="3x256", note="crashed")})
    check_row(row)
    assert row["speedup"] is None
    assert "crashed" in row["note"]


def test_a_peer_quantizes_as_fast_as_at_its_best_shape(session):
    case = small_case("quantize")
    session.rows(case)
    answers = {
        "a": peers.Answer(shape="a", note="crashed"),
        "b": peers.Answer(shape="b", encode_us=40.0, note="slow"),
        "c": peers.Answer(shape="c", encode_us=20.0, note="fast"),
    }
    (row,) = session.peer_rows(case, "vllm", answers)
    assert row["speedup"] == 2.0


def test_a_wrong_output_has_no_time(session, monkeypatch):
    def wrong(query, *_, out, lse, **__):
        out.fill_(1.0)
        lse.fill_(0.0)

    monkeypatch.setattr("benchmarks.gpu.decode.decode_attention", wrong)
    with pytest.raises(WrongOutputError, match="output errs by"):
        session.rows(small_case("decode"))


def test_an_error_that_is_no_number_is_a_failure():
    assert failures({"a": (0.1, 0.2)}) == []
    assert len(failures({"a": (float("nan"), 0.2), "b": (0.3, 0.2)})) == 2
