"""The text half of training: mixture draw -> row -> template -> exemplars -> rendered example.

Every choice of draw number n comes from a generator seeded with (seed, n), and every row from (seed, task, how often
the task was drawn), so the state of a stream is a handful of counts, and a resumed stream goes on with exactly the
examples it would have given.

    stream = build_text_stream("demo", [Path("../shared/data")], seed=0)
    example = next(stream)                     # TextExample(inputs=..., targets=..., task=..., template_type=...)
    state = stream.state_dict()                # JSON-able
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.example import TextExample
from finetune.exemplars import draw_exemplars, fit, to_exemplar, with_own_options
from finetune.heldout import HeldoutExample
from finetune.mixtures import MixtureSpec, effective_weights, load_mixture
from finetune.task_rows import TaskRows, drop_leaks, load_rows
from finetune.tasks import Task, load_tasks
from finetune.templates import (
    TEMPLATE_TYPES,
    WITH_EXEMPLARS,
    WITH_OPTIONS,
    WITH_RATIONALE,
    TemplateError,
    choose,
    load_templates,
    near,
)
from serve.prompts import render, render_target
from serve.request import Exemplar, Mode

__all__ = ["SMOKE_DATA_DIR", "HeldoutExample", "Instance", "TextStream", "build_text_stream"]

SMOKE_DATA_DIR = Path(__file__).parent / "data" / "smoke"
_COT_OPTIONS_RATE = 0.25
_WITHOUT_EXEMPLARS = {"fs_opt": "zs_opt", "fs_noopt": "zs_noopt", "fs_cot": "cot"}


@dataclass(frozen=True, slots=True)
class Instance:
    """A row dressed as request fields: what a client would send, and what should come back."""

    task: str
    template_type: str
    mode: Mode
    instruction: str
    input: str | None
    options: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    output: str
    rationale: str | None

    def render(self) -> TextExample:
        """Through serve.prompts, so that the model is trained on the bytes it will be served."""
        inputs = render(self.mode, self.instruction, self.input, self.options, self.exemplars)
        return TextExample(inputs, render_target(self.mode, self.output, self.rationale), self.task, self.template_type)


class TextStream:
    """An endless iterator of TextExample over a mixture; its state is small and JSON-able."""

    def __init__(self, spec: MixtureSpec, rows: Mapping[str, TaskRows], *, seed: int) -> None:
        self.spec = spec
        self.rows = dict(rows)
        self.seed = seed
        self.weights = effective_weights(spec, {name: task_rows.num_train for name, task_rows in rows.items()})
        self._names = list(self.weights)
        self._cumulative = list(accumulate(self.weights.values()))
        self._types = {name: _type_weights(spec, name, rows[name]) for name in self._names}
        self._own_options = {name: not rows[name].task.options and rows[name].has_options for name in self._names}
        self._num_draws = 0
        self._counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[TextExample]:
        return self

    def __next__(self) -> TextExample:
        return self.next_instance()[1].render()

    def next_instance(self) -> tuple[dict[str, Any], Instance]:
        """The next draw before rendering, with its row; `inspect` shows the stages."""
        rng = random.Random(f"{self.seed}/{self._num_draws}")
        name = self._draw_task(rng)
        row = self.rows[name].train_row(self._counts[name])
        self._num_draws += 1
        self._counts[name] += 1
        types, cumulative = self._types[name]
        template_type = types[bisect_right(cumulative, rng.random() * cumulative[-1])]
        return row, self._instance(self.rows[name], row, template_type, rng)

    def heldout_examples(
        self, task: str, limit: int | None = None, *, template_type: str | None = None
    ) -> list[HeldoutExample]:
        """The first `limit` held-out cases of a task, always the same, in types drawn as in training or in one type.

        Exemplars come from the train rows. Empty where the task has no held-out rows.
        """
        if task not in self.rows:
            raise KeyError(f"the mixture {self.spec.name} has no task {task}; it has {', '.join(self.rows)}")
        task_rows = self.rows[task]
        if template_type is not None:
            _check_type(task_rows, template_type)
        order = list(range(len(task_rows.held_out)))
        random.Random(f"{self.seed}/{task}/held out").shuffle(order)
        types, cumulative = self._types[task]
        examples = []
        for index in order[:limit]:
            rng = random.Random(f"{self.seed}/{task}/held out/{index}")
            drawn = types[bisect_right(cumulative, rng.random() * cumulative[-1])]
            row = task_rows.held_out[index]
            instance = self._instance(task_rows, row, drawn if template_type is None else template_type, rng)
            examples.append(_to_heldout(instance, row, task_rows.task))
        return examples

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs to go on with the next example: the mixture, the seed, and counts."""
        own = {"mixture": self.spec.name, "seed": self.seed}
        return own | {"num_draws": self._num_draws, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; raises ValueError where mixture, seed or tasks are not the same."""
        for name, own in (("mixture", self.spec.name), ("seed", self.seed)):
            if state[name] != own:
                raise ValueError(f"the state is of {name} {state[name]!r}, the stream has {own!r}")
        unknown = sorted(set(state["counts"]) - set(self.rows))
        if unknown:
            raise ValueError(f"the state counts tasks that the mixture {self.spec.name} lacks: {', '.join(unknown)}")
        self._num_draws = state["num_draws"]
        self._counts = Counter(state["counts"])

    def manifest(self) -> list[dict[str, Any]]:
        """For flan.json: per task its submixture, licence, effective weight, sizes, realised count and epochs.

        A generated task has no end: `num_train` is the nominal size that its rate may follow, `epochs` is None.
        """
        return [
            {
                "task": name,
                "submixture": self.rows[name].task.submixture,
                "licence": self.rows[name].task.licence,
                "permissive": self.rows[name].task.permissive,
                "weight": round(self.weights[name], 6),
                "num_train": self.rows[name].num_train,
                "num_held_out": len(self.rows[name].held_out),
                "count": self._counts[name],
                "epochs": None
                if self.rows[name].task.generator is not None
                else round(self._counts[name] / self.rows[name].num_train, 3),
            }
            for name in self._names
        ]

    def _draw_task(self, rng: random.Random) -> str:
        """A task by weight; raises StopIteration where the exhaustion policy ends the stream."""
        if self.spec.exhaustion == "drop":
            left = [name for name in self._names if self._counts[name] < self.rows[name].num_train]
            if not left:
                raise StopIteration
            return rng.choices(left, [self.weights[name] for name in left])[0]
        index = bisect_right(self._cumulative, rng.random() * self._cumulative[-1])
        name = self._names[index]
        if self.spec.exhaustion == "stop" and self._counts[name] >= self.rows[name].num_train:
            raise StopIteration
        return name

    def _instance(self, rows: TaskRows, row: Mapping[str, Any], template_type: str, rng: random.Random) -> Instance:
        """A row dressed in a template of this type; without exemplars that fit, a few-shot type becomes zero-shot."""
        task = rows.task
        template = rng.choice(choose(task.templates, template_type))
        instruction, input_text = template.fill(row, task.name)
        options = _draw_options(row, task.num_options, rng) if _shows_options(row, template_type, rng) else ()
        exemplars: list[Exemplar] = []
        if template_type in WITH_EXEMPLARS:
            drawn = draw_exemplars(rows.random_train_row, row, rng.randint(*self.spec.num_exemplars), rng)
            exemplars = [to_exemplar(other, template, instruction, task.name) for other in drawn]
            if options and self._own_options[task.name]:
                pairs = zip(exemplars, drawn, strict=True)
                exemplars = [with_own_options(exemplar, other["options"]) for exemplar, other in pairs]
            mode = _mode(template_type)

            def length(some: Sequence[Exemplar]) -> int:
                return len(render(mode, instruction, input_text, options, some))

            exemplars = fit(exemplars, length, self.spec.max_input_chars)
            if not exemplars:
                template_type = _WITHOUT_EXEMPLARS[template_type]
        return Instance(
            task.name,
            template_type,
            _mode(template_type),
            instruction,
            input_text,
            options,
            tuple(exemplars),
            row["output"],
            row["rationale"] if template_type in WITH_RATIONALE else None,
        )


def build_text_stream(mixture: str | Path, data_dirs: Sequence[Path], *, seed: int) -> TextStream:
    """The stream of a mixture over data folders; without a folder the small data that the repository ships.

    Raises TemplateError, TaskError, MixtureError or SourceError before the first example.
    """
    tasks = load_tasks(load_templates())
    spec = load_mixture(mixture, tasks)
    folders = [Path(folder) for folder in data_dirs] if data_dirs else [SMOKE_DATA_DIR]
    rows = {
        name: load_rows(
            tasks[name],
            folders,
            seed=seed,
            max_row_chars=spec.max_row_chars,
            max_target_chars=spec.max_target_chars,
        )
        for name in dict.fromkeys(member.task for member in spec.members)
    }
    drop_leaks(rows.values())
    return TextStream(spec, rows, seed=seed)


def _mode(template_type: str) -> Mode:
    """
    >>> [_mode(name).value for name in ("zs_opt", "fs_noopt", "fs_cot")]
    ['instruction', 'few_shot', 'cot']
    """
    if template_type in WITH_RATIONALE:
        return Mode.COT
    return Mode.FEW_SHOT if template_type in WITH_EXEMPLARS else Mode.INSTRUCTION


def _check_type(rows: TaskRows, template_type: str) -> None:
    """Refuse a type that the task's rows cannot have; that it is never trained on is no reason to refuse."""
    if template_type not in TEMPLATE_TYPES:
        raise ValueError(f"unknown template type {template_type}{near(template_type, TEMPLATE_TYPES)}")
    if not rows.can_have(template_type):
        raise ValueError(f"task {rows.task.name} cannot have the type {template_type}: no options, chains or templates")


def _type_weights(spec: MixtureSpec, name: str, rows: TaskRows) -> tuple[list[str], list[float]]:
    """The template types a task is trained in, with cumulated weights."""
    wished = next((member.types for member in spec.members if member.task == name and member.types), spec.types)
    allowed = rows.task.types if rows.task.types else TEMPLATE_TYPES
    possible = {
        template_type: weight
        for template_type, weight in wished.items()
        if weight > 0 and template_type in allowed and rows.can_have(template_type)
    }
    if not possible:
        raise TemplateError(f"mixture {spec.name}: task {name} can have none of the types {', '.join(wished)}")
    return list(possible), list(accumulate(possible.values()))


def _shows_options(row: Mapping[str, Any], template_type: str, rng: random.Random) -> bool:
    """Chain-of-thought inputs show choices where the question makes no sense without them, else now and then."""
    if template_type in WITH_RATIONALE:
        return bool(row.get("show_options")) or rng.random() < _COT_OPTIONS_RATE
    return template_type in WITH_OPTIONS


def _draw_options(row: Mapping[str, Any], num_options: int | None, rng: random.Random) -> tuple[str, ...]:
    """The row's options in their order, or `num_options` of them: the right one and others, shuffled."""
    options: tuple[str, ...] = row["options"]
    if num_options is None or len(options) <= num_options:
        return options
    others = rng.sample([option for option in options if option != row["output"]], num_options - 1)
    drawn = [row["output"], *others]
    rng.shuffle(drawn)
    return tuple(drawn)


def _to_heldout(instance: Instance, row: Mapping[str, Any], task: Task) -> HeldoutExample:
    accepted = tuple(dict.fromkeys([instance.output, *(str(text).strip() for text in row.get("accepted", ()))]))
    return HeldoutExample(
        task=instance.task,
        template_type=instance.template_type,
        mode=instance.mode.value,
        instruction=instance.instruction,
        input=instance.input,
        options=instance.options,
        exemplars=instance.exemplars,
        output=instance.output,
        accepted=accepted,
        rationale=row.get("rationale"),
        metric=task.metric,
    )
