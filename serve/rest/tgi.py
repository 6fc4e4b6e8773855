"""Text Generation Inference's requests to the domain's; unknown fields are ignored.

A field that would change the result and that we cannot honour is refused, never passed over in silence.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum

from serve.errors import InvalidRequest
from serve.request import GenerateRequest, Mode
from serve.rest.fields import Field, Flag, Integer, Number, Object, Table, Text, Texts, parse
from serve.rest.json_text import Json
from serve.rest.request_fields import SAMPLING_FIELDS
from serve.sampling_params import MAX_LOGPROBS, MAX_SEQUENCES, MAX_STOP_STRINGS, SamplingFields

# A drawn seed goes back to the client, whose JSON numbers may be doubles.
_DRAWN_SEEDS = 2**53


class Answer(Enum):
    """How a route answers."""

    OBJECT = "object"  # POST /generate
    STREAM = "stream"  # POST /generate_stream
    AS_ASKED = "as asked"  # POST /: a stream where the body says so, else a list of one object


@dataclass(frozen=True, slots=True)
class TgiRequest:
    """A request as asked, and how the response is to look.

    `echoed`: the prompt that stands before the text, "" without `return_full_text`. `seed`: what `details` tells,
    None where nothing was drawn by it.
    """

    request: GenerateRequest
    details: bool = False
    echoed: str = ""
    as_list: bool = False
    seed: int | None = None


PARAMETER_FIELDS: Table = {
    "max_new_tokens": Field(
        Integer(low=1, enforced=True),
        "Most tokens of the text; above the server's limit it is lowered to that. Default: the server's, 256.",
    ),
    "do_sample": Field(
        Flag(), "Sample, where no other field asks for it: temperature not 1, top_k, or top_p below 1. Default: false."
    ),
    "temperature": Field(Number(0, 2, excludes_low=True), "Randomness of sampling. Default: 1."),
    "top_k": Field(SAMPLING_FIELDS["top_k"].kind, SAMPLING_FIELDS["top_k"].help),
    "top_p": Field(SAMPLING_FIELDS["top_p"].kind, SAMPLING_FIELDS["top_p"].help),
    "repetition_penalty": SAMPLING_FIELDS["repetition_penalty"],
    "seed": Field(Integer(), "Makes sampling repeatable. Default: drawn, and told in `details`."),
    "stop": Field(
        Texts(or_one=True, most=MAX_STOP_STRINGS), "Texts that end the output, none empty; they are not part of it."
    ),
    "best_of": Field(
        Integer(1, MAX_SEQUENCES, enforced=True),
        "Sample so many texts, return the likeliest per token. Needs sampling, no seed, no stream. Default: 1.",
    ),
    "return_full_text": Field(Flag(), "Put the prompt before `generated_text`. Default: false."),
    "truncate": Field(Integer(low=1, enforced=True), "Keep the last so many tokens of the prompt."),
    "details": Field(Flag(), "Return tokens, log-probabilities, finish reason and seed. Default: false."),
    "decoder_input_details": Field(
        Flag(), "The prompt's tokens and log-probabilities as `prefill`: decoder-only models, not streamed."
    ),
    "top_n_tokens": Field(
        Integer(0, MAX_LOGPROBS, enforced=True), "So many likeliest alternatives of each token, in `details`."
    ),
    "typical_p": Field(Number(0, 1, excludes_low=True), "Not supported: must be 1."),
    "frequency_penalty": Field(Number(-2, 2), "Not supported: must be 0; repetition_penalty is."),
    "watermark": Field(Flag(), "Not supported: must be false."),
}

GENERATE_FIELDS: Table = {
    "inputs": Field(Text(), "The prompt: the text the model reads, as it is. Not blank.", required=True),
    "parameters": Field(Object(PARAMETER_FIELDS, ignore_unknown=True), "How the text is made and returned."),
}

AS_ASKED_FIELDS: Table = {
    **GENERATE_FIELDS,
    "stream": Field(Flag(), "Answer with server-sent events. Default: false."),
}


def to_request(body: Json, *, answer: Answer, timeout_seconds: float | None, is_encoder_decoder: bool) -> TgiRequest:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    said = parse(AS_ASKED_FIELDS if answer is Answer.AS_ASKED else GENERATE_FIELDS, body, ignore_unknown=True)
    given: Json = said.get("parameters", {})
    is_stream = answer is Answer.STREAM or said.get("stream", False)
    parameters = body.get("parameters")
    samples = _samples(given)
    _refuse_unsupported({} if parameters is None else parameters, given)
    _check_best_of(given, is_stream=is_stream, samples=samples)
    wants_prefill = given.get("decoder_input_details", False)
    if wants_prefill and is_encoder_decoder:
        raise InvalidRequest(
            "decoder_input_details must be false: an encoder-decoder model's prompt has no log-probabilities; "
            "POST /v1/score gives those of any continuation",
            field="decoder_input_details",
        )
    if wants_prefill and is_stream:
        raise InvalidRequest("decoder_input_details must be false in a stream", field="decoder_input_details")
    details = given.get("details", False)
    sampling = _sampling(given, samples=samples, needs_logprobs=details or is_stream)
    request = GenerateRequest(
        mode=Mode.RAW,
        prompts=(said["inputs"],),
        sampling=sampling,
        stream=is_stream,
        truncate_prompt_tokens=given.get("truncate"),
        prompt_logprobs=wants_prefill and details,
        timeout_seconds=timeout_seconds,
    )
    return TgiRequest(
        request,
        details=details,
        echoed=said["inputs"] if given.get("return_full_text", False) else "",
        as_list=answer is Answer.AS_ASKED,
        seed=sampling.seed if samples else None,
    )


def _samples(given: Json) -> bool:
    """TGI's rule: greedy, but where a field makes no sense without sampling."""
    return bool(
        given.get("do_sample", False)
        or given.get("temperature", 1.0) != 1.0
        or given.get("top_k", 0) > 0
        or given.get("top_p", 1.0) < 1.0
    )


