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

from finetune.exemplars import draw_exemplars, fit, to_exemplar
from finetune.example import TextExample
from finetune.mixtures import MixtureSpec, effective_weights, load_mixture
from finetune.task_rows import TaskRows, drop_leaks, load_rows
from finetune.tasks import Task, load_tasks
from finetune.templates import WITH_EXEMPLARS, WITH_OPTIONS, WITH_RATIONALE, Template, TemplateError, choose, load_templates
from serve.prompts import render, render_target
from serve.request import Exemplar, Mode

SMOKE_DATA_DIR = Path(__file__).parent / "data" / "smoke"
_COT_OPTIONS_RATE = 0.25
_TRIES_PER_DRAW = 1000  # with exhaustion "drop" most draws may hit tasks that are used up


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


@dataclass(frozen=True, slots=True)
class HeldoutExample:
    """A held-out case for evaluation: the native request fields, the expected output and how to score it.

    `accepted` holds every right answer, `output` first.
    """

    task: str
    template_type: str
    mode: str
    instruction: str
    input: str | None
    options: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    output: str
    accepted: tuple[str, ...]
    rationale: str | None
    metric: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object, one line of an evaluation file."""
        exemplars = [
            {"input": exemplar.input, "output": exemplar.output, "rationale": exemplar.rationale}
            for exemplar in self.exemplars
        ]
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"options": list(self.options), "accepted": list(self.accepted), "exemplars": exemplars}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> HeldoutExample:
        """The inverse of `to_json`."""
        exemplars = tuple(Exemplar(**exemplar) for exemplar in fields["exemplars"])
        lists = {"options": tuple(fields["options"]), "accepted": tuple(fields["accepted"]), "exemplars": exemplars}
        return cls(**{**fields, **lists})


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
        return {"mixture": self.spec.name, "seed": self.seed, "num_draws": self._num_draws, "counts": dict(self._counts)}

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
        """For flan.json: per task its submixture, licence, effective weight, sizes, realised count and epochs."""
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
                "epochs": round(self._counts[name] / self.rows[name].num_train, 3),
            }
            for name in self._names
        ]

    def _draw_task(self, rng: random.Random) -> str:
        for _ in range(_TRIES_PER_DRAW):
            index = bisect_right(self._cumulative, rng.random() * self._cumulative[-1])
            name = self._names[min(index, len(self._names) - 1)]
            is_used_up = self._counts[name] >= self.rows[name].num_train
            if not is_used_up or self.spec.exhaustion == "repeat":
                return name
            if self.spec.exhaustion == "stop":
                raise StopIteration
        raise StopIteration  # every task is used up

    def _instance(self, rows: TaskRows, row: Mapping[str, Any], template_type: str, rng: random.Random) -> Instance:
        task = rows.task
        templates = choose(task.templates, template_type)
        if not templates:
            raise TemplateError(f"task {task.name} has no template for the type {template_type}")
        template = rng.choice(templates)
        instruction, input_text = template.fill(row, task.name)
        options = _draw_options(row, task.num_options, rng) if _shows_options(row, template_type, rng) else ()
        exemplars: list[Exemplar] = []
        if template_type in WITH_EXEMPLARS:
            own_options = bool(options) and self._own_options[task.name]
            count = rng.randint(*self.spec.num_exemplars)
            drawn = draw_exemplars(rows.random_train_row, row, count, rng)
            exemplars = [to_exemplar(other, template, task.name, own_options=own_options) for other in drawn]
            mode = Mode.COT if template_type in WITH_RATIONALE else Mode.FEW_SHOT

            def length(some: Sequence[Exemplar]) -> int:
                return len(render(mode, instruction, input_text, options, some))

            exemplars = fit(exemplars, length, self.spec.max_input_chars)
        if template_type in WITH_RATIONALE:
            mode = Mode.COT
            template_type = "fs_cot" if exemplars else "cot"
        elif exemplars:
            mode = Mode.FEW_SHOT
        else:
            mode = Mode.INSTRUCTION
            template_type = template_type.replace("fs_", "zs_")
        rationale = row.get("rationale") if mode is Mode.COT else None
        return Instance(
            task.name, template_type, mode, instruction, input_text, options, tuple(exemplars), row["output"], rationale
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


def _type_weights(spec: MixtureSpec, name: str, rows: TaskRows) -> tuple[list[str], list[float]]:
    """The template types a task can have, with cumulated weights."""
    wished = next((member.types for member in spec.members if member.task == name and member.types), spec.types)
    possible = {
        template_type: weight
        for template_type, weight in wished.items()
        if weight > 0
        and (not rows.task.types or template_type in rows.task.types)
        and (template_type not in WITH_OPTIONS or rows.has_options)
        and (template_type not in WITH_RATIONALE or rows.has_rationales)
        and choose(rows.task.templates, template_type)
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
