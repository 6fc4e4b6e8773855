"""Rates, caps, exhaustion and refusals of mixtures (cases D4), and the mixtures that we ship."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from finetune.contamination import reason_to_refuse
from finetune.mixtures import MIXTURES_DIR, Member, MixtureError, MixtureSpec, effective_weights, load_mixture
from finetune.pipeline import TextStream
from finetune.task_rows import TaskRows
from finetune.tasks import Task, load_tasks
from finetune.templates import load_templates, parse_template

TEMPLATES = (parse_template("Do it.", "plain[0]"),)


def task(name: str, **settings: Any) -> Task:
    fields: dict[str, Any] = {"submixture": "muffin", "permissive": True, "reader": "jsonl", "path": f"{name}.jsonl"}
    fields |= settings
    return Task(name, licence="MIT", templates=TEMPLATES, **fields)


def rows(name: str, size: int) -> TaskRows:
    made = [{"input": f"{name} {i}", "key": f"{name} {i}", "output": "y", "options": ()} for i in range(size)]
    return TaskRows(task(name), seed=0, train=made)


def spec(sizes: dict[str, int], **settings: Any) -> MixtureSpec:
    cap, rates = settings.pop("cap", None), settings.pop("rates", {})
    members = tuple(Member(name, index, None, cap) for index, name in enumerate(sizes))
    groups = tuple(rates.get(name) for name in sizes)
    return MixtureSpec("m", members, groups, types={"zs_noopt": 1.0}, **settings)


def stream(sizes: dict[str, int], **settings: Any) -> TextStream:
    return TextStream(spec(sizes, **settings), {name: rows(name, size) for name, size in sizes.items()}, seed=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_thirty_thousand_draws_follow_the_formula(temperature: float) -> None:
    sizes = {"a": 10, "b": 1000, "c": 100_000}
    drawn = Counter(example.task for example in islice(stream(sizes, cap=3000, temperature=temperature), 30_000))
    shares = {name: min(size, 3000) ** (1 / temperature) for name, size in sizes.items()}
    for name, share in shares.items():
        assert abs(drawn[name] / 30_000 - share / sum(shares.values())) < 0.02


def test_rates_are_normalised_and_an_exhausted_task_repeats() -> None:
    running = stream({"a": 10, "b": 5000, "c": 5000}, rates={"a": 4, "b": 4, "c": 2})
    assert running.weights == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    drawn = Counter(example.inputs.split()[2] + example.inputs.split()[3] for example in islice(running, 10_000))
    counts = [drawn[f"a{i}"] for i in range(10)]
    assert max(counts) - min(counts) <= 1
    entry = next(entry for entry in running.manifest() if entry["task"] == "a")
    assert entry["epochs"] == pytest.approx(400, rel=0.05)
    assert abs(entry["count"] / 10_000 - 0.4) < 0.02


def test_exhaustion_drop_gives_every_row_once_and_ends() -> None:
    drawn = Counter(
        example.inputs for example in stream({"a": 10, "b": 300, "c": 3}, exhaustion="drop", rates={"a": 9})
    )
    assert len(drawn) == 313
    assert set(drawn.values()) == {1}


def test_exhaustion_stop_ends_at_the_first_used_up_task() -> None:
    running = stream({"a": 5, "b": 1000}, exhaustion="stop", rates={"a": 1, "b": 1})
    drawn = Counter(example.task for example in running)
    assert drawn["a"] == 5
    assert 0 < drawn["b"] < 100


def test_a_groups_share_is_divided_by_size() -> None:
    members = (Member("a", 0), Member("b", 0), Member("c", 1))
    weights = effective_weights(MixtureSpec("m", members, (3.0, 1.0)), {"a": 100, "b": 200, "c": 7})
    assert weights == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})


SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {},
    "benchmark": {"evaluation_only": True},
    "closed": {"permissive": False},
    "bbh": {"path": "eval/bbh/navigate.json"},
    "execute": {"path": "instruction_induction/raw/execute/sum.json"},
    "mmlu": {"reader": "natural_instructions", "path": "natural_instructions/tasks/task0690_x.json"},
    "ni_test": {"reader": "natural_instructions", "path": "natural_instructions/tasks/task648_answer_generation.json"},
}
TASKS = {name: task(name, **settings) for name, settings in SETTINGS.items()}


def load(tmp_path: Path, text: str, **others: str) -> MixtureSpec:
    for name, content in {"m": text, **others}.items():
        (tmp_path / f"{name}.toml").write_text(content)
    return load_mixture("m", TASKS, tmp_path)


def test_held_out_tasks_are_refused_all_at_once(tmp_path: Path) -> None:
    names = ("one", "benchmark", "bbh", "execute", "mmlu", "ni_test")
    with pytest.raises(MixtureError) as error:
        load(tmp_path, "".join(f'[[member]]\ntask = "{name}"\n' for name in names))
    message = str(error.value)
    assert message.count("is held out") == 5
    assert "task mmlu is held out: Natural Instructions 685-737 are MMLU questions" in message
    assert "official Natural Instructions test split" in message


def test_a_permissive_mixture_refuses_other_licences(tmp_path: Path) -> None:
    text = '[[member]]\ntask = "one"\n[[member]]\ntask = "closed"\n'
    assert len(load(tmp_path, text).members) == 2
    with pytest.raises(MixtureError, match="task closed is not permissively licensed"):
        load(tmp_path, "permissive_only = true\n" + text)


def test_every_mistake_at_once(tmp_path: Path) -> None:
    with pytest.raises(MixtureError) as error:
        load(
            tmp_path,
            'temprature = 1\nexhaustion = "repeats"\nnum_exemplars = [3, 2]\n[types]\nzs_op = 1\n'
            '[[member]]\ntask = "oen"\n[[member]]\ntask = "one"\nmixture = "m"\n[[member]]\nsubmixture = "muffn"\n'
            '[[member]]\ntask = "one"\nrate = 0\n[[member]]\ntask = "one"\nwieght = 2\n[[member]]\nmixture = "m"\n'
            '[[member]]\nsubmixture = "muffin"\nexclude = ["nine*"]\n',
        )
    message = str(error.value)
    for part in (
        "unknown key temprature; did you mean temperature?",
        "unknown exhaustion policy repeats; did you mean repeat?",
        "num_exemplars must be",
        "unknown type zs_op; did you mean zs_opt?",
        "unknown task oen; did you mean one?",
        "exactly one of task, mixture and submixture",
        "unknown submixture muffn; did you mean muffin?",
        "the rate must be a number above 0, not 0",
        "unknown key wieght",
        "mixture m contains itself (m > m)",
        "exclude nine* matches no task of muffin",
    ):
        assert part in message


def test_unknown_mixtures_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match="unknown mixture dmo; did you mean demo"):
        load_mixture("dmo", TASKS)
    with pytest.raises(MixtureError, match="no mixture file"):
        load_mixture(tmp_path / "none.toml", TASKS)


def test_a_mixture_inside_a_mixture_keeps_its_rates(tmp_path: Path) -> None:
    inner = '[[member]]\ntask = "one"\nrate = 3\n[[member]]\ntask = "two"\nrate = 1\n'
    outer = '[[member]]\nmixture = "inner"\nrate = 8\n[[member]]\ntask = "closed"\nrate = 2\n'
    chosen = load(tmp_path, outer, inner=inner)
    weights = effective_weights(chosen, {"one": 5, "two": 500, "closed": 9})
    assert weights == pytest.approx({"one": 0.6, "two": 0.2, "closed": 0.2})


def test_submixtures_with_exclusions_and_caps(tmp_path: Path) -> None:
    text = '[[member]]\nsubmixture = "muffin"\nrate = 1\ncap = 10\nexclude = ["b*", "e*", "mmlu", "ni_*"]\n'
    chosen = load(tmp_path, text)
    assert [member.task for member in chosen.members] == ["one", "two", "closed"]
    assert effective_weights(chosen, {"one": 10, "two": 99, "closed": 20})["two"] == pytest.approx(1 / 3)


def test_draws_depend_on_the_seed() -> None:
    first, second = stream({"a": 50, "b": 50}), stream({"a": 50, "b": 50})
    assert [next(first).inputs for _ in range(40)] == [next(second).inputs for _ in range(40)]
    other = TextStream(first.spec, first.rows, seed=1)
    assert [next(other).task for _ in range(40)] != [next(first).task for _ in range(40)]


def test_shipped_mixtures_load_and_hold_what_they_promise() -> None:
    tasks = load_tasks(load_templates())
    names = sorted(path.stem for path in MIXTURES_DIR.glob("*.toml"))
    assert names == ["demo", "demo_focus", "flan2022", "smoke"]
    specs = {name: load_mixture(name, tasks) for name in names}
    assert specs["demo"].permissive_only
    assert specs["demo_focus"].permissive_only
    assert {member.task for member in specs["demo_focus"].members} == {member.task for member in specs["demo"].members}
    sizes = dict.fromkeys(tasks, 100)
    by_submixture: Counter[str] = Counter()
    for name, weight in effective_weights(specs["flan2022"], sizes).items():
        by_submixture[tasks[name].submixture] += weight  # type: ignore[assignment]
    proportions = {name: round(100 * share, 1) for name, share in by_submixture.items()}
    assert proportions == {"muffin": 46.0, "t0": 27.9, "niv2": 24.2, "cot": 1.8}


def test_no_shipped_task_is_contaminated() -> None:
    tasks = load_tasks(load_templates())
    assert [name for name, shipped in tasks.items() if reason_to_refuse(shipped) is not None] == []
    capital = tasks["short_country_capital"]
    assert reason_to_refuse(replace(capital, path="natural_instructions/tasks/task666_mmmlu_x.json")) is not None
