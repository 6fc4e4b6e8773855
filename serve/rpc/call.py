"""One gRPC call in progress: its messages, its name, its deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from serve.errors import Cancelled, InvalidRequest, ServeError, TooLarge
from serve.request import is_request_id, new_request_id
from serve.request_tracker import trace_parent
from serve.rpc import codec
from serve.rpc.errors import abort

REQUEST_ID_KEY = "x-request-id"
_LEAD_SECONDS = 0.005
_CLOCK_TOLERANCE_SECONDS = 0.05  # the client's own deadline ends a call a moment before ours does

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[bytes, bytes]


class Call:
    """Reads and writes one call's messages.

    Args:
        messages: what the client sends, serialized.
        max_message_bytes: the largest message that may be written.
    """

    def __init__(self, messages: AsyncIterator[bytes], context: Context, max_message_bytes: int) -> None:
        self.messages = messages
        self._context = context
        self._max_message_bytes = max_message_bytes
        self._named = False
        metadata = first_values(context.invocation_metadata() or ())
        self.trace_parent = trace_parent(metadata.get)
        # What it is called until the message has been read, and in the end where the message does not name it.
        self.request_id, self._is_callers = request_id_of(metadata)

    async def read(self, message_class: type[M]) -> M:
        """The call's one message.

        Raises:
            InvalidRequest: it is not of that class.
            TooLarge: there is none.
        """
        async for raw in self.messages:
            return codec.parse(message_class, raw)
        # Either grpc refused the message already, and then its own status stands, or the client sent none.
        raise TooLarge("no message within the size limit came")

    async def name(self, in_message: str = "") -> str:
        """Settle the request's id and tell the client: the metadata's, else the message's, else a new one.

        Raises:
            InvalidRequest: the message's id is not valid. (One in the metadata may be a proxy's and is passed over.)
        """
        if in_message and not self._is_callers:
            self.request_id = check_request_id(in_message)
        self._named = True
        await self._context.send_initial_metadata(((REQUEST_ID_KEY, self.request_id),))
        return self.request_id

    async def write(self, message: Message) -> None:
        """Send a message; returns when the transport has room for the next.

        Raises:
            TooLarge: the message is above the limit; the client would drop it.
            Cancelled: the client is gone.
        """
        raw = message.SerializeToString()
        if len(raw) > self._max_message_bytes:
            limit = self._max_message_bytes
            raise TooLarge(
                f"the response has {len(raw)} bytes, the limit is {limit}: ask for fewer outputs or logprobs"
            )
        try:
            await self._context.write(raw)
        except Exception as error:  # grpc's classes for it are private; a write fails only when the call is over
            raise Cancelled("the client went away") from error

    async def refuse(self, error: ServeError) -> NoReturn:
        """End the call with the error's status."""
        if not self._named:
            await self.name()
        await abort(self._context, error)

    def timeout_seconds(self) -> float | None:
        """Seconds that the request has; None = it has no deadline.

        A little less than until the client's deadline: at that moment the client hangs up, which would look like a
        cancelled call.
        """
        remaining = self._remaining_seconds()
        return None if remaining is None else remaining - min(_LEAD_SECONDS, remaining / 20)

    def deadline_passed(self) -> bool:
        remaining = self._remaining_seconds()
        return remaining is not None and remaining <= _CLOCK_TOLERANCE_SECONDS

    def _remaining_seconds(self) -> float | None:
        remaining: float | None = self._context.time_remaining()  # the stub says float
        return remaining


def first_values(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str | bytes]:
    """A call's metadata by key; of several values the first."""
    return dict(reversed(tuple(metadata)))


def request_id_of(metadata: Mapping[str, str | bytes]) -> tuple[str, bool]:
    """A call's id by its metadata, and whether the client gave it; one that is not valid is passed over."""
    given = metadata.get(REQUEST_ID_KEY)
    return (given, True) if isinstance(given, str) and is_request_id(given) else (new_request_id(), False)


def check_request_id(text: str) -> str:
    if not is_request_id(text):
        raise InvalidRequest("request_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -", field="request_id")
    return text
