"""What a workload is: its cases, chosen in the parent, and one measurement of a case, taken in a system's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from loadtests.bench.effort import Effort
from loadtests.bench.system import System

Case = dict[str, Any]  # JSON; "name" is the case's name in tables
Row = dict[str, Any]  # one measurement as it is saved
MeasureOurs = Callable[["Workload", Case], dict[str, float]]  # one measurement of ours: its metrics


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a measurement. Its first one is the workload's own; `compared` ones get ratios against peers."""

    name: str
    unit: str
    higher_is_better: bool = True
    compared: bool = True

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Measured:
    """`metrics` by their names; `data` is for `Workload.finish` and is not saved."""

    metrics: dict[str, float]
    data: dict[str, Any] = field(default_factory=dict)


class Workload:
    """One kind of load.

    `fresh`: every measurement gets a process of its own. `all_at_once`: requests that are all known from the start, of
    which `Measured.data` says the `seconds` and the `requests` [tokens in, tokens out]. `max_rounds` None = as many as
    asked. `home` says whose weights it runs on: random checkpoints of the shapes, a trained checkpoint, or weights that
    are drawn on a card.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    ours_only: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    all_at_once: ClassVar[bool] = False
    max_rounds: ClassVar[int | None] = None
    home: ClassVar[Literal["shapes", "checkpoint", "card"]] = "shapes"

    def cases(self, effort: Effort) -> list[Case]:
        raise NotImplementedError

    def measure(self, system: System, case: Case, key: str) -> Measured:
        """One measurement; `key` seeds it."""
        raise NotImplementedError

    def prepare(self, cases: list[Case], measure_ours: MeasureOurs) -> list[Case]:
        """Fill in what a case needs to know of our speed."""
        del measure_ours
        return cases

    def at_a_time(self, case: Case) -> int:
        """Requests that a system sees at a time, for its choice of tunings."""
        del case
        return 1

    def tuning_key(self, case: Case) -> str:
        """Cases with one key, of any workload, share the tuning that was found for the first of them."""
        return f"{self.name}, {case['name']}"

    def trial(self, system: System, case: Case, key: str) -> float:
        """How well a tuning does, higher is better; also the warm-up."""
        metric = self.metrics[0]
        value = self.measure(system, case, key).metrics[metric.name]
        return value if metric.higher_is_better else -value

    def published(self, case: Case) -> Mapping[str, tuple[str, float]]:
        """metric -> (whose, value): figures from elsewhere to stand beside ours."""
        del case
        return {}

    def finish(self, rows: Sequence[Row], data: Sequence[dict[str, Any]]) -> None:
        """Fill in metrics that need several systems' measurements; `data[i]` belongs to `rows[i]`."""
