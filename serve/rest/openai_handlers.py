"""The OpenAI routes: decode, call the service, encode."""

from __future__ import annotations

from serve.metrics import RequestTracker
from serve.output import Completion
from serve.rest import openai, openai_responses
from serve.rest.call import Call
from serve.rest.generation import Schema, answer
from serve.rest.openai import OpenAIRequest
from serve.rest.openai_responses import ChatChunks, CompletionChunks, Echo
from serve.service import ResponseStream, Service


class OpenAIHandlers:
    """Handlers over a Service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, call: Call, tracker: RequestTracker) -> None:
        timeout = call.timeout_seconds()
        is_encoder_decoder = self._service.model_card().is_encoder_decoder
        asked = await call.read(
            lambda body: openai.to_completion_request(
                body, timeout_seconds=timeout, is_encoder_decoder=is_encoder_decoder
            )
        )

        def to_response(completion: Completion) -> bytes:
            echo = self._echo(asked, len(completion.outputs))
            return openai_responses.to_completion_response(completion, echo, only_prompt=asked.only_prompt)

        def to_chunks(stream: ResponseStream) -> CompletionChunks:
            return CompletionChunks(stream, asked, self._echo(asked, stream.prepared.num_sequences))

        await answer(self._service, call, tracker, asked.request, Schema(to_response, to_chunks))

    async def chat(self, call: Call, tracker: RequestTracker) -> None:
        timeout = call.timeout_seconds()
        asked = await call.read(lambda body: openai.to_chat_request(body, timeout_seconds=timeout))
        schema = Schema(openai_responses.to_chat_response, lambda stream: ChatChunks(stream, asked))
        await answer(self._service, call, tracker, asked.request, schema)

    def _echo(self, asked: OpenAIRequest, num_outputs: int) -> Echo:
        """The text of the prompt that an output's text follows."""
        if not asked.echoed:
            return lambda index: ""
        texts = [prompt if isinstance(prompt, str) else self._service.detokenize(prompt) for prompt in asked.echoed]
        n = num_outputs // len(texts)
        return lambda index: texts[index // n]
