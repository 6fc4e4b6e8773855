"""One generation request from the service to the wire, whatever schema it came in: whole, or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from serve.metrics import RequestTracker
from serve.output import Completion, TextDelta
from serve.request import GenerateRequest
from serve.rest.call import Call
from serve.rest.errors import Headers
from serve.rest.json_text import Json
from serve.rest.sse import DONE_TERMINATED, EventForm
from serve.service import ResponseStream, Service

# More log-probabilities than this (about a MB of JSON) are written in a thread, so that the loop answers meanwhile.
_INLINE_LOGPROBS = 4096


class Frames(Protocol):
    """A schema's form of a stream: one of these for each response."""

    def take(self, delta: TextDelta) -> Sequence[Json]:
        """The data frames of a delta, none where there is nothing to send yet."""
        ...

    def last(self, completion: Completion) -> Json | None:
        """The frame behind all others, None where the schema has none."""
        ...


@dataclass(frozen=True, slots=True)
class Schema:
    """How a response looks. `to_headers`: what a whole response says of itself in headers."""

    to_response: Callable[[Completion], bytes]
    to_frames: Callable[[ResponseStream], Frames]
    to_headers: Callable[[Completion], Headers] = lambda completion: []
    event_form: EventForm = DONE_TERMINATED


async def answer(
    service: Service, call: Call, tracker: RequestTracker, request: GenerateRequest, schema: Schema
) -> None:
    """Run the request while its client is there, and write what comes.

    Raises:
        What the service raises. Cancelled: the client went away.
    """
    request = replace(request, request_id=call.request_id.settle(request.request_id))
    if request.stream:
        await call.while_connected(_stream(service, call, tracker, request, schema))
        return
    completion = await call.while_connected(service.generate(request, tracker))
    if _num_logprobs(completion) <= _INLINE_LOGPROBS:
        body = schema.to_response(completion)
    else:
        body = await asyncio.to_thread(schema.to_response, completion)
    await call.reply(body, headers=schema.to_headers(completion))


async def _stream(
    service: Service, call: Call, tracker: RequestTracker, request: GenerateRequest, schema: Schema
) -> None:
    stream = await service.open(request, tracker)  # what must be a plain refusal is raised here, before the head
    try:
        frames = schema.to_frames(stream)
        async with call.events(schema.event_form) as events:
            async for delta in stream:
                for frame in frames.take(delta):
                    await events.send(frame)
            await events.end(frames.last(stream.completion))
    finally:
        await stream.aclose()


def _num_logprobs(completion: Completion) -> int:
    """How many log-probabilities the response has, alternatives included."""
    return sum(1 + len(item.top) for output in completion.outputs for item in output.logprobs or ())
