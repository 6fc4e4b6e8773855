"""Span corruption: nothing is lost, the sentinels go down, the densities are T5's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.denoising import TextPieces, corrupt
from finetune.example import TextExample

SENTINELS = list(range(32_099, 31_999, -1))
EOS = 1


def mended(inputs: list[int], targets: list[int]) -> list[int]:
    """Put the hidden spans back: the inverse of `corrupt`."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in SENTINELS:
            spans[token] = []
            current = spans[token]
        else:
            current.append(token)
    whole: list[int] = []
    for token in inputs[:-1]:
        whole += spans[token] if token in SENTINELS else [token]
    return whole


@given(st.lists(st.integers(10, 5000), min_size=2, max_size=400), st.integers(0, 10_000), st.sampled_from([0.15, 0.5]))
def test_nothing_is_lost(ids: list[int], seed: int, noise_density: float) -> None:
    inputs, targets = corrupt(
        ids, sentinel_ids=SENTINELS, eos_id=EOS, rng=random.Random(seed), noise_density=noise_density
    )
    assert mended(inputs, targets) == ids
    assert inputs[-1] == targets[-1] == EOS
    assert inputs.count(EOS) == targets.count(EOS) == 1
    used = [token for token in targets if token in SENTINELS]
    assert used == SENTINELS[: len(used)]
    assert [token for token in inputs if token in SENTINELS] == used[:-1]


def test_noise_of_512_tokens_is_t5s() -> None:
    ids = list(range(100, 612))
    inputs, targets = corrupt(ids, sentinel_ids=SENTINELS, eos_id=EOS, rng=random.Random(0))
    hidden = len([token for token in targets if token not in SENTINELS]) - 1
    assert hidden == round(512 * 0.15)
    assert len([token for token in inputs if token in SENTINELS]) == round(hidden / 3)


def test_seeded() -> None:
    def run(seed: int) -> tuple[list[int], list[int]]:
        return corrupt(range(50, 150), sentinel_ids=SENTINELS, eos_id=EOS, rng=random.Random(seed))

    assert run(1) == run(1) != run(2)


def test_few_sentinels_make_few_spans() -> None:
    inputs, targets = corrupt(range(50, 150), sentinel_ids=SENTINELS[:3], eos_id=EOS, rng=random.Random(0))
    assert mended(inputs, targets) == list(range(50, 150))
    assert [token for token in targets if token in SENTINELS] == SENTINELS[:3]


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([5], {}, "at least 2"),
        ([5, 6, 7], {"noise_density": 1.0}, "noise_density"),
        ([5, 6, 7], {"mean_span": 0.5}, "mean_span"),
        ([5, 6, 7], {"sentinel_ids": [9]}, "sentinels"),
    ],
)
def test_refusals(ids: list[int], settings: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"sentinel_ids": SENTINELS, "eos_id": EOS, "rng": random.Random(0)}
    with pytest.raises(ValueError, match=message):
        corrupt(ids, **(usual | settings))


class _Two:
    position = 0

    def __next__(self) -> TextExample:
        self.position += 1
        return TextExample(f"in {self.position}", "out", "t", "zs_noopt")

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def test_texts_of_a_stream_and_its_state() -> None:
    pieces = TextPieces(_Two())
    assert next(pieces) == "in 1\nout"
    state = pieces.state_dict()
    following = next(pieces)
    pieces.load_state_dict(state)
    assert next(iter(pieces)) == following
