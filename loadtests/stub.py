"""A server with known delays, for checking the meters: it speaks REST and gRPC and generates nothing.

A request waits for one of `--capacity` slots; then its first token comes after `--first-ms` and each next one
`--gap-ms` later, kept to by absolute times. Every `--refuse-every`th request is refused. It prints one ready line like
the real server's. `GET /counts` says how many requests it served and refused.

    python -m loadtests.stub --first-ms 50 --gap-ms 10 --tokens 10
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1 import generation_pb2_grpc


@dataclass(slots=True)
class Stub:
    """The delays, and the counts of what was served; shared by both servers."""

    first_ms: float
    gap_ms: float
    tokens: int
    capacity: int
    refuse_every: int
    counts: dict[str, int] = field(default_factory=lambda: {"served": 0, "refused": 0})
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _slots: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = threading.Semaphore(self.capacity)

    def admits(self) -> bool:
        """Counts a request; False: it is to be refused."""
        with self._lock:
            number = self.counts["served"] + self.counts["refused"] + 1
            refused = self.refuse_every > 0 and number % self.refuse_every == 0
            self.counts["refused" if refused else "served"] += 1
        return not refused

    def generate(self, timings: dict[str, float]) -> Iterator[str]:
        """The texts at their times; the last token is the ending one, whose text is empty. Fills in `queue_ms`."""
        arrived = time.perf_counter()
        with self._slots:
            start = time.perf_counter()
            timings["queue_ms"] = (start - arrived) * 1000
            for number in range(self.tokens):
                due = start + (self.first_ms + number * self.gap_ms) / 1000
                time.sleep(max(0.0, due - time.perf_counter()))
                yield f"word{number} " if number < self.tokens - 1 else ""

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": 8, "completion_tokens": self.tokens, "total_tokens": 8 + self.tokens}


class _RestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small frames wait 40 ms for an acknowledgement, and no delay is known
    stub: Stub

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [{"id": "stub", "object": "model", "runtime": "stub"}]})
        elif self.path == "/counts":
            self._send_json(200, self.stub.counts)
        else:
            self._send_json(200 if self.path in ("/livez", "/readyz") else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.stub.admits():
            self._send_json(429, {"error": {"message": "full", "type": "queue_full", "param": None, "code": None}})
        elif body.get("stream"):
            self._stream()
        else:
            timings: dict[str, float] = {}
            text = "".join(self.stub.generate(timings))
            outputs = [{"index": 0, "text": text, "finish_reason": "stop"}]
            self._send_json(200, {"outputs": outputs, "usage": self.stub.usage(), "timings": timings})

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        timings: dict[str, float] = {}
        for number, text in enumerate(self.stub.generate(timings), start=1):
            frame: dict[str, Any] = {"index": 0, "text": text}
            if number == self.stub.tokens:
                frame["finish_reason"] = "stop"
            self._send_chunk(f"data: {json.dumps(frame)}\n\n")
        self._send_chunk(f"data: {json.dumps({'usage': self.stub.usage(), 'timings': timings})}\n\n")
        self._send_chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _send_chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: one line a request would only add load."""


class _Service(generation_pb2_grpc.FlanServiceServicer):
    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:  # noqa: N802
        self._refuse_if_due(context)
        timings: dict[str, float] = {}
        return self._final(request, "".join(self._stub.generate(timings)), timings)

    def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:  # noqa: N802
        self._refuse_if_due(context)
        timings: dict[str, float] = {}
        texts = []
        for text in self._stub.generate(timings):
            texts.append(text)
            finished = pb.FINISH_REASON_STOP if len(texts) == self._stub.tokens else None
            yield pb.GenerateStreamResponse(delta=pb.Delta(index=0, text=text, finish_reason=finished))
        yield pb.GenerateStreamResponse(final=self._final(request, "".join(texts), timings))

    def _refuse_if_due(self, context: Any) -> None:
        if not self._stub.admits():
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    def _final(self, request: pb.GenerateRequest, text: str, timings: dict[str, float]) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            model="stub",
            mode=request.mode,
            outputs=[pb.Output(index=0, text=text, finish_reason=pb.FINISH_REASON_STOP)],
            usage=pb.Usage(**self._stub.usage()),
            timings=pb.Timings(queue_ms=timings["queue_ms"]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-ms", type=float, default=50.0)
    parser.add_argument("--gap-ms", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--capacity", type=int, default=64, help="requests that are worked on at a time")
    parser.add_argument("--refuse-every", type=int, default=0, help="refuse every so manyth request; 0 = none")
    parser.add_argument("--seconds", type=float, default=600.0, help="exit after this long, whatever happens")
    args = parser.parse_args()
    stub = Stub(args.first_ms, args.gap_ms, args.tokens, args.capacity, args.refuse_every)

    handler = type("BoundHandler", (_RestHandler,), {"stub": stub})
    rest = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    rest.daemon_threads = True
    threading.Thread(target=rest.serve_forever, daemon=True).start()
    rpc = grpc.server(ThreadPoolExecutor(max_workers=256))
    generation_pb2_grpc.add_FlanServiceServicer_to_server(_Service(stub), rpc)  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
    grpc_port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    address = f"rest=http://127.0.0.1:{rest.server_port} grpc=127.0.0.1:{grpc_port}"
    print(f"ready {address} model=stub runtime=stub", flush=True)
    stop.wait(args.seconds)
    rpc.stop(grace=0.5).wait()


if __name__ == "__main__":
    main()
