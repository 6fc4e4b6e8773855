"""The completions route of bare `vllm serve`, made honest for T5.

- `usage.prompt_tokens` (and `prompt_token_ids`, where asked for) are the prompt that was sent: the encoder's.
- `max_tokens` is limited by the decoder's room alone; vLLM subtracts the encoder's length.
- `echo` is refused with a sentence; vLLM answers 500.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from serve.vllm_t5.hooks import Hook, wrap
from serve.vllm_t5.prompt_routing import serves_t5

COMPLETIONS = ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion")
PROMPT_LENGTH = Hook("vllm.entrypoints.serve.engine.serving", "BaseServing", "_extract_prompt_len", ("self", "prompt"))
REQUEST = Hook(*COMPLETIONS, "render_completion_request", ("self", "request"))
ANSWER = Hook(
    *COMPLETIONS,
    "request_output_to_completion_response",
    (
        "self",
        "final_res_batch",
        "request",
        "request_id",
        "created_time",
        "model_name",
        "tokenizer",
        "request_metadata",
    ),
)
STREAM = Hook(
    *COMPLETIONS,
    "completion_stream_generator",
    (
        "self",
        "request",
        "engine_inputs",
        "result_generator",
        "request_id",
        "created_time",
        "model_name",
        "num_prompts",
        "tokenizer",
        "request_metadata",
    ),
)
NO_ECHO = (
    "`echo` is not supported by an encoder-decoder model: the prompt goes to the encoder and is no part of the text "
    "that the decoder writes. To score a continuation, send it as the decoder prompt with `prompt_logprobs`."
)


def install() -> None:
    """Wrap the serving classes, once a process; where nothing serves HTTP they stay unimported."""
    if "uvicorn" not in sys.modules:
        return
    wrap(PROMPT_LENGTH, _decoder_length)
    wrap(REQUEST, _without_echo)
    wrap(ANSWER, _answer_about_encoder)
    wrap(STREAM, _stream_about_encoder)


def about_encoder(output: Any) -> Any:
    """A copy of a `RequestOutput` whose prompt is the encoder's; the original keeps the decoder's."""
    if output.encoder_prompt_token_ids is None or output.prompt_token_ids is None:
        return output
    output = copy.copy(output)
    output.prompt_token_ids = output.encoder_prompt_token_ids
    return output


def _decoder_length(inner: Callable[..., Any]) -> Callable[..., Any]:
    def extract_prompt_len(self: Any, prompt: Any) -> Any:
        if isinstance(prompt, dict) and prompt.get("type") == "enc_dec" and serves_t5(self.model_config):
            return len(prompt["decoder_prompt"]["prompt_token_ids"])
        return inner(self, prompt)

    return extract_prompt_len


def _without_echo(inner: Callable[..., Any]) -> Callable[..., Any]:
    async def render_completion_request(self: Any, request: Any) -> Any:
        if request.echo and serves_t5(self.model_config):
            return self.create_error_response(NO_ECHO, param="echo")
        return await inner(self, request)

    return render_completion_request


def _answer_about_encoder(inner: Callable[..., Any]) -> Callable[..., Any]:
    def request_output_to_completion_response(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, [about_encoder(output) for output in final_res_batch], *args, **kwargs)

    return request_output_to_completion_response


def _stream_about_encoder(inner: Callable[..., Any]) -> Callable[..., Any]:
    def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        async def told() -> AsyncIterator[Any]:
            async for index, output in result_generator:
                yield index, about_encoder(output)

        return inner(self, request, engine_inputs, told(), *args, **kwargs)

    return completion_stream_generator
