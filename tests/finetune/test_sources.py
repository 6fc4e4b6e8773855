"""Readers against the traps that the data's README lists; the shipped smoke files have each of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.pipeline import SMOKE_DATA_DIR
from finetune.sources import READERS, ReadOptions, SourceError, find_files, read_cot_tsv, read_t0, unescape_agnews

SMOKE = SMOKE_DATA_DIR


def read(reader: str, path: Path, **settings: object) -> tuple[list[dict[str, object]], ReadOptions]:
    options = ReadOptions(**settings)  # type: ignore[arg-type]
    return list(READERS[reader](path, options)), options


def test_t0_drops_the_end_mark_and_skips_empty_completions() -> None:
    rows, options = read("t0", SMOKE / "t0/reviews_Did_the_writer_like_it.jsonl")
    assert len(rows) == 60
    assert {row["output"] for row in rows} == {"Yes", "No"}
    assert options.skipped["empty completion"] == 1


def test_cot_lines_are_cut_at_lf_only_and_quotes_are_text() -> None:
    rows, _ = read("cot_tsv", SMOKE / "flan_cot/stories_train.tsv")
    assert len(rows) == 72
    assert any("\u2028" in str(row["input"]) for row in rows)
    quoted = next(row for row in rows if str(row["input"]).startswith('"'))
    assert quoted["input"] == '"A whale is a fish."\nIs the above claim true?'
    assert quoted["options"] == ["yes", "no"]
    assert quoted["output"] == "no"


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (
            "How much?\\nOptions:\\n(A) 300\\n(B) 992\t(A)\t1\\n2",
            {
                "input": "How much?",
                "output": "(A)",
                "rationale": "1\n2",
                "options": ["(A) 300", "(B) 992"],
                "show_options": True,
            },
        ),
        ("Is it?\tyes\tIt is.", {"input": "Is it?", "output": "yes", "rationale": "It is."}),
    ],
)
def test_cot_escapes_and_choices(tmp_path: Path, line: str, row: dict[str, object]) -> None:
    path = tmp_path / "cot.tsv"
    path.write_text(line + "\n", encoding="utf-8")
    assert list(read_cot_tsv(path, ReadOptions())) == [row]


def test_damaged_lines_name_file_and_line_or_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "cot.tsv"
    path.write_text("a\tb\tc\nonly\ttwo\nd\te\tf\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"cot\.tsv, line 2: 3 tab-separated columns expected, 2 found"):
        list(read_cot_tsv(path, ReadOptions()))
    options = ReadOptions(skip_damaged=True)
    assert [row["input"] for row in read_cot_tsv(path, options)] == ["a", "d"]
    assert options.skipped == {"damaged": 1}


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", '{"prompt": 1, "completion": "x"}'])
def test_damaged_json_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c<|endoftext|>"}\n' + text + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"rows\.jsonl, line 2"):
        list(read_t0(path, ReadOptions()))
    options = ReadOptions(skip_damaged=True)
    assert list(read_t0(path, options)) == [{"input": "p", "output": "c"}]
    assert options.skipped["damaged"] == 1


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.tsv"
    path.write_bytes("caf\xe9\tja\tso\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"latin\.tsv: not UTF-8"):
        list(read_cot_tsv(path, ReadOptions()))


def test_natural_instructions_definitions_and_references() -> None:
    capitals, _ = read("natural_instructions", SMOKE / "natural_instructions/tasks/task9001_capitals.json")
    reverse, options = read("natural_instructions", SMOKE / "natural_instructions/tasks/task9002_reverse.json")
    assert capitals[0]["definition"] == "In this task you are given the name of a country. Answer with its capital."
    assert reverse[0]["definition"] == "You are given a list of words. Write the words in reverse order."
    assert len(reverse[0]["accepted"]) == 2  # type: ignore[arg-type]
    assert options.skipped["empty reference"] == 1


def test_cl_benchmark_skips_rows_outside_the_label_list() -> None:
    rows, options = read("cl_benchmark", SMOKE / "muffin/cl_benchmark/topics/train.json", strip_prefix="Text: ")
    assert len(rows) == 60
    assert options.skipped["unlabelled"] == 1
    assert not any(str(row["input"]).startswith("Text:") for row in rows)
    assert rows[0]["options"] == ["Sports", "Business", "Weather"]


def test_cl_benchmark_body_only(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["A"]')
    (tmp_path / "test.json").write_text(json.dumps([{"sentence": "Title: T\nText:  the body.\n", "label": "A"}]))
    rows, _ = read("cl_benchmark", tmp_path / "test.json", body_only=True)
    assert rows[0]["input"] == "the body."


def test_alps_header_and_trailing_spaces() -> None:
    rows, _ = read("alps", SMOKE / "muffin/alps/reviews.tsv", header=True)
    assert len(rows) == 40
    assert {row["output"] for row in rows} == {"0", "1"}
    assert not any(str(row["input"]).endswith(" ") for row in rows)


def test_commonsenseqa_answers_are_texts() -> None:
    rows, _ = read("commonsenseqa", SMOKE / "muffin/commonsenseqa/train.jsonl")
    assert len(rows) == 30
    assert all(row["output"] in row["options"] for row in rows)  # type: ignore[operator]


def test_instruction_induction_keeps_the_sources_field_names() -> None:
    rows, _ = read("instruction_induction", SMOKE / "instruction_induction/raw/induce/cause_and_effect.json")
    assert rows[0] == {"cause": "It rained all night.", "effect": "The street was wet in the morning."}
    with pytest.raises(SourceError, match="no dict of examples"):
        read("instruction_induction", SMOKE / "natural_instructions/tasks/task9001_capitals.json")


@pytest.mark.parametrize(
    ("damaged", "mended"),
    [
        (r"plan\to", "plan to"),
        ("NASA #39;s craft", "NASA's craft"),
        ("the  quot;vomit comet quot; for", 'the "vomit comet" for'),
        ("AT amp;T", "AT&T"),
        ('He said "no" and "yes".', 'He said "no" and "yes".'),
    ],
)
def test_agnews_escapes(damaged: str, mended: str) -> None:
    assert unescape_agnews(damaged) == mended


def test_files_are_found_directly_or_under_train(tmp_path: Path) -> None:
    (tmp_path / "train/t0").mkdir(parents=True)
    (tmp_path / "train/t0/a_1.jsonl").write_text("{}")
    (tmp_path / "train/t0/a_2.jsonl").write_text("{}")
    assert [path.name for path in find_files("t0/a_*.jsonl", [tmp_path])] == ["a_1.jsonl", "a_2.jsonl"]
    with pytest.raises(SourceError, match="no file t0/b_"):
        find_files("t0/b_*.jsonl", [tmp_path])
