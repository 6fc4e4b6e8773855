"""Tasks as data: where rows come from, which field is what, in which words, under which licence.

A task is an entry `[[task]]` of a TOML file in finetune/data/tasks:

    name        unique; exemplars, counts and scores go by it
    submixture  muffin, t0, cot, niv2 or generated: the paper's grouping, for proportions
    source      {reader, path, ...reader settings} or {generator, ...its settings, size}
    num_options  where options are shown: the right one and random others, so many in all (default: every one)
    fields      our field -> the source's field, where names differ: {output = "effect"}
    output_order "input": a comma-separated output is put into the order in which its items stand in the input
    templates   names of template sets; options  a closed list for every row; label_names  raw label -> word
    held_out    {path = ...} a file of its own, {fraction = 0.1} by hash of the row's key, or nothing
    types       template types the task may take; derived from options and rationales when absent
    licence, permissive, metric
    evaluation_only  true: the whole task is for evaluation; a mixture that names it is refused

The loader reports every error of every file at once, each with the file, the task and the nearest known name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.generators import GENERATORS
from finetune.sources import READERS
from finetune.templates import TEMPLATE_TYPES, Template, near

TASKS_DIR = Path(__file__).parent / "data" / "tasks"
SUBMIXTURES = ("muffin", "t0", "cot", "niv2", "generated")
METRICS = ("exact_match", "any_exact_match", "set_match", "rouge_l", "numeric_match")
READER_SETTINGS = frozenset({"skip_damaged", "unescape", "strip_prefix", "body_only", "header"})
_REQUIRED_KEYS = ("name", "submixture", "source", "templates", "licence", "permissive")
_OPTIONAL_KEYS = (
    "fields",
    "options",
    "num_options",
    "output_order",
    "label_names",
    "held_out",
    "types",
    "metric",
    "evaluation_only",
)
_KEYS = (*_REQUIRED_KEYS, *_OPTIONAL_KEYS)


class TaskError(ValueError):
    """Task files that cannot be used; the message lists every mistake."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task as its file says it. Exactly one of `reader` and `generator` is set."""

    name: str
    submixture: str
    licence: str
    permissive: bool
    templates: tuple[Template, ...]
    reader: str | None = None
    path: str | None = None
    generator: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    num_options: int | None = None
    label_names: Mapping[str, str] = field(default_factory=dict)
    output_in_input_order: bool = False
    held_out_path: str | None = None
    held_out_fraction: float = 0.0
    types: tuple[str, ...] = ()
    metric: str = "exact_match"
    evaluation_only: bool = False

    @property
    def has_held_out(self) -> bool:
        """Whether some rows are kept from training: a generator always splits its cases."""
        return self.generator is not None or self.held_out_path is not None or self.held_out_fraction > 0

    @property
    def nominal_size(self) -> int:
        """How many examples a generator counts as when rates follow sizes."""
        return int(self.settings.get("size", 10_000))


def load_tasks(template_sets: Mapping[str, tuple[Template, ...]], folder: Path = TASKS_DIR) -> dict[str, Task]:
    """Every task of a folder of TOML files, by name; raises one TaskError with all mistakes."""
    tasks: dict[str, Task] = {}
    errors: list[str] = []
    for path in sorted(folder.glob("*.toml")):
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8")).get("task", [])
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            errors.append(f"{path}: {error}")
            continue
        for index, entry in enumerate(entries):
            name = str(entry.get("name", f"number {index + 1}"))
            found = _check(entry, template_sets)
            if name in tasks:
                found.append("the name is taken by another task")
            if found:
                errors.extend(f"{path.name}: task {name}: {error}" for error in found)
            else:
                tasks[name] = _build(entry, template_sets)
    if errors:
        raise TaskError("\n".join(errors))
    return tasks


def _check(entry: Mapping[str, Any], template_sets: Mapping[str, tuple[Template, ...]]) -> list[str]:
    """Every mistake of one entry."""
    errors = [f"unknown key {key}{near(key, _KEYS)}" for key in sorted(set(entry) - set(_KEYS))]
    errors += [f"{key} is missing" for key in _REQUIRED_KEYS if key not in entry]
    if entry.get("submixture", "cot") not in SUBMIXTURES:
        errors.append(f"unknown submixture {entry['submixture']}{near(entry['submixture'], SUBMIXTURES)}")
    if entry.get("metric", "exact_match") not in METRICS:
        errors.append(f"unknown metric {entry['metric']}{near(entry['metric'], METRICS)}")
    for template_set in entry.get("templates", ()):
        if template_set not in template_sets:
            errors.append(f"unknown template set {template_set}{near(template_set, template_sets)}")
    for template_type in entry.get("types", ()):
        if template_type not in TEMPLATE_TYPES:
            errors.append(f"unknown template type {template_type}{near(template_type, TEMPLATE_TYPES)}")
    if entry.get("output_order", "input") != "input":
        errors.append(f"unknown output_order {entry['output_order']}; there is only input")
    if not isinstance(entry.get("permissive", True), bool):
        errors.append("permissive must be true or false")
    return errors + _check_source(entry.get("source", {})) + _check_held_out(entry)


def _check_source(source: Mapping[str, Any]) -> list[str]:
    if ("reader" in source) == ("generator" in source):
        return ["the source needs a reader or a generator, and not both"]
    if "generator" in source:
        name = source["generator"]
        return [] if name in GENERATORS else [f"unknown generator {name}{near(name, GENERATORS)}"]
    errors = []
    if source["reader"] not in READERS:
        errors.append(f"unknown reader {source['reader']}{near(source['reader'], READERS)}")
    if "path" not in source:
        errors.append("the source needs a path")
    unknown = sorted(set(source) - READER_SETTINGS - {"reader", "path"})
    return errors + [f"unknown reader setting {key}{near(key, READER_SETTINGS)}" for key in unknown]


def _check_held_out(entry: Mapping[str, Any]) -> list[str]:
    held_out = entry.get("held_out")
    if held_out is None:
        return []
    if "generator" in entry.get("source", {}):
        return ["a generator splits its cases itself; held_out is for files"]
    if set(held_out) not in ({"path"}, {"fraction"}):
        return ["held_out needs either a path or a fraction"]
    if "fraction" in held_out and not 0 < held_out["fraction"] < 1:
        return [f"the held-out fraction must be between 0 and 1, not {held_out['fraction']}"]
    return []


def _build(entry: Mapping[str, Any], template_sets: Mapping[str, tuple[Template, ...]]) -> Task:
    source = dict(entry["source"])
    held_out = entry.get("held_out", {})
    return Task(
        name=entry["name"],
        submixture=entry["submixture"],
        licence=entry["licence"],
        permissive=entry["permissive"],
        templates=tuple(template for name in entry["templates"] for template in template_sets[name]),
        reader=source.pop("reader", None),
        path=source.pop("path", None),
        generator=source.pop("generator", None),
        settings=source,
        fields=dict(entry.get("fields", {})),
        options=tuple(entry.get("options", ())),
        num_options=entry.get("num_options"),
        label_names=dict(entry.get("label_names", {})),
        output_in_input_order=entry.get("output_order") == "input",
        held_out_path=held_out.get("path"),
        held_out_fraction=float(held_out.get("fraction", 0.0)),
        types=tuple(entry.get("types", ())),
        metric=entry.get("metric", "exact_match"),
        evaluation_only=entry.get("evaluation_only", False),
    )
