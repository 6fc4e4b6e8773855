"""A request as asked becomes a request as accepted: rendered, tokenized, fitted to the limit, checked. Pure.

Everything that makes a request a 400 is found here (ranges in `sampling_params.resolve`), with the field's name as
spelt on the wire. May take seconds for a prompt of some MB, so the service runs it in a worker thread then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve import prompts
from serve.errors import InvalidRequest
from serve.exemplars import select
from serve.request import (
    ChatMessage,
    Exemplar,
    GenerateRequest,
    Mode,
    PreparedPrompt,
    PreparedRequest,
    PreparedScore,
    ScoreRequest,
)
from serve.sampling_params import MAX_SEQUENCES, SamplingDefaults, SamplingFields, SamplingParams, resolve
from serve.tokenizer import Tokenizer, check_text

MAX_OPTIONS = 256
MAX_CANDIDATES = 1024
MAX_PROMPTS = 1024
MAX_REQUEST_SEQUENCES = 2048  # prompts · n
SELF_CONSISTENCY_TEMPERATURE = 0.7  # of samples > 1 where nobody says a temperature: greedy samples would be alike
# Tokenizing megabytes takes seconds. Of a text with more characters than this times the limit, so many are looked at
# first, and when they alone are beyond the limit the text is not tokenized whole.
_CHARACTERS_PER_TOKEN = 32
_CUT_TOKENS = 64  # more than a cut in the middle of a word can add
_CHARACTERS_PER_CALL = 32  # a text costs as much beyond its length


@dataclass(frozen=True, slots=True)
class PrepareContext:
    """What requests are prepared against; fixed once the model is loaded."""

    tokenizer: Tokenizer
    is_encoder_decoder: bool = True
    max_input_tokens: int = 2048
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    exemplar_sets: Mapping[str, tuple[Exemplar, ...]] = field(default_factory=dict)


def prepare(
    request: GenerateRequest, context: PrepareContext, request_id: str, timeout_seconds: float | None = None
) -> PreparedRequest:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    _check_texts(request)
    samples = _samples(request)
    sampling = _sampling(request, samples, context)
    used = dropped = 0
    if request.prompts or request.messages:
        prepared = _ready_made_prompts(request, context)
    else:
        _check_prompt_fields(request)
        exemplars = select(request, context.exemplar_sets)
        prompt, used = _fit(request, exemplars, context, request.truncate_prompt_tokens)
        prepared, dropped = (prompt,), len(exemplars) - used
    if len(prepared) * sampling.n > MAX_REQUEST_SEQUENCES:
        raise InvalidRequest(f"prompts times n must be at most {MAX_REQUEST_SEQUENCES}", field="n")
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
    )


def prepare_score(
    request: ScoreRequest, context: PrepareContext, request_id: str, timeout_seconds: float | None = None
) -> PreparedScore:
    """
    Raises:
        InvalidRequest: naming the field.
    """
    _check_texts(request)
    _check_prompt_fields(request)
    if not request.candidates:
        raise InvalidRequest("candidates must hold at least one text", field="candidates")
    _check_list("candidates", request.candidates, MAX_CANDIDATES)
    exemplars = select(request, context.exemplar_sets)
    prompt, _ = _fit(request, exemplars, context, None)
    candidates = tuple(_candidate_ids(text, context) for text in request.candidates)
    return PreparedScore(request_id, prompt, request.candidates, candidates, timeout_seconds)


def num_characters(request: GenerateRequest | ScoreRequest, context: PrepareContext) -> int:
    """How much text there is to tokenize, about: it says whether that may be done on the event loop."""
    texts: list[str | None] = [request.instruction, request.input, *request.options]
    exemplars = request.exemplars
    if request.exemplar_set is not None:
        exemplars = context.exemplar_sets.get(request.exemplar_set, ())
    for exemplar in exemplars:
        texts += [exemplar.input, exemplar.output, exemplar.rationale]
    num_ids = 0
    if isinstance(request, ScoreRequest):
        texts += request.candidates
    else:
        texts += [prompt for prompt in request.prompts if isinstance(prompt, str)]
        texts += [message.content for message in request.messages]
        texts += [] if request.sampling.stop is None else request.sampling.stop
        num_ids = sum(len(prompt) for prompt in request.prompts if not isinstance(prompt, str))
    return num_ids + sum(len(text) + _CHARACTERS_PER_CALL for text in texts if text is not None)


def _candidate_ids(text: str, context: PrepareContext) -> tuple[int, ...]:
    limit = context.defaults.max_output_tokens
    about = _far_beyond(text, limit, context.tokenizer)
    if about is not None:
        raise InvalidRequest(f"a candidate has about {about} tokens; the limit is {limit}", field="candidates")
    ids = context.tokenizer.encode(text, add_special_tokens=False)
    if context.is_encoder_decoder:
        ids = _end_in_eos(ids, context.tokenizer)
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
    if len(request.prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt takes at most {MAX_PROMPTS} prompts", field="prompt")
    return tuple(_ready_made_prompt(prompt, truncate, context) for prompt in request.prompts)


def _chat_prompt(messages: Sequence[ChatMessage], truncate: int | None, context: PrepareContext) -> PreparedPrompt:
    """A chat in the checkpoint's own form if it has one, else in the documented Flan rendering."""
    if not any(message.content.strip() for message in messages):
        raise InvalidRequest("messages must hold some text", field="messages")
    if context.tokenizer.chat_template is None:
        prompt = _tokenize(prompts.chat.render(messages), "messages", context, truncate)
    else:
        text, ids = context.tokenizer.encode_chat(messages)
        ids = _end_in_eos(ids, context.tokenizer) if context.is_encoder_decoder else ids
        prompt = _cut(ids, text, "messages", context, truncate)
    return _checked(prompt, "messages", context)


