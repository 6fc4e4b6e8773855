"""The bench's arithmetic and generators: ratios and their spread, prompts, arrivals, the queue, budgets, pages."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from loadtests import __main__ as cli
from loadtests.bench import bounds, command, profiles, prompts, ratios, running, tables
from loadtests.bench.bounds import Work
from loadtests.bench.budget import Budget
from loadtests.bench.options import Options
from loadtests.bench.prompts import Request
from loadtests.bench.queueing import serve_in_batches
from loadtests.bench.shapes import EOS_ID, SHAPES, random_tensors, tensor_sizes
from loadtests.bench.system import OnToken
from loadtests.bench.workloads import arrivals, quality
from loadtests.bench.workloads.base import Metric
from loadtests.bench.workloads.registry import WORKLOADS

RATE = Metric("tokens_per_second", "tokens/s")
TIME = Metric("latency", "s", higher_is_better=False)


def row(system: str, setting: str, number: int, value: float, **more: Any) -> dict[str, Any]:
    names = {"shape": "tiny", "workload": "uniform", "case": "batch 1", "system": system, "setting": setting}
    return {**names, "round": number, "metrics": {"tokens_per_second": value}, **more}


ROWS = [
    *(row("ours", "float32", number, value) for number, value in enumerate((30.0, 20.0, 40.0))),
    *(row("ours", "int8", number, value) for number, value in enumerate((60.0, 60.0, 60.0))),
    *(row("ctranslate2", "int8", number, value) for number, value in enumerate((20.0, 20.0, 20.0))),
]
RATES = {"float32": 100.0, "int8": 400.0, "memory": 20.0}
TAKEN = {
    "shape": "tiny",
    "workload": "uniform",
    "case": "batch 1",
    "mode": "int8",
    "at_once": 1,
    "seconds": 2.0,
    "requests": [[10, 2]],
    "parts": dict.fromkeys(profiles.PARTS, 0.2),
}
RECORD = {
    "created": "2026-11-25T00:00:00+00:00",
    "command": "python -m loadtests bench",
    "rounds": 3,
    "versions": {"torch": "2", "ctranslate2": None},
    "processor": {"model": "a cpu", "cores": 2, "threads_used": 2, "instructions": ["avx2"], "device": "cpu"},
    "rows": ROWS,
    "ratios": ratios.build(ROWS, WORKLOADS),
    "rates": RATES,
    "bounds": bounds.build(ROWS, {("tiny", "uniform", "batch 1"): Work.of(SHAPES["tiny"], [(10, 2)], 1)}, RATES),
    "profiles": profiles.build([TAKEN], SHAPES, RATES),
    "agreement": [],
    "tunings": [],
    "failures": [],
    "notes": ["a note"],
}


def test_a_ratio_above_one_is_ours_ahead_whichever_way_the_metric_goes() -> None:
    assert ratios.ratio(30, 20, RATE) == 1.5
    assert ratios.ratio(0.5, 1.0, TIME) == 2.0
    assert [ratios.ratio(a, b, RATE) for a, b in ((0.0, 1.0), (1.0, 0.0), (math.inf, 1.0))] == [None] * 3


def test_ratios_are_paired_by_round_and_keep_their_spread() -> None:
    found = {record["setting"]: record for record in RECORD["ratios"]}  # type: ignore[attr-defined]
    assert len(found) == 2
    first = found["float32"]
    assert (first["ratio"], first["low"], first["high"], first["rounds"]) == (1.5, 1.0, 2.0, 3)
    assert (first["ours"], first["theirs"], first["peer"]) == (30.0, 20.0, "ctranslate2 int8")
    assert found["int8"]["ratio"] == found["int8"]["low"] == found["int8"]["high"] == 3.0


def test_only_rounds_that_both_have_are_compared() -> None:
    assert ratios.paired({0: 1.0, 1: 4.0}, {1: 2.0, 2: 9.0}, RATE) == {
        "ratio": 2.0, "low": 2.0, "high": 2.0, "rounds": 1, "ours": 4.0, "theirs": 2.0
    }  # fmt: skip
    assert ratios.paired({0: 1.0}, {1: 1.0}, RATE) is None


def test_a_published_figure_is_a_peer() -> None:
    published = {"milliseconds": ("theirs, published", 706.0)}
    rows = [row("ours", "bfloat16", 0, 0.0, workload="xl", published=published)]
    rows[0]["metrics"] = {"milliseconds": 353.0}
    [record] = ratios.build(rows, WORKLOADS)
    assert (record["peer"], record["ratio"]) == ("theirs, published", 2.0)


def test_the_bound_of_a_batch_counts_its_products_and_bytes() -> None:
    """flan-t5-small by hand: 18.87 million numbers in the encoder's layers, 3.15 in cross-attention's k and v."""
    work = Work.of(SHAPES["flan-t5-small"], [(128, 32)] * 32, 32)
    per_token = 8 * (4 * 512 * 384 + 3 * 512 * 1024) + 8 * 2 * 512 * 384
    assert work.encode_operations == 2 * 32 * 128 * per_token
    assert work.attention_operations == 2 * 32 * 128 * 8 * 2 * 128 * 384
    assert work.step_weights == 8 * (6 * 512 * 384 + 3 * 512 * 1024)
    assert work.decode_operations == 2 * 32 * 32 * work.step_weights
    assert work.cache_numbers == 32 * 8 * 2 * 384 * sum(128 + step for step in range(1, 33))
    head = 2 * 32 * 32128 * 512 * 32
    encode = work.encode_operations + work.attention_operations
    expected = (encode + work.decode_operations) / 100e9 + head / 400e9
    assert work.seconds("float32", RATES) == pytest.approx(expected + work.cache_numbers * 4 / 20e9)
    alone = Work.of(SHAPES["flan-t5-small"], [(128, 32)], 1)  # a step reads its weights longer than it multiplies
    slow = (alone.encode_operations + alone.attention_operations) / 100e9 + 32 * (
        alone.step_weights * 2 / 20e9 + 32128 * 512 / 20e9
    )
    rates = {**RATES, "float16": 100.0}
    assert alone.seconds("float16", rates) == pytest.approx(slow + alone.cache_numbers * 2 / 20e9)


def test_the_bound_of_mixed_requests_counts_the_steps_that_they_need() -> None:
    """Four requests, two at a time, 40 tokens: 20 steps at least; or as many as the longest output."""
    shape = SHAPES["tiny"]
    assert Work.of(shape, [(10, 10)] * 4, 2).steps == 20
    assert Work.of(shape, [(10, 30), (20, 4), (5, 4), (5, 2)], 2).steps == 30
    one, two = Work.of(shape, [(10, 30)], 1), Work.of(shape, [(20, 4)], 1)
    both = Work.of(shape, [(10, 30), (20, 4)], 2)
    for name in ("encode_operations", "attention_operations", "decode_operations", "cache_numbers", "tokens"):
        assert getattr(both, name) == getattr(one, name) + getattr(two, name)


def test_bounds_say_what_is_reached_and_which_peers_are_beyond() -> None:
    narrow, wide = RECORD["bounds"][1], RECORD["bounds"][0]  # type: ignore[index]
    assert (wide["mode"], narrow["mode"]) == ("float32", "int8")
    assert wide["bound"] < narrow["bound"]
    assert wide["reached"] == pytest.approx(30.0 / wide["bound"])
    assert narrow["peers"] == {"ctranslate2 int8": pytest.approx(20.0 / narrow["bound"])}


def test_the_parts_of_the_bound_are_the_bound_and_attention_is_of_float32_everywhere() -> None:
    work = Work.of(SHAPES["tiny"], [(10, 2), (30, 7)], 2)
    rates = {**RATES, "int16": 200.0}
    narrow, wide = work.least("int16", rates), work.least("float32", rates)
    assert sum(narrow.values()) == pytest.approx(work.seconds("int16", rates))
    assert narrow["encoder products"] == pytest.approx(wide["encoder products"] / 2)
    assert narrow["encoder attention"] == wide["encoder attention"]
    assert set(narrow) == set(profiles.BOUNDED)


def test_a_profile_says_its_least_seconds_for_just_its_requests() -> None:
    [record] = profiles.build([TAKEN], SHAPES, RATES)
    assert record["least"] == Work.of(SHAPES["tiny"], [(10, 2)], 1).least("int8", RATES)
    assert record["tokens"] == 2
    assert profiles.build([{**TAKEN, "mode": "bfloat16"}], SHAPES, RATES) == []  # whose rate nobody measured


def test_mixed_requests_keep_their_bounds_and_their_median() -> None:
    drawn = prompts.mixed(prompts.generator("a"), 2000, 500)
    inputs = [len(request.ids) for request in drawn]
    assert (min(inputs), max(inputs)) == (16, 512)
    assert 74 <= statistics.median(inputs) <= 86
    assert {min(r.length for r in drawn), max(r.length for r in drawn)} == {4, 128}
    assert all(request.ids[-1] == EOS_ID and min(request.ids[:-1]) > 2 for request in drawn)
    assert max(max(request.ids) for request in drawn) == 499


def test_the_same_key_draws_the_same_and_another_key_others() -> None:
    assert prompts.mixed(prompts.generator(0, "a"), 5, 99) == prompts.mixed(prompts.generator(0, "a"), 5, 99)
    assert prompts.mixed(prompts.generator(0, "a"), 5, 99) != prompts.mixed(prompts.generator(1, "a"), 5, 99)


def test_poisson_times_have_their_rate() -> None:
    times = prompts.poisson_times(prompts.generator("a"), 4000, 8.0)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.06)
    with pytest.raises(ValueError, match="positive"):
        prompts.poisson_times(prompts.generator("a"), 1, 0.0)


def test_what_waits_is_the_next_batch() -> None:
    """A batch takes a second, whatever is in it; the fourth request comes when all is over."""
    now = 0.0
    batches: list[int] = []

    def generate(batch: Any, tell: OnToken) -> None:
        nonlocal now
        now += 1.0
        batches.append(len(batch))
        for place in range(len(batch)):
            tell(place)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    asked = [Request((5, EOS_ID), 1)] * 5
    told = serve_in_batches(generate, asked, [0, 0.2, 0.4, 0.9, 7.0], clock=lambda: now, sleep=sleep)
    assert batches == [1, 3, 1]
    assert told == [[1.0], [2.0], [2.0], [2.0], [8.0]]
    batches.clear()
    now = 0.0
    serve_in_batches(generate, asked, [0.0] * 5, largest=2, clock=lambda: now, sleep=sleep)
    assert batches == [2, 2, 1]


def test_latencies_count_from_when_a_request_was_due() -> None:
    asked = [Request((5, EOS_ID), 2), Request((5, EOS_ID), 2)]
    found = arrivals.summarise(asked, [0.0, 1.0], [[0.5, 0.55], [3.0, 3.05]])
    assert 0.5 <= found["ttft_p50"] <= found["ttft_p99"] <= 2.0
    assert found["latency_p99"] == pytest.approx(2.05, abs=0.05)
    assert found["goodput"] == pytest.approx(1 / 3.05)  # the second had its first token too late


def test_agreement_ends_at_the_first_token_that_differs() -> None:
    own = {"tokens": [[5, 6, 7], [8, 9]], "scores": [1.0, 2.0, 3.0]}
    other = {"tokens": [[5, 6, 7], [8, 4]], "scores": [1.0, 2.0, 2.9]}
    found = quality.compare(own, other)
    assert (found["token_agreement"], found["identical_prompts"]) == (0.8, 0.5)
    assert 0.99 < found["score_correlation"] < 1.0
    assert "score_correlation" not in quality.compare(own | {"scores": [1.0] * 3}, other)  # JSON has no NaN


def test_quality_prompts_are_seeded_or_read(tmp_path: Path) -> None:
    assert quality.texts(20, 1) == quality.texts(20, 1) != quality.texts(20, 2)
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n{"prompt": "two"}\n{"text": 3}\n')
    assert quality.texts(2, 0, path) == ["one", "two"]
    with pytest.raises(ValueError, match="line 3"):
        quality.texts(3, 0, path)


def test_a_budget_gives_every_part_its_share() -> None:
    now = 0.0
    budget = Budget(100.0, 2, clock=lambda: now)
    budget.next_part()
    now = 20.0
    assert budget.allows_another(30.0)
    assert not budget.allows_another(31.0)
    budget.next_part()
    assert budget.allows_another(80.0)
    spent = [budget.spent]
    now = 100.0
    assert [*spent, budget.spent] == [False, True]
    assert Budget(None, 1).allows_another(1e9)
    assert not Budget(None, 1).spent


def test_weights_are_seeded_and_of_the_published_sizes() -> None:
    first, second = (dict(random_tensors(SHAPES["tiny"], 3)) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["shared.weight"].equal(dict(random_tensors(SHAPES["tiny"], 4))["shared.weight"])
    counts = {name: sum(map(math.prod, tensor_sizes(SHAPES[name]).values())) for name in SHAPES}
    assert counts["flan-t5-small"] == 76_961_152
    assert counts["flan-t5-base"] == 247_577_856
    assert counts["flan-t5-xl"] == 2_849_757_184


def test_the_page_shows_ratios_with_their_spread() -> None:
    text = tables.to_markdown(RECORD, "bench.png")
    assert "| batch 1 | tokens per second, tokens/s | float32 | 30 | 20 | **1.50** [1.00, 2.00] |" in text
    assert "![ratios](bench.png)" in text
    assert "memory 20 GB/s" in text
    assert "| shape | case | products | bound, tokens/s | ours reaches | ctranslate2 int8 |" in text
    assert "| shape | case | ours | seconds | encoder products | encoder attention |" in text
    first, attention, *_ = RECORD["profiles"][0]["least"].values()  # type: ignore[index]
    assert f"| tiny | batch 1 | int8 | 2 | 10% ({first / 0.2:.2f}) | 10% ({attention / 0.2:.2f}) |" in text
    assert "| 10% | 10% | 10% | 10% |\n" in text  # nobody can say how long rounding, norms and waiting must take
    assert "- a note" in text


def test_a_record_is_saved_in_three_forms(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command.save(RECORD, tmp_path / "deep" / "bench.json")
    saved = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert {"workload", "setting", "peer", "ratio", "low", "high"} <= saved["ratios"][0].keys()
    assert (tmp_path / "deep" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "deep" / "bench.md").read_text().startswith("# ")


def asked(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.options_of(parser.parse_args(arguments))


def test_defaults_follow_the_effort() -> None:
    full, quick = asked(), asked("--quick")
    assert (full.rounds, full.minutes, full.shapes) == (5, None, ("flan-t5-small", "flan-t5-base"))
    assert (quick.minutes, quick.shapes) == (8.0, ("flan-t5-small",))
    assert full.settings == ("float32", "float16", "int16", "int8")
    assert quick.settings == ("float16", "int16", "int8")
    assert full.quality_settings == ("float32", "float16", "int16", "int8", "bfloat16")
    assert asked("--modes", "int8").quality_settings == ("int8",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "huge"), "no shape 'huge'"),
        (("--workloads", "mixed,all"), "no workload 'all'"),
        (("--modes", "int4"), "no mode 'int4'"),
        (("--rounds", "0"), "--rounds"),
        (("--workloads", "xl"), "needs --device cuda"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked(*arguments)


def test_modes_that_the_engine_lacks_are_skipped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.number_format.fbgemm_available", lambda: False)
    monkeypatch.setattr(running, "_at_home", lambda options, findings: seen.append(options))
    seen: list[Options] = []
    record = running.run(asked("--modes", "float32,int8", "--systems", "ours"))
    assert (seen[0].settings, seen[0].quality_settings) == (("float32",), ("float32",))
    assert any(note.startswith("mode int8 is skipped") for note in record["notes"])


def test_a_missing_peer_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "installed", lambda: False)
    monkeypatch.setattr(running, "_at_home", lambda options, findings: None)
    running.run(asked())
    assert "ctranslate2 is not installed" in (said := capsys.readouterr().err)
    assert "[bench]" in said


def test_without_a_card_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "_has_cuda", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "no usable CUDA device" in capsys.readouterr().err
