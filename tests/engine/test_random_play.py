"""The whole engine under random arrivals, aborts and a cache that is too small: nothing lost, nobody's tokens changed.

test_scheduler.py plays the same on paper; here the rows are real, and so are their copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.model import T5Model
from serve.engine.runner import ModelRunner
from serve.engine.sequence import Sequence
from serve.output import FinishReason
from serve.sampling_params import SamplingParams
from tests.engine.driving import Results, assert_idle, drain, engine_of, run_alone, same_up_to_near_tie
from tests.engine.test_model import random_prompts

PROMPTS = random_prompts((1, 5, 16, 17, 40, 90), 380, seed=9)
MOST_TOKENS = 40
ROW_BYTES = 2 * 2 * 64 * 4  # of a token: layers x (keys, values) x inner x float32


@dataclass(frozen=True)
class Arrival:
    """A request, then `steps` steps, then perhaps the abort of one of those that are there, counted from the oldest."""

    prompt: int
    max_tokens: int
    n: int
    steps: int
    abort: int | None


ARRIVALS = st.builds(
    Arrival,
    prompt=st.integers(0, len(PROMPTS) - 1),
    max_tokens=st.integers(1, MOST_TOKENS),
    n=st.integers(1, 3),
    steps=st.integers(0, 9),
    abort=st.none() | st.integers(0, 9),
)
CROWD = [*[Arrival(prompt=2, max_tokens=40, n=3, steps=9, abort=None)] * 4, Arrival(3, 40, n=1, steps=9, abort=0)]


class Alone:
    """Each prompt's greedy tokens and margins when it is alone, computed once."""

    def __init__(self, model: T5Model) -> None:
        params = SamplingParams(max_tokens=MOST_TOKENS, ignore_eos=True)
        self.results = [run_alone(model, prompt, params) for prompt in PROMPTS]


def test_nothing_is_lost(model: T5Model) -> None:
    alone = Alone(model)
    preempted = aborted = 0

    @settings(max_examples=40, deadline=None)
    @given(
        arrivals=st.lists(ARRIVALS, min_size=1, max_size=14),
        tokens=st.integers(200, 350),  # of room in the cache: the longest prompt and its output just fit
        saved=st.integers(0, 150),
    )
    @example(arrivals=CROWD, tokens=200, saved=0)  # whatever else is drawn: somebody is preempted, and one aborted
    def play(arrivals: list[Arrival], tokens: int, saved: int) -> None:
        nonlocal preempted, aborted
        cache_bytes = tokens * ROW_BYTES
        runner = ModelRunner(model, cache_bytes=cache_bytes)
        engine = engine_of(
            model,
            runner,
            cache_bytes=cache_bytes,
            encoder_cache_bytes=saved * ROW_BYTES,
            max_running_sequences=8,
            encode_tokens_per_step=64,
        )
        results = Results()
        asked: dict[str, Arrival] = {}
        gone: set[str] = set()
        for number, event in enumerate(arrivals):
            name = f"r{number}"
            asked[name] = event
            params = SamplingParams(max_tokens=event.max_tokens, n=event.n, ignore_eos=True)
            engine.add(name, [PROMPTS[event.prompt]], params)
            for _ in range(event.steps):
                if engine.has_work:
                    results.take(engine.step())
                preempted += preempted_now(engine)
                scheduler = engine.scheduler
                assert scheduler.room.used_bytes <= cache_bytes
                waiting = {item.request_id for item in scheduler.waiting}
                assert scheduler.requests_waiting == len(waiting - scheduler._started)
            if event.abort is not None and engine._sequences:
                victim = list(engine._sequences)[event.abort % len(engine._sequences)]
                engine.abort(victim)
                gone.add(victim)
                aborted += 1
        drain(engine, results)
        assert_idle(engine, runner)
        for name, event in asked.items():
            if name not in gone:
                for index in range(event.n):
                    check(results, alone, name, index, event)

    play()
    assert preempted > 0
    assert aborted > 0


def preempted_now(engine: Engine) -> int:
    """Sequences in the queue that have tokens already."""
    return sum(isinstance(item, Sequence) and bool(item.token_ids) for item in engine.scheduler.waiting)


def check(results: Results, alone: Alone, name: str, index: int, event: Arrival) -> None:
    expected, margins = alone.results[event.prompt]
    got = results.sequences[name, index]
    assert got.finish_reason is FinishReason.LENGTH
    assert len(got.token_ids) == event.max_tokens
    equal, _ = same_up_to_near_tie(got.token_ids, expected.token_ids[: event.max_tokens], margins)
    assert equal
