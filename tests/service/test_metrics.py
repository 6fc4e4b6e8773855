from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    QueueFull,
    ServeError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from serve.metrics import Metrics, Outcome, Protocol, RequestRecord, Route, outcome_of
from serve.output import FinishReason
from serve.request import Mode
from serve.runtimes.base import StepStats

# SPEC section 7, and the three names that others already know.
SERIES = {
    "flan_requests": "counter",
    "flan_requests_running": "gauge",
    "flan_requests_waiting": "gauge",
    "flan_sequences_running": "gauge",
    "flan_prompt_tokens": "counter",
    "flan_generation_tokens": "counter",
    "flan_unknown_tokens": "counter",
    "flan_exemplars_dropped": "counter",
    "flan_time_to_first_token_seconds": "histogram",
    "flan_inter_token_latency_seconds": "histogram",
    "flan_request_queue_time_seconds": "histogram",
    "flan_request_duration_seconds": "histogram",
    "flan_encode_batch_tokens": "histogram",
    "flan_decode_batch_sequences": "histogram",
    "flan_engine_step_seconds": "histogram",
    "flan_cache_usage_ratio": "gauge",
    "flan_encoder_cache_hits": "counter",
    "flan_engine_up": "gauge",
    "flan_model_info": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
}


class Load:
    requests_running = 2
    requests_waiting = 3
    sequences_running = 5
    engine_up = True


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def outcomes(metrics: Metrics) -> dict[str, float]:
    """Finished requests by outcome."""
    found: dict[str, float] = {}
    for (name, labels), count in samples(metrics).items():
        if name == "flan_requests_total":
            outcome = dict(labels)["outcome"]
            found[outcome] = found.get(outcome, 0) + count
    return found


def test_every_promised_series_is_there_and_nothing_else() -> None:
    metrics = Metrics()
    metrics.watch(Load())
    metrics.describe_model({"model": "m"})
    metrics.track(Protocol.REST, Route.GENERATE).finish("stop")
    found = {family.name: family.type for family in text_string_to_metric_families(metrics.render().decode())}
    assert found == SERIES


def test_content_type_is_what_scrapers_expect() -> None:
    assert Metrics.content_type.startswith("text/plain; version=")


def test_two_registries_do_not_meet() -> None:
    left, right = Metrics(), Metrics()
    left.generation_tokens.inc(3)
    assert value(right, "flan_generation_tokens_total") == 0


def test_gauges_are_zero_without_load_and_follow_it() -> None:
    metrics = Metrics()
    names = ("flan_requests_running", "flan_requests_waiting", "flan_sequences_running", "flan_engine_up")
    assert [value(metrics, name) for name in names] == [0, 0, 0, 0]
    metrics.watch(Load())
    assert [value(metrics, name) for name in names] == [2, 3, 5, 1]
    assert value(metrics, "vllm:num_requests_running") == 2
    assert value(metrics, "vllm:num_requests_waiting") == 3


def test_steps_are_observed() -> None:
    metrics = Metrics()
    metrics.watch(Load())
    usage = (("self", 0.25), ("cross", 0.5))
    metrics.observe_step(StepStats(100, 0.02, 8, 0.001, encoder_cache_hits=2, cache_usage=usage))
    metrics.observe_step(StepStats(decode_sequences=8, decode_seconds=0.0009))
    assert value(metrics, "flan_encode_batch_tokens_count") == 1
    assert value(metrics, "flan_decode_batch_sequences_sum") == 16
    assert value(metrics, "flan_engine_step_seconds_count", phase="encode") == 1
    assert value(metrics, "flan_engine_step_seconds_count", phase="decode") == 2
    assert value(metrics, "flan_engine_step_seconds_bucket", phase="decode", le="0.001") == 2
    assert value(metrics, "flan_encoder_cache_hits_total") == 2
    assert value(metrics, "flan_cache_usage_ratio", pool="cross") == 0.5
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.5


def test_cache_use_is_zero_at_idle_whatever_the_last_step_said() -> None:
    metrics, load = Metrics(), Load()
    metrics.watch(load)
    metrics.observe_step(StepStats(decode_sequences=1, cache_usage=(("self", 0.25),)))
    load.requests_running = 0
    assert value(metrics, "flan_cache_usage_ratio", pool="self") == 0
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0


