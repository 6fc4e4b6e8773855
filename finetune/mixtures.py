"""Mixtures: which task comes next, and how often.

A mixture file has members; each is a task, another mixture, or a whole submixture:

    [[member]]
    task = "sentiment"        rate = 3.0
    [[member]]
    submixture = "niv2"       rate = 24.2    cap = 5000    exclude = ["ni_task278*"]

Rates of one file are normalised to 1; a group's share is divided among its tasks. A task without a rate counts by its
size: min(number of train rows, cap) ^ (1 / temperature), the cap before the temperature.

When a task has given all its train rows (`exhaustion`): "repeat" (default) shuffles them anew and goes on, and the
counts tell the epochs; "drop" leaves the task out from then on; "stop" ends the stream.

Refused, all at once: unknown names, held-out (evaluation) tasks, and, where `permissive_only` is set, tasks whose
licence is not permissive.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from finetune.contamination import reason_to_refuse
from finetune.tasks import SUBMIXTURES, Task
from finetune.templates import TEMPLATE_TYPES, near

MIXTURES_DIR = Path(__file__).parent / "data" / "mixtures"
EXHAUSTION_POLICIES = ("repeat", "drop", "stop")
_PLAIN_KEYS = (
    "description",
    "temperature",
    "exhaustion",
    "max_row_chars",
    "max_input_chars",
    "max_target_chars",
    "types",
)
_KEYS = {*_PLAIN_KEYS, "permissive_only", "cap", "num_exemplars", "member"}
_MEMBER_KEYS = {"task", "mixture", "submixture", "rate", "cap", "exclude", "types"}


class MixtureError(ValueError):
    """A mixture file that cannot be used; the message lists every mistake."""


@dataclass(frozen=True, slots=True)
class Member:
    """A task's place in a mixture. `share`: of the mixture; sized members of one group share it by their sizes."""

    task: str
    group: int
    rate: float | None = None
    cap: int | None = None
    types: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class MixtureSpec:
    """A mixture as its file says it, with groups resolved to tasks.

    num_exemplars     (least, most) exemplars of a few-shot input
    max_row_chars     rows with a longer input are left out
    max_input_chars   few-shot inputs drop exemplars from the front until they fit
    types             weight of each template type, among those a task can have
    groups            for each group its rate, or None: the group counts by the summed sizes of its tasks
    """

    name: str
    members: tuple[Member, ...]
    groups: tuple[float | None, ...]
    description: str = ""
    permissive_only: bool = False
    temperature: float = 1.0
    exhaustion: str = "repeat"
    num_exemplars: tuple[int, int] = (2, 3)
    max_row_chars: int = 8000
    max_input_chars: int = 8000
    max_target_chars: int = 4000
    types: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TEMPLATE_TYPES, 1.0))


def load_mixture(name: str | Path, tasks: Mapping[str, Task], folder: Path = MIXTURES_DIR) -> MixtureSpec:
    """A mixture by name (finetune/data/mixtures/<name>.toml) or by path."""
    path = find_mixture(name, folder)
    content = _read_toml(path)
    resolver = _Resolver(tasks, folder, _check_settings(content))
    members, groups = resolver.resolve(content, (path.stem,))
    errors = resolver.errors
    permissive_only = bool(content.get("permissive_only", False))
    for member in members:
        task = tasks[member.task]
        refusal = reason_to_refuse(task)
        if refusal is not None:
            errors.append(f"task {task.name} is held out: {refusal}")
        if permissive_only and not task.permissive:
            errors.append(f"task {task.name} is not permissively licensed ({task.licence}), the mixture is")
    if not members and not errors:
        errors.append("no member")
    if errors:
        raise MixtureError("\n".join(f"mixture {path.stem}: {error}" for error in errors))
    least, most = content.get("num_exemplars", (2, 3))
    return MixtureSpec(
        path.stem,
        tuple(members),
        tuple(groups),
        permissive_only=permissive_only,
        num_exemplars=(least, most),
        **{key: content[key] for key in _PLAIN_KEYS if key in content},
    )


def find_mixture(name: str | Path, folder: Path = MIXTURES_DIR) -> Path:
    """The file of a mixture: a path that exists, or a name of a shipped mixture."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise MixtureError(f"no mixture file {path}")
        return path
    known = sorted(file.stem for file in folder.glob("*.toml"))
    if str(name) not in known:
        raise MixtureError(f"unknown mixture {name}{near(str(name), known)}; shipped: {', '.join(known)}")
    return folder / f"{name}.toml"


def effective_weights(spec: MixtureSpec, sizes: Mapping[str, int]) -> dict[str, float]:
    """The share of each task, summing to 1.

    >>> members = tuple(Member(name, group=index, cap=3000) for index, name in enumerate("abc"))
    >>> spec = MixtureSpec("m", members, (None, None, None), temperature=2.0)
    >>> {task: round(share, 3) for task, share in effective_weights(spec, {"a": 10, "b": 1000, "c": 100_000}).items()}
    {'a': 0.035, 'b': 0.353, 'c': 0.612}
    """
    weights: dict[str, float] = {}
    for group, group_rate in enumerate(spec.groups):
        inside: dict[str, float] = {}
        for member in spec.members:
            if member.group == group:
                size = sizes[member.task] if member.cap is None else min(sizes[member.task], member.cap)
                inside[member.task] = size ** (1 / spec.temperature) if member.rate is None else member.rate
        total = sum(inside.values())
        share = total if group_rate is None else group_rate
        for task, weight in inside.items():
            weights[task] = weights.get(task, 0.0) + share * weight / total
    everything = sum(weights.values())
    return {task: weight / everything for task, weight in weights.items()}


@dataclass(slots=True)
class _Opened:
    """A task found behind a member, with its rate inside the group where the group's file gave one."""

    task: str
    rate: float | None = None
    types: Mapping[str, float] | None = None


