"""OpenAI's requests, completions and chat, to the domain's. vLLM's extra fields count; other unknown ones do not.

A field that would change the result and that we cannot honour is refused, never passed over in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.errors import InvalidRequest
from serve.request import ChatMessage, GenerateRequest, Mode
from serve.rest.fields import Field, Flag, Integer, Number, Object, Table, Text, field_of, nearest, parse, refuse
from serve.rest.json_text import Json, shown
from serve.rest.request_fields import PROMPT_FIELDS, SAMPLING_FIELDS
from serve.sampling_params import INT64_MAX, INT64_MIN, MAX_LOGPROBS, SamplingFields

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0
_ECHO_MESSAGE = (
    "echo with logprobs does not exist for an encoder-decoder model, whose prompt has no log-probabilities; "
    "POST /v1/score gives those of any continuation"
)
# OpenAI calls the system's voice "developer" in newer schemas.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A request as asked, and how the response is to look.

    `echoed`: the prompts that stand before their texts, empty without `echo`. `only_prompt`: no token was asked for
    (`max_tokens` 0 with `echo` and `logprobs`); one is made, because there is no request without, and not shown.
    """

    request: GenerateRequest
    echoed: tuple[str | tuple[int, ...], ...] = ()
    include_usage: bool = False
    continuous_usage: bool = False
    only_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Prompts:
    """A string, a list of strings, a list of token ids, or a list of such lists, to a tuple of prompts."""

    def parse(self, name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            refuse(name, "a string, a list of strings, or token ids", value)
        if not value:
            raise InvalidRequest(f"{name} must not be empty", field=name)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) for item in value):
            return tuple(self._token_ids(f"{name}[{index}]", item) for index, item in enumerate(value))
        return (self._token_ids(name, value),)

    def _token_ids(self, where: str, items: list[Any]) -> tuple[int, ...]:
        name = field_of(where)
        if not items:
            raise InvalidRequest(f"{where} must not be empty", field=name)
        for index, item in enumerate(items):
            if type(item) is not int:
                refuse(f"{where}[{index}]", "a token id, like the others", item)
            if not INT64_MIN <= item <= INT64_MAX:
                raise InvalidRequest(f"{where}[{index}] is no token id", field=name)
        return tuple(items)

    def to_schema(self) -> Json:
        ids: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
        texts: Json = {"type": "array", "items": {"type": "string"}, "minItems": 1}
        return {"anyOf": [{"type": "string"}, texts, ids, {"type": "array", "items": ids, "minItems": 1}]}


