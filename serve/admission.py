"""Whether a request may enter now: a bounded first-in-first-out queue before a gate that counts sequences.

    enter ──> PREPARING ──join──> QUEUED ──grant──> RUNNING ──begin──> (engine works on it) ──leave──> DONE
                 │                   │                 └ shrink: its finished sequences give slots back
                 └── leave ──────────┴── leave: it never runs

All of it runs in one event loop and every operation is O(1). A ticket that has left holds nothing.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum, StrEnum

from serve.errors import Cancelled, EngineFailure, QueueFull, ServeError, Unavailable

RETRY_QUEUE_SECONDS = 1.0
RETRY_LOADING_SECONDS = 5.0
RETRY_DRAINING_SECONDS = 2.0  # by then the load balancer has taken this server out


class ServerState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class _Stage(Enum):
    PREPARING = 0
    QUEUED = 1
    RUNNING = 2
    DONE = 3


class Ticket:
    """A request's place: first while it is prepared, then in the queue, then at the gate. Made by `Admission.enter`."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._stage = _Stage.PREPARING
        self._begun = False
        self.slots = 0
        self._refusal: ServeError | None = None
        self._decided: asyncio.Future[None] | None = None  # made when somebody waits for the grant

    @property
    def is_running(self) -> bool:
        return self._stage is _Stage.RUNNING

    @property
    def has_begun(self) -> bool:
        return self._begun

    def join(self, num_sequences: int) -> None:
        """Queue up for `num_sequences` slots (at most the whole gate); passes at once when nobody waits and they
        are free.

        Raises:
            QueueFull, Unavailable: the ticket has left.
        """
        self._admission._join(self, num_sequences)

    async def granted(self) -> None:
        """Return once the request may run. Cancelling the wait keeps the place; `leave` gives it up.

        Raises:
            Unavailable: the server drains. EngineFailure: the engine died. Cancelled: `leave` was called.
        """
        if self._stage is _Stage.QUEUED:
            if self._decided is None:
                self._decided = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._decided)
        if self._refusal is not None:
            raise self._refusal
        if self._stage is not _Stage.RUNNING:
            raise Cancelled("the request has left the queue")

    def begin(self) -> None:
        """The engine has begun the request: it counts as running, no longer as waiting."""
        self._admission._begin(self)

    def shrink(self, num_sequences: int) -> None:
        """Only `num_sequences` are unfinished; surplus slots go to the next in line."""
        self._admission._shrink(self, num_sequences)

    def leave(self) -> None:
        """Give up the place or the slots; idempotent, from any stage."""
        self._admission._leave(self)

    def _decide(self) -> None:
        if self._decided is not None and not self._decided.done():
            self._decided.set_result(None)


