"""The task loader's complaints, rows of a task, and the task files that we ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.pipeline import SMOKE_DATA_DIR
from finetune.sources import SourceError
from finetune.task_rows import load_rows, to_row
from finetune.tasks import Task, TaskError, load_tasks
from finetune.templates import load_templates, parse_template

TEMPLATES = {"plain": (parse_template("Do it.", "plain[0]"),)}
FINE = """
[[task]]
name = "one"
submixture = "cot"
source = { reader = "jsonl", path = "rows.jsonl" }
templates = ["plain"]
licence = "MIT"
permissive = true
"""


def task(**settings: Any) -> Task:
    fields: dict[str, Any] = {"reader": "jsonl", "path": "rows.jsonl"} | settings
    return Task("t", "muffin", "MIT", True, TEMPLATES["plain"], **fields)


def test_every_mistake_of_every_file_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(FINE)
    bad = FINE.replace('"one"', '"two"').replace("jsonl", "jsnl", 1).replace('"plain"', '"plane"')
    bad = bad.replace("cot", "cott").replace("permissive = true", 'metrik = "x"\nmetric = "exact"')
    (tmp_path / "b.toml").write_text(FINE + bad)
    with pytest.raises(TaskError) as error:
        load_tasks(TEMPLATES, tmp_path)
    message = str(error.value)
    for part in (
        "b.toml: task one: the name is taken",
        "b.toml: task two: unknown reader jsnl; did you mean jsonl?",
        "unknown template set plane; did you mean plain?",
        "unknown submixture cott; did you mean cot?",
        "unknown key metrik; did you mean metric?",
        "unknown metric exact; did you mean exact_match?",
        "permissive is missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("source", "extra", "message"),
    [
        ("{ path = 'x' }", "", "a reader or a generator"),
        ("{ reader = 'jsonl' }", "", "needs a path"),
        ("{ reader = 'jsonl', path = 'x', heading = true }", "", "unknown reader setting heading; did you mean header"),
        ("{ generator = 'coin_flp' }", "", "unknown generator coin_flp; did you mean coin_flip"),
        ("{ generator = 'coin_flip' }", "held_out = { fraction = 0.1 }", "splits its cases itself"),
        ("{ reader = 'jsonl', path = 'x' }", "held_out = { fraction = 1.5 }", "between 0 and 1"),
        ("{ reader = 'jsonl', path = 'x' }", "held_out = { rows = 3 }", "either a path or a fraction"),
        ("{ reader = 'jsonl', path = 'x' }", "types = ['cots']", "unknown template type cots; did you mean cot"),
    ],
)
def test_bad_sources_and_splits(tmp_path: Path, source: str, extra: str, message: str) -> None:
    text = FINE.replace('{ reader = "jsonl", path = "rows.jsonl" }', source) + extra
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(TaskError, match=message):
        load_tasks(TEMPLATES, tmp_path)


def test_fields_lists_labels_and_order() -> None:
    raw = {"things": ["cat", "bus", "dog"], "right": "dog, cat", "extra": 3}
    row = to_row(raw, task(fields={"input": "things", "output": "right"}, output_in_input_order=True))
    assert (row["input"], row["output"], row["key"]) == ("cat, bus, dog", "cat, dog", "cat, bus, dog")
    named = task(label_names={"0": "bad", "1": "good"}, options=("good", "bad"))
    assert to_row({"input": "x", "output": 1}, named)["output"] == "good"
    with pytest.raises(SourceError, match=r"no field rihgt; did you mean right"):
        to_row(raw, task(fields={"output": "rihgt"}))
    with pytest.raises(SourceError, match=r"no output; map it with fields"):
        to_row({"input": "x"}, task())


def test_split_drops_repeats_leaks_and_long_rows(tmp_path: Path) -> None:
    rows = ["short", "short", "Held  OUT", "x" * 50]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"input": "{row}", "output": "y"}}\n' for row in rows))
    (tmp_path / "test.jsonl").write_text('{"input": "held out", "output": "y"}\n')
    chosen = task(held_out_path="test.jsonl")
    loaded = load_rows(chosen, [tmp_path], seed=0, max_row_chars=40, max_target_chars=40)
    assert [row["input"] for row in loaded.train] == ["short"]
    assert loaded.left_out == {"repeat": 1, "held out": 1, "too long": 1}
    with pytest.raises(SourceError, match="task t: no train row is left"):
        load_rows(chosen, [tmp_path], seed=0, max_row_chars=3, max_target_chars=40)
    with pytest.raises(SourceError, match=r"task t: no file rows\.jsonl under .*--data DIR"):
        load_rows(chosen, [tmp_path / "elsewhere"], seed=0, max_row_chars=40, max_target_chars=40)


def test_rows_that_differ_in_their_choices_only_are_different(tmp_path: Path) -> None:
    lines = [f"Which is right?\\nOptions:\\n- {a}\\n- {b}\t{a}\tIt is {a}.\n" for a, b in ("ab", "cd", "ab")]
    (tmp_path / "cot.tsv").write_text("".join(lines))
    chosen = task(reader="cot_tsv", path="cot.tsv")
    assert len(load_rows(chosen, [tmp_path], seed=0, max_row_chars=99, max_target_chars=99).train) == 2


def test_every_epoch_gives_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"input": "{i}", "output": "y"}}\n' for i in range(20)))
    rows = load_rows(task(), [tmp_path], seed=4, max_row_chars=9, max_target_chars=9)
    epochs = [[rows.train_row(20 * epoch + i)["input"] for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows.train_row(3)["input"] == epochs[0][3]


def test_shipped_tasks() -> None:
    tasks = load_tasks(load_templates())
    assert len(tasks) >= 220
    assert sum(task.submixture == "niv2" for task in tasks.values()) >= 108
    for name in ("qqp", "wic", "amazon", "yelp", "multirc", "agnews", "imdb", "t0_samsum", "t0_sciq", "t0_gigaword"):
        assert not tasks[name].permissive
    for number in (278, 610, 672, 927, 1290, 1504, 1579):
        assert not next(task for name, task in tasks.items() if name.startswith(f"ni_task{number}_")).permissive


def test_shipped_smoke_tasks_use_every_reader() -> None:
    from finetune.sources import READERS

    tasks = [task for name, task in load_tasks(load_templates()).items() if name.startswith("smoke_")]
    assert {task.reader for task in tasks} == set(READERS)
    for smoke in tasks:
        assert load_rows(smoke, [SMOKE_DATA_DIR], seed=0, max_row_chars=400, max_target_chars=300).train
