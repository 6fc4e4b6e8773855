"""gRPC as the meters need it. In a locust process, `grpc.experimental.gevent.init_gevent()` must come first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict

from loadtests.meters import Final, Piece, RequestFailed
from protos.flan.v1 import generation_pb2, generation_pb2_grpc


def to_request(fields: Mapping[str, Any]) -> generation_pb2.GenerateRequest:
    """REST's JSON fields as the gRPC message; a field that the message lacks is an error."""
    body = dict(fields)
    body["mode"] = f"MODE_{body['mode'].upper()}"
    if "answer_format" in body:
        body["answer_format"] = f"ANSWER_FORMAT_{body['answer_format'].upper()}"
    if isinstance(body.get("stop"), str):
        body["stop"] = [body["stop"]]
    return ParseDict(body, generation_pb2.GenerateRequest())


class RpcClient:
    """One user's channel to `flan.v1.FlanService`; users do not share a connection, as they would not in life."""

    protocol = "grpc"

    def __init__(self, target: str, api_key: str | None = None, timeout_seconds: float = 60.0) -> None:
        # A channel of its own: gRPC shares connections between channels with equal options otherwise.
        self._channel = grpc.insecure_channel(
            target, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )
        self._stub = generation_pb2_grpc.FlanServiceStub(self._channel)
        self._timeout = timeout_seconds
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)

    def generate(self, fields: Mapping[str, Any]) -> Final:
        try:
            response = self._stub.Generate(to_request(fields), timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise RequestFailed(_describe(error)) from error
        return _to_final(response)

    def stream(self, fields: Mapping[str, Any]) -> Iterator[Piece | Final]:
        call = self._stub.GenerateStream(to_request(fields), timeout=self._timeout, metadata=self._metadata)
        try:
            for message in call:
                if message.HasField("delta"):
                    delta = message.delta
                    yield Piece(delta.index, delta.text, delta.HasField("finish_reason"))
                else:
                    yield _to_final(message.final)
        except grpc.RpcError as error:
            raise RequestFailed(_describe(error)) from error
        finally:
            call.cancel()  # a reader that leaves early leaves nothing running

    def close(self) -> None:
        self._channel.close()


def _describe(error: grpc.RpcError) -> str:
    # The errors that calls raise are calls themselves, which the type does not say.
    code = getattr(error, "code", None)
    return f"gRPC {code().name}" if callable(code) else "gRPC error"


def _to_final(response: generation_pb2.GenerateResponse) -> Final:
    answer = response.answer if response.HasField("answer") else None
    if answer is None and response.outputs and response.outputs[0].HasField("answer"):
        answer = response.outputs[0].answer
    return Final(
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        queue_ms=response.timings.queue_ms if response.HasField("timings") else None,
        answer=answer,
        texts=tuple(output.text for output in response.outputs),
    )
