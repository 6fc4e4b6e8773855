"""Prompts as token ids that fit: the template's special tokens, the one EOS, the limit, exemplars left out.

Texts of megabytes are judged by their beginning, so that a refusal does not take the seconds that tokenizing takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve import prompts
from serve.errors import InvalidRequest
from serve.request import Exemplar, GenerateRequest, Mode, PreparedPrompt, ScoreRequest
from serve.sampling_params import SamplingDefaults
from serve.tokenizer import Tokenizer

# Of a text with many more characters than this times the limit, so many are looked at first.
_CHARACTERS_PER_TOKEN = 32
_CUT_TOKENS = 64  # more than a cut in the middle of a word can add


@dataclass(frozen=True, slots=True)
class PrepareContext:
    """What requests are prepared against; fixed once the model is loaded.

    `in_chat`: prompts are turns of the checkpoint's own chat template (of a decoder-only model that was not trained
    on our prompt formats). `context_length`: prompt and answer together, where the model has a bound.
    """

    tokenizer: Tokenizer
    is_encoder_decoder: bool = True
    in_chat: bool = False
    context_length: int | None = None
    max_input_tokens: int = 2048
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    exemplar_sets: Mapping[str, tuple[Exemplar, ...]] = field(default_factory=dict)


def fit(
    request: GenerateRequest | ScoreRequest,
    exemplars: tuple[Exemplar, ...],
    context: PrepareContext,
    truncate: int | None,
) -> tuple[PreparedPrompt, int]:
    """The prompt with as many of the last exemplars as the limit allows, and how many those are."""
    instruction = "" if request.instruction is None else request.instruction
    where = to_shorten(request)

    def fitting(kept: int) -> PreparedPrompt | None:
        parts = (request.mode, instruction, request.input, request.options, exemplars[len(exemplars) - kept :])
        text = prompts.render(*parts)
        if kept > 0 and far_beyond(text, context.max_input_tokens, context.tokenizer) is not None:
            return None
        if _is_told_in_turns(request.mode, context):
            if kept == 0 and truncate is None:
                check_not_far_beyond(text, where, context)
            shown, ids = context.tokenizer.encode_chat(prompts.chat.turns(*parts))
            prompt = cut(ids, shown, where, context, truncate)
        else:
            prompt = tokenize(text, where, context, truncate)
        if kept == 0:
            return checked(prompt, where, context)
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


def to_shorten(request: GenerateRequest | ScoreRequest) -> str:
    """The field to shorten where the prompt does not fit."""
    if isinstance(request, GenerateRequest) and request.prompts:
        return "prompt"
    if isinstance(request, GenerateRequest) and request.messages:
        return "messages"
    instruction = "" if request.instruction is None else request.instruction
    has_longer_input = request.input is not None and len(request.input) > len(instruction)
    return "input" if has_longer_input else "instruction"


def far_beyond(text: str, limit: int, tokenizer: Tokenizer) -> int | None:
    """About how many tokens `text` has if its beginning alone has more than `limit`; else None."""
    start = _CHARACTERS_PER_TOKEN * limit
    if len(text) <= 2 * start:
        return None
    count = len(tokenizer.encode(text[:start]))
    return count * len(text) // start if count > limit + _CUT_TOKENS else None


def check_not_far_beyond(text: str, where: str, context: PrepareContext) -> None:
    about = far_beyond(text, context.max_input_tokens, context.tokenizer)
    if about is not None:
        limit = context.max_input_tokens
        raise InvalidRequest(f"the prompt has about {about} tokens; the limit is {limit}", field=where)


def _is_told_in_turns(mode: Mode, context: PrepareContext) -> bool:
    """In the turns of the checkpoint's own chat, not in the plain Flan form."""
    return context.in_chat and context.tokenizer.chat_template is not None and mode is not Mode.RAW


def tokenize(text: str, where: str, context: PrepareContext, truncate: int | None) -> PreparedPrompt:
    if truncate is None:
        check_not_far_beyond(text, where, context)
    ids = context.tokenizer.encode(text)
    if context.is_encoder_decoder:
        ids = end_in_eos(ids, context.tokenizer)
    return cut(ids, text, where, context, truncate)


def cut(
    ids: tuple[int, ...], text: str | None, where: str, context: PrepareContext, truncate: int | None
) -> PreparedPrompt:
    if len(ids) <= int(context.is_encoder_decoder):  # nothing, or EOS alone (which `truncate: 1` may leave, below)
        raise InvalidRequest(f"{where} must not be empty", field=where)
    if truncate is not None:
        if truncate < 1:
            raise InvalidRequest(f"truncate must be at least 1, not {truncate}", field="truncate")
        ids = ids[-truncate:]
    return PreparedPrompt(ids, context.tokenizer.count_unknown(ids), text)


def checked(prompt: PreparedPrompt, where: str, context: PrepareContext) -> PreparedPrompt:
    count, limit = len(prompt.token_ids), context.max_input_tokens
    if count > limit:
        raise InvalidRequest(f"the prompt has {count} tokens; the limit is {limit}", field=where)
    return prompt


def end_in_eos(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.eos_id is None:
        return ids
    end = len(ids)
    while end > 0 and ids[end - 1] == tokenizer.eos_id:
        end -= 1
    return (*ids[:end], tokenizer.eos_id)
