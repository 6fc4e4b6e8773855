"""generate_many: what is read when, what is given up when, and what is left behind: nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from serve.client import AsyncFlanClient, FlanClient, ManyResult
from serve.errors import DeadlineExceeded
from tests.client.harness import ask, async_client, both, is_idle, outcomes, rows, served, twins, until
from tests.service.scripted_runtime import ScriptedRuntime


class Watched:
    """Requests that count: how many were read, how many of them have not come back."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.read = self.returned = self.most = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for fields in rows(self.number):
            self.read += 1
            self.most = max(self.most, self.read - self.returned)
            yield fields


@both
@twins
async def test_no_more_is_read_than_there_is_room_for(transport: str, twin: str) -> None:
    runtime, watched = ScriptedRuntime([5]), Watched(40)
    async with served(runtime=runtime) as s:
        runtime.freeze()
        requests = ({**fields, "max_tokens": 3} for fields in watched)
        asking = asyncio.ensure_future(ask(s, transport, twin, requests, many={"max_in_flight": 7}))
        await until(lambda: runtime.num_running == 7)
        await asyncio.sleep(0.1)
        assert watched.read == s.service.requests_running + s.service.requests_waiting == 7
        runtime.thaw()
        assert [result.error for result in await asking] == [None] * 40
        assert runtime.most_running == 7


