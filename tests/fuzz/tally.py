"""What was asked and what came of it, beside what the server itself counted, and the memory it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

GAUGES = ("flan_requests_running", "flan_requests_waiting", "flan_sequences_running", "flan_cache_usage_ratio")
MARKS = (10, 50, 100)  # percent of the run at which memory is read
MOST_GROWTH = 1.03
MOST_WRONG = 10  # requests for each that is served
ENOUGH_REQUESTS = 4000  # with fewer, the first tenth is still warm-up
_SERVED = ("stop", "length")

Outcomes = Counter[tuple[str, str]]


@dataclass
class Tally:
    """Counts of one run.

    `answers`: (route, status) of everything sent. `outcomes`: (route label, outcome) of what counts as a request;
    "served" is stop or length. `left`: by route label, those whose outcome the client cannot know.
    """

    server: ServerReadings
    expected: int
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    outcomes: Outcomes = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    memory: dict[int, float] = field(default_factory=dict)

    def count(self, route: str, status: str) -> None:
        """One more was sent and answered."""
        self.answers[route, status] += 1
        self.sent += 1
        for mark in MARKS:
            if mark not in self.memory and self.sent * 100 >= self.expected * mark:
                self.memory[mark] = self.server.memory_mib()
                print(f"{self.sent} requests, {self.memory[mark]:.1f} MiB resident", flush=True)

    def report(self) -> str:
        """The counts by route and status, and resident memory."""
        lines = [f"{self.sent} requests"]
        routes = sorted({route for route, _ in self.answers})
        for route in routes:
            counts = {status: count for (name, status), count in self.answers.items() if name == route}
            shown = "  ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
            lines.append(f"  {route:28} {sum(counts.values()):6}   {shown}")
        lines.append("resident memory: " + ", ".join(f"{mark} %: {size:.1f} MiB" for mark, size in self.memory.items()))
        return "\n".join(lines)

    def check_reach(self, labels: Iterable[str]) -> None:
        """
        Raises:
            AssertionError: so little of what was sent is right that the model has hardly been asked.
        """
        for label in labels:
            counted = sum(count for (route, _), count in self.outcomes.items() if route == label)
            assert 0 < counted <= MOST_WRONG * self.outcomes[label, "served"], (label, self.outcomes)

    @property
    def is_long(self) -> bool:
        """Whether the run is long enough for its memory to be judged."""
        return self.expected >= ENOUGH_REQUESTS

    def check_memory(self) -> None:
        """
        Raises:
            AssertionError: it grew after the first tenth of a long run.
        """
        assert set(self.memory) == set(MARKS), self.sent
        if self.is_long:
            first = self.memory[MARKS[0]]
            assert max(self.memory.values()) <= first * MOST_GROWTH, self.memory

    def check_outcomes(self, counted: Outcomes, *, all_arrived: bool = True) -> None:
        """
        Args:
            counted: by the server, since the run began.
            all_arrived: those that were left reached the server too, each of them.

        Raises:
            AssertionError: the server's count is another.
        """
        for route in {name for name, _ in (*counted, *self.outcomes)} | set(self.left):
            spare = {
                outcome: counted[route, outcome] - self.outcomes[route, outcome]
                for outcome in {known for name, known in (*counted, *self.outcomes) if name == route}
            }
            assert min(spare.values(), default=0) >= 0, (route, spare)
            fewest = self.left[route] if all_arrived else 0
            assert fewest <= sum(spare.values()) <= self.left[route], (route, spare)


class ServerReadings:
    """A server's metrics and memory.

    Args:
        url: of its REST port.
        protocol: the label's value that counts.
    """

    def __init__(self, url: str, pid: int, protocol: str) -> None:
        self._url = url
        self._process = psutil.Process(pid)
        self._protocol = protocol

    def memory_mib(self) -> float:
        resident: int = self._process.memory_info().rss
        return resident / 2**20

    def outcomes(self) -> Outcomes:
        """`flan_requests_total` by (route, outcome); stop and length together are "served"."""
        found: Outcomes = Counter()
        for name, labels, value in self._samples():
            if name == "flan_requests_total" and labels["protocol"] == self._protocol:
                outcome = labels["outcome"]
                found[labels["route"], "served" if outcome in _SERVED else outcome] += int(value)
        return found

    def gauges(self) -> dict[str, float]:
        """The largest value of each gauge that is 0 at idle."""
        found: dict[str, float] = {}
        for name, _, value in self._samples():
            if name in GAUGES:
                found[name] = max(value, found.get(name, 0.0))
        return found

    def _samples(self) -> list[tuple[str, dict[str, str], float]]:
        text = httpx.get(f"{self._url}/metrics", timeout=10).text
        families = text_string_to_metric_families(text)
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
