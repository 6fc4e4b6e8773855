"""From an error's kind to a gRPC status: the only place that decides.

Beside the code and the message, a refused call carries `grpc-status-details-bin` (google.rpc.Status):

    ErrorInfo    always: `reason` = the kind, so that a client can tell a full queue from a message too large
    BadRequest   where one field is at fault: its name
    RetryInfo    where another try makes sense: when
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2

from serve.errors import DEFAULT_RETRY_AFTER_SECONDS, ServeError

CODES = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unauthorized": grpc.StatusCode.UNAUTHENTICATED,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "method_not_allowed": grpc.StatusCode.UNIMPLEMENTED,
    "queue_full": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "cancelled": grpc.StatusCode.CANCELLED,
    "engine_failure": grpc.StatusCode.INTERNAL,
    "error": grpc.StatusCode.INTERNAL,
}
_RETRY_KINDS = ("queue_full", "unavailable")  # what REST says Retry-After to
DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "flan.v1"

# A message may quote what the client sent. Clients take 8 KiB of trailers; the message is in them three times, once
# percent-encoded (up to three bytes for one) and twice in base64.
_MAX_MESSAGE_BYTES = 1024


def to_message(error: ServeError) -> str:
    """The error's message, cut to what fits into trailers."""
    raw = error.message.encode("utf-8", "replace")
    if len(raw) <= _MAX_MESSAGE_BYTES:
        return raw.decode("utf-8")
    return raw[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"


def to_trailers(error: ServeError) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that tells the error's kind, field and time of another try."""
    message = to_message(error)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.kind, domain=ERROR_DOMAIN)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_seconds = error.retry_after_seconds
    if retry_after_seconds is None and error.kind in _RETRY_KINDS:
        retry_after_seconds = DEFAULT_RETRY_AFTER_SECONDS
    if retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_seconds * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=CODES[error.kind].value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return ((DETAILS_KEY, status.SerializeToString()),)


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], error: ServeError) -> NoReturn:
    """End the call with the error's status."""
    await context.abort(CODES[error.kind], to_message(error), to_trailers(error))
