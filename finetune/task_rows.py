"""The rows of one task in memory, split into train and held-out.

Order of work: read -> rename fields -> leave out what is too long -> split -> leave out train rows whose input is
also held out, and exact repeats. Everything left out is counted by reason in `left_out`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.exemplars import normalised
from finetune.generators import generate, is_held_out
from finetune.sources import READERS, ReadOptions, SourceError, find_files
from finetune.tasks import Task
from finetune.templates import WITH_OPTIONS, WITH_RATIONALE, near

Row = dict[str, Any]
_LEAST_WORDS_OF_A_LEAK = 5
_NUM_HELD_OUT_GENERATED = 500  # a generator has no end; so many held-out cases are offered for evaluation


@dataclass(slots=True)
class TaskRows:
    """Train and held-out rows of a task. A generator's train rows are made when they are drawn, never kept."""

    task: Task
    seed: int
    train: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    _order: list[int] = field(default_factory=list)
    _order_epoch: int = -1

    @property
    def num_train(self) -> int:
        """How many train rows there are; a generator's nominal size."""
        return len(self.train) if self.task.generator is None else self.task.nominal_size

    def train_row(self, position: int) -> Row:
        """The row at `position` of the endless train sequence: every epoch all rows, each epoch in its own order.

        It depends on the seed, the task and the position alone, so a resumed run needs nothing but the position.
        """
        if self.task.generator is not None:
            return self._generate(position, held_out=False)
        epoch, offset = divmod(position, len(self.train))
        if epoch != self._order_epoch:
            self._order = list(range(len(self.train)))
            random.Random(f"{self.seed}/{self.task.name}/{epoch}").shuffle(self._order)
            self._order_epoch = epoch
        return self.train[self._order[offset]]

    def random_train_row(self, rng: random.Random) -> Row:
        """Any train row, for exemplars."""
        if self.task.generator is not None:
            return self._generate(rng.randrange(2**40), held_out=False)
        return rng.choice(self.train)

    def can_have(self, template_type: str) -> bool:
        """Whether there are the options, the chains and a template that a template type needs."""
        if template_type in WITH_OPTIONS and not self.has_options:
            return False
        if template_type in WITH_RATIONALE and not self._probe().get("rationale"):
            return False
        return any(template.serves(template_type) for template in self.task.templates)

    @property
    def has_options(self) -> bool:
        return bool(self._probe().get("options"))

    def _probe(self) -> Row:
        return self._generate(0, held_out=False) if self.task.generator is not None else self.train[0]

    def _generate(self, index: int, *, held_out: bool) -> Row:
        task = self.task
        assert task.generator is not None
        stream = f"{self.seed}/{task.name}"
        return to_row(generate(task.generator, index, stream=stream, held_out=held_out, settings=task.settings), task)


def load_rows(task: Task, data_dirs: list[Path], *, seed: int, max_row_chars: int, max_target_chars: int) -> TaskRows:
    """Read and split a task's rows; raises SourceError naming the task where a file is missing or nothing is left."""
    rows = TaskRows(task, seed)
    if task.generator is not None:
        rows.held_out = list(_held_out_cases(rows))
        return rows
    limits = (max_row_chars, max_target_chars)
    try:
        everything = list(_read(task, str(task.path), data_dirs, limits, rows.left_out))
        if task.held_out_path is not None:
            train = everything
            rows.held_out = list(_read(task, task.held_out_path, data_dirs, limits, Counter()))
        else:
            sides: dict[bool, list[Row]] = {True: [], False: []}
            for row in everything:
                sides[is_held_out(row["key"], task.held_out_fraction)].append(row)
            train, rows.held_out = sides[False], sides[True]
    except SourceError as error:
        raise SourceError(f"task {task.name}: {error}") from error
    rows.train = list(_clean(train, rows.held_out, rows.left_out))
    if not rows.train:
        raise SourceError(f"task {task.name}: no train row is left ({dict(rows.left_out)}); raise max_row_chars?")
    return rows


