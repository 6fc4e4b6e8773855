"""The sampler as a card runs it: the same tokens, and the host reads nothing but the result."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.engine import sampler
from serve.engine.sequence import Sequence
from serve.sampling_params import SamplingParams

EOS = 1
# What makes the host wait for a device: a number read back, or a result whose size only the device knows.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "is_nonzero"}


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operations at which a host would wait for its device, and counts the lists that it asks for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []
        self.lists = 0
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:  # on a CPU this is no operation that __torch_dispatch__ would see
            self.lists += 1
            return tolist(tensor)

        patch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if name in WAITS or any(index is not None and index.dtype is torch.bool for index in indices):
            self.seen.append(name)
        return func(*args, **({} if kwargs is None else kwargs))


def batch(vocabulary: int) -> tuple[torch.Tensor, list[Sequence]]:
    """Every kind of request, flat and sharp distributions."""
    rng = random.Random(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "top_k": 300, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 5000},
        {"repetition_penalty": 1.5, "logit_bias": {7: 3.0}},
        {"temperature": 0.9, "top_p": 0.5, "min_tokens": 30, "repetition_penalty": 1.2},
    ]
    sequences = []
    for number in range(4 * len(kinds)):
        made = Sequence(
            str(number), 0, (5, EOS), SamplingParams(max_tokens=50, **kinds[number % len(kinds)]), number, 0
        )
        made.token_ids = [rng.randrange(vocabulary) for _ in range(number % 5)]
        made.position = len(made.token_ids)
        sequences.append(made)
    spread = torch.tensor([0.1, 1.0, 4.0, 9.0]).repeat_interleave(len(kinds))[:, None]
    return torch.randn(len(sequences), vocabulary, generator=torch.Generator().manual_seed(1)) * spread, sequences


@pytest.mark.parametrize("vocabulary", [50, 300, 32100])
def test_without_looking_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    logits, sequences = batch(vocabulary)
    want = sampler.sample(logits.clone(), sequences, eos_token_id=EOS)
    monkeypatch.setattr(sampler, "_draw", partial(sampler._draw, may_look=False))
    got = sampler.sample(logits.clone(), sequences, eos_token_id=EOS)
    assert got.token_ids == want.token_ids
    assert all(got.finite)


@pytest.mark.parametrize("logprobs", [None, 3])
def test_the_host_reads_the_result_only(monkeypatch: pytest.MonkeyPatch, logprobs: int | None) -> None:
    logits, sequences = batch(32100)
    sequences[3].params = SamplingParams(max_tokens=50, logprobs=logprobs)
    real = sampler._draw
    monkeypatch.setattr(sampler, "_draw", partial(real, may_look=False))
    waits = Waits(monkeypatch)
    with waits:
        sampler.sample(logits.clone(), sequences, eos_token_id=EOS)
    assert waits.seen == []
    assert waits.lists == 1
    with waits:
        sampler.best_and_finite(logits)
    assert waits.seen == []
    assert waits.lists == 1
    monkeypatch.setattr(sampler, "_draw", real)  # on a CPU, where looking is free and sorting is not
    sampler.sample(logits, sequences, eos_token_id=EOS)
    assert waits.lists > 2


def test_the_check_sees_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(4.0)
    waits = Waits(monkeypatch)
    with waits:
        bool(x.sum() > 1)
        x[x > 1]
        x.nonzero()
        x.tolist()
    assert len(waits.seen) >= 3
    assert waits.lists == 1


def test_a_row_that_is_not_finite_points_nowhere_beyond_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index out of range is the end of a CUDA process, so none may come of a row of NaN."""
    monkeypatch.setattr(sampler, "_draw", partial(sampler._draw, may_look=False))
    for vocabulary in (50, 300, 32100):
        logits, sequences = batch(vocabulary)
        logits[::2] = float("nan")
        logits[1] = float("inf")
        got = sampler.sample(logits, sequences, eos_token_id=EOS)
        assert all(0 <= token_id < vocabulary for token_id in got.token_ids)
        assert got.finite == [row % 2 == 1 and row != 1 for row in range(len(sequences))]


def test_the_choice_that_a_graph_holds_is_the_sampler_s() -> None:
    logits, _ = batch(32100)
    logits[2, 5] = float("nan")
    greedy = [Sequence("r", 0, (5, EOS), SamplingParams(max_tokens=5), 0, 0) for _ in logits]
    token_ids, flags = sampler.best_and_finite(logits).tolist()
    want = sampler.sample(logits, greedy, eos_token_id=EOS)
    assert [bool(flag) for flag in flags] == want.finite
    assert [token for row, token in enumerate(token_ids) if row != 2] == [
        token for row, token in enumerate(want.token_ids) if row != 2
    ]
