"""A request as asked becomes a request as accepted: rendered, tokenized, fitted to the limit, checked. Pure.

Everything that makes a request a 400 is found here (ranges in `sampling_params.resolve`), with the field's name as
spelt on the wire. May take seconds for a prompt of some MB, so the service runs it in a worker thread then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from serve import prompts
from serve.errors import InvalidRequest
from serve.exemplars import MAX_EXEMPLARS, select
from serve.prompt_fitting import (
    PrepareContext,
    check_not_far_beyond,
    checked,
    cut,
    end_in_eos,
    far_beyond,
    fit,
    to_shorten,
    tokenize,
)
from serve.request import (
    ChatMessage,
    GenerateRequest,
    Mode,
    PreparedPrompt,
    PreparedRequest,
    PreparedScore,
    ScoreRequest,
)
from serve.sampling_params import MAX_SEQUENCES, SamplingFields, SamplingParams, resolve
from serve.tokenizer import check_text

MAX_OPTIONS = 256
MAX_CANDIDATES = 1024
MAX_PROMPTS = 1024
MAX_REQUEST_SEQUENCES = 2048  # prompts · n
SELF_CONSISTENCY_TEMPERATURE = 0.7  # of samples > 1 where nobody says a temperature: greedy samples would be alike
_CHARACTERS_PER_CALL = 32  # a text costs as much beyond its length


def prepare(
    request: GenerateRequest, context: PrepareContext, request_id: str, timeout_seconds: float | None = None
) -> PreparedRequest:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    _check_counts(request)
    _check_texts(request)
    samples = _samples(request)
    sampling = _sampling(request, samples, context)
    used = dropped = 0
    if request.prompts or request.messages:
        prepared = _ready_made_prompts(request, context)
    else:
        _check_prompt_fields(request, context)
        exemplars = select(request, context.exemplar_sets)
        prompt, used = fit(request, exemplars, context, request.truncate_prompt_tokens)
        prepared, dropped = (prompt,), len(exemplars) - used
    if len(prepared) * sampling.n > MAX_REQUEST_SEQUENCES:
        raise InvalidRequest(f"prompts times n must be at most {MAX_REQUEST_SEQUENCES}", field="n")
    if request.prompt_logprobs and context.is_encoder_decoder:
        raise InvalidRequest("an encoder-decoder model's prompt has no log-probabilities", field="echo")
    sampling = _within_context(sampling, prepared, to_shorten(request), context)
    return PreparedRequest(
        request_id=request_id,
        mode=request.mode,
        prompts=prepared,
        sampling=sampling,
        samples=samples,
        answer_format=request.answer_format,
        exemplars_used=used,
        exemplars_dropped=dropped,
        debug=request.debug,
        timeout_seconds=timeout_seconds,
        prompt_logprobs=request.prompt_logprobs,
    )


def _within_context(
    sampling: SamplingParams, prepared: Sequence[PreparedPrompt], where: str, context: PrepareContext
) -> SamplingParams:
    """`max_tokens` is clamped to what the longest prompt leaves of the model's context, as to the server's limit."""
    room = _room(max(len(prompt.token_ids) for prompt in prepared), where, context)
    if room is None or room >= sampling.max_tokens:
        return sampling
    return replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


def _room(prompt_tokens: int, where: str, context: PrepareContext) -> int | None:
    """How many tokens a prompt leaves of the model's context, at least one; None where the model has no bound.

    Args:
        where: the field to shorten where it leaves none.
    """
    if context.context_length is None:
        return None
    room = context.context_length - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens; the model's context has {context.context_length}, answer included",
            field=where,
        )
    return room


def prepare_score(
    request: ScoreRequest, context: PrepareContext, request_id: str, timeout_seconds: float | None = None
) -> PreparedScore:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    _check_counts(request)
    _check_texts(request)
    _check_prompt_fields(request, context)
    if not request.candidates:
        raise InvalidRequest("candidates must hold at least one text", field="candidates")
    _check_none_blank("candidates", request.candidates)
    exemplars = select(request, context.exemplar_sets)
    prompt, _ = fit(request, exemplars, context, None)
    room = _room(len(prompt.token_ids), to_shorten(request), context)
    candidates = tuple(_candidate_ids(text, context) for text in request.candidates)
    longest = max(map(len, candidates))
    if room is not None and longest > room:
        raise InvalidRequest(
            f"a candidate has {longest} tokens; the prompt leaves {room} of the model's context", field="candidates"
        )
    return PreparedScore(request_id, prompt, request.candidates, candidates, timeout_seconds)


def num_characters(request: GenerateRequest | ScoreRequest, context: PrepareContext, enough: int) -> int:
    """How much text there is to tokenize, about, counted up to `enough`: may that be done on the event loop?"""
    count = 0
    for text in _texts_of(request, context):
        count += len(text) + _CHARACTERS_PER_CALL if text is not None else 0
        if count > enough:
            break
    return count


def _texts_of(
    request: GenerateRequest | ScoreRequest, context: PrepareContext
) -> Iterator[str | tuple[int, ...] | None]:
    """Everything that is read or tokenized; token ids count too."""
    yield from (request.instruction, request.input)
    yield from request.options
    exemplars = request.exemplars
    if request.exemplar_set is not None:
        exemplars = context.exemplar_sets.get(request.exemplar_set, ())
    for exemplar in exemplars:
        yield from (exemplar.input, exemplar.output, exemplar.rationale)
    if isinstance(request, ScoreRequest):
        yield from request.candidates
    else:
        yield from request.prompts
        yield from (message.content for message in request.messages)
        yield from _stop_strings(request.sampling)


def _candidate_ids(text: str, context: PrepareContext) -> tuple[int, ...]:
    limit = context.defaults.max_output_tokens
    about = far_beyond(text, limit, context.tokenizer)
    if about is not None:
        raise InvalidRequest(f"a candidate has about {about} tokens; the limit is {limit}", field="candidates")
    ids = context.tokenizer.encode(text, add_special_tokens=False)
    if context.is_encoder_decoder:
        ids = end_in_eos(ids, context.tokenizer)
    if not 0 < len(ids) <= limit:
        raise InvalidRequest(f"a candidate has {len(ids)} tokens; the limit is 1 to {limit}", field="candidates")
    return ids


def _samples(request: GenerateRequest) -> int:
    if request.samples is None:
        return 1
    if request.mode is not Mode.COT:
        raise InvalidRequest("samples is for mode cot; use n in other modes", field="samples")
    if not 1 <= request.samples <= MAX_SEQUENCES:
        raise InvalidRequest(f"samples must be between 1 and {MAX_SEQUENCES}, not {request.samples}", field="samples")
    if request.samples > 1 and request.sampling.n is not None and request.sampling.n > 1:
        raise InvalidRequest("n and samples exclude each other; samples makes the sequences that vote", field="n")
    return request.samples


def _sampling(request: GenerateRequest, samples: int, context: PrepareContext) -> SamplingParams:
    asked = request.sampling if samples == 1 else replace(request.sampling, n=samples)
    sampling = resolve(asked, context.defaults, tokenizer_size=context.tokenizer.size)
    if samples > 1 and asked.temperature is None and sampling.greedy:
        return replace(sampling, temperature=SELF_CONSISTENCY_TEMPERATURE)
    return sampling


def _ready_made_prompts(request: GenerateRequest, context: PrepareContext) -> tuple[PreparedPrompt, ...]:
    """Prompts of the OpenAI and TGI routes, taken as they are; or a chat."""
    truncate = request.truncate_prompt_tokens
    if request.messages:
        return (_chat_prompt(request.messages, truncate, context),)
    return tuple(_ready_made_prompt(prompt, truncate, context) for prompt in request.prompts)


def _chat_prompt(messages: Sequence[ChatMessage], truncate: int | None, context: PrepareContext) -> PreparedPrompt:
    """A chat in the checkpoint's own form if it has one, else in the documented Flan rendering."""
    if not any(message.content.strip() for message in messages):
        raise InvalidRequest("messages must hold some text", field="messages")
    if context.tokenizer.chat_template is None:
        prompt = tokenize(prompts.chat.render(messages), "messages", context, truncate)
    else:
        text, ids = context.tokenizer.encode_chat(messages)
        ids = end_in_eos(ids, context.tokenizer) if context.is_encoder_decoder else ids
        prompt = cut(ids, text, "messages", context, truncate)
    return checked(prompt, "messages", context)


