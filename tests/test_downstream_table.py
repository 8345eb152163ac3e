"""The table of docs/downstream.md is what docs/downstream.json says was seen, and each row has tests that are there."""

import ast
import json
from pathlib import Path

import downstream_table
import pytest
from downstream_table import BEGIN, END, PAGE, ROWS, SEEN, Row, belongs, page, seen_now, table

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", ROWS)
def test_a_rows_tests_are_there(name):
    row = ROWS[name]
    names = {
        node.name
        for file in row.file.split()
        for node in ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    for wanted in row.tests:
        assert any(found.startswith(wanted.partition("[")[0]) for found in names), wanted


def test_the_page_is_what_was_seen():
    seen = json.loads(SEEN.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert seen.keys() == ROWS.keys()
    assert page(text, seen) == text
    assert text.count(BEGIN) == text.count(END) == 1
    assert all("torch " in entry["with"] and "transformers " in entry["with"] for entry in seen.values())


def test_what_fails_and_what_is_not_installed_are_told(monkeypatch):
    rows = {
        "good": Row("a", "test_x.py", ("test_good",)),
        "bad": Row("b", "test_x.py", ("test_four[bad]",), ("torch",)),
        "absent": Row("c", "test_x.py", ("test_absent",)),
    }
    found = {
        ("test_x.py", "test_good"): "passed",
        ("test_x.py", "test_four[bad-1]"): "failed",
        ("test_x.py", "test_four[bad-2]"): "passed",
        ("test_x.py", "test_four[good]"): "failed",
        ("test_x.py", "test_absent[a]"): "skipped",
        ("test_y.py", "test_good"): "failed",
    }
    monkeypatch.setattr(downstream_table, "ROWS", rows)
    monkeypatch.setattr(downstream_table, "outcomes", lambda _: found)
    seen = seen_now(list(rows))
    assert {name: entry["seen"] for name, entry in seen.items()} == {"good": "works", "bad": "1 of 2 tests fail"}
    assert seen["bad"]["with"].startswith("torch ")
    assert "| absent | c | not tried |  |" in table(seen)
    assert belongs(rows["bad"], "test_x.py", "test_four[bad-1]")
    monkeypatch.setattr(downstream_table, "seen_now", lambda _: seen)
    assert downstream_table.main([]) == 1
