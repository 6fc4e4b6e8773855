"""What a refused call says, read the way a client in any language would."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    code: grpc.StatusCode
    message: str
    reason: str | None = None
    field: str | None = None
    retry_seconds: float | None = None


async def refusal(call: Awaitable[Any]) -> Refusal:
    """The status that the call ends with; fails when it succeeds."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read(caught.value)


def read(error: grpc.aio.AioRpcError) -> Refusal:
    """What the status of a failed call says."""
    details = error.details()
    refused = Refusal(error.code(), "" if details is None else details)
    trailers = dict(error.trailing_metadata() or ())
    raw = trailers.get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(raw)
    if raw:
        assert (status.code, status.message) == (error.code().value[0], error.details())
    found: dict[str, Any] = {}
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "flan.v1"
            found["reason"] = info.reason
        elif detail.Unpack(bad):
            (violation,) = bad.field_violations
            found["field"] = violation.field
        elif detail.Unpack(retry):
            found["retry_seconds"] = retry.retry_delay.ToTimedelta().total_seconds()
    return Refusal(refused.code, refused.message, **found)