def _ready_made_prompt(prompt: str | tuple[int, ...], truncate: int | None, context: PrepareContext) -> PreparedPrompt:
    if isinstance(prompt, str):
        _check_not_blank("prompt", prompt)
        return checked(tokenize(prompt, "prompt", context, truncate), "prompt", context)
    ids = end_in_eos(prompt, context.tokenizer) if context.is_encoder_decoder else prompt
    prepared = checked(cut(ids, None, "prompt", context, truncate), "prompt", context)
    last = context.tokenizer.size - 1
    for token_id in prepared.token_ids:
        if not 0 <= token_id <= last:
            raise InvalidRequest(f"prompt has token id {token_id}; ids are 0 to {last}", field="prompt")
    return prepared


def _check_prompt_fields(request: GenerateRequest | ScoreRequest, context: PrepareContext) -> None:
    if request.instruction is None:
        raise InvalidRequest("instruction is required", field="instruction")
    _check_not_blank("instruction", request.instruction)
    _check_none_blank("options", request.options)
    if request.mode is Mode.RAW:
        if request.input is not None and request.input.strip():
            raise InvalidRequest("in mode raw the instruction is the whole prompt; leave input out", field="input")
        if request.options:
            raise InvalidRequest("in mode raw the instruction is the whole prompt; leave options out", field="options")
    for name, text in (("instruction", request.instruction), ("input", request.input)):
        if text is not None:
            check_not_far_beyond(text, name, context)


