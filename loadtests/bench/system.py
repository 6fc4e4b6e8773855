"""What a system under test can do: one small protocol for our engine and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtests.bench.prompts import Request

OnToken = Callable[[int], None]  # called with the place of a request in its list, once a token, when it is known
Tokens = list[list[int]]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a system is to batch and to use the processor's threads.

    `batch` bounds one batch, in requests or (`by_tokens`) in padded input tokens; 0 = all there is, in one.
    `streams` batches run side by side, with `threads` threads each.
    """

    batch: int = 0
    by_tokens: bool = False
    streams: int = 1
    threads: int = 1

    def __str__(self) -> str:
        bound = "all in one batch" if self.batch == 0 else f"{self.batch} {'tokens' if self.by_tokens else 'requests'}"
        return f"{bound}, {self.streams} x {self.threads} threads"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a child process finds its model, and what it may use."""

    folder: str | None  # a checkpoint; None = draw the weights of `shape` on the device
    shape: str = ""
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    max_running: int = 64  # sequences that our engine runs at a time
    encode_tokens_per_step: int = 2048  # prompt tokens that it encodes between two decode steps
    vocab_limit: int | None = None


class System(Protocol):
    """A model that is loaded. Output lengths are forced: every request gets exactly its `length` tokens."""

    name: str
    setting: str
    vocab_size: int

    def candidates(self, count: int) -> list[Tuning]:
        """The tunings worth trying for `count` requests at a time, the likeliest first; the fastest is kept."""
        ...

    def use(self, tuning: Tuning) -> None: ...

    def generate(self, requests: Sequence[Request], *, at_once: int = 0, on_token: OnToken | None = None) -> Tokens:
        """Greedy tokens of each request, in order; `at_once` (0 = no bound) requests at a time."""
        ...

    def sample(self, request: Request, count: int, seed: int) -> Tokens:
        """`count` sequences of one prompt, at temperature 1."""
        ...

    def score(self, ids: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """Summed log-probability of each candidate (EOS is its last token) after a prompt."""
        ...

    def serve(self, requests: Sequence[Request], due: Sequence[float]) -> list[list[float]]:
        """Run requests that arrive at `due` seconds; returns when each of their tokens was known, on that clock."""
        ...


def by_length(requests: Sequence[Request]) -> list[int]:
    """Places of the requests, longest input first: what a user does who knows inputs and not outputs."""
    return sorted(range(len(requests)), key=lambda place: -len(requests[place].ids))
