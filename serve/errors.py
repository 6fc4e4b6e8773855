"""Everything that can go wrong with a request, in words.

    ServeError
    ├── InvalidRequest      the request says something the contract does not allow
    │   ├── UnknownField    a field that there is not, or that is there twice
    │   └── TooLarge        the body or message is larger than the server takes
    ├── Unauthorized        a key is needed and none, or a wrong one, was given
    ├── NotFound            unknown model, route or method
    │   └── MethodNotAllowed
    ├── QueueFull           too many requests are waiting
    ├── Unavailable         loading weights, or draining before exit
    ├── DeadlineExceeded    the request's time ran out
    ├── Cancelled           the client went away
    └── EngineFailure       our fault: a sequence, or the whole engine, failed

The words (`kind`) are what metrics and logs carry. Codes live at the edges, in one table each
(`serve/rest/errors.py`, `serve/rpc/errors.py`); nobody else decides.
"""

from __future__ import annotations

from typing import ClassVar

DEFAULT_RETRY_AFTER_SECONDS = 1.0  # where a QueueFull or Unavailable does not say when


class ServeError(Exception):
    """A request that cannot be served.

    Args:
        message: says what to change; safe to show to the client (never a key, a path or a traceback).
        field: the request field at fault, as spelt on the wire (`sampling` fields are flat: "top_p").
        retry_after_seconds: when another try makes sense; edges turn it into Retry-After.
    """

    kind: ClassVar[str] = "error"
    outcome: ClassVar[str] = "error"  # value of the `outcome` label in metrics

    def __init__(self, message: str, *, field: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(ServeError):
    kind = "invalid"
    outcome = "invalid"


class UnknownField(InvalidRequest):
    """Its `field` is the client's word, which may be anything: answers say it, logs and traces do not."""


class TooLarge(InvalidRequest):
    kind = "too_large"


class Unauthorized(ServeError):
    kind = "unauthorized"
    outcome = "unauthorized"


class NotFound(ServeError):
    kind = "not_found"
    outcome = "invalid"


class MethodNotAllowed(NotFound):
    kind = "method_not_allowed"


class QueueFull(ServeError):
    kind = "queue_full"
    outcome = "refused"


class Unavailable(ServeError):
    kind = "unavailable"
    outcome = "refused"


class DeadlineExceeded(ServeError):
    kind = "deadline"
    outcome = "deadline"


class Cancelled(ServeError):
    kind = "cancelled"
    outcome = "cancelled"


class EngineFailure(ServeError):
    kind = "engine_failure"
    outcome = "error"


class CheckpointError(Exception):
    """A checkpoint that cannot be served; the message names the file or tensor and what is wrong with it.

    It stops the start (exit code 1); no client ever sees it.
    """
