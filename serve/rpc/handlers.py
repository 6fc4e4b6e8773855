"""FlanService: each method reads its message, calls the service and writes what comes.

Every method is registered as a stream of bytes both ways, also the unary ones (the wire is the same), because then it
is our code that reads the first message: one that does not parse is INVALID_ARGUMENT (grpc would answer UNKNOWN), and
one above the size limit, which grpc refuses by itself, is still counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from protos.flan.v1 import generation_pb2 as pb
from serve.errors import DeadlineExceeded, EngineFailure, InvalidRequest, ServeError
from serve.metrics import Protocol, RequestTracker, Route
from serve.request import GenerateRequest
from serve.rpc import codec
from serve.rpc.call import Call, Context
from serve.rpc.generate_many import ManyRequests
from serve.service import Service

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FlanService"].full_name
# What counts as a request. GetModel is a look at the server, not work for the model.
ROUTES = {
    "Generate": Route.GENERATE,
    "GenerateStream": Route.GENERATE,
    "GenerateMany": Route.GENERATE_MANY,
    "Score": Route.SCORE,
    "Tokenize": Route.TOKENIZE,
}

Handler = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]


class FlanHandlers:
    """The methods of FlanService over a Service.

    Args:
        max_message_bytes: the largest message that may be written.
        max_parallel: most requests of one GenerateMany call that are in progress at a time.
        stopping: set when the server goes away; GenerateMany calls end then.
    """

    def __init__(self, service: Service, *, max_message_bytes: int, max_parallel: int, stopping: asyncio.Event) -> None:
        self._service = service
        self._max_message_bytes = max_message_bytes
        self._max_parallel = max_parallel
        self._stopping = stopping

    def method_handlers(self) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """What to register with the server under SERVICE_NAME."""
        methods = {
            "Generate": self._tracked(Route.GENERATE, self._generate),
            "GenerateStream": self._tracked(Route.GENERATE, self._generate_stream),
            "GenerateMany": self._generate_many,  # each of its requests is tracked by itself
            "Score": self._tracked(Route.SCORE, self._score),
            "Tokenize": self._tracked(Route.TOKENIZE, self._tokenize),
            "GetModel": self._get_model,
        }
        return {name: grpc.stream_stream_rpc_method_handler(self._answered(method)) for name, method in methods.items()}

    def _answered(self, method: Callable[[Call], Awaitable[None]]) -> Handler:
        """The method as grpc calls it; whatever goes wrong ends the call with a status."""

        async def handle(messages: AsyncIterator[bytes], context: Context) -> None:
            call = Call(messages, context, self._max_message_bytes)
            try:
                await method(call)
                return
            except ServeError as error:
                refusal = error
            except Exception:
                logger.exception("a gRPC handler failed")
                refusal = EngineFailure("internal error")
            await call.refuse(refusal)

        return handle

    def _tracked(
        self, route: Route, method: Callable[[Call, RequestTracker], Awaitable[None]]
    ) -> Callable[[Call], Awaitable[None]]:
        """The method with a tracker, which gets exactly one outcome."""

        async def handle(call: Call) -> None:
            with self._service.metrics.track(Protocol.GRPC, route) as tracker:
                tracker.request_id, tracker.facts.parent = call.request_id, call.trace_parent
                try:
                    await method(call, tracker)
                except asyncio.CancelledError:  # how grpc tells that the client left, or that its time is up
                    if call.deadline_passed():
                        tracker.fail(DeadlineExceeded("the call's deadline passed"))
                    raise

        return handle

    async def _generate_request(self, call: Call, tracker: RequestTracker) -> GenerateRequest:
        message = await call.read(pb.GenerateRequest)
        tracker.request_id = await call.name(message.request_id)
        return codec.to_request(message, request_id=tracker.request_id, timeout_seconds=call.timeout_seconds())

    async def _generate(self, call: Call, tracker: RequestTracker) -> None:
        request = await self._generate_request(call, tracker)
        await call.write(codec.to_response(await self._service.generate(request, tracker)))

    async def _generate_stream(self, call: Call, tracker: RequestTracker) -> None:
        stream = await self._service.open(await self._generate_request(call, tracker), tracker)
        try:
            async for delta in stream:
                message = codec.to_delta(delta)
                if message is not None:
                    await call.write(message)
            await call.write(codec.to_final(stream.completion))
        finally:
            await stream.aclose()

    async def _generate_many(self, call: Call) -> None:
        await call.name()
        await ManyRequests(self._service, call, self._max_parallel).run(self._stopping)

    async def _score(self, call: Call, tracker: RequestTracker) -> None:
        message = await call.read(pb.ScoreRequest)
        tracker.request_id = await call.name(message.request_id)
        request = codec.to_score_request(message, request_id=tracker.request_id, timeout_seconds=call.timeout_seconds())
        await call.write(codec.to_score_response(await self._service.score(request, tracker)))

    async def _tokenize(self, call: Call, tracker: RequestTracker) -> None:
        message = await call.read(pb.TokenizeRequest)
        tracker.request_id = await call.name()
        if not message.HasField("text"):
            raise InvalidRequest("text is required", field="text")
        tokenization = await self._service.tokenize(
            message.text,
            add_special_tokens=message.add_special_tokens if message.HasField("add_special_tokens") else True,
            model=message.model if message.HasField("model") else None,
            timeout_seconds=call.timeout_seconds(),
            tracker=tracker,
        )
        await call.write(codec.to_tokenize_response(tokenization))

    async def _get_model(self, call: Call) -> None:
        await call.read(pb.GetModelRequest)
        await call.name()
        await call.write(codec.to_model_response(self._service.model_card()))
