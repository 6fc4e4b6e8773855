from __future__ import annotations

import asyncio
import random

import pytest

from serve.admission import Admission, Ticket
from serve.errors import Cancelled, EngineFailure, QueueFull, Unavailable


def ready(slots: int = 2, queue: int = 3) -> Admission:
    admission = Admission(slots, queue)
    admission.ready()
    return admission


def joined(admission: Admission, num_sequences: int = 1) -> Ticket:
    ticket = admission.enter()
    ticket.join(num_sequences)
    return ticket


def runs(ticket: Ticket) -> bool:
    return ticket.is_running


def assert_idle(admission: Admission) -> None:
    assert (admission.requests_running, admission.requests_waiting, admission.slots_used) == (0, 0, 0)
    assert admission._preparing == admission._running == len(admission._queue) == 0
    assert admission._idle.is_set()


async def test_loading_refuses_with_a_hint_when_to_try_again() -> None:
    with pytest.raises(Unavailable, match="loading") as caught:
        Admission(1, 1).enter()
    assert caught.value.retry_after_seconds is not None


async def test_what_fits_runs_at_once_the_rest_waits_in_order() -> None:
    admission = ready(slots=2, queue=3)
    first, second, third, fourth = (joined(admission) for _ in range(4))
    assert [runs(ticket) for ticket in (first, second, third, fourth)] == [True, True, False, False]
    first.leave()
    assert runs(third)
    assert not runs(fourth)
    second.leave()
    assert runs(fourth)
    third.leave()
    fourth.leave()
    assert_idle(admission)


