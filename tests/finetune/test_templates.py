"""Template patterns, and the template sets that we ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.templates import TemplateError, choose, load_templates, parse_template

ROW = {"input": "2 3", "left": "2", "right": "3", "definition": "Add."}


@pytest.mark.parametrize(
    ("entry", "filled"),
    [
        ("Add the numbers.", ("Add the numbers.", "2 3")),
        ("What is {left} plus {right}?", ("What is 2 plus 3?", None)),
        ({"instruction": "{definition}", "input": "Input: {input}"}, ("Add.", "Input: 2 3")),
        ("Write {{left}} and {left}.", ("Write {left} and 2.", None)),
    ],
)
def test_fill(entry: str | dict[str, str], filled: tuple[str, str | None]) -> None:
    assert parse_template(entry, "sums[0]").fill(ROW, "sum") == filled


def test_braces_of_a_row_are_text() -> None:
    template = parse_template("Repeat {input}", "copy[0]")
    assert template.fill({"input": "{left} {x}"}, "copy") == ("Repeat {left} {x}", None)


def test_an_unfilled_placeholder_names_template_task_and_near_match() -> None:
    template = parse_template("What is {lefft}?", "sums[3]")
    with pytest.raises(
        TemplateError, match=r"template sums\[3\] of task addition: nothing fills \{lefft\}; did you mean left"
    ):
        template.fill(ROW, "addition")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"instructon": "x"}, "unknown key instructon; did you mean instruction"),
        ({"instruction": " "}, "an instruction is needed"),
        ({"instruction": "x", "types": ["zs_opts"]}, "unknown type zs_opts; did you mean zs_opt"),
        ("What is {left?", "expected '}'"),
        ("What is {0}?", "not a plain field name"),
        ("What is {left!r}?", "not a plain field name"),
    ],
)
def test_bad_entries(entry: str | dict[str, object], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        parse_template(entry, "set[0]")


def test_types_limit_where_a_template_is_drawn() -> None:
    both, chain = parse_template("a", "s[0]"), parse_template({"instruction": "b", "types": ["cot"]}, "s[1]")
    assert choose([both, chain], "zs_opt") == [both]
    assert choose([both, chain], "cot") == [both, chain]


def test_every_error_of_a_folder_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('one = ["{x", "fine"]\ntwo = [{instruction = ""}]\n')
    (tmp_path / "b.toml").write_text('one = ["again"]\n')
    (tmp_path / "c.toml").write_text("not toml")
    with pytest.raises(TemplateError) as error:
        load_templates(tmp_path)
    message = str(error.value)
    assert message.count("\n") == 3
    for part in ("one[0]", "two[0]", "set one is defined twice", "c.toml"):
        assert part in message


def test_shipped_sets_have_at_least_three_wordings() -> None:
    sets = load_templates()
    assert len(sets) >= 67
    assert {name for name, templates in sets.items() if len(templates) < 3} == {"prompted"}
