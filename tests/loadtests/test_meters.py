"""The meters' arithmetic, on events at given times; the chain over a real wire is test_selftest.py's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from loadtests import meters
from loadtests.meters import Final, Measurement, Piece, RequestFailed, measure


class Clock:
    """Stands in for `time.perf_counter`; the scripted client sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedClient:
    """Yields events, each at its millisecond."""

    protocol = "rest"

    def __init__(self, clock: Clock, script: list[tuple[float, Piece | Final | None]]) -> None:
        self._clock, self._script = clock, script

    def stream(self, fields: Mapping[str, Any]) -> Iterator[Piece | Final]:
        for milliseconds, event in self._script:
            self._clock.now = milliseconds / 1000
            if event is None:
                raise RequestFailed("HTTP 429 queue_full")
            yield event

    def generate(self, fields: Mapping[str, Any]) -> Final:
        (event,) = self.stream(fields)
        assert isinstance(event, Final)
        return event

    def close(self) -> None: ...


def run(
    monkeypatch: pytest.MonkeyPatch, script: list[tuple[float, Any]], shape: str = "stream", **more: Any
) -> Measurement:
    clock = Clock()
    monkeypatch.setattr(meters, "perf_counter", clock)
    return measure(ScriptedClient(clock, script), {}, shape, **more)


def test_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(
        monkeypatch,
        [
            (20, Piece(0, "", False)),  # held back: not yet content
            (50, Piece(0, "a", False)),
            (60, Piece(0, "b", False)),
            (90, Piece(0, "c", False)),
            (110, Piece(0, "", True)),
            (112, Final(7, 4, 3.5, None)),
        ],
    )
    assert result.error is None
    assert result.text == "abc"
    assert result.ttft_ms == pytest.approx(50)
    assert result.tpot_ms == pytest.approx((110 - 50) / 3)
    assert result.itl_ms == pytest.approx([10, 30])
    assert result.e2e_ms == pytest.approx(112)
    assert (result.prompt_tokens, result.completion_tokens, result.queue_ms) == (7, 4, 3.5)


def test_gaps_are_per_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two outputs in turn, 10 ms a step: the gap between the tokens of one output is 10, not 5."""
    script: list[tuple[float, Any]] = []
    for step in range(3):
        script += [(10 + 10 * step, Piece(0, "a", step == 2)), (15 + 10 * step, Piece(1, "b", step == 2))]
    result = run(monkeypatch, [*script, (36, Final(5, 6, None, None))])
    assert result.itl_ms == pytest.approx([10, 10, 10, 10])
    assert result.tpot_ms == pytest.approx((35 - 10) / 2)
    assert result.text == "aaa"


def test_latency_counts_from_the_scheduled_send(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [(50.0, Piece(0, "a", True)), (51.0, Final(5, 1, None, None))]
    result = run(monkeypatch, script, scheduled=-1.0)
    assert result.ttft_ms == pytest.approx(1050)
    assert result.tpot_ms is None, "one token has no time between tokens"


def test_an_empty_output_has_no_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, [(9.0, Piece(0, "", True)), (9.0, Final(5, 1, None, None))])
    assert (result.error, result.ttft_ms, result.tpot_ms, result.itl_ms) == (None, None, None, [])


def test_a_stream_that_ends_early_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, [(9.0, Piece(0, "a", False))]).error == "the stream ended early"
    assert run(monkeypatch, [(9.0, Final(5, 1, None, None))]).error == "the stream ended early"


def test_a_refusal_is_recorded_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, [(4.0, None)])
    assert result.error == "HTTP 429 queue_full"
    assert result.e2e_ms == pytest.approx(4)


def test_unary_has_no_token_times(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, [(80.0, Final(5, 9, 2.0, "42", ("so 42",)))], "unary")
    assert (result.text, result.answer, result.ttft_ms, result.tpot_ms) == ("so 42", "42", None, None)
    assert result.e2e_ms == pytest.approx(80)


def test_every_reported_metric_is_defined() -> None:
    from loadtests.recorder import METRICS

    assert {*METRICS, "lag_ms", "goodput", "tokens_per_second"} <= meters.DEFINITIONS.keys()
