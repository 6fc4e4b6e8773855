"""The keyword arguments of FlanClient's calls: the request fields of the contract, spelt as on the wire.

A field left out, or None, means the server's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from serve.request import Exemplar, Mode

ExemplarLike = Exemplar | Mapping[str, str]


class PromptFields(TypedDict, total=False):
    """What the prompt is rendered from."""

    mode: Mode | Literal["raw", "instruction", "few_shot", "cot"] | None
    input: str | None
    options: Sequence[str] | None
    exemplars: Sequence[ExemplarLike] | None
    exemplar_set: str | None
    num_exemplars: int | None
    model: str | None
    request_id: str | None


class GenerateFields(PromptFields, total=False):
    """Fields of a generation request beside `instruction`; README, "A generation request", has their ranges."""

    samples: int | None
    answer_format: Literal["text", "number"] | None
    debug: bool | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    logit_bias: Mapping[int, float] | None
