"""Text Generation Inference's routes: decode, call the service, encode."""

from __future__ import annotations

from serve.metrics import RequestTracker
from serve.rest import tgi, tgi_responses
from serve.rest.call import Call
from serve.rest.endpoint import TrackedHandler
from serve.rest.generation import Schema, answer
from serve.rest.tgi import Answer
from serve.service import Service


class TgiHandlers:
    """Handlers over a Service.

    Args:
        version: of the server, for `/info`.
    """

    def __init__(self, service: Service, *, version: str) -> None:
        self._service = service
        self._version = version

    def generate(self, kind: Answer) -> TrackedHandler:
        """The handler of a route that answers so."""

        async def handle(call: Call, tracker: RequestTracker) -> None:
            timeout = call.timeout_seconds()
            is_encoder_decoder = self._service.model_card().is_encoder_decoder
            asked = await call.read(
                lambda body: tgi.to_request(
                    body, answer=kind, timeout_seconds=timeout, is_encoder_decoder=is_encoder_decoder
                )
            )
            is_special = self._service.is_special
            schema = Schema(
                lambda completion: tgi_responses.to_response(completion, asked, is_special),
                lambda stream: tgi_responses.TgiEvents(stream, asked, is_special),
                tgi_responses.to_headers,
                tgi_responses.EVENT_FORM,
            )
            await answer(self._service, call, tracker, asked.request, schema)

        return handle

    async def info(self, call: Call) -> None:
        await call.reply(tgi_responses.to_info(self._service.model_card(), self._service.settings, self._version))
