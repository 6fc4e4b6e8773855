"""From an error's kind to an HTTP status and an OpenAI error type: the only place that decides.

Every refusal has the body `{"error": {"message", "type", "param", "code"}}`. `code` is the kind, so that a client can
tell a deadline from a full queue without reading the message; `param` is the field at fault. Text Generation
Inference's routes have its body, `{"error", "error_type"}`, under the same statuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from serve.errors import DEFAULT_RETRY_AFTER_SECONDS, ServeError

Headers = list[tuple[bytes, bytes]]
ToBody = Callable[[ServeError], dict[str, Any]]

# kind -> (status, type). The types are OpenAI's words where it has one.
STATUSES: dict[str, tuple[int, str]] = {
    "invalid": (400, "invalid_request_error"),
    "unauthorized": (401, "authentication_error"),
    "not_found": (404, "not_found_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "too_large": (413, "invalid_request_error"),
    "queue_full": (429, "rate_limit_error"),
    "cancelled": (499, "cancelled_error"),  # nobody is left to read it
    "engine_failure": (500, "server_error"),
    "error": (500, "server_error"),
    "unavailable": (503, "service_unavailable_error"),
    "deadline": (504, "timeout_error"),
}
# kind -> TGI's word, by which its clients choose the exception; where it has none, our own kind.
TGI_TYPES: dict[str, str] = {
    "invalid": "validation",
    "too_large": "validation",
    "queue_full": "overloaded",
    "unavailable": "overloaded",
    "engine_failure": "generation",
    "error": "generation",
    "deadline": "timeout",
}
# What a TGI request calls the fields that are not named as ours, in messages that the service words.
_TGI_NAMES = {"prompt": "inputs"}
_RETRY_STATUSES = (429, 503)


def to_status(error: ServeError) -> int:
    return STATUSES[error.kind][0]


def to_body(error: ServeError) -> dict[str, Any]:
    """
    >>> from serve.errors import InvalidRequest
    >>> to_body(InvalidRequest("n must be at least 1", field="n"))["error"]["param"]
    'n'
    """
    return {
        "error": {
            "message": error.message,
            "type": STATUSES[error.kind][1],
            "param": error.field,
            "code": error.kind,
        }
    }


def to_tgi_body(error: ServeError) -> dict[str, Any]:
    """The schema has no place for the field at fault, so the message names it.

    >>> from serve.errors import InvalidRequest
    >>> to_tgi_body(InvalidRequest("prompt must not be blank", field="prompt"))
    {'error': 'inputs must not be blank', 'error_type': 'validation'}
    >>> to_tgi_body(InvalidRequest("the prompt has 9 tokens; the limit is 8", field="prompt"))["error"]
    'inputs: the prompt has 9 tokens; the limit is 8'
    """
    field = "" if error.field is None else error.field
    message = error.message
    if field in _TGI_NAMES and message.startswith(f"{field} "):
        message = _TGI_NAMES[field] + message.removeprefix(field)
    name = _TGI_NAMES.get(field, field)
    if name not in message:
        message = f"{name}: {message}"
    return {"error": message, "error_type": TGI_TYPES.get(error.kind, error.kind)}


def to_headers(error: ServeError) -> Headers:
    """What a status obliges to: WWW-Authenticate, Retry-After (whole seconds, as the standard has it)."""
    status = to_status(error)
    if status == 401:
        return [(b"www-authenticate", b"Bearer")]
    if status in _RETRY_STATUSES:
        seconds = DEFAULT_RETRY_AFTER_SECONDS if error.retry_after_seconds is None else error.retry_after_seconds
        return [(b"retry-after", b"%d" % max(1, math.ceil(seconds)))]
    return []
