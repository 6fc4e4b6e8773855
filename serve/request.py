"""Requests: as asked (GenerateRequest, ScoreRequest) and as accepted (PreparedRequest, PreparedScore).

Edges build the first kind from the wire; `serve.prepare` turns them into the second; only the second reaches a
runtime. Nothing else converts between them (parse, don't validate).
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from serve.sampling_params import SamplingFields, SamplingParams

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def is_request_id(text: str) -> bool:
    """Whether a caller may name its request so: 1 to 128 characters of A-Z a-z 0-9 . _ : -"""
    return _REQUEST_ID.fullmatch(text) is not None


def new_request_id() -> str:
    return f"req-{secrets.token_hex(12)}"


class Mode(StrEnum):
    """How the prompt is rendered from the request's fields."""

    RAW = "raw"
    INSTRUCTION = "instruction"
    FEW_SHOT = "few_shot"
    COT = "cot"


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A solved case shown in a prompt. `rationale` is shown in cot mode only."""

    input: str
    output: str
    rationale: str | None = None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat; role is system, user or assistant. Text parts are already joined."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A generation request as asked. Field names and meanings: README, "A generation request".

    Exactly one of `instruction`, `prompts` and `messages` carries the prompt. `prompts` (each a text or token ids,
    mode raw) and `messages` come only from the OpenAI and TGI routes. `truncate_prompt_tokens` keeps the last k
    prompt tokens, the final EOS included (TGI's `truncate`). `prompt_logprobs`: those of the prompts' own tokens are
    wanted, too, with `sampling.logprobs` alternatives (OpenAI's echo with logprobs; decoder-only models).
    `timeout_seconds` is relative to acceptance; None = the server's setting.
    """

    mode: Mode = Mode.INSTRUCTION
    instruction: str | None = None
    input: str | None = None
    options: tuple[str, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    exemplar_set: str | None = None
    num_exemplars: int | None = None
    samples: int | None = None
    answer_format: Literal["text", "number"] = "text"
    sampling: SamplingFields = field(default_factory=SamplingFields)
    stream: bool = False
    model: str | None = None
    request_id: str | None = None
    debug: bool = False
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: bool = False
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Score `candidates` as continuations of the rendered prompt."""

    mode: Mode = Mode.INSTRUCTION
    instruction: str | None = None
    input: str | None = None
    options: tuple[str, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    exemplar_set: str | None = None
    num_exemplars: int | None = None
    candidates: tuple[str, ...] = ()
    model: str | None = None
    request_id: str | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """One prompt, ready for a runtime. `token_ids` ends in exactly one EOS for encoder-decoder models."""

    token_ids: tuple[int, ...]
    unknown_tokens: int = 0
    text: str | None = None  # the rendered prompt; None for a token-id prompt


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A generation request as accepted: everything checked, every default filled in.

    A runtime makes `len(prompts) * sampling.n` sequences; sequence index = prompt · n + j. (For cot with samples,
    `sampling.n` is already the number of samples.)
    """

    request_id: str
    mode: Mode
    prompts: tuple[PreparedPrompt, ...]
    sampling: SamplingParams
    samples: int = 1  # self-consistency: > 1 means vote
    answer_format: Literal["text", "number"] = "text"
    exemplars_used: int = 0
    exemplars_dropped: int = 0
    debug: bool = False
    timeout_seconds: float | None = None
    prompt_logprobs: bool = False

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.sampling.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class PreparedScore:
    """A scoring request as accepted. `candidate_token_ids[i]` ends in EOS (encoder-decoder)."""

    request_id: str
    prompt: PreparedPrompt
    candidates: tuple[str, ...]
    candidate_token_ids: tuple[tuple[int, ...], ...]
    timeout_seconds: float | None = None