def _sampling(given: Json, *, samples: bool, needs_logprobs: bool) -> SamplingFields:
    best_of, seed = given.get("best_of", 1), given.get("seed")
    if samples and seed is None and best_of == 1:
        seed = secrets.randbelow(_DRAWN_SEEDS)
    logprobs = given.get("top_n_tokens", 0) if needs_logprobs or best_of > 1 else None
    return SamplingFields(
        temperature=given.get("temperature", 1.0) if samples else 0.0,
        top_p=given.get("top_p", 1.0),
        top_k=given.get("top_k", 0),
        max_tokens=given.get("max_new_tokens"),
        repetition_penalty=given.get("repetition_penalty"),
        stop=given.get("stop"),
        seed=seed,
        n=best_of,
        logprobs=logprobs,
    )


def _check_best_of(given: Json, *, is_stream: bool, samples: bool) -> None:
    if given.get("best_of", 1) == 1:
        return
    if is_stream:
        raise InvalidRequest("best_of must be 1 in a stream", field="best_of")
    if not samples:
        raise InvalidRequest("best_of needs sampling; set do_sample", field="best_of")
    if "seed" in given:
        raise InvalidRequest("best_of and seed exclude each other", field="seed")


def _refuse_unsupported(parameters: Json, given: Json) -> None:
    if "temperature" in given and not given["temperature"] > 0:
        raise InvalidRequest("temperature must be above 0; leave it out for greedy decoding", field="temperature")
    if given.get("typical_p", 1.0) != 1.0:
        raise InvalidRequest("typical_p is not supported; top_p is", field="typical_p")
    if given.get("frequency_penalty", 0.0) != 0.0:
        raise InvalidRequest("frequency_penalty is not supported; repetition_penalty is", field="frequency_penalty")
    if given.get("watermark", False):
        raise InvalidRequest("watermark is not supported", field="watermark")
    for name in ("grammar", "adapter_id"):  # of any type, so they are not in the table
        if parameters.get(name) is not None:
            raise InvalidRequest(f"{name} is not supported", field=name)
