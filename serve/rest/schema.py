"""The OpenAPI document: requests from the field tables, responses by hand, errors from the one table."""

from __future__ import annotations

from typing import Any

from serve.rest import tgi
from serve.rest.errors import STATUSES, TGI_TYPES
from serve.rest.fields import Table, to_schema
from serve.rest.json_text import Json
from serve.rest.openai import CHAT_FIELDS, COMPLETION_FIELDS
from serve.rest.request_fields import GENERATE_FIELDS, SCORE_FIELDS, TOKENIZE_FIELDS

_STRING: Json = {"type": "string"}
_INTEGER: Json = {"type": "integer"}
_NUMBER: Json = {"type": "number"}
_BOOLEAN: Json = {"type": "boolean"}
_STATUS_WORDS = {
    400: "The request is not valid; `param` names the field.",
    401: "A key is needed (header WWW-Authenticate).",
    404: "No such route, or no model of that name.",
    413: "The body is too large.",
    429: "Too many requests are waiting (header Retry-After).",
    500: "The engine failed.",
    503: "Loading, or draining before exit (header Retry-After).",
    504: "The request's time ran out.",
}
_SSE = (
    "With `stream: true` the answer is `text/event-stream`: data frames, `: keepalive` comments in silence, and "
    "`data: [DONE]` at the end. A failure after the first frame is a last frame with `error`, and no `[DONE]`."
)


def openapi_document(version: str, *, has_keys: bool) -> Json:
    """The document that `/openapi.json` shows."""
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "flan-serve",
            "version": version,
            "description": "Generate with, and score against, an instruction-finetuned (Flan) model. null is the same "
            "as an absent field. Every response carries `x-request-id`, the caller's if valid. The header "
            "`x-request-timeout-ms` is a request's deadline.",
        },
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths() -> Json:
    return {
        "/v1/generate": _post("Generate text", "Generate", _SSE, example={"instruction": "Name a colour."}),
        "/v1/score": _post(
            "Score candidates as continuations",
            "Score",
            "Log-probabilities of given texts: rank classification.",
            example={"instruction": "Is water wet?", "candidates": ["yes", "no"]},
        ),
        "/v1/tokenize": _post("Token ids of a text", "Tokenize", "", example={"text": "Name a colour."}),
        "/v1/completions": _post(
            "OpenAI completions",
            "Completion",
            f"Unknown fields are ignored. {_SSE}",
            example={"prompt": "Name a colour.", "max_tokens": 8},
        ),
        "/v1/chat/completions": _post(
            "OpenAI chat completions",
            "Chat",
            "A model without a chat template gets the Flan rendering: the system text first, then each turn with a "
            f"visible label; one user turn stands by itself. Unknown fields are ignored. {_SSE}",
            example={"messages": [{"role": "user", "content": "Name a colour."}]},
        ),
        **_tgi_paths(),
        "/v1/models": {"get": _get("The served model and its limits", "ModelList")},
        "/livez": {"get": _probe("Alive: 503 once the engine is dead")},
        "/readyz": {"get": _probe("Ready: 503 while loading or draining, or with a dead engine")},
        "/health": {"get": _probe("The same as /readyz")},
        "/metrics": {
            "get": {
                "summary": "Prometheus metrics",
                "security": [],
                "responses": {"200": {"description": "Prometheus text", "content": {"text/plain": {}}}},
            }
        },
    }


def _tgi_paths() -> Json:
    text = "Text Generation Inference's schema; unknown fields are ignored. Stop text is not returned."
    events = "One event a token and no `[DONE]`; the last one has `generated_text` and `details`."
    example = {"inputs": "Name a colour.", "parameters": {"max_new_tokens": 8}}
    paths = {
        "/generate": _post("Generate text (TGI)", "Tgi", text, example=example, error="TgiError"),
        "/generate_stream": _post("Stream text (TGI)", "Tgi", f"{text} {events}", example=example, error="TgiError"),
        "/": _post(
            "Generate or stream (TGI)",
            "TgiAsAsked",
            f"{text} With `stream: true` as /generate_stream, else a list of one object.",
            example=example,
            error="TgiError",
        ),
        "/info": {"get": _get("The served model and its limits (TGI)", "TgiInfo")},
    }
    paths["/generate_stream"]["post"]["responses"]["200"]["content"] = {
        "text/event-stream": {"schema": _ref("TgiEvent")}
    }
    return paths