@dataclass(frozen=True, slots=True)
class Messages:
    """A list of messages with role and content; text parts are joined, one a line, as vLLM does it."""

    def parse(self, name: str, value: Any) -> tuple[ChatMessage, ...]:
        if not isinstance(value, list):
            refuse(name, "a list of messages", value)
        if not value:
            raise InvalidRequest(f"{name} must not be empty", field=name)
        return tuple(self._message(f"{name}[{index}]", item) for index, item in enumerate(value))

    def _message(self, where: str, value: Any) -> ChatMessage:
        if not isinstance(value, dict):
            refuse(where, "an object with role and content", value)
        role = value.get("role")
        if not isinstance(role, str):
            refuse(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
        if role not in _ROLES:
            hint = nearest(role, _ROLES)
            raise InvalidRequest(
                f"{where}.role must be one of {', '.join(_ROLES)}, not {shown(role)}{hint}", field="messages"
            )
        return ChatMessage(_ROLES[role], self._content(f"{where}.content", value.get("content")))

    def _content(self, where: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            refuse(where, "a string or a list of text parts", value)
        texts = []
        for index, part in enumerate(value):
            kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
            if kind != "text" or not isinstance(text, str):
                raise InvalidRequest(
                    f'{where}[{index}] must be a text part, {{"type": "text", "text": "…"}}; no other kind is served',
                    field="messages",
                )
            texts.append(text)
        return "\n".join(texts)

    def to_schema(self) -> Json:
        part: Json = {
            "type": "object",
            "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
            "required": ["type", "text"],
        }
        content: Json = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
        properties: Json = {"role": {"type": "string", "enum": list(_ROLES)}, "content": content}
        message: Json = {"type": "object", "properties": properties, "required": ["role", "content"]}
        return {"type": "array", "items": message, "minItems": 1}


STREAM_OPTIONS_FIELDS: Table = {
    "include_usage": Field(Flag(), "One more chunk at the end, without choices, that has the usage."),
    "continuous_usage_stats": Field(Flag(), "The usage so far in every chunk (vLLM)."),
}

_SHARED_FIELDS: Table = {
    "model": PROMPT_FIELDS["model"],
    **SAMPLING_FIELDS,
    "max_completion_tokens": Field(Integer(low=1, enforced=True), "The newer name of max_tokens; goes before it."),
    "temperature": Field(SAMPLING_FIELDS["temperature"].kind, "Randomness; 0 is greedy. Default: 1."),
    "top_k": Field(
        Integer(low=-1, enforced=True), "Sample from so many likeliest tokens; 0 or -1 = all (vLLM). Default: 0."
    ),
    "truncate_prompt_tokens": Field(
        Integer(low=1, enforced=True), "Keep the last so many tokens of the prompt (vLLM)."
    ),
    "presence_penalty": Field(Number(-2, 2), "Not supported: must be 0."),
    "frequency_penalty": Field(Number(-2, 2), "Not supported: must be 0; repetition_penalty is."),
    "stream": Field(Flag(), "Answer with server-sent events. Default: false."),
    "stream_options": Field(Object(STREAM_OPTIONS_FIELDS, ignore_unknown=True), "Only with stream."),
    "debug": Field(Flag(), "Return the rendered prompt, as `prompt`. Default: false."),
}

COMPLETION_FIELDS: Table = {
    "prompt": Field(Prompts(), "The text the model reads, as it is; or several; or token ids.", required=True),
    **_SHARED_FIELDS,
    "logprobs": Field(Integer(0, MAX_LOGPROBS), "Log-probabilities, with so many likeliest alternatives."),
    "echo": Field(
        Flag(),
        "Put the prompt before the text; with logprobs those of its tokens, too (decoder-only models). Default: false.",
    ),
    "best_of": Field(Integer(low=1), "Not supported: must be n."),
    "suffix": Field(Text(), "Not supported: must be empty."),
}

CHAT_FIELDS: Table = {
    "messages": Field(Messages(), "The conversation: system first, then user and assistant.", required=True),
    **_SHARED_FIELDS,
    "logprobs": Field(Flag(), "Log-probabilities of the tokens. Default: false."),
    "top_logprobs": Field(
        Integer(0, MAX_LOGPROBS, enforced=True), "So many likeliest alternatives of each. Needs logprobs."
    ),
}


def to_completion_request(body: Json, *, timeout_seconds: float | None, is_encoder_decoder: bool) -> OpenAIRequest:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    # First, because those who ask for it may send max_tokens 0, which is wrong elsewhere.
    wants_prompt = body.get("echo") is True and body.get("logprobs") is not None
    if wants_prompt and is_encoder_decoder:
        raise InvalidRequest(_ECHO_MESSAGE, field="echo")
    only_prompt = wants_prompt and type(body.get("max_tokens")) is int and body["max_tokens"] == 0
    said = parse(COMPLETION_FIELDS, {**body, "max_tokens": 1} if only_prompt else body, ignore_unknown=True)
    _refuse_unsupported(body, said)
    prompts = said["prompt"]
    request = GenerateRequest(
        mode=Mode.RAW,
        prompts=prompts,
        sampling=_sampling(said, said.get("logprobs")),
        prompt_logprobs=wants_prompt,
        **_common(said, timeout_seconds),
    )
    echoed = prompts if said.get("echo", False) else ()
    return OpenAIRequest(request, echoed, *_usage_options(said), only_prompt=only_prompt)


def to_chat_request(body: Json, *, timeout_seconds: float | None) -> OpenAIRequest:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    said = parse(CHAT_FIELDS, body, ignore_unknown=True)
    _refuse_unsupported(body, said)
    top = said.get("top_logprobs", 0)
    wants_logprobs = said.get("logprobs", False)
    if top > 0 and not wants_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    request = GenerateRequest(
        mode=Mode.RAW,
        messages=said["messages"],
        sampling=_sampling(said, top if wants_logprobs else None),
        **_common(said, timeout_seconds),
    )
    return OpenAIRequest(request, (), *_usage_options(said))


def _sampling(said: Json, logprobs: int | None) -> SamplingFields:
    given = {name: said[name] for name in SAMPLING_FIELDS if name in said}
    given.setdefault("temperature", DEFAULT_TEMPERATURE)
    given.setdefault("top_p", DEFAULT_TOP_P)
    if "max_completion_tokens" in said:
        given["max_tokens"] = said["max_completion_tokens"]
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingFields(**given, logprobs=logprobs)


def _common(said: Json, timeout_seconds: float | None) -> dict[str, Any]:
    names = ("model", "stream", "debug", "truncate_prompt_tokens")
    return {**{name: said[name] for name in names if name in said}, "timeout_seconds": timeout_seconds}


def _usage_options(said: Json) -> tuple[bool, bool]:
    """(include_usage, continuous_usage)"""
    options = said.get("stream_options")
    if options is None:
        return False, False
    if not said.get("stream", False):
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")
    return options.get("include_usage", False), options.get("continuous_usage_stats", False)


def _refuse_unsupported(body: Json, said: Json) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        if said.get(name, 0) != 0:
            raise InvalidRequest(f"{name} is not supported; repetition_penalty is", field=name)
    if said.get("best_of", said.get("n", 1)) != said.get("n", 1):
        raise InvalidRequest("best_of is not supported; n gives several outputs", field="best_of")
    if said.get("suffix", ""):
        raise InvalidRequest("suffix is not supported", field="suffix")
    for name in ("tools", "functions"):
        if body.get(name):
            raise InvalidRequest(f"{name} is not supported: the model cannot call any", field=name)
    for name in ("tool_choice", "function_call"):
        if body.get(name) not in (None, "none", "auto"):
            raise InvalidRequest(f"{name} is not supported: the model cannot call any", field=name)
    form = body.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        raise InvalidRequest('response_format must be {"type": "text"}; no other is supported', field="response_format")