@dataclass(slots=True)
class _Resolver:
    """Opens members up into tasks, collecting mistakes."""

    tasks: Mapping[str, Task]
    folder: Path
    errors: list[str]

    def resolve(self, content: Mapping[str, Any], chain: tuple[str, ...]) -> tuple[list[Member], list[float | None]]:
        """Members and the rate of each group; a single task is a group of one. `chain`: the mixtures being opened."""
        members: list[Member] = []
        groups: list[float | None] = []
        for number, entry in enumerate(content.get("member", ()), start=1):
            where = f"member {number} of {chain[-1]}"
            unknown = sorted(set(entry) - _MEMBER_KEYS)
            self.errors += [f"{where}: unknown key {key}{near(key, _MEMBER_KEYS)}" for key in unknown]
            kinds = [kind for kind in ("task", "mixture", "submixture") if kind in entry]
            if len(kinds) != 1:
                self.errors.append(f"{where}: exactly one of task, mixture and submixture is needed")
                continue
            rate = entry.get("rate")
            if rate is not None and not _is_above_zero(rate):
                self.errors.append(f"{where}: the rate must be a number above 0, not {rate!r}")
                continue
            self.errors += _check_types(entry.get("types"), where)
            opened = self._open(kinds[0], entry, chain)
            cap = entry.get("cap", content.get("cap"))
            members += [
                Member(found.task, len(groups), found.rate, cap, entry.get("types", found.types)) for found in opened
            ]
            if opened:
                groups.append(rate)
        return members, groups

    def _open(self, kind: str, entry: Mapping[str, Any], chain: tuple[str, ...]) -> list[_Opened]:
        """The tasks behind one member, without the excluded ones."""
        name = str(entry[kind])
        excluded: Sequence[str] = entry.get("exclude", ())
        if kind == "mixture":
            opened = self._open_mixture(name, chain)
        elif kind == "submixture":
            if name not in SUBMIXTURES:
                self.errors.append(f"unknown submixture {name}{near(name, SUBMIXTURES)}")
            opened = [_Opened(task.name) for task in self.tasks.values() if task.submixture == name]
        else:
            if name not in self.tasks:
                self.errors.append(f"unknown task {name}{near(name, self.tasks)}")
                return []
            opened = [_Opened(name)]
        for pattern in excluded:
            if not any(fnmatchcase(found.task, pattern) for found in opened):
                self.errors.append(f"exclude {pattern} matches no task of {name}")
        return [found for found in opened if not any(fnmatchcase(found.task, pattern) for pattern in excluded)]

    def _open_mixture(self, name: str, chain: tuple[str, ...]) -> list[_Opened]:
        """A mixture inside a mixture. Its group rates become task rates, if all its groups have one."""
        if name in chain:
            self.errors.append(f"mixture {name} contains itself ({' > '.join([*chain, name])})")
            return []
        try:
            content = _read_toml(find_mixture(name, self.folder))
        except MixtureError as error:
            self.errors.append(str(error))
            return []
        members, groups = self.resolve(content, (*chain, name))
        sizes = Counter(member.group for member in members)
        rates = [rate for rate in groups if rate is not None]
        if len(rates) < len(groups):
            return [_Opened(member.task, member.rate, member.types) for member in members]
        return [_Opened(member.task, rates[member.group] / sizes[member.group], member.types) for member in members]


def _check_settings(content: Mapping[str, Any]) -> list[str]:
    errors = [f"unknown key {key}{near(key, _KEYS)}" for key in sorted(set(content) - _KEYS)]
    exhaustion = content.get("exhaustion", "repeat")
    if exhaustion not in EXHAUSTION_POLICIES:
        errors.append(f"unknown exhaustion policy {exhaustion}{near(exhaustion, EXHAUSTION_POLICIES)}")
    if not _is_above_zero(content.get("temperature", 1.0)):
        errors.append(f"the temperature must be a number above 0, not {content['temperature']!r}")
    least, most = content.get("num_exemplars", (2, 3))
    if not 1 <= least <= most:
        errors.append(f"num_exemplars must be [least, most] with 1 <= least <= most, not [{least}, {most}]")
    return errors + _check_types(content.get("types"), "types")


def _check_types(types: Mapping[str, float] | None, where: str) -> list[str]:
    if types is None:
        return []
    unknown = [name for name in types if name not in TEMPLATE_TYPES]
    errors = [f"{where}: unknown type {name}{near(name, TEMPLATE_TYPES)}" for name in unknown]
    if any(weight < 0 for weight in types.values()) or not sum(types.values()) > 0:
        errors.append(f"{where}: type weights must not be negative, and one must be above 0")
    return errors


def _is_above_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MixtureError(f"{path}: {error}") from error
