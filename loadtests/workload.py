"""Workloads: which requests are sent. Data in `workloads/*.toml`, one family a kind of request, cases in the file.

A family has a `mode`, an `instruction`, optional `options`, `exemplars` and further request fields (`request`), and
`cases`, pairs of an input and the expected answer ("" where none is checked). `{input}` in the instruction takes the
input's place there; else the input is sent as the field `input`. `repeat = [1, 20]` sends every input that many
times over, which makes long prompts out of short data.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKLOADS_DIR = Path(__file__).parent / "workloads"
MODES = ("raw", "instruction", "few_shot", "cot")
SHAPES = ("stream", "unary")
_FAMILY_KEYS = {"name", "mode", "weight", "instruction", "options", "exemplars", "request", "repeat", "cases"}


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `fields` is REST's JSON body without `stream`; `expected` is None where no answer is checked."""

    name: str
    mode: str
    fields: Mapping[str, Any]
    expected: str | None


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    mode: str
    weight: int
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    description: str
    families: tuple[Family, ...]

    def deck(self, seed: int, shapes: tuple[str, ...] = SHAPES) -> Iterator[tuple[str, Case]]:
        """(shape, case) without end: in every pass each family comes `weight` times in each shape, shuffled by seed.

        So a short run meets every mode in every shape, and two runs with one seed send the same requests.
        """
        rng = random.Random(seed)
        while True:
            cards = [(shape, family) for family in self.families for shape in shapes for _ in range(family.weight)]
            rng.shuffle(cards)
            for shape, family in cards:
                yield shape, rng.choice(family.cases)


def available() -> list[str]:
    return sorted(path.stem for path in WORKLOADS_DIR.glob("*.toml"))


def load(name: str) -> Workload:
    """A workload that ships with the package, by name, or one of your own, by path.

    Raises:
        ValueError: the file is missing or says something that no workload can say.
    """
    path = Path(name) if name.endswith(".toml") else WORKLOADS_DIR / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"no workload {name!r}: give a .toml file or one of {', '.join(available())}")
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        families = tuple(_family(raw) for raw in data.pop("family"))
        workload = Workload(path.stem, data.pop("description"), families)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    if data:
        raise ValueError(f"{path}: unknown key {next(iter(data))!r}")
    names = [family.name for family in families]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two families have one name")
    return workload


def _family(raw: dict[str, Any]) -> Family:
    name, mode = raw["name"], raw["mode"]
    if unknown := raw.keys() - _FAMILY_KEYS:
        raise ValueError(f"family {name!r}: unknown key {min(unknown)!r}")
    if mode not in MODES:
        raise ValueError(f"family {name!r}: mode must be one of {', '.join(MODES)}, not {mode!r}")
    repeats, pairs = raw.get("repeat", [1]), raw["cases"]
    if not pairs or not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"family {name!r}: cases must be pairs of an input and an expected answer")
    cases = tuple(
        Case(f"{name}/{number}", mode, _fields(raw, " ".join([text] * repeat)), expected or None)
        for number, (repeat, (text, expected)) in enumerate((repeat, pair) for repeat in repeats for pair in pairs)
    )
    return Family(name, mode, raw.get("weight", 1), cases)


def _fields(raw: dict[str, Any], text: str) -> dict[str, Any]:
    instruction = raw["instruction"]
    fields: dict[str, Any] = {"mode": raw["mode"], "instruction": instruction.replace("{input}", text)}
    if "{input}" not in instruction:
        fields["input"] = text
    fields.update({key: raw[key] for key in ("options", "exemplars") if key in raw})
    fields.update(raw.get("request", {}))
    return fields