class Admission:
    """The queue and the gate.

    Args:
        max_running_sequences: slots of the gate; a request takes min(its sequences, all slots).
        max_queued_requests: requests that may wait beyond those running.
    """

    def __init__(self, max_running_sequences: int, max_queued_requests: int) -> None:
        self.max_running_sequences = max_running_sequences
        self.max_queued_requests = max_queued_requests
        self.state = ServerState.LOADING
        self._failure: str | None = None
        self._queue: OrderedDict[Ticket, int] = OrderedDict()  # ticket -> slots it wants
        self._free = max_running_sequences
        self._preparing = 0
        self._running = 0  # tickets at the gate
        self._begun = 0  # those of them that the engine works on
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def requests_running(self) -> int:
        """Requests that the engine works on."""
        return self._begun

    @property
    def requests_waiting(self) -> int:
        """Accepted requests that have not begun: in this queue, or passed to an engine that has no room yet."""
        return len(self._queue) + self._running - self._begun

    @property
    def slots_used(self) -> int:
        return self.max_running_sequences - self._free

    def check(self) -> None:
        """
        Raises:
            Unavailable: loading or draining. EngineFailure: the engine is dead.
        """
        if self._failure is not None:
            raise EngineFailure(self._failure)
        if self.state is ServerState.LOADING:
            raise loading()
        if self.state is ServerState.DRAINING:
            raise draining()

    def enter(self) -> Ticket:
        """Take a place for a request that is yet to be prepared, so that what is being prepared is bounded too.

        Raises:
            QueueFull, Unavailable, EngineFailure
        """
        self.check()
        room = self.max_queued_requests if self._queue else self.max_queued_requests + self._free
        if self._preparing + len(self._queue) >= room:
            raise self._full()
        self._preparing += 1
        self._idle.clear()
        return Ticket(self)

    def ready(self) -> None:
        """The model is loaded: accept requests."""
        if self.state is ServerState.LOADING:
            self.state = ServerState.READY

    def drain(self) -> None:
        """Refuse new and queued requests; what runs goes on. Cannot be undone."""
        self.state = ServerState.DRAINING
        self._refuse_queued(draining)

    def fail(self, reason: str) -> None:
        """The engine is dead: refuse new and queued requests."""
        self._failure = reason
        self._refuse_queued(lambda: EngineFailure(reason))

    async def wait_idle(self) -> None:
        """Return once no request is prepared, queued or running."""
        await self._idle.wait()

    def _join(self, ticket: Ticket, num_sequences: int) -> None:
        if ticket._stage is not _Stage.PREPARING:
            raise RuntimeError(f"a ticket joins once, while it is prepared, not in stage {ticket._stage.name}")
        try:
            self.check()
            wanted = min(num_sequences, self.max_running_sequences)
            must_wait = bool(self._queue) or wanted > self._free
            if must_wait and len(self._queue) >= self.max_queued_requests:
                raise self._full()
        except ServeError:
            self._leave(ticket)
            raise
        self._preparing -= 1
        if must_wait:
            ticket._stage = _Stage.QUEUED
            self._queue[ticket] = wanted
        else:
            self._grant(ticket, wanted)

    def _grant(self, ticket: Ticket, wanted: int) -> None:
        ticket._stage = _Stage.RUNNING
        ticket.slots = wanted
        self._free -= wanted
        self._running += 1
        ticket._decide()

    def _begin(self, ticket: Ticket) -> None:
        if ticket._stage is _Stage.RUNNING and not ticket._begun:
            ticket._begun = True
            self._begun += 1

    def _shrink(self, ticket: Ticket, num_sequences: int) -> None:
        if ticket._stage is _Stage.RUNNING and num_sequences < ticket.slots:
            self._free += ticket.slots - num_sequences
            ticket.slots = num_sequences
            self._grant_next()

    def _leave(self, ticket: Ticket) -> None:
        stage, ticket._stage = ticket._stage, _Stage.DONE
        if stage is _Stage.PREPARING:
            self._preparing -= 1
        elif stage is _Stage.QUEUED:
            del self._queue[ticket]
        elif stage is _Stage.RUNNING:
            self._running -= 1
            self._begun -= ticket._begun
            self._free += ticket.slots
            ticket.slots = 0
        else:
            return
        ticket._decide()
        self._grant_next()  # also when a queued one left: it may have been the big one at the head
        if self._preparing + self._running + len(self._queue) == 0:
            self._idle.set()

    def _grant_next(self) -> None:
        while self._queue:
            ticket, wanted = next(iter(self._queue.items()))
            if wanted > self._free:
                return
            del self._queue[ticket]
            self._grant(ticket, wanted)

    def _refuse_queued(self, to_error: Callable[[], ServeError]) -> None:
        queued, self._queue = self._queue, OrderedDict()
        for ticket in queued:
            ticket._stage = _Stage.DONE
            ticket._refusal = to_error()  # one each: an exception carries the traceback of who raised it
            ticket._decide()
        if self._preparing + self._running == 0:
            self._idle.set()

    def _full(self) -> QueueFull:
        return QueueFull(
            f"the queue is full: it holds {self.max_queued_requests} requests; try again later",
            retry_after_seconds=RETRY_QUEUE_SECONDS,
        )


def loading() -> Unavailable:
    return Unavailable("the model is loading", retry_after_seconds=RETRY_LOADING_SECONDS)


def draining() -> Unavailable:
    return Unavailable("the server is shutting down", retry_after_seconds=RETRY_DRAINING_SECONDS)