def instantly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every request is answered by an echo after a turn of the loop; returns how many were there at a time."""
    counts = [0, 0]  # now, at most

    class Echo:
        async def send(self, call: Any) -> dict[str, Any]:
            counts[0] += 1
            counts[1] = max(counts)
            await asyncio.sleep(0)
            counts[0] -= 1
            return ECHO | {"request_id": call.body["request_id"]}

        async def close(self) -> None:
            counts.append(-1)

    for path in ("rest.RestTransport", "rest.AsyncRestTransport"):
        monkeypatch.setattr(f"serve.client.{path}.open_many", lambda self: Echo())
    return counts


ECHO: dict[str, Any] = {
    "model": "m",
    "mode": "raw",
    "created": 0,
    "outputs": [],
    "max_tokens": 1,
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    "timings": {"queue_ms": 0.0, "total_ms": 0.0},
}


async def test_ten_thousand_requests_are_read_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, watched = instantly(monkeypatch), Watched(10_000)
    async with AsyncFlanClient("http://nowhere") as client:
        results = client.generate_many(watched, max_in_flight=32)
        for _ in range(5):
            await anext(results)
            watched.returned += 1
        for _ in range(50):
            await asyncio.sleep(0)
        assert watched.read == 5 + 32  # who does not read is not read from
        async for _ in results:
            watched.returned += 1
        assert (watched.read, watched.returned, watched.most) == (10_000, 10_000, 32)
    assert counts[:2] == [0, 32]
    assert counts[2:] == [-1]


def test_ten_thousand_requests_are_read_lazily_by_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, watched = instantly(monkeypatch), Watched(10_000)
    reader = set()

    def requests() -> Iterator[dict[str, Any]]:
        for fields in watched:
            reader.add(threading.current_thread())
            yield fields

    with FlanClient("http://nowhere") as client:
        for _ in client.generate_many(requests(), max_in_flight=32):
            watched.returned += 1
    assert (watched.read, watched.returned) == (10_000, 10_000)
    assert watched.most <= 32
    assert counts[1] <= 32
    assert counts[2:] == [-1]
    assert reader == {threading.current_thread()}


def names_of_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if "flan" in thread.name or "consume" in thread.name)


@both
@twins
@pytest.mark.parametrize("how", ["with", "break"])
async def test_who_stops_reading_cancels_the_rest(transport: str, twin: str, how: str) -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.02)
    threads = names_of_threads()

    def requests() -> Iterator[dict[str, Any]]:
        yield {"instruction": "x", "max_tokens": 1}
        yield from rows(1000, max_tokens=500)

    async with served(runtime=runtime) as s:
        before = asyncio.all_tasks()
        if how == "with":
            (first,) = await ask(s, transport, twin, requests(), take=1, many={"max_in_flight": 8})
        elif twin == "sync":

            def synchronous() -> ManyResult:
                with FlanClient(s.urls[transport]) as client:
                    for result in client.generate_many(requests(), max_in_flight=8):
                        return result
                raise AssertionError

            first = await asyncio.to_thread(synchronous)
        else:
            async with async_client(s, transport) as client:
                async for result in client.generate_many(requests(), max_in_flight=8):
                    first = result
                    break
        assert first.index == 0
        await is_idle(s)
        assert runtime.tokens_made < 8 * 40
        assert len(runtime.requests) <= 9
        await until(lambda: outcomes(s).get("cancelled", 0) == len(runtime.requests) - 1)
        await until(lambda: names_of_threads() == threads)
        ours = [task for task in asyncio.all_tasks() - before if "serve/client" in str(task.get_coro())]
        assert ours == []


@both
async def test_cancelling_the_reader_cancels_the_requests(transport: str) -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    async with served(runtime=runtime) as s, async_client(s, transport) as client:

        async def read() -> None:
            async with client.generate_many(rows(20, max_tokens=500)) as results:
                async for _ in results:
                    pass

        reading = asyncio.ensure_future(read())
        await until(lambda: runtime.num_running == 20)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await is_idle(s)
        assert outcomes(s) == {"cancelled": 20}


@both
@twins
async def test_the_timeout_is_for_all(transport: str, twin: str) -> None:
    runtime, watched = ScriptedRuntime([5]), Watched(1000)
    results: list[ManyResult] = []
    async with served(runtime=runtime) as s:
        runtime.freeze()
        options: dict[str, Any] = {"max_in_flight": 4, "timeout": 0.8}
        with pytest.raises(DeadlineExceeded):
            await ask(s, transport, twin, watched, many=options, into=results)
        # What was read has come back. (The server's clock may end some a moment before ours ends the reading.)
        assert 1 <= len(results) == watched.read <= 12
        assert {type(result.error) for result in results} == {DeadlineExceeded}
        # All requests were read: their errors are the whole answer.
        late = await ask(s, transport, twin, rows(3), many={"timeout": 0.4})
        assert [type(result.error) for result in late] == [DeadlineExceeded] * 3
        runtime.thaw()
        await is_idle(s)


@both
@twins
async def test_what_the_iterable_raises_comes_after_what_was_under_way(transport: str, twin: str) -> None:
    def requests() -> Iterator[dict[str, Any]]:
        yield from rows(3, max_tokens=4)
        raise ZeroDivisionError

    results: list[ManyResult] = []
    async with served(runtime=ScriptedRuntime([5], pace_seconds=0.01)) as s:
        with pytest.raises(ZeroDivisionError):
            await ask(s, transport, twin, requests(), into=results)
        assert sorted(result.request_id for result in results) == ["r0", "r1", "r2"]
        await is_idle(s)


@both
async def test_results_do_not_wait_for_the_next_request(transport: str) -> None:
    """The async client reads and hands back side by side: here every request is made of the result before."""
    go_on = asyncio.Event()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for n in range(5):
            yield {"instruction": "x", "request_id": f"r{n}"}
            await go_on.wait()
            go_on.clear()

    async with served("yes") as s, async_client(s, transport) as client:
        seen = []
        async for result in client.generate_many(requests()):
            seen.append(result.request_id)
            go_on.set()
        assert seen == ["r0", "r1", "r2", "r3", "r4"]


@both
async def test_a_source_that_hangs_is_left_at_the_timeout(transport: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"instruction": "x"}
        await asyncio.Event().wait()

    async with served("yes") as s, async_client(s, transport, timeout=0.3) as client:
        results = client.generate_many(requests())
        assert (await anext(results)).error is None
        with pytest.raises(DeadlineExceeded):
            await anext(results)
