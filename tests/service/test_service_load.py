"""The service under load and failure: cancel, queue, deadlines, drain, engine death, and a storm of everything."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from serve.errors import Cancelled, DeadlineExceeded, EngineFailure, QueueFull, ServeError, Unavailable
from serve.metrics import Metrics, Protocol, RequestTracker, Route
from serve.output import Completion, Scores, TextDelta
from serve.request import GenerateRequest, Mode, ScoreRequest
from serve.response_stream import ResponseStream
from serve.sampling_params import SamplingFields
from serve.service import Service, ServiceSettings
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.test_metrics import outcomes, value
from tests.service.test_service import collect
from tests.service.toy_tokenizers import t5_like

TOKENIZER = t5_like()
SMALL = ServiceSettings(
    served_model_names=("scripted",), max_running_sequences=2, max_queued_requests=2, dead_grace_seconds=0.1
)
REQUEST = GenerateRequest(instruction="yes or no?")
SCORE = ScoreRequest(instruction="yes or no?", candidates=("yes", "no"))
Serve = Callable[..., Service]


@pytest.fixture
async def runtime() -> ScriptedRuntime:
    return ScriptedRuntime([5], pace_seconds=0.005)  # never ends by itself before max_tokens


@pytest.fixture
async def service(runtime: ScriptedRuntime) -> AsyncIterator[Service]:
    service = scripted_service(runtime=runtime, settings=SMALL)
    yield service
    await service.close()
    await settled(service, runtime)


async def settled(service: Service, runtime: ScriptedRuntime) -> None:
    """Everything came back: rooms, slots, gauges, tasks of streams."""
    async with asyncio.timeout(2):
        while runtime.num_running > 0 or service._running:
            await asyncio.sleep(0.002)
    assert runtime.open_streams == set()
    for gauge in ("requests_running", "requests_waiting", "sequences_running"):
        assert value(service.metrics, f"flan_{gauge}") == 0
    assert service.admission._preparing == 0


def tracker_of(service: Service) -> RequestTracker:
    return service.metrics.track(Protocol.GRPC, Route.GENERATE)


async def opened(service: Service, request: GenerateRequest = REQUEST) -> ResponseStream:
    return await service.open(request, tracker_of(service))


async def running(service: Service, request: GenerateRequest = REQUEST) -> ResponseStream:
    stream = await opened(service, request)
    await anext(stream)
    return stream


async def drained(stream: ResponseStream) -> list[TextDelta]:
    try:
        return [delta async for delta in stream]
    finally:
        await stream.aclose()


class TestCancel:
    async def test_closing_frees_the_room_at_once(self, service: Service, runtime: ScriptedRuntime) -> None:
        stream = await running(service)
        made = runtime.tokens_made
        await stream.aclose()
        await stream.aclose()
        assert runtime.num_running == 0
        assert service.admission.slots_used == 0
        await asyncio.sleep(0.03)
        assert runtime.tokens_made == made
        assert outcomes(service.metrics) == {"cancelled": 1}
        assert [delta async for delta in stream] == []

    async def test_closing_while_another_task_waits_for_the_next(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        runtime.freeze()
        stream = await opened(service)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.01)
        await stream.aclose()
        with pytest.raises(Cancelled):
            await waiting

    async def test_a_queued_request_whose_client_left_never_runs(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        first, second = await running(service), await running(service)
        queued = await opened(service)
        waiting = asyncio.create_task(anext(queued))
        await asyncio.sleep(0.01)
        await queued.aclose()
        with pytest.raises(Cancelled):
            await waiting
        await first.aclose()
        await second.aclose()
        assert len(runtime.requests) == 2

    async def test_a_cancelled_unary_call_frees_everything(self, service: Service, runtime: ScriptedRuntime) -> None:
        call = asyncio.create_task(service.generate(REQUEST, tracker_of(service)))
        await asyncio.sleep(0.02)
        assert runtime.num_running == 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert runtime.num_running == 0
        assert outcomes(service.metrics) == {"cancelled": 1}

    async def test_a_cancelled_score_frees_its_slot(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.score_seconds = 5
        call = asyncio.create_task(service.score(SCORE, tracker_of(service)))
        await asyncio.sleep(0.02)
        assert service.admission.slots_used == 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert outcomes(service.metrics) == {"cancelled": 1}

    async def test_cancelling_one_wait_loses_nothing(self, service: Service, runtime: ScriptedRuntime) -> None:
        """A keepalive made with `wait_for` cancels `__anext__` again and again."""
        runtime.say(TOKENIZER, "yes no one two three")
        runtime.start_seconds, runtime.pace_seconds = 0.02, 0.01
        blocker = [await running(service), await running(service)]
        stream, texts = await opened(service), []
        for one in blocker:
            asyncio.get_running_loop().call_later(0.02, one.interrupt, Cancelled("x"))
        async with asyncio.timeout(5):
            while True:
                try:
                    texts.append((await asyncio.wait_for(anext(stream), 0.012)).text)
                except TimeoutError:
                    continue
                except StopAsyncIteration:
                    break
        assert "".join(texts) == stream.completion.outputs[0].text == "yes no one two three"
        assert len(runtime.requests) == 3
        await stream.aclose()

    async def test_slots_come_back_as_sequences_finish(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.script = [[5, 1], [5] * 400]
        both = await opened(service, GenerateRequest(instruction="a", sampling=SamplingFields(n=2, temperature=1.0)))
        reader = asyncio.create_task(drained(both))
        other = await opened(service)
        async with asyncio.timeout(2):
            await anext(other)  # runs beside the long one
        assert not reader.done()
        await other.aclose()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


class TestQueue:
    async def test_overflow_is_refused_at_once_and_order_is_kept(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        order: list[str] = []

        async def client(name: str) -> None:
            stream = await opened(service, GenerateRequest(instruction=name, request_id=name))
            async for _ in stream:
                if name not in order:
                    order.append(name)
            await stream.aclose()

        first = [await running(service), await running(service)]
        clients = [asyncio.create_task(client(name)) for name in ("one", "two")]
        await asyncio.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(QueueFull) as caught:
            await opened(service)
        assert time.monotonic() - started < 0.5
        assert caught.value.retry_after_seconds is not None
        assert value(service.metrics, "flan_requests_waiting") == 2
        assert value(service.metrics, "vllm:num_requests_waiting") == 2
        await first[0].aclose()
        await asyncio.sleep(0.03)
        assert order == ["one"]
        await first[1].aclose()
        await asyncio.sleep(0.03)
        assert order == ["one", "two"]
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        for stream in tuple(service._running):
            assert isinstance(stream, ResponseStream)
            await stream.aclose()
        assert outcomes(service.metrics) == {"refused": 1, "cancelled": 4}
        assert runtime.most_running <= 2

    async def test_more_sequences_than_slots_are_served_alone(self, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes")
        service = scripted_service(runtime=runtime, settings=SMALL)
        many = GenerateRequest(instruction="a", sampling=SamplingFields(n=8, temperature=1.0))
        completion = await service.generate(many, tracker_of(service))
        assert len(completion.outputs) == 8
        await service.close()

    async def test_waiting_in_the_engine_counts_as_waiting(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.start_seconds = 0.05
        stream = await opened(service)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.01)
        assert value(service.metrics, "flan_requests_waiting") == 1
        assert value(service.metrics, "flan_requests_running") == 0
        await first
        assert value(service.metrics, "flan_requests_waiting") == 0
        assert value(service.metrics, "flan_requests_running") == 1
        assert value(service.metrics, "flan_sequences_running") == 1
        await stream.aclose()


class TestDeadline:
    async def test_while_running(self, service: Service, runtime: ScriptedRuntime) -> None:
        request = GenerateRequest(instruction="a", timeout_seconds=0.05)
        stream = await opened(service, request)
        deltas: list[TextDelta] = []
        with pytest.raises(DeadlineExceeded):
            await collect(stream, deltas)
        assert deltas
        assert stream._tracker.elapsed() < 0.5
        await asyncio.sleep(0)
        assert runtime.num_running == 0
        assert outcomes(service.metrics) == {"deadline": 1}
        await stream.aclose()

    async def test_while_nobody_reads(self, service: Service, runtime: ScriptedRuntime) -> None:
        stream = await running(service, GenerateRequest(instruction="a", timeout_seconds=0.03))
        await asyncio.sleep(0.06)
        assert runtime.num_running == 0
        assert service.admission.slots_used == 0
        with pytest.raises(DeadlineExceeded):
            await anext(stream)
        await stream.aclose()

    async def test_in_the_queue_it_never_starts(self, service: Service, runtime: ScriptedRuntime) -> None:
        first = [await running(service), await running(service)]
        with pytest.raises(DeadlineExceeded):
            await service.generate(GenerateRequest(instruction="a", timeout_seconds=0.03), tracker_of(service))
        with pytest.raises(DeadlineExceeded):
            await service.score(
                ScoreRequest(instruction="a", candidates=("b",), timeout_seconds=0.03), tracker_of(service)
            )
        for stream in first:
            await stream.aclose()
        assert len(runtime.requests) == 2
        assert runtime.scores == []
        assert outcomes(service.metrics) == {"deadline": 2, "cancelled": 2}

    async def test_while_scoring(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.score_seconds = 5
        request = ScoreRequest(instruction="a", candidates=("b",), timeout_seconds=0.03)
        with pytest.raises(DeadlineExceeded):
            await service.score(request, tracker_of(service))

    @pytest.mark.parametrize("seconds", [0.0, -1.0])
    async def test_already_over(self, service: Service, runtime: ScriptedRuntime, seconds: float) -> None:
        with pytest.raises(DeadlineExceeded):
            await opened(service, GenerateRequest(instruction="a", timeout_seconds=seconds))
        with pytest.raises(DeadlineExceeded):
            await service.score(
                ScoreRequest(instruction="a", candidates=("b",), timeout_seconds=seconds), tracker_of(service)
            )
        assert runtime.requests == []
        assert outcomes(service.metrics) == {"deadline": 2}

    async def test_the_servers_deadline_holds_where_the_request_says_none(self, runtime: ScriptedRuntime) -> None:
        settings = ServiceSettings(request_timeout_seconds=0.03)
        service = scripted_service(runtime=runtime, settings=settings)
        with pytest.raises(DeadlineExceeded):
            await service.generate(REQUEST, tracker_of(service))
        runtime.say(TOKENIZER, "yes no yes no yes no yes no")
        runtime.pace_seconds = 0.01
        patient = GenerateRequest(instruction="a", timeout_seconds=5.0)
        assert (await service.generate(patient, tracker_of(service))).outputs[0].text
        await service.close()

    async def test_a_client_that_leaves_at_its_deadline_counts_as_deadline(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        call = asyncio.create_task(
            service.generate(GenerateRequest(instruction="a", timeout_seconds=0.06), tracker_of(service))
        )
        await asyncio.sleep(0.03)  # its own clock is a little ahead of ours
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert outcomes(service.metrics) == {"deadline": 1}


class TestDrain:
    async def test_running_finish_queued_and_new_are_refused(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.script = lambda request, index: [5] * 10 + [1]
        first = [await running(service), await running(service)]
        readers = [asyncio.create_task(drained(stream)) for stream in first]
        queued = await opened(service)
        waiting = asyncio.create_task(drained(queued))
        await asyncio.sleep(0.005)
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        assert service.readiness() == "draining"
        assert service.liveness() is None
        with pytest.raises(Unavailable, match="shutting down"):
            await waiting
        with pytest.raises(Unavailable):
            await opened(service)
        with pytest.raises(Unavailable):
            await service.tokenize("a", tracker=tracker_of(service))
        await asyncio.wait_for(draining, 2)
        for reader in readers:
            assert (await reader)[-1].finish_reason == "stop"
        assert outcomes(service.metrics) == {"stop": 2, "refused": 3}

    async def test_close_ends_what_is_stuck(self, service: Service, runtime: ScriptedRuntime) -> None:
        stuck = await running(service)
        runtime.freeze()
        waiting = asyncio.create_task(anext(stuck))
        score = asyncio.create_task(service.score(SCORE, tracker_of(service)))
        await asyncio.sleep(0.01)
        await service.close()
        for task in (waiting, score):
            with pytest.raises(Unavailable):
                await asyncio.wait_for(task, 1)
        assert outcomes(service.metrics) == {"refused": 2}


class TestDeath:
    async def test_every_waiter_fails_and_readiness_flips(self, service: Service, runtime: ScriptedRuntime) -> None:
        first = [await running(service), await running(service)]
        queued = await opened(service)
        tasks: list[asyncio.Task[list[TextDelta]]] = [asyncio.create_task(drained(s)) for s in (*first, queued)]
        await asyncio.sleep(0.01)
        assert service.readiness() is None
        runtime.kill("device lost")
        assert service.readiness() == "engine dead: device lost"
        assert service.liveness() is None  # so that the waiters get their errors
        for task in tasks:
            with pytest.raises(EngineFailure):
                await asyncio.wait_for(task, 1)
        with pytest.raises(EngineFailure, match="restarted"):
            await opened(service)
        assert value(service.metrics, "flan_engine_up") == 0
        await asyncio.sleep(0.12)
        assert service.liveness() == "engine dead: device lost"
        assert outcomes(service.metrics) == {"error": 4}

    async def test_a_frozen_engine_is_noticed_without_a_probe(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.freeze()
        stream = asyncio.create_task(drained(await opened(service)))
        score = asyncio.create_task(service.score(SCORE, tracker_of(service)))
        await asyncio.sleep(0.01)
        runtime.ill = "no heartbeat for 30 s"
        for task in (stream, score):
            with pytest.raises(EngineFailure):
                await asyncio.wait_for(task, 2)
        assert value(service.metrics, "flan_engine_up") == 0
        runtime.ill = None  # death is final
        assert service.readiness() is not None

    async def test_its_words_stay_inside(self, service: Service, runtime: ScriptedRuntime) -> None:
        stream = asyncio.create_task(drained(await running(service)))
        runtime.score_seconds = 0.01
        score = asyncio.create_task(service.score(SCORE, tracker_of(service)))
        await asyncio.sleep(0.002)
        runtime.kill("/srv/model/secret: device lost")
        late = asyncio.create_task(opened(service))
        for task in (stream, score, late):
            with pytest.raises(EngineFailure, match="restarted") as caught:
                await task
            assert "secret" not in caught.value.message


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_ends_with_every_request_counted_once_and_nothing_held(seed: int) -> None:
    chance = random.Random(seed)
    runtime = ScriptedRuntime(pace_seconds=0.0005, on_step=None, tokens_per_delta=chance.choice([1, 3]))
    runtime.script = lambda request, index: [*[5, 6, 88, 90] * chance.randint(0, 6), 1]
    metrics = Metrics()
    runtime.on_step = metrics.observe_step
    settings = ServiceSettings(max_running_sequences=8, max_queued_requests=30)
    service = scripted_service(runtime=runtime, settings=settings, metrics=metrics)
    received = 0

    async def generate(request: GenerateRequest) -> Completion:
        return await service.generate(request, tracker_of(service))

    async def stream(request: GenerateRequest) -> None:
        tracker = tracker_of(service)
        answer = await service.open(request, tracker)
        try:
            async for _ in answer:
                if chance.random() < 0.05:
                    return
        finally:
            await answer.aclose()

    async def score(request: GenerateRequest) -> Scores:
        asked = ScoreRequest(instruction=request.instruction, candidates=("a", "b"), timeout_seconds=0.5)
        return await service.score(asked, tracker_of(service))

    async def client() -> None:
        nonlocal received
        await asyncio.sleep(chance.random() * 0.4)
        received += 1
        n = chance.choice([1, 1, 1, 2, 5, 20])
        request = GenerateRequest(
            mode=chance.choice(list(Mode)),
            instruction=chance.choice(["yes", "no", " ", "yes " * 3000, "yes " * 1500]),
            sampling=SamplingFields(n=n, temperature=1.0, max_tokens=chance.choice([3, 20]), stop=("e a",)),
            timeout_seconds=chance.choice([None, None, 0.001, 0.05]),
            model=chance.choice([None, None, None, "other"]),
        )
        way: Callable[[GenerateRequest], Awaitable[object]] = chance.choice([generate, stream, stream, score])
        await way(request)

    tasks = [asyncio.create_task(client()) for _ in range(300)]
    for task in chance.sample(tasks, 60):
        asyncio.get_running_loop().call_later(0.1 + chance.random() * 0.5, task.cancel)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    unexpected = [
        result
        for result in results
        if isinstance(result, BaseException) and not isinstance(result, ServeError | asyncio.CancelledError)
    ]
    assert unexpected == []
    await settled(service, runtime)
    counts = outcomes(metrics)
    assert sum(counts.values()) == received
    assert {"stop", "length", "cancelled", "invalid", "deadline"} <= set(counts)
    assert value(metrics, "flan_generation_tokens_total") > 0
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0
    assert value(metrics, "flan_request_duration_seconds_count") == received
    await service.close()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
