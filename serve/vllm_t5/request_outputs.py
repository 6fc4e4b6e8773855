"""`RequestOutput.encoder_prompt_token_ids`: vLLM has the field and leaves it empty; here it is the encoder's ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.vllm_t5.hooks import Hook, wrap

IDS = "_flan_t5_encoder_ids"  # attribute of vLLM's RequestState

CREATED = Hook(
    "vllm.v1.engine.output_processor",
    "RequestState",
    "from_new_request",
    ("cls", "tokenizer", "request", "prompt", "parent_req", "request_index", "queue", "log_stats", "stream_interval"),
)
ANSWERED = Hook(
    "vllm.v1.engine.output_processor",
    "RequestState",
    "_new_request_output",
    ("self", "external_req_id", "outputs", "finished", "kv_transfer_params", "ec_transfer_params", "error"),
)


def install() -> None:
    """Wrap vLLM's request state, once a process."""
    wrap(CREATED, _remembering)
    wrap(ANSWERED, _telling)


def encoder_ids(features: Any) -> list[int] | None:
    """The ids in a request's only text item; None for a request of another kind."""
    for feature in features or ():
        if feature.modality == "text" and feature.data is not None:
            return [int(number) for number in feature.data["encoder_ids"].data.flatten().tolist()]
    return None


def _remembering(inner: Callable[..., Any]) -> Callable[..., Any]:
    def from_new_request(cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = inner(cls, tokenizer, request, *args, **kwargs)
        setattr(state, IDS, encoder_ids(request.mm_features))
        return state

    return from_new_request


def _telling(inner: Callable[..., Any]) -> Callable[..., Any]:
    def new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        ids = getattr(self, IDS, None)
        if ids is not None:
            output.encoder_prompt_token_ids = ids
        return output

    return new_request_output
