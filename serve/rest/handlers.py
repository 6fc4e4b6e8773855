"""The native routes, the model list, probes and metrics: decode, call the service, encode."""

from __future__ import annotations

from dataclasses import replace

from serve.errors import NotFound, Unavailable
from serve.metrics import RequestTracker
from serve.rest import codec
from serve.rest.call import Call
from serve.rest.generation import Schema, answer
from serve.rest.json_text import dump, shown
from serve.service import Service

_NATIVE = Schema(codec.to_response, lambda stream: codec.NativeFrames())
_PROBE_RETRY_SECONDS = 1.0


class Handlers:
    """Handlers over a Service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, call: Call, tracker: RequestTracker) -> None:
        timeout = call.timeout_seconds()
        request = await call.read(lambda body: codec.to_request(body, timeout_seconds=timeout))
        await answer(self._service, call, tracker, request, _NATIVE)

    async def score(self, call: Call, tracker: RequestTracker) -> None:
        timeout = call.timeout_seconds()
        request = await call.read(lambda body: codec.to_score_request(body, timeout_seconds=timeout))
        request = replace(request, request_id=call.request_id.settle(request.request_id))
        scores = await call.while_connected(self._service.score(request, tracker))
        await call.reply(codec.to_score_response(scores))

    async def tokenize(self, call: Call, tracker: RequestTracker) -> None:
        timeout = call.timeout_seconds()
        arguments = await call.read(codec.to_tokenize_arguments)
        tokenization = await call.while_connected(
            self._service.tokenize(**arguments, timeout_seconds=timeout, tracker=tracker)
        )
        await call.reply(codec.to_tokenize_response(tokenization))

    async def models(self, call: Call) -> None:
        await call.reply(codec.to_models_response(self._service.model_card(), self._names()))

    async def model(self, call: Call) -> None:
        card, name = self._service.model_card(), call.scope["path_params"]["name"]
        if name not in card.names:
            raise NotFound(f"no model has the name {shown(name)}; this server has {', '.join(self._names())}")
        await call.reply(dump(codec.to_model(card, name)))

    async def live(self, call: Call) -> None:
        await _probe(call, self._service.liveness())

    async def ready(self, call: Call) -> None:
        await _probe(call, self._service.readiness())

    async def metrics(self, call: Call) -> None:
        metrics = self._service.metrics
        await call.reply(metrics.render(), content_type=metrics.content_type.encode())

    def _names(self) -> tuple[str, ...]:
        return self._service.settings.served_model_names


async def _probe(call: Call, problem: str | None) -> None:
    if problem is not None:
        raise Unavailable(problem, retry_after_seconds=_PROBE_RETRY_SECONDS)
    await call.reply(b'{"status":"ok"}')