def _post(summary: str, name: str, description: str, *, example: Json, error: str = "Error") -> Json:
    body = {"schema": _ref(f"{name}Request"), "example": example}
    return {
        "post": {
            "summary": summary,
            "description": description,
            "parameters": [
                _header("x-request-id", "The request's name."),
                _header("x-request-timeout-ms", "The request's deadline, in milliseconds from its arrival."),
            ],
            "requestBody": {"required": True, "content": {"application/json": body}},
            "responses": {
                "200": {
                    "description": "The answer.",
                    "content": {"application/json": {"schema": _ref(f"{name}Response")}},
                },
                **{str(status): _refusal(words, error) for status, words in _STATUS_WORDS.items()},
            },
        }
    }


def _get(summary: str, name: str) -> Json:
    answer = {"description": "OK", "content": {"application/json": {"schema": _ref(name)}}}
    return {"summary": summary, "responses": {"200": answer, "503": _refusal(_STATUS_WORDS[503])}}


def _probe(summary: str) -> Json:
    return {
        "summary": summary,
        "security": [],
        "responses": {"200": {"description": "Yes."}, "503": _refusal("No; `message` says why.")},
    }


def _refusal(description: str, error: str = "Error") -> Json:
    return {"description": description, "content": {"application/json": {"schema": _ref(error)}}}


def _schemas() -> Json:
    tables: dict[str, tuple[Table, bool]] = {
        "GenerateRequest": (GENERATE_FIELDS, False),
        "ScoreRequest": (SCORE_FIELDS, False),
        "TokenizeRequest": (TOKENIZE_FIELDS, False),
        "CompletionRequest": (COMPLETION_FIELDS, True),
        "ChatRequest": (CHAT_FIELDS, True),
        "TgiRequest": (tgi.GENERATE_FIELDS, True),
        "TgiAsAskedRequest": (tgi.AS_ASKED_FIELDS, True),
    }
    requests = {name: to_schema(table, is_open=is_open) for name, (table, is_open) in tables.items()}
    return {**requests, **_native_responses(), **_openai_responses(), **_tgi_responses(), "Error": _error()}


def _native_responses() -> Json:
    return {
        "GenerateResponse": _object(
            request_id=_STRING,
            model=_STRING,
            mode=_STRING,
            created=_INTEGER,
            outputs=_list(_ref("Output")),
            answer=_optional(_STRING),
            votes=_list(_object(answer=_optional(_STRING), count=_INTEGER, weight=_NUMBER)),
            tie=_BOOLEAN,
            max_tokens=_INTEGER,
            exemplars_used=_INTEGER,
            exemplars_dropped=_INTEGER,
            prompt=_STRING,
            stop=_list(_STRING),
            usage=_ref("Usage"),
            timings=_ref("Timings"),
        ),
        "Output": _object(
            index=_INTEGER,
            text=_STRING,
            finish_reason={"type": "string", "enum": ["stop", "length", "cancelled", "error"]},
            stop_reason=_STRING,
            rationale=_STRING,
            answer=_optional(_STRING),
            logprobs=_list(_ref("TokenLogprob")),
        ),
        "TokenLogprob": _object(
            token_id=_INTEGER,
            text=_STRING,
            logprob=_NUMBER,
            top=_list(_object(token_id=_INTEGER, text=_STRING, logprob=_NUMBER)),
        ),
        "Usage": _object(
            prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER, unknown_tokens=_INTEGER
        ),
        "Timings": _object(queue_ms=_NUMBER, first_token_ms=_optional(_NUMBER), total_ms=_NUMBER),
        "ScoreResponse": _object(
            request_id=_STRING,
            model=_STRING,
            candidates=_list(
                _object(
                    text=_STRING,
                    logprob=_NUMBER,
                    num_tokens=_INTEGER,
                    logprob_per_token=_NUMBER,
                    probability=_NUMBER,
                )
            ),
            best=_INTEGER,
            usage=_ref("Usage"),
            timings=_ref("Timings"),
        ),
        "TokenizeResponse": _object(token_ids=_list(_INTEGER), num_tokens=_INTEGER, unknown_tokens=_INTEGER),
        "ModelList": _object(object=_STRING, data=_list(_ref("Model"))),
        "Model": _object(
            id=_STRING,
            object=_STRING,
            created=_INTEGER,
            owned_by=_STRING,
            root=_STRING,
            parent=_optional(_STRING),
            max_model_len=_INTEGER,
            runtime=_STRING,
            dtype=_STRING,
            architecture=_STRING,
            max_input_tokens=_INTEGER,
            max_output_tokens=_INTEGER,
            modes=_list(_STRING),
        ),
    }