def test_buckets_resolve_a_millisecond() -> None:
    names = [name for (name, labels) in samples(Metrics()) if ("le", "0.001") in labels]
    for histogram in ("time_to_first_token", "inter_token_latency", "request_queue_time", "request_duration"):
        assert f"flan_{histogram}_seconds_bucket" in names
    assert ("flan_inter_token_latency_seconds_bucket", (("le", "0.0005"),)) in samples(Metrics())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("x"), "invalid"),
        (TooLarge("x"), "invalid"),
        (NotFound("x"), "invalid"),
        (MethodNotAllowed("x"), "invalid"),
        (Unauthorized("x"), "unauthorized"),
        (QueueFull("x"), "refused"),
        (Unavailable("x"), "refused"),
        (DeadlineExceeded("x"), "deadline"),
        (Cancelled("x"), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (EngineFailure("x"), "error"),
        (ServeError("x"), "error"),
        (ZeroDivisionError("x"), "error"),
    ],
)
def test_every_error_has_its_outcome(error: BaseException, outcome: str) -> None:
    metrics = Metrics()
    with pytest.raises(type(error)), metrics.track(Protocol.GRPC, Route.SCORE):
        raise error
    assert outcomes(metrics) == {outcome: 1}
    assert value(metrics, "flan_requests_total", protocol="grpc", route="score", mode="none", outcome=outcome) == 1


def test_exactly_one_outcome_whoever_comes_first() -> None:
    metrics = Metrics()
    tracker = metrics.track(Protocol.REST, Route.CHAT)
    tracker.mode = Mode.COT
    tracker.finish("length")
    tracker.finish("stop")
    tracker.fail(EngineFailure("late"))
    with tracker:
        pass
    assert value(metrics, "flan_requests_total", protocol="rest", route="chat", mode="cot", outcome="length") == 1
    assert outcomes(metrics) == {"length": 1}
    assert value(metrics, "flan_request_duration_seconds_count") == 1


def test_leaving_without_an_outcome_is_a_stop() -> None:
    metrics = Metrics()
    with metrics.track(Protocol.REST, Route.TOKENIZE):
        pass
    assert outcomes(metrics) == {"stop": 1}


def test_an_outcome_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="lengthy"):
        Metrics().track(Protocol.REST, Route.TGI).finish("lengthy")


def test_the_log_gets_one_record_a_request_and_only_our_own_words() -> None:
    records: list[RequestRecord] = []
    metrics = Metrics(on_request_end=records.append)
    tracker = metrics.track(Protocol.REST, Route.GENERATE)
    tracker.request_id, tracker.mode, tracker.queue_seconds = "r1", Mode.RAW, 0.5
    tracker.fail(InvalidRequest("no model has the name 'my secret'", field="model"))
    tracker.finish("stop")
    [record] = records
    assert (record.request_id, record.mode, record.outcome) == ("r1", "raw", Outcome.INVALID)
    assert (record.error, record.field, record.detail) == ("invalid", "model", None)
    assert record.queue_ms == 500
    metrics.track(Protocol.REST, Route.GENERATE).fail(EngineFailure("non-finite logits"))
    assert records[1].detail == "non-finite logits"
    metrics.track(Protocol.REST, Route.GENERATE).fail(ValueError("a prompt"))
    assert records[2].detail == "ValueError"


@pytest.mark.parametrize(
    ("reasons", "outcome"),
    [
        (["stop", "stop"], "stop"),
        (["stop", "length"], "length"),
        (["length", "error", "stop"], "error"),
        (["cancelled", "length"], "cancelled"),
    ],
)
def test_the_worst_sequence_decides(reasons: list[str], outcome: str) -> None:
    assert outcome_of(FinishReason(reason) for reason in reasons) == outcome


def test_steps_from_another_thread_are_not_lost() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.observe_step(StepStats(decode_sequences=1, cache_usage=(("self", 0.1),)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        metrics.render()
    for thread in threads:
        thread.join()
    assert value(metrics, "flan_decode_batch_sequences_count") == 2000


def test_another_process_reads_the_text_with_the_official_parser() -> None:
    metrics = Metrics()
    metrics.describe_model({"model": 'a"b\\c\nd'})
    metrics.track(Protocol.REST, Route.GENERATE).finish("stop")
    code = (
        "import sys; from prometheus_client.parser import text_string_to_metric_families as parse;"
        "print(sum(len(f.samples) for f in parse(sys.stdin.read())))"
    )
    command: list[Any] = [sys.executable, "-c", code]
    done = subprocess.run(command, input=metrics.render(), capture_output=True, check=True, timeout=60)
    assert int(done.stdout) == len(samples(metrics))
