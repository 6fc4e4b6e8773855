"""FlanClient."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Self, Unpack

from serve.client import wire
from serve.client.calls import DEFAULT_MAX_BODY_MIB, DEFAULT_MAX_RETRIES, Calls, parse_url
from serve.client.fields import GenerateFields, PromptFields
from serve.client.many import DEFAULT_MAX_IN_FLIGHT, Fields, ManyPlan, ManyResults, check
from serve.client.rest import RestTransport
from serve.client.retries import Retries
from serve.client.rpc import RpcTransport
from serve.client.streams import CompletionStream
from serve.client.transport import TlsFiles, Transport
from serve.client.wire import Call, Json, ModelInfo
from serve.errors import EngineFailure
from serve.output import Completion, Scores, Tokenization


class FlanClient:
    """A client of a flan-serve server. The URL chooses REST or gRPC; everything else is the same.

        with FlanClient("http://127.0.0.1:8000") as client:
            completion = client.generate("Translate to German.", input="Good morning.", max_tokens=32)
            print(completion.outputs[0].text)

    Keyword arguments are the request fields of the contract, spelt as on the wire. Errors are `serve.errors` classes.
    Safe to use from several threads.

    Args:
        url: `http://HOST:PORT`, `https://…` (REST), `grpc://HOST:PORT` or `grpcs://…` (gRPC with TLS).
        api_key: sent as a bearer token.
        timeout: seconds that a call may take, waits and retries included; the server stops working on it then, too.
            None = no limit. Each call can have its own.
        max_retries: how often a call is tried again that the server had no room for, or that did not reach one.
        max_body_mib: largest message, either way; as the server's `--max-body-mib`.
        tls: whom to trust, and the client's own certificate.

    Raises:
        ValueError: `url` is not a URL of a server, or does not go with `api_key` or `tls`.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int = DEFAULT_MAX_RETRIES,
        max_body_mib: float = DEFAULT_MAX_BODY_MIB,
        tls: TlsFiles | None = None,
    ) -> None:
        server, over_grpc = parse_url(url, api_key, max_body_mib, tls)
        self._transport: Transport = RpcTransport(server) if over_grpc else RestTransport(server)
        self._calls = Calls(timeout)
        self._retries = Retries(max_retries)

    def generate(
        self, instruction: str | None = None, *, timeout: float | None = None, **fields: Unpack[GenerateFields]
    ) -> Completion:
        """Generate and return when all outputs have finished.

            client.generate("Is this review positive?", input="A joy.", options=["yes", "no"])
            client.generate("Tom has 3 pens and buys 4. How many?", mode="cot", samples=8, temperature=0.7).answer

        Raises:
            ServeError: its class says what happened; `field` names the request field at fault.
        """
        call = self._calls.generate(instruction, timeout, fields)
        return wire.to_completion(self._send(call))

    def stream(
        self, instruction: str | None = None, *, timeout: float | None = None, **fields: Unpack[GenerateFields]
    ) -> CompletionStream:
        """Generate and iterate over the text as it is made. The call starts with the first step of the iteration.

            with client.stream("Write a poem about rain.", max_tokens=100) as stream:
                for delta in stream:
                    print(delta.text, end="")
            print(stream.completion.usage)

        Leaving the `with` block, or `close`, cancels what is still running.
        """
        return CompletionStream(self._events(self._calls.generate(instruction, timeout, fields)))

    def generate_many(
        self,
        requests: Iterable[Fields],
        *,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
        timeout: float | None = None,
    ) -> ManyResults:
        """Generate for many requests and iterate over the results as they finish, in any order; each has its `index`.

            requests = ({"instruction": "Is it positive?", "input": text, "request_id": f"row-{n}"} for n, text in rows)
            with client.generate_many(requests) as results:
                for result in results:
                    if result.error is None:
                        print(result.request_id, result.completion.outputs[0].text)

        Every request that was read gets one result; one that fails is a result with an `error`, and the others go on.
        The iterable is read in the caller's thread, between the results and only where there is room, so it may be as
        long as it likes. Leaving the `with` block, or `close`, cancels what is still running.

        Args:
            requests: mappings with the fields of `generate`.
            max_in_flight: most requests that are read and have not come back as a result.
            timeout: of all together, in seconds.

        Raises (while iterating, when what was under way has come back):
            DeadlineExceeded: the timeout passed before all requests were read.
            Exception: what the iterable raised.
        """
        check(requests, max_in_flight)
        expires = self._calls.expires(timeout)
        return ManyResults(requests, ManyPlan(self._transport.open_many(), self._retries, expires, max_in_flight))

    def score(
        self,
        instruction: str | None = None,
        candidates: Sequence[str] = (),
        *,
        timeout: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> Scores:
        """Log-probabilities of the candidates as continuations of the prompt.

        scores = client.score("The capital of France is", ["Paris", "Rome"], mode="raw")
        scores.candidates[scores.best].text
        """
        call = self._calls.score(instruction, candidates, timeout, fields)
        return wire.to_scores(self._send(call))

    def tokenize(
        self, text: str, *, add_special_tokens: bool = True, model: str | None = None, timeout: float | None = None
    ) -> Tokenization:
        """The text's token ids; with `add_special_tokens` as the model reads them, its ending token included."""
        call = self._calls.tokenize(text, add_special_tokens, model, timeout)
        return wire.to_tokenization(self._send(call))

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """The served model and its limits."""
        return wire.to_model_info(self._send(self._calls.model(timeout)))

    def health(self) -> bool:
        """Whether the server takes requests: False while it loads, drains or cannot be reached."""
        return self._transport.ready()

    def close(self) -> None:
        self._calls.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call) -> Json:
        return self._retries.run(call, lambda: self._transport.send(call))

    def _events(self, call: Call) -> Generator[Json]:
        first, rest = self._retries.run(call, lambda: self._open(call))
        try:
            yield first
            yield from rest
        finally:
            rest.close()

    def _open(self, call: Call) -> tuple[Json, Generator[Json]]:
        """A stream that has begun: until its first event it can still be tried again."""
        events = self._transport.stream(call)
        for first in events:
            return first, events
        raise EngineFailure("the stream ended early")
