"""What `beside-vllm` computes; the run itself needs vLLM and minutes."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from loadtests import beside_vllm
from loadtests.beside_vllm import OURS, PEER, Load, Round, ratios, to_markdown


def test_the_examples() -> None:
    assert doctest.testmod(beside_vllm).failed == 0


def test_prompts_repeat_with_the_round_and_never_within_or_between_rounds() -> None:
    load = Load(requests=5, words=7)
    assert load.prompts(0) == load.prompts(0)
    everything = [prompt for number in range(4) for prompt in load.prompts(number)]
    assert len(set(everything)) == 20
    assert all(len(prompt.split()) == 8 for prompt in everything)


def test_ratios_are_paired_by_round_and_above_one_is_ours_ahead() -> None:
    ours = [Round(0, 100.0, 40.0, 80.0), Round(1, 30.0, 50.0, 90.0), Round(2, 90.0, 60.0, 60.0)]
    peer = [Round(0, 50.0, 20.0, 80.0), Round(1, 60.0, 100.0, 90.0), Round(2, 90.0, 60.0, 90.0)]
    found = ratios(ours, peer)
    assert found["tokens_per_second"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert found["ttft_p50_ms"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert found["ttft_p95_ms"] == {"median": 1.0, "low": 1.0, "high": 1.5}


def test_the_table_has_medians_and_spread() -> None:
    row = {"number": 0, "tokens_per_second": 10.0, "ttft_p50_ms": 1.0, "ttft_p95_ms": 2.0}
    result = {
        "rounds": {OURS: [row, {**row, "tokens_per_second": 30.0}], PEER: [row, row]},
        "ratios": {"tokens_per_second": {"median": 2.0, "low": 1.0, "high": 3.0}},
    }
    assert "| tokens_per_second | 20.0 | 10.0 | 2.00 (1.00 .. 3.00) |" in to_markdown(result)


def test_both_servers_get_the_same_engine_arguments() -> None:
    arguments = ["max_model_len=512", "enforce_eager=true"]
    ours = beside_vllm._our_command(Path("model"), arguments)
    bare = beside_vllm._vllm_command(Path("model"), arguments)
    assert ours[-4:] == ["--runtime-arg", "max_model_len=512", "--runtime-arg", "enforce_eager=true"]
    assert bare[-3:] == ["--max-model-len", "512", "--enforce-eager"]


def test_without_a_server_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_vllm, "_our_command", lambda *_: ["false"])
    with pytest.raises(RuntimeError, match=r"flan-serve \+ vLLM did not start"):
        beside_vllm.run(tmp_path, Load(rounds=1), [])
