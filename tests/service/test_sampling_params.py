from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from serve.errors import InvalidRequest
from serve.sampling_params import (
    INT64_MAX,
    INT64_MIN,
    SamplingDefaults,
    SamplingFields,
    SamplingParams,
    resolve,
)

NAN, INF = float("nan"), float("inf")


def resolved(defaults: SamplingDefaults | None = None, **asked: Any) -> SamplingParams:
    return resolve(SamplingFields(**asked), SamplingDefaults() if defaults is None else defaults, tokenizer_size=100)


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("max_tokens", [1, 10**9], [0, -1]),
        ("min_tokens", [0, 256], [-1, 257]),
        ("temperature", [0.0, 1e-9, 0.7, 2.0], [-0.1, 2.01, NAN, INF, -INF]),
        ("top_p", [1e-9, 0.5, 1.0], [0.0, -1.0, 1.01, NAN, INF]),
        ("top_k", [0, 10**6], [-1]),
        ("repetition_penalty", [0.01, 1.0, 1000.0], [0.0, -1.0, NAN, INF]),
        ("n", [1, 64], [0, 65, -3]),
        ("logprobs", [0, 20], [-1, 21]),
        ("seed", [INT64_MIN, -1, 0, INT64_MAX], [INT64_MIN - 1, INT64_MAX + 1]),
        ("stop", [(), ("a",) * 16], [("",), ("a", ""), ("a",) * 17]),
        ("logit_bias", [{}, {0: -100.0, 99: 100.0}], [{-1: 1.0}, {100: 1.0}, {5: 100.1}, {5: -101.0}, {5: NAN}]),
    ],
)
def test_ranges(field: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        resolved(**{field: value})
    for value in outside:
        with pytest.raises(InvalidRequest) as caught:
            resolved(**{field: value})
        assert caught.value.field == field
        assert field in caught.value.message


def test_every_field_is_in_the_range_table_or_cannot_be_wrong() -> None:
    [mark] = [mark for mark in test_ranges.pytestmark if mark.name == "parametrize"]
    checked = {row[0] for row in mark.args[1]}
    assert {item.name for item in fields(SamplingFields)} - checked == {"ignore_eos", "skip_special_tokens"}


def test_defaults_are_greedy() -> None:
    assert resolved() == SamplingParams(max_tokens=256)
    assert resolved().greedy


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    params = resolved(temperature=temperature)
    assert (params.temperature, params.greedy) == (0.0, True)
    assert not resolved(temperature=0.01).greedy


def test_max_tokens_is_clamped_not_refused() -> None:
    assert resolved(max_tokens=100_000).max_tokens == 512
    assert resolved(max_tokens=3).max_tokens == 3
    assert resolved(SamplingDefaults(default_max_tokens=256, max_output_tokens=100)).max_tokens == 100


def test_min_tokens_up_to_max_tokens() -> None:
    assert resolved(max_tokens=5, min_tokens=5).min_tokens == 5
    with pytest.raises(InvalidRequest, match=r"max_tokens \(5\)"):
        resolved(max_tokens=5, min_tokens=6)
    assert resolved(max_tokens=1000, min_tokens=900).min_tokens == 512  # clamped like max_tokens


def test_precedence_request_then_checkpoint_then_server() -> None:
    defaults = SamplingDefaults(generation_config={"temperature": 0.5, "top_k": 7})
    params = resolved(defaults, top_k=3)
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 3, 1.0)
    assert resolved(defaults, temperature=0.0).greedy  # 0 can be said
    assert resolved(defaults, top_k=0).top_k == 0


def test_everything_said_arrives() -> None:
    asked: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 4,
        "repetition_penalty": 1.5,
        "seed": -7,
        "n": 3,
        "stop": ("a", "b"),
        "logprobs": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logit_bias": {3: 1.0},
    }
    params = resolved(**asked)
    assert {name: getattr(params, name) for name in asked} == asked
    assert set(asked) == {item.name for item in fields(SamplingParams)}


def test_lengths_too_go_from_request_to_checkpoint_to_server() -> None:
    defaults = SamplingDefaults(256, 512, generation_config={"max_tokens": 64, "min_tokens": 5})
    silent = resolve(SamplingFields(), defaults, tokenizer_size=100)
    assert (silent.max_tokens, silent.min_tokens) == (64, 5)
    asked = resolve(SamplingFields(max_tokens=3, min_tokens=0), defaults, tokenizer_size=100)
    assert (asked.max_tokens, asked.min_tokens) == (3, 0)
    short = resolve(SamplingFields(max_tokens=3), defaults, tokenizer_size=100)
    assert (short.max_tokens, short.min_tokens) == (3, 3)
