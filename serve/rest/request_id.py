"""A request's name: the caller's from `x-request-id`, else the body's, else a new one. Every response carries it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from serve.request import is_request_id, new_request_id

HEADER = "x-request-id"
_STATE_KEY = "request_id"


class RequestId:
    """The name of the request in progress; one object for middleware and handlers."""

    def __init__(self, scope: Scope) -> None:
        given = Headers(scope=scope).get(HEADER)
        # An invalid one may be a proxy's doing and is passed over.
        self._is_callers = given is not None and is_request_id(given)
        self.value = given if given is not None and self._is_callers else new_request_id()

    @classmethod
    def of(cls, scope: Scope) -> RequestId:
        """The request's name, settled at the first call."""
        state = scope.setdefault("state", {})
        found = state.get(_STATE_KEY)
        if found is None:
            found = state[_STATE_KEY] = cls(scope)
        assert isinstance(found, cls)
        return found

    def settle(self, in_body: str | None) -> str:
        """The name in the end; `in_body` is valid."""
        if in_body is not None and not self._is_callers:
            self.value = in_body
        return self.value