def _check_not_blank(name: str, text: str) -> None:
    if not text.strip():
        raise InvalidRequest(f"{name} must not be blank", field=name)


def _check_none_blank(name: str, texts: Sequence[str]) -> None:
    for text in texts:
        if not text.strip():
            raise InvalidRequest(f"{name} must not hold a blank text", field=name)


def _check_counts(request: GenerateRequest | ScoreRequest) -> None:
    """Before anything looks at each of them."""
    for name, most in (("exemplars", MAX_EXEMPLARS), ("options", MAX_OPTIONS)):
        if len(getattr(request, name)) > most:
            raise InvalidRequest(f"{name} takes at most {most}", field=name)
    if isinstance(request, ScoreRequest):
        if len(request.candidates) > MAX_CANDIDATES:
            raise InvalidRequest(f"candidates takes at most {MAX_CANDIDATES}", field="candidates")
    elif len(request.prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt takes at most {MAX_PROMPTS} prompts", field="prompt")


def _check_texts(request: GenerateRequest | ScoreRequest) -> None:
    """Every text of the request is well-formed Unicode without NUL."""
    named: list[tuple[str, str | None]] = [("instruction", request.instruction), ("input", request.input)]
    named += [("options", text) for text in request.options]
    for exemplar in request.exemplars:
        named += [("exemplars", text) for text in (exemplar.input, exemplar.output, exemplar.rationale)]
    if isinstance(request, ScoreRequest):
        named += [("candidates", text) for text in request.candidates]
    else:
        named += [("prompt", prompt) for prompt in request.prompts if isinstance(prompt, str)]
        named += [("messages", message.content) for message in request.messages]
        named += [("stop", text) for text in _stop_strings(request.sampling)]
    for name, text in named:
        if text is not None:
            check_text(name, text)


def _stop_strings(sampling: SamplingFields) -> tuple[str, ...]:
    return () if sampling.stop is None else sampling.stop
