"""Templates: the wordings of a task, as data.

A template says how a row becomes the fields of a request: an instruction and perhaps an input. It holds no separator,
no label and no option list; those are strings of `serve.prompts`. In a data file a template is a text or a table:

    "Write the plural."                                 the row's input stands below the instruction
    "What is the plural of {input}?"                    has a placeholder: the instruction is the whole prompt
    {instruction = "{definition}", input = "{input}"}   both written out
    {instruction = "...", types = ["cot"]}              drawn for these template types only

>>> template = parse_template("What is {left} plus {right}?", "sums")
>>> template.fill({"left": "2", "right": "3"}, "sum")
('What is 2 plus 3?', None)
>>> parse_template("Add the numbers.", "sums").fill({"input": "2 3"}, "sum")
('Add the numbers.', '2 3')
"""

from __future__ import annotations

import difflib
import string
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATES_DIR = Path(__file__).parent / "data" / "templates"
TEMPLATE_TYPES = ("zs_opt", "zs_noopt", "fs_opt", "fs_noopt", "cot", "fs_cot")
WITH_OPTIONS = frozenset({"zs_opt", "fs_opt"})
WITH_EXEMPLARS = frozenset({"fs_opt", "fs_noopt", "fs_cot"})
WITH_RATIONALE = frozenset({"cot", "fs_cot"})
_KEYS = ("instruction", "input", "types")

Pattern = tuple[tuple[str, str | None], ...]  # pieces of (literal text, name of the field that follows)


class TemplateError(ValueError):
    """A template file or a placeholder that cannot be used; names the template."""


@dataclass(frozen=True, slots=True)
class Template:
    """One wording. `types` empty: for every template type the task has."""

    name: str
    instruction: Pattern
    input: Pattern | None
    types: tuple[str, ...] = ()

    def fill(self, row: Mapping[str, Any], task: str) -> tuple[str, str | None]:
        """Instruction and input of a row. Braces inside the row's texts are text, never placeholders."""
        instruction = self._fill(self.instruction, row, task)
        return instruction, None if self.input is None else self._fill(self.input, row, task)

    def serves(self, template_type: str) -> bool:
        """Whether the template may be drawn for this type."""
        return not self.types or template_type in self.types

    @property
    def placeholders(self) -> frozenset[str]:
        patterns = self.instruction if self.input is None else self.instruction + self.input
        return frozenset(name for _, name in patterns if name is not None)

    def _fill(self, pattern: Pattern, row: Mapping[str, Any], task: str) -> str:
        pieces = []
        for literal, name in pattern:
            pieces.append(literal)
            if name is None:
                continue
            if name not in row:
                raise TemplateError(
                    f"template {self.name} of task {task}: nothing fills {{{name}}}{near(name, row)}; "
                    f"the row has {', '.join(sorted(row))}"
                )
            pieces.append(str(row[name]))
        return "".join(pieces)


def parse_template(entry: str | Mapping[str, Any], name: str) -> Template:
    """A template from its entry in a data file; `name` is for errors, `set[index]`."""
    fields = {"instruction": entry} if isinstance(entry, str) else dict(entry)
    for key in fields:
        if key not in _KEYS:
            raise TemplateError(f"template {name}: unknown key {key}{near(key, _KEYS)}")
    if not isinstance(fields.get("instruction"), str) or not fields["instruction"].strip():
        raise TemplateError(f"template {name}: an instruction is needed")
    types = tuple(fields.get("types", ()))
    for template_type in types:
        if template_type not in TEMPLATE_TYPES:
            raise TemplateError(f"template {name}: unknown type {template_type}{near(template_type, TEMPLATE_TYPES)}")
    instruction = _parse_pattern(fields["instruction"], name)
    is_whole_prompt = any(field is not None for _, field in instruction)
    default_input = None if is_whole_prompt else "{input}"
    input_text = fields.get("input", default_input)
    return Template(name, instruction, None if input_text is None else _parse_pattern(input_text, name), types)


def load_templates(folder: Path = TEMPLATES_DIR) -> dict[str, tuple[Template, ...]]:
    """All template sets of a folder of TOML files, `set name -> templates`; every error at once."""
    sets: dict[str, tuple[Template, ...]] = {}
    errors: list[str] = []
    for path in sorted(folder.glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            errors.append(f"{path}: {error}")
            continue
        for set_name, entries in content.items():
            if set_name in sets:
                errors.append(f"{path}: template set {set_name} is defined twice")
                continue
            templates = []
            for index, entry in enumerate(entries):
                try:
                    templates.append(parse_template(entry, f"{set_name}[{index}]"))
                except TemplateError as error:
                    errors.append(f"{path}: {error}")
            sets[set_name] = tuple(templates)
    if errors:
        raise TemplateError("\n".join(errors))
    return sets


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for an unknown name, or nothing.

    >>> near("anwser", ["answer", "input"])
    '; did you mean answer?'
    """
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def choose(templates: Sequence[Template], template_type: str) -> list[Template]:
    """The templates that serve a type, in order."""
    return [template for template in templates if template.serves(template_type)]


def _parse_pattern(text: str, name: str) -> Pattern:
    """Cut `a {b} c` into (("a ", "b"), (" c", None)); `{{` and `}}` are literal braces."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise TemplateError(f"template {name}: {error} in {text!r}") from error
    for _, field, spec, conversion in pieces:
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise TemplateError(f"template {name}: {{{field}}} is not a plain field name in {text!r}")
    return tuple((literal, field) for literal, field, _, _ in pieces)
