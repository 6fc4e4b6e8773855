"""Protobuf messages to and from their JSON form, and gRPC errors to ours.

Unlike protobuf's own JSON mapping, 64-bit integers stay integers and enums are the contract's words ("few_shot", not
"MODE_FEW_SHOT"): the form that REST has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from serve.client.retries import parse_retry_after
from serve.client.wire import ERRORS, Json
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

# What a status means that comes without the server's details: from grpc itself, or from a proxy.
_CODES: Mapping[grpc.StatusCode, type[ServeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthorized,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNIMPLEMENTED: MethodNotAllowed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}
_DETAILS_KEY = "grpc-status-details-bin"
# How grpc's implementations refuse a message by its size: with RESOURCE_EXHAUSTED too, and only the text says why.
_SIZE_WORDS = re.compile(r"larger than|too large|exceeds max|size exceeds", re.IGNORECASE)


def fill(message: Message, body: Mapping[str, Any]) -> None:
    """Set a message's fields from their JSON form.

    Raises:
        InvalidRequest: naming the field whose value has a wrong type, or is a number that the wire cannot carry.
    """
    fields = message.DESCRIPTOR.fields_by_name
    for name, value in body.items():
        if name not in fields:
            raise InvalidRequest(f"unknown field {name!r}", field=name)
        try:
            _set(message, fields[name], value)
        except InvalidRequest as error:  # of a message inside
            raise InvalidRequest(error.message, field=name) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"{name}: {error}", field=name) from None


def _set(message: Message, field: Any, value: Any) -> None:
    if field.enum_type is not None:
        words = _enum_words(field.enum_type)
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {value!r}")
        setattr(message, field.name, words[value])
    elif not field.is_repeated:
        setattr(message, field.name, value)
    elif isinstance(value, Mapping):
        getattr(message, field.name).update(value)
    elif field.message_type is not None:
        for item in value:
            fill(getattr(message, field.name).add(), item)
    else:
        getattr(message, field.name).extend([value] if isinstance(value, str) else value)


def to_json(message: Message) -> Json:
    """The message as JSON has it: what has presence and is not set is left out. (No response has a map.)"""
    return {
        name: convert(getattr(message, name))
        for name, has_presence, convert in _plan(message.DESCRIPTOR)
        if not has_presence or message.HasField(name)
    }


@cache
def _plan(descriptor: Descriptor) -> tuple[tuple[str, bool, Callable[[Any], Any]], ...]:
    """For each field: its name, whether it can be absent, how its value is converted."""
    return tuple((field.name, field.has_presence, _converter(field)) for field in descriptor.fields)


def _converter(field: Any) -> Callable[[Any], Any]:
    convert: Callable[[Any], Any] = _same
    if field.message_type is not None:
        convert = to_json
    elif field.enum_type is not None:
        words = {number: word for word, number in _enum_words(field.enum_type).items()}
        convert = words.__getitem__
    if not field.is_repeated:
        return convert

    def convert_all(items: Iterable[Any]) -> list[Any]:
        return [convert(item) for item in items]

    return convert_all


def _same(value: Any) -> Any:
    return value


@cache
def _enum_words(enum: EnumDescriptor) -> dict[str, int]:
    """The contract's word for each value but UNSPECIFIED: {"few_shot": MODE_FEW_SHOT, ...}."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
    return {value.name.removeprefix(prefix).lower(): value.number for value in enum.values if value.number != 0}


def to_serve_error(error: Any) -> ServeError:
    """Our error for grpc's: by the server's details if there are any, else by the status code."""
    code, text = error.code(), error.details() or ""
    trailers = dict(error.trailing_metadata() or ())
    reason, field, retry_after_seconds = _details(trailers.get(_DETAILS_KEY, b""))
    kind = ERRORS.get(reason, _CODES.get(code, EngineFailure))
    if not reason and kind is QueueFull and _SIZE_WORDS.search(text):
        kind = TooLarge
    if retry_after_seconds is None:  # a gateway's, that has made a status of an HTTP response
        retry_after_seconds = parse_retry_after(str(trailers.get("retry-after", "")))
    message = text if text else f"the call failed with {code.name}"
    return kind(message, field=field, retry_after_seconds=retry_after_seconds)


def _details(raw: bytes) -> tuple[str, str | None, float | None]:
    """The kind, the field and the time of another try, from a serialized google.rpc.Status."""
    reason, field, retry_after_seconds = "", None, None
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(bad_request):
                field = bad_request.field_violations[0].field
            elif detail.Unpack(retry):
                retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
    except (DecodeError, IndexError):
        pass  # somebody else's details; the status code still says what happened
    return reason, field, retry_after_seconds