def to_row(raw: Mapping[str, Any], task: Task) -> Row:
    """A source's row in our fields; the source's own fields stay for templates.

    Lists of texts become one text, comma-separated, except options and accepted answers.
    """
    row = dict(raw)
    for ours, theirs in task.fields.items():
        if theirs not in raw:
            raise SourceError(f"a row has no field {theirs}{near(theirs, raw)}; it has {', '.join(sorted(raw))}")
        row[ours] = raw[theirs]
    for name, value in row.items():
        if isinstance(value, list) and name not in ("options", "accepted", "positive"):
            row[name] = ", ".join(str(item) for item in value)
    for name in ("input", "output"):
        if name not in row:
            raise SourceError(f"a row has no {name}; map it with fields = {{{name} = ...}} to one of {sorted(raw)}")
        row[name] = str(row[name]).strip()
    if task.output_in_input_order:
        row["output"] = ", ".join(sorted(row["output"].split(", "), key=row["input"].split(", ").index))
    if task.label_names:
        row["output"] = task.label_names.get(row["output"], row["output"])
        row["options"] = [task.label_names.get(option, option) for option in row.get("options", ())]
    own_options = tuple(row.get("options") or ())
    row["options"] = task.options if task.options else own_options
    if "key" not in row:  # questions that differ in nothing but their choices are different questions
        row["key"] = "\n".join([row["input"], *own_options]) if row.get("show_options") else row["input"]
    return row


def _read(
    task: Task, pattern: str, data_dirs: list[Path], limits: tuple[int, int], left_out: Counter[str]
) -> Iterator[Row]:
    """Rows of every file that matches, within the length limits."""
    max_row_chars, max_target_chars = limits
    options = ReadOptions(**task.settings, skipped=left_out)
    reader = READERS[str(task.reader)]
    for path in find_files(pattern, data_dirs):
        for raw in reader(path, options):
            row = to_row(raw, task)
            target_chars = max(len(row["output"]), len(row.get("rationale") or ""))
            if len(row["input"]) > max_row_chars or target_chars > max_target_chars:
                left_out["too long"] += 1
            elif not row["input"] or not row["output"]:
                left_out["empty"] += 1
            else:
                yield row


def drop_leaks(all_rows: Iterable[TaskRows]) -> None:
    """Leave out train rows of any task that are a held-out case of another one.

    (723 ECQA training questions are in the CommonsenseQA dev file; two antonym tasks share words.) A text of five
    words and more is compared alone, a shorter one with its output: single words are inputs of many tasks, with
    different answers.
    """
    tasks = list(all_rows)
    owners: dict[tuple[str, str], set[str]] = {}
    for task_rows in tasks:
        for row in task_rows.held_out:
            owners.setdefault(_case(row), set()).add(task_rows.task.name)
    for task_rows in tasks:
        own = {task_rows.task.name}
        kept = [row for row in task_rows.train if owners.get(_case(row), own) <= own]
        if len(kept) < len(task_rows.train):
            task_rows.left_out["held out elsewhere"] += len(task_rows.train) - len(kept)
            task_rows.train = kept


def _case(row: Row) -> tuple[str, str]:
    """What two rows of different tasks are the same case by."""
    text = normalised(row["input"])
    return text, "" if text.count(" ") >= _LEAST_WORDS_OF_A_LEAK - 1 else normalised(row["output"])


def _clean(train: list[Row], held_out: list[Row], left_out: Counter[str]) -> Iterator[Row]:
    """Train rows without those that are held out, and without exact repeats."""
    held_out_keys = {normalised(row["key"]) for row in held_out}
    seen: set[tuple[str, str]] = set()
    for row in train:
        key = normalised(row["key"])
        if key in held_out_keys:
            left_out["held out"] += 1
        elif (key, row["output"]) in seen:
            left_out["repeat"] += 1
        else:
            seen.add((key, row["output"]))
            yield row


def _held_out_cases(rows: TaskRows) -> Iterator[Row]:
    """Different held-out cases of a generator; a small domain may have fewer than the usual number."""
    seen: set[str] = set()
    for index in range(_NUM_HELD_OUT_GENERATED):
        row = rows._generate(index, held_out=True)
        if row["key"] not in seen:
            seen.add(row["key"])
            yield row
