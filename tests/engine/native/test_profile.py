"""The kernels say where their time goes, when somebody asks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from serve.engine.layers import WeightFormat
from serve.engine.loading import load_model
from serve.engine.native.library import Level, level, limited
from serve.engine.native.profile import Profile, profiled
from tests.engine.checkpoints import make_t5_checkpoint
from tests.engine.test_model import greedy, random_prompts

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(level() is Level.NONE, reason="the kernels are not built, or not for this processor")
with_vnni = pytest.mark.skipif(level() is not Level.AVX512_VNNI, reason="int16 needs AVX-512 VNNI")


def profile_of(folder: Path, weights: WeightFormat, threads: int = 1) -> tuple[Profile, float]:
    """Of a few prompts' greedy answers, and how long these took."""
    model = load_model(folder, device=CPU, dtype=torch.float32, weights=weights, vocab_limit=380)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        began = time.perf_counter()
        with profiled() as profile:
            greedy(model, random_prompts((40, 90), 380), 12)
        return profile, time.perf_counter() - began
    finally:
        torch.set_num_threads(before)


@with_vnni
@pytest.mark.parametrize("threads", [1, 2])
def test_time_is_told_by_job_and_part(tmp_path: Path, threads: int) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5_v1_1")
    profile, took = profile_of(folder, "int16", threads)
    for job in ("encoder", "decoder"):
        for part in ("products", "attention", "rounding", "by_row"):
            assert profile.seconds[job, part] > 0, (job, part)
    assert sum(profile.seconds.values()) < took


def test_only_what_happens_meanwhile_counts(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5_v1_1")
    first, _ = profile_of(folder, "plain")
    kept = dict(first.seconds)
    model = load_model(folder, device=CPU, dtype=torch.float32, vocab_limit=380)
    greedy(model, random_prompts((40,), 380), 5)
    assert first.seconds == kept
    with profiled() as idle:
        pass
    assert idle.seconds == {}


def test_results_are_the_same_with_a_profile(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5_v1_1")
    model = load_model(folder, device=CPU, dtype=torch.float32, vocab_limit=380)
    prompts = random_prompts((30, 70), 380)
    plain = greedy(model, prompts, 10)
    with profiled():
        watched = greedy(model, prompts, 10)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))


def test_there_is_one_profile_at_a_time() -> None:
    with profiled():
        with pytest.raises(RuntimeError, match="one profile"), profiled():
            pass
        with pytest.raises(RuntimeError, match="one profile"), profiled():  # the refused one did not end the first
            pass


def test_without_kernels_there_is_nothing_to_tell() -> None:
    with limited(Level.NONE), profiled() as profile, profiled() as other:
        pass
    assert profile.seconds == other.seconds == {}