def _ready_made_prompt(prompt: str | tuple[int, ...], truncate: int | None, context: PrepareContext) -> PreparedPrompt:
    if isinstance(prompt, str):
        _check_not_blank("prompt", prompt)
        return _checked(_tokenize(prompt, "prompt", context, truncate), "prompt", context)
    last = context.tokenizer.size - 1
    for token_id in prompt:
        if not 0 <= token_id <= last:
            raise InvalidRequest(f"prompt has token id {token_id}; ids are 0 to {last}", field="prompt")
    ids = _end_in_eos(prompt, context.tokenizer) if context.is_encoder_decoder else prompt
    return _checked(_cut(ids, None, "prompt", context, truncate), "prompt", context)


def _check_prompt_fields(request: GenerateRequest | ScoreRequest) -> None:
    if request.instruction is None:
        raise InvalidRequest("instruction is required", field="instruction")
    _check_not_blank("instruction", request.instruction)
    _check_list("options", request.options, MAX_OPTIONS)
    if request.mode is Mode.RAW:
        if request.input is not None and request.input.strip():
            raise InvalidRequest("in mode raw the instruction is the whole prompt; leave input out", field="input")
        if request.options:
            raise InvalidRequest("in mode raw the instruction is the whole prompt; leave options out", field="options")


def _fit(
    request: GenerateRequest | ScoreRequest,
    exemplars: tuple[Exemplar, ...],
    context: PrepareContext,
    truncate: int | None,
) -> tuple[PreparedPrompt, int]:
    """The prompt with as many of the last exemplars as the limit allows, and how many those are."""
    instruction = "" if request.instruction is None else request.instruction

    def fitting(kept: int) -> PreparedPrompt | None:
        shown = exemplars[len(exemplars) - kept :]
        text = prompts.render(request.mode, instruction, request.input, request.options, shown)
        if kept == 0:
            return _checked(_tokenize(text, "instruction", context, truncate), "instruction", context)
        if _far_beyond(text, context.max_input_tokens, context.tokenizer) is not None:
            return None
        prompt = _tokenize(text, "instruction", context, truncate)
        return prompt if len(prompt.token_ids) <= context.max_input_tokens else None

    best = fitting(len(exemplars))
    if best is not None:
        return best, len(exemplars)
    too_many, kept = len(exemplars), -1
    while kept + 1 < too_many:  # `kept` fits, `too_many` does not
        middle = min(2 * kept + 2, (kept + too_many) // 2)  # from few to many: the few are cheap to try
        prompt = fitting(middle)
        if prompt is None:
            too_many = middle
        else:
            best, kept = prompt, middle
    assert best is not None  # with no exemplar it fits, or was refused
    return best, kept


def _far_beyond(text: str, limit: int, tokenizer: Tokenizer) -> int | None:
    """About how many tokens `text` has if its beginning alone has more than `limit`; else None."""
    start = _CHARACTERS_PER_TOKEN * limit
    if len(text) <= 2 * start:
        return None
    count = len(tokenizer.encode(text[:start]))
    return count * len(text) // start if count > limit + _CUT_TOKENS else None


def _tokenize(text: str, where: str, context: PrepareContext, truncate: int | None) -> PreparedPrompt:
    limit = context.max_input_tokens
    about = _far_beyond(text, limit, context.tokenizer) if truncate is None else None
    if about is not None:
        raise InvalidRequest(f"the prompt has about {about} tokens; the limit is {limit}", field=where)
    ids = context.tokenizer.encode(text)
    if context.is_encoder_decoder:
        ids = _end_in_eos(ids, context.tokenizer)
    return _cut(ids, text, where, context, truncate)


def _cut(
    ids: tuple[int, ...], text: str | None, where: str, context: PrepareContext, truncate: int | None
) -> PreparedPrompt:
    if len(ids) <= int(context.is_encoder_decoder):  # nothing, or EOS alone (which `truncate: 1` may leave, below)
        raise InvalidRequest(f"{where} must not be empty", field=where)
    if truncate is not None:
        if truncate < 1:
            raise InvalidRequest(f"truncate must be at least 1, not {truncate}", field="truncate")
        ids = ids[-truncate:]
    return PreparedPrompt(ids, context.tokenizer.count_unknown(ids), text)


def _checked(prompt: PreparedPrompt, where: str, context: PrepareContext) -> PreparedPrompt:
    count, limit = len(prompt.token_ids), context.max_input_tokens
    if count > limit:
        raise InvalidRequest(f"the prompt has {count} tokens; the limit is {limit}", field=where)
    return prompt


def _end_in_eos(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.eos_id is None:
        return ids
    end = len(ids)
    while end > 0 and ids[end - 1] == tokenizer.eos_id:
        end -= 1
    return (*ids[:end], tokenizer.eos_id)


def _check_not_blank(name: str, text: str) -> None:
    if not text.strip():
        raise InvalidRequest(f"{name} must not be blank", field=name)


def _check_list(name: str, texts: Sequence[str], most: int) -> None:
    if len(texts) > most:
        raise InvalidRequest(f"{name} takes at most {most} texts", field=name)
    for text in texts:
        if not text.strip():
            raise InvalidRequest(f"{name} must not hold a blank text", field=name)


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