async def test_one_more_than_the_queue_holds_is_refused_at_once() -> None:
    admission = ready(slots=1, queue=2)
    tickets = [joined(admission) for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        admission.enter()
    assert caught.value.retry_after_seconds is not None
    tickets[1].leave()  # a place in the queue is free again
    joined(admission)
    with pytest.raises(QueueFull):
        admission.enter()


async def test_a_queue_of_none_still_serves_what_can_run() -> None:
    admission = ready(slots=1, queue=0)
    ticket = joined(admission)
    with pytest.raises(QueueFull):
        admission.enter()
    ticket.leave()
    assert runs(joined(admission))


async def test_requests_being_prepared_count_against_the_bound() -> None:
    admission = ready(slots=1, queue=1)
    preparing = [admission.enter(), admission.enter()]
    with pytest.raises(QueueFull):
        admission.enter()
    for ticket in preparing:
        ticket.leave()
    assert_idle(admission)


async def test_a_request_too_big_for_what_is_left_of_the_queue_is_refused_when_it_joins() -> None:
    admission = ready(slots=2, queue=1)
    early, late = admission.enter(), admission.enter()
    joined(admission)
    late.join(2)  # waits: one slot is free, it wants two
    with pytest.raises(QueueFull):
        early.join(2)
    early.leave()
    assert admission.requests_waiting == 2  # one passed and not begun, one queued


async def test_a_request_takes_its_sequences_but_never_more_than_there_are() -> None:
    admission = ready(slots=4)
    big = joined(admission, 64)
    assert (big.slots, admission.slots_used) == (4, 4)
    small = joined(admission, 1)
    assert not runs(small)
    big.shrink(10)
    assert not runs(small)
    big.shrink(3)
    assert runs(small)
    assert admission.slots_used == 4
    big.leave()
    small.leave()
    assert_idle(admission)


async def test_the_queue_is_first_in_first_out_also_for_big_requests() -> None:
    admission = ready(slots=2)
    running = joined(admission, 1)
    big, small = joined(admission, 2), joined(admission, 1)
    assert not runs(big)
    assert not runs(small)
    running.leave()
    assert runs(big)
    assert not runs(small)
    big.leave()
    assert runs(small)


async def test_the_next_runs_when_the_big_one_at_the_head_leaves() -> None:
    admission = ready(slots=2)
    joined(admission, 1)
    big, small = joined(admission, 2), joined(admission, 1)
    big.leave()
    assert runs(small)


async def test_waiting_for_the_grant() -> None:
    admission = ready(slots=1)
    first, second = joined(admission), joined(admission)
    await first.granted()
    waiting = asyncio.create_task(second.granted())
    await asyncio.sleep(0)
    assert not waiting.done()
    first.leave()
    await waiting
    assert runs(second)


async def test_cancelling_the_wait_keeps_the_place() -> None:
    admission = ready(slots=1)
    first, second, third = (joined(admission) for _ in range(3))
    waiting = asyncio.create_task(second.granted())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert admission.requests_waiting == 3
    first.leave()
    assert runs(second)
    assert not runs(third)
    await second.granted()


async def test_leaving_wakes_the_wait() -> None:
    admission = ready(slots=1)
    first, second = joined(admission), joined(admission)
    waiting = asyncio.create_task(second.granted())
    await asyncio.sleep(0)
    second.leave()
    second.leave()
    with pytest.raises(Cancelled):
        await waiting
    first.leave()
    assert_idle(admission)


async def test_running_and_waiting_tell_begun_from_not_begun() -> None:
    admission = ready(slots=2)
    first, _ = joined(admission), joined(admission)
    joined(admission)
    assert (admission.requests_running, admission.requests_waiting) == (0, 3)
    first.begin()
    first.begin()
    assert (admission.requests_running, admission.requests_waiting) == (1, 2)
    first.leave()
    assert (admission.requests_running, admission.requests_waiting) == (0, 2)


async def test_draining_refuses_new_and_queued_and_waits_for_the_running() -> None:
    admission = ready(slots=1)
    running, queued, preparing = joined(admission), joined(admission), admission.enter()
    waiting = asyncio.create_task(queued.granted())
    await asyncio.sleep(0)
    admission.drain()
    with pytest.raises(Unavailable, match="shutting down") as caught:
        await waiting
    assert caught.value.retry_after_seconds is not None
    with pytest.raises(Unavailable):
        admission.enter()
    with pytest.raises(Unavailable):
        preparing.join(1)
    assert runs(running)
    idle = asyncio.create_task(admission.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    running.leave()
    await asyncio.wait_for(idle, 1)
    assert_idle(admission)


async def test_a_refusal_that_nobody_waited_for_is_told_later() -> None:
    admission = ready(slots=1)
    joined(admission)
    queued = joined(admission)
    admission.drain()
    with pytest.raises(Unavailable):
        await queued.granted()


async def test_a_drain_that_begins_while_loading_stays() -> None:
    admission = Admission(1, 1)
    admission.drain()
    admission.ready()
    with pytest.raises(Unavailable, match="shutting down"):
        admission.enter()
    await asyncio.wait_for(admission.wait_idle(), 1)


async def test_a_dead_engine_fails_the_queued_and_the_new() -> None:
    admission = ready(slots=1)
    running, queued = joined(admission), joined(admission)
    admission.fail("gone")
    with pytest.raises(EngineFailure, match="gone"):
        await queued.granted()
    with pytest.raises(EngineFailure, match="gone"):
        admission.enter()
    running.leave()
    assert_idle(admission)


@pytest.mark.parametrize("seed", range(5))
async def test_a_storm_of_random_tasks_leaves_nothing_behind_and_keeps_the_order(seed: int) -> None:
    chance = random.Random(seed)
    admission = ready(slots=8, queue=20)
    order: list[int] = []  # joining order of those that waited
    granted: list[int] = []
    most = refused = 0

    async def client(number: int) -> None:
        nonlocal most, refused
        await asyncio.sleep(chance.random() * 0.2)
        try:
            ticket = admission.enter()
        except QueueFull:
            refused += 1
            return
        try:
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.005)
            wanted = chance.choice([1, 1, 1, 2, 4, 8, 30])
            ticket.join(wanted)
            if not runs(ticket):
                order.append(number)
            async with asyncio.timeout(chance.choice([None, None, 0.001, 0.02])):
                await ticket.granted()
                granted.append(number)
                ticket.begin()
                most = max(most, admission.slots_used)
                for left in range(min(wanted, 8), 0, -1):
                    await asyncio.sleep(chance.random() * 0.001)
                    ticket.shrink(left)
        except QueueFull:
            refused += 1
        finally:
            ticket.leave()

    tasks = [asyncio.create_task(client(number)) for number in range(400)]
    for task in chance.sample(tasks, 80):
        asyncio.get_running_loop().call_later(chance.random() * 0.2, task.cancel)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    unexpected = [r for r in results if r is not None and not isinstance(r, TimeoutError | asyncio.CancelledError)]
    assert unexpected == []
    assert most <= 8
    assert refused > 0
    assert len(granted) > 30
    waited = set(order)
    assert [n for n in granted if n in waited] == [n for n in order if n in set(granted)]
    assert_idle(admission)
