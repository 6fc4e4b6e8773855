"""Which runner a device gets, decided without one; and the weights that benchmarks run on."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from serve.engine import loading
from serve.engine.config import EngineSettings
from serve.engine.loading import make_engine, make_runner
from serve.engine.model import T5Model
from serve.engine.runner import ModelRunner
from serve.engine.weights import expected_shapes
from serve.sampling_params import SamplingParams
from tests.engine.driving import drain
from tests.engine.gpu.random_weights import flan_t5_config, random_checkpoint
from tests.engine.gpu.shapes import TINY

PAGED = "serve.engine.gpu.runner"
CPU = torch.device("cpu")


def a_model_on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def test_cuda_has_the_paged_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(PAGED)
    module.PagedRunner = lambda model, settings: ("paged", model, settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PAGED, module)
    model, settings = a_model_on("cuda"), EngineSettings()
    assert make_runner(model, settings) == ("paged", model, settings)  # type: ignore[comparison-overlap]


def test_cuda_without_triton_runs_slowly_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, PAGED, None)  # an ImportError, as a missing Triton gives
    monkeypatch.setattr(loading, "ModelRunner", lambda model, *, cache_bytes, **_: ("rows", cache_bytes))
    with caplog.at_level(logging.WARNING):
        assert make_runner(a_model_on("cuda"), EngineSettings(cache_bytes=7)) == ("rows", 7)  # type: ignore[comparison-overlap]
    assert "Triton is missing" in caplog.text


def test_a_cpu_never_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PAGED, None)
    model = T5Model(random_checkpoint(TINY, device=CPU, dtype=torch.float32), device=CPU, dtype=torch.float32)
    assert isinstance(make_runner(model, EngineSettings()), ModelRunner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_run(dtype: torch.dtype, tied: bool) -> None:
    checkpoint = random_checkpoint(TINY, device=CPU, dtype=dtype, tied=tied, seed=3)
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()} == expected_shapes(TINY)
    assert all(tensor.dtype is dtype for tensor in checkpoint.tensors.values())
    engine = make_engine(T5Model(checkpoint, device=CPU, dtype=dtype), EngineSettings())
    engine.add("r", [(5, 6, 7, 1)], SamplingParams(max_tokens=12, ignore_eos=True))
    result = drain(engine).sequences["r", 0]
    assert result.error is None
    assert len(result.token_ids) == 12
    again = random_checkpoint(TINY, device=CPU, dtype=dtype, tied=tied, seed=3)
    assert torch.equal(again.head, checkpoint.head)


def test_flan_t5_xl_has_its_published_size() -> None:
    config = flan_t5_config("xl")
    count = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    count += config.vocab_size * config.d_model  # the head
    assert count == 2_849_757_184
