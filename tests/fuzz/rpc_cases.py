"""gRPC calls: every method of the service, with messages and metadata of all kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from protos.flan.v1 import generation_pb2 as pb
from tests.fuzz.chances import one_in, rarely
from tests.fuzz.rest_cases import KEY
from tests.fuzz.wire_messages import LENGTH, field, messages

SERVICE = pb.DESCRIPTOR.services_by_name["FlanService"]
SECONDS = 10.0  # a call that takes longer is a hang
NO_METHOD = "Nothing"

_RIGHT_KEYS = tuple(f"{scheme}{KEY}" for scheme in ("Bearer ", "bearer ", "BEARER   "))
_WRONG_KEYS = (
    "",
    "Bearer",
    "Bearer wrong",
    "Basic Zm9v",
    KEY,
    f"Bearer {KEY}2",
    f"Token {KEY}",
    "Bearer " + "x" * 3000,
)
_REQUEST_IDS = ("mine", "a.b:c-d_1", "x" * 128, "x" * 129, "", "a b", "a/b", "{}")
_OTHER_METADATA: tuple[tuple[str, str | bytes], ...] = (
    *(("x-request-timeout-ms", "soon"), ("traceparent", "00-0-0-0"), ("some-bin", b"\0\xff"), ("x" * 200, "y" * 2000)),
    *(("authorization-bin", b"Bearer"), ("x-forwarded-for", "1.2.3.4"), ("content-language", "de")),
)


@dataclass(frozen=True)
class RpcCase:
    """One call.

    `seconds`: its deadline, None = it has none. `leaves`: the client cancels it at once.
    """

    method: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    has_key: bool = True
    seconds: float | None = None
    leaves: bool = False

    @property
    def is_sure(self) -> bool:
        """Whether the client knows how the call ends."""
        return self.seconds is None and not self.leaves


@dataclass(frozen=True)
class RpcAnswer:
    code: grpc.StatusCode
    message: str
    responses: tuple[bytes, ...]
    headers: dict[str, str | bytes]
    trailers: dict[str, str | bytes]


def rpc_cases(max_message_bytes: int) -> SearchStrategy[RpcCase]:
    """Calls of every method.

    Args:
        max_message_bytes: the server's limit, which a few messages are above.
    """
    by_method = {method.name: messages(method.input_type) for method in SERVICE.methods}
    too_large = field(99, (LENGTH, bytes(max_message_bytes + 1)))

    @st.composite
    def drawn(draw: DrawFn) -> RpcCase:
        method = draw(rarely(st.sampled_from(sorted(by_method)), st.just(NO_METHOD), 60))
        message = by_method.get(method, st.binary(max_size=20))
        several = st.lists(message, max_size=4)
        is_usual = method != "GenerateMany" and not draw(one_in(40))
        sent: list[bytes] = [draw(message)] if is_usual else draw(several)
        is_too_large = draw(one_in(60))
        if sent and is_too_large:
            sent[-1] += too_large
        has_key = not draw(one_in(15))
        leaves = draw(one_in(40))
        return RpcCase(
            method=method,
            messages=tuple(sent),
            metadata=draw(_metadata(has_key)),
            has_key=has_key,
            seconds=draw(rarely(st.none(), st.sampled_from([0.001, 0.005, 0.02, 5.0]), 20)),
            leaves=leaves,
        )

    return drawn()


@st.composite
def _metadata(draw: DrawFn, has_key: bool) -> tuple[tuple[str, str | bytes], ...]:
    found: list[tuple[str, str | bytes]] = []
    if has_key:
        found.append(("authorization", draw(st.sampled_from(_RIGHT_KEYS))))
    elif draw(st.booleans()):
        found.append(("authorization", draw(st.sampled_from(_WRONG_KEYS))))
    if draw(one_in(4)):
        found.append(("x-request-id", draw(st.sampled_from(_REQUEST_IDS))))
    if draw(one_in(8)):
        found.append(draw(st.sampled_from(_OTHER_METADATA)))
    return tuple(found)


def call(channel: grpc.Channel, case: RpcCase) -> RpcAnswer:
    """Make the call, bytes in and bytes out; what came of it, whatever it was.

    Every kind of method is called as a stream both ways: on the wire it is the same.
    """
    method: Any = channel.stream_stream(f"/{SERVICE.full_name}/{case.method}")
    seconds = SECONDS if case.seconds is None else case.seconds
    calling = method(iter(case.messages), metadata=case.metadata, timeout=seconds)
    if case.leaves:
        calling.cancel()
    responses = tuple(_until_refused(calling))
    return RpcAnswer(
        code=calling.code(),
        message=calling.details() or "",
        responses=responses,
        headers=_by_key(calling.initial_metadata()),
        trailers=_by_key(calling.trailing_metadata()),
    )


def _until_refused(responses: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from responses
    except grpc.RpcError:
        return


def _by_key(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str | bytes]:
    return dict(metadata or ())
