"""GenerateMany: many requests over one call, results as they finish, in bounded memory.

A request is read only when one of `max_parallel` places is free, and its place is free again only when its result has
been written. So a client that sends fast is not read from, and one that reads slowly is not worked for; HTTP/2's flow
control does the rest.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from protos.flan.v1 import generation_pb2 as pb
from serve.errors import EngineFailure, ServeError, TooLarge, Unavailable
from serve.metrics import Protocol, Route
from serve.output import Completion
from serve.request import new_request_id
from serve.rpc import codec
from serve.rpc.call import Call, check_request_id
from serve.service import Service

logger = logging.getLogger(__name__)


class ManyRequests:
    """The requests of one GenerateMany call."""

    def __init__(self, service: Service, call: Call, max_parallel: int) -> None:
        self._service = service
        self._call = call
        self._places = asyncio.Semaphore(max_parallel)
        self._writing = asyncio.Lock()  # grpc takes one write at a time

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until the client has sent all and got all.

        Raises:
            Unavailable: the server stops; what was in progress has been answered.
        """
        stop = asyncio.ensure_future(stopping.wait())
        try:
            async with asyncio.TaskGroup() as requests:
                while True:
                    await self._places.acquire()
                    raw = await self._next(stop)
                    if raw is None:
                        break
                    requests.create_task(self._serve(raw))
        except* ServeError as errors:  # from a write: the client is gone
            raise errors.exceptions[0] from None
        finally:
            stop.cancel()
        if stopping.is_set():
            raise Unavailable("the server is stopping", retry_after_seconds=1.0)

    async def _next(self, stop: asyncio.Future[Any]) -> bytes | None:
        """The next message; None when the client has sent all, or the server stops."""
        message = asyncio.ensure_future(anext(self._call.messages, None))
        try:
            await asyncio.wait((message, stop), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else None
        finally:
            message.cancel()

    async def _serve(self, raw: bytes) -> None:
        request_id, result = await self._result(raw)
        async with self._writing:
            try:
                await self._call.write(codec.to_many_response(request_id, result))
            except TooLarge as error:
                await self._call.write(codec.to_many_response(request_id, error))
        self._places.release()

    async def _result(self, raw: bytes) -> tuple[str, Completion | ServeError]:
        """A request's id and what became of it."""
        request_id = ""
        try:
            with self._service.metrics.track(Protocol.GRPC, Route.GENERATE_MANY) as tracker:
                tracker.request_id, tracker.facts.parent = self._call.request_id, self._call.trace_parent
                message = codec.parse(pb.GenerateRequest, raw)
                request_id = message.request_id
                request_id = check_request_id(request_id) if request_id else new_request_id()
                tracker.request_id = request_id
                request = codec.to_request(message, request_id=request_id, timeout_seconds=self._call.timeout_seconds())
                return request_id, await self._service.generate(request, tracker)
        except ServeError as error:
            return request_id, error
        except Exception:
            logger.exception("a request of GenerateMany failed")
            return request_id, EngineFailure("internal error")