def _openai_responses() -> Json:
    choice = {"index": _INTEGER, "finish_reason": _STRING, "stop_reason": _optional(_STRING)}
    whole = {"id": _STRING, "object": _STRING, "created": _INTEGER, "model": _STRING, "usage": _ref("Usage")}
    logprobs = _object(
        tokens=_list(_STRING),
        token_logprobs=_list(_NUMBER),
        top_logprobs=_list({"type": "object", "additionalProperties": _NUMBER}),
        text_offset=_list(_INTEGER),
    )
    token = {"token": _STRING, "logprob": _NUMBER, "bytes": _list(_INTEGER)}
    chat_logprobs = _object(content=_list(_object(**token, top_logprobs=_list(_object(**token)))))
    message = _object(role=_STRING, content=_STRING)
    return {
        "CompletionResponse": _object(
            **whole, choices=_list(_object(**choice, text=_STRING, logprobs=_optional(logprobs)))
        ),
        "ChatResponse": _object(
            **whole, choices=_list(_object(**choice, message=message, logprobs=_optional(chat_logprobs)))
        ),
    }


def _tgi_responses() -> Json:
    token: Json = _object(id=_INTEGER, text=_STRING, logprob=_NUMBER, special=_BOOLEAN)
    prefill = _list(_object(id=_INTEGER, text=_STRING, logprob=_optional(_NUMBER)))
    reason: Json = {"type": "string", "enum": ["length", "eos_token", "stop_sequence"]}
    ended = {"finish_reason": reason, "generated_tokens": _INTEGER, "seed": _optional(_INTEGER)}
    made = {**ended, "prefill": prefill, "tokens": _list(token), "top_tokens": _list(_list(token))}
    details = _object(**made, best_of_sequences=_list(_object(generated_text=_STRING, **made)))
    whole = _object(generated_text=_STRING, details=details)
    error_types = sorted({*TGI_TYPES.values(), "unauthorized"})  # of a key it knows nothing: our own word
    limits = ("max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_tokens", "max_total_tokens")
    return {
        "TgiResponse": whole,
        "TgiAsAskedResponse": _list(whole),
        "TgiEvent": _object(
            index=_INTEGER,
            token=token,
            top_tokens=_list(token),
            generated_text=_optional(_STRING),
            details=_optional(_object(**ended, input_length=_INTEGER)),
        ),
        "TgiInfo": _object(model_id=_STRING, **dict.fromkeys(limits, _INTEGER), version=_STRING),
        "TgiError": _object(error=_STRING, error_type={"type": "string", "enum": error_types}),
    }


def _error() -> Json:
    kinds = [kind for kind in STATUSES if kind not in ("error", "cancelled")]
    types = sorted({kind for _, kind in STATUSES.values()})
    return _object(
        error=_object(
            message=_STRING,
            type={"type": "string", "enum": types},
            param=_optional(_STRING),
            code={"type": "string", "enum": kinds},
        )
    )


def _object(**properties: Any) -> Json:
    return {"type": "object", "properties": properties}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _optional(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _header(name: str, description: str) -> Json:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": _STRING}
