"""The page of what was run with what is the one that its rows make."""

from engines import compatibility


def test_the_page_is_written_from_its_rows():
    is_current = compatibility.PAGE.read_text() == compatibility.page()
    assert is_current, "run PYTHONPATH=tests python -m engines.compatibility"


def test_rows_are_those_of_tests_that_are_there():
    folders = {engine: folder for folder, (engine, _) in compatibility.ENGINES.items()}
    rows = compatibility.read_rows()
    assert rows
    for row in rows:
        assert set(row) == {"engine", "version", "file", "what", "passed"}
        folder = compatibility.ROOT / "tests" / "engines" / folders[row["engine"]]
        assert (folder / f"{row['file']}.py").is_file()
        assert row["passed"] > 0
