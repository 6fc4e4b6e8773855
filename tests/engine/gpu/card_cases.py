"""What only a card can show: graphs, waiting, real shapes. Run by test_triton.py where there is one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.gpu.runner import PagedRunner
from serve.engine.loading import make_engine
from serve.engine.model import T5Model
from serve.sampling_params import SamplingParams
from tests.engine.driving import drain
from tests.engine.gpu.devices import DEVICE
from tests.engine.gpu.random_weights import flan_t5_config, random_checkpoint
from tests.engine.gpu.shapes import TINY

XL_BYTES = 24 << 30  # free memory that Flan-T5-XL, its building and a cache ask for


def tiny_engine(runner_settings: EngineSettings) -> tuple[Engine, PagedRunner]:
    checkpoint = random_checkpoint(TINY, device=DEVICE, dtype=torch.bfloat16)
    model = T5Model(checkpoint, device=DEVICE, dtype=torch.bfloat16)
    runner = PagedRunner(model, runner_settings)
    return make_engine(model, runner_settings, runner), runner


def waits(engine: Engine) -> int:
    """How often the host waits for the device in one step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}, {"temperature": 1.0, "top_k": 20}, {"logprobs": 3}],
    ids=["greedy", "top_p", "top_k", "logprobs"],
)
def test_a_step_waits_once(sampling: dict[str, Any]) -> None:
    engine, _ = tiny_engine(EngineSettings(max_running_sequences=8, cache_bytes=1 << 22))
    for number in range(5):
        engine.add(str(number), [(5 + number, 6, 7, 1)], SamplingParams(max_tokens=40, ignore_eos=True, **sampling))
    assert [waits(engine) for _ in range(20)] == [1] * 20


def test_a_replayed_step_is_the_step() -> None:
    """The graph's logits against the same step run eagerly; storing its keys again changes nothing."""
    engine, runner = tiny_engine(EngineSettings(max_running_sequences=6, cache_bytes=1 << 22))
    for number in range(6):
        engine.add(str(number), [(5 + number, 6, 7, 1)], SamplingParams(max_tokens=20 + number, ignore_eos=True))
    decode, seen = runner._steps.decode, set()

    def compared(sequences: Any) -> torch.Tensor:
        replayed = decode(sequences).clone()
        rows = next(size for size in runner._steps._sizes if size >= len(sequences))
        eager = runner._steps._eager(rows)()[: len(sequences)]
        torch.testing.assert_close(replayed, eager, atol=1e-3, rtol=1e-3)
        seen.add(rows)
        return replayed

    runner._steps.decode = compared  # type: ignore[method-assign]
    results = drain(engine)
    assert seen == {1, 2, 4, 6}
    assert all(result.error is None for result in results.sequences.values())


@pytest.mark.parametrize("count", [32, 128])
def test_flan_t5_xl_s_shapes_run(count: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < XL_BYTES:
        pytest.fail(f"the card has less than {XL_BYTES >> 30} GiB free")
    settings = EngineSettings(max_running_sequences=count, encode_tokens_per_step=8192, cache_bytes=8 << 30)
    checkpoint = random_checkpoint(flan_t5_config("xl"), device=DEVICE, dtype=torch.bfloat16)
    model = T5Model(checkpoint, device=DEVICE, dtype=torch.bfloat16)
    del checkpoint
    engine = make_engine(model, settings)
    for number in range(count):
        prompt = tuple(100 + (number * 37 + place) % 30000 for place in range(127))
        engine.add(str(number), [(*prompt, 1)], SamplingParams(max_tokens=24, ignore_eos=True))
    results = drain(engine)
    assert len(results.sequences) == count
    assert all(result.error is None and len(result.token_ids) == 24 for result in results.sequences.values())
