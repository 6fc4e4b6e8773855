"""The per-request sampling fields: names, ranges, defaults, and how they are resolved.

`SamplingFields` is what a client said (None = not said); `SamplingParams` is what is in effect. Nothing but
`resolve` turns one into the other. Precedence: request > checkpoint's generation config > server default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from serve.errors import InvalidRequest

GREEDY_TEMPERATURE = 1e-5  # at or below this a temperature means greedy: 1e-9 behaves as 0
MAX_SEQUENCES = 64
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingFields:
    """Sampling fields as asked; None means absent, so that 0 can be said. Names as on the wire."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: tuple[str, ...] | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters in effect; every value is inside its range.

    `logprobs` is None when none are returned; 0 returns the chosen token's only; k adds the k best.
    `temperature` is exactly 0.0 when decoding is greedy.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What holds where the request is silent: the server's settings under the checkpoint's generation config.

    `generation_config` holds only sampling fields that the checkpoint's file really sets.
    """

    default_max_tokens: int = 256
    max_output_tokens: int = 512
    generation_config: Mapping[str, float | int] = field(default_factory=dict)


def resolve(asked: SamplingFields, defaults: SamplingDefaults, *, tokenizer_size: int) -> SamplingParams:
    """Check ranges and fill defaults.

    `max_tokens` above `defaults.max_output_tokens` is clamped, not refused; the response says what is in effect.

    Raises:
        InvalidRequest: naming the field.
    """
    _check_ranges(asked, tokenizer_size)
    chosen: dict[str, Any] = {"max_tokens": defaults.default_max_tokens, **defaults.generation_config}
    for item in fields(SamplingFields):
        value = getattr(asked, item.name)
        if value is not None:
            chosen[item.name] = value
    if asked.min_tokens is not None and asked.min_tokens > chosen["max_tokens"]:
        raise InvalidRequest(f"min_tokens must be at most max_tokens ({chosen['max_tokens']})", field="min_tokens")
    chosen["max_tokens"] = min(chosen["max_tokens"], defaults.max_output_tokens)
    chosen["min_tokens"] = min(chosen.get("min_tokens", 0), chosen["max_tokens"])
    if chosen.get("temperature", 0.0) <= GREEDY_TEMPERATURE:
        chosen["temperature"] = 0.0
    return SamplingParams(**chosen)


def _check_ranges(asked: SamplingFields, tokenizer_size: int) -> None:
    _check_int("max_tokens", asked.max_tokens, 1, INT64_MAX)
    _check_int("min_tokens", asked.min_tokens, 0, INT64_MAX)
    _check_float("temperature", asked.temperature, 0.0, 2.0)
    _check_float("top_p", asked.top_p, 0.0, 1.0, exclusive_low=True)
    _check_int("top_k", asked.top_k, 0, INT64_MAX)
    _check_float("repetition_penalty", asked.repetition_penalty, 0.0, math.inf, exclusive_low=True)
    _check_int("seed", asked.seed, INT64_MIN, INT64_MAX)
    _check_int("n", asked.n, 1, MAX_SEQUENCES)
    _check_int("logprobs", asked.logprobs, 0, MAX_LOGPROBS)
    if asked.stop is not None:
        if len(asked.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings", field="stop")
        if any(text == "" for text in asked.stop):
            raise InvalidRequest("stop must not contain an empty string", field="stop")
    for token_id, bias in (asked.logit_bias or {}).items():
        if not 0 <= token_id < tokenizer_size:
            raise InvalidRequest(
                f"logit_bias has token id {token_id}; ids are 0 to {tokenizer_size - 1}", field="logit_bias"
            )
        _check_float("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _check_int(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not low <= value <= high:
        bounds = f"at least {low}" if high == INT64_MAX and low > INT64_MIN else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {bounds}, not {value}", field=name)


def _check_float(name: str, value: float | None, low: float, high: float, *, exclusive_low: bool = False) -> None:
    if value is None:
        return
    inside = (low < value if exclusive_low else low <= value) and value <= high and not math.isinf(value)
    if not inside or math.isnan(value):
        opening = "(" if exclusive_low else "["
        closing = "infinity)" if math.isinf(high) else f"{high:g}]"
        raise InvalidRequest(f"{name} must be in {opening}{low:g}, {closing}, not {value}", field=name)
