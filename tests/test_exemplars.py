"""Exemplar sets from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.exemplars import ExemplarError, load_sets
from serve.request import Exemplar


def test_both_forms_are_read(tmp_path: Path) -> None:
    (tmp_path / "sentiment.jsonl").write_text(
        '{"input": "fine", "output": "positive"}\n\n{"input": "bad", "output": "negative"}\n'
    )
    (tmp_path / "sums.json").write_text('[{"input": "1+1", "output": "2", "rationale": "1 and 1 is 2."}]')
    (tmp_path / "notes.txt").write_text("not a set")
    assert load_sets(tmp_path) == {
        "sentiment": (Exemplar("fine", "positive"), Exemplar("bad", "negative")),
        "sums": (Exemplar("1+1", "2", "1 and 1 is 2."),),
    }


def test_all_errors_at_once_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input": "x", "output": "y"}\n{"input": "x"}\n')
    (tmp_path / "b.json").write_text('{"input": "x"}')
    (tmp_path / "c.jsonl").write_text('{"input": "x", "output": "y", "answer": "z"}')
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(ExemplarError) as caught:
        load_sets(tmp_path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 4
    assert "a.jsonl: line 2: output must be" in lines[0]
    assert "b.json: must hold a JSON list" in lines[1]
    assert "c.jsonl: line 1: unknown field 'answer'" in lines[2]
    assert "d.jsonl: line 1: not valid JSON" in lines[3]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExemplarError, match=r"holds no \.json or \.jsonl file"):
        load_sets(tmp_path)
