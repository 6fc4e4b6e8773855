"""From measurements to the report, its pages, the gate and the comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from loadtests import __main__ as cli
from loadtests import comparison, objectives, report
from loadtests.meters import DEFINITIONS, Measurement
from loadtests.objectives import Objective, Objectives
from loadtests.recorder import Goodput, Recorder, quantile, summarise
from loadtests.workload import Case

RUN = {
    "created": "2026-11-25T00:00:00+00:00",
    "commit": "abc",
    "machine": {"processor": "cpu", "cores": 2},
    "server": {"id": "demo", "runtime": "torch", "dtype": "float32"},
    "config": {"workload": "flan", "load": "closed loop, 4 users", "rest": "http://127.0.0.1:1"},
}
MODES = ("raw", "cot")


def recorded(slower: float = 1.0, failures: int = 0) -> dict[str, Any]:
    """A report of 80 requests, 1 s apart, that took 100, 101, ... ms (times `slower`), `failures` more that failed."""
    recorder = Recorder(Goodput(ttft_ms=60.0))
    for number in range(80):
        mode = MODES[number // 2 % 2]
        case = Case(f"{mode}/0", mode, {}, "yes")
        shape = "stream" if number % 2 else "unary"
        found = Measurement(float(number), (100 + number) * slower, queue_ms=1.0, completion_tokens=10, prompt_tokens=5)
        found.text = found.answer = "Yes." if number < 60 else "no"
        if shape == "stream":
            found.ttft_ms, found.tpot_ms, found.itl_ms = 20.0 + number, 5.0 * slower, [5.0 * slower] * 8
        recorder.add("rest" if number < 40 else "grpc", shape, case, found)
    for number in range(failures):
        recorder.add(
            "rest", "unary", Case("raw/0", "raw", {}, "yes"), Measurement(float(number), 3.0, error="HTTP 429")
        )
    recorder.lags_ms = [0.5, 1.5]
    rows = {(p, s, m) for p in ("rest", "grpc") for s in ("stream", "unary") for m in MODES}
    return recorder.build(RUN, rows)


def test_quantile_is_numpys() -> None:
    assert [quantile([1.0, 2.0, 4.0], p) for p in (0, 50, 75, 100)] == [1.0, 2.0, 3.0, 4.0]
    assert summarise([]) is None
    assert summarise([3.0]) == {"count": 1, "mean": 3, "p50": 3, "p90": 3, "p95": 3, "p99": 3, "max": 3}


def test_the_report_conserves_what_was_recorded() -> None:
    built = recorded(failures=3)
    totals = built["totals"]
    assert (totals["requests"], totals["failed"], totals["completion_tokens"]) == (83, 3, 800)
    assert len(built["rows"]) == 8
    for key in ("requests", "failed", "completion_tokens", "answers_right", "answers_checked"):
        assert sum(row[key] for row in built["rows"]) == totals[key]
    assert (totals["answers_right"], totals["answers_checked"]) == (60, 80)
    assert totals["metrics"]["ttft_ms"]["count"] == 40
    assert totals["metrics"]["itl_ms"]["count"] == 320
    assert built["failures"] == {"HTTP 429": 3}
    elapsed = 79 + 0.179
    assert totals["requests_per_second"] == pytest.approx(80 / elapsed, abs=0.001)
    # 20 + number <= 60: 20 of the 40 streams; a unary request has no first token to be late with
    assert totals["goodput"] == pytest.approx((20 + 40) / elapsed, abs=0.001)
    assert len(built["requests"]) == 83
    json.dumps(built)


def test_an_empty_run_is_a_report_too(tmp_path: Path) -> None:
    built = Recorder().build(RUN, {("rest", "unary", "raw")})
    assert built["totals"]["requests"] == 0
    assert built["totals"]["missing_rows"] == 1
    assert "not measured" in report.to_markdown(built, objectives.check(built, objectives.load("smoke")))
    report.draw(built, tmp_path / "empty.png")


def test_pages(tmp_path: Path) -> None:
    built = recorded(failures=1)
    verdicts = objectives.check(built, objectives.load("smoke"))
    text = report.to_markdown(built, verdicts, "report.png")
    for definition in DEFINITIONS.values():
        assert definition in text
    assert "| rest stream cot | 10 | 0 | 100 |" in text
    assert "1 x HTTP 429" in text
    assert "failed_ratio | 0.01235 | <= 0 | **missed**" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:11]} == {table[0].count("|")}, "a ragged table"
    report.draw(built, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_objectives_of_rows_and_totals() -> None:
    built = recorded()
    objective = Objective("ttft_ms", percentile=50, max=60, protocol="rest")
    verdicts = objectives.check(built, Objectives(Goodput(), (objective, Objective("tokens_per_second", min=5))))
    assert [(verdict.what, verdict.kept) for verdict in verdicts] == [
        ("ttft_ms p50 rest stream cot", True),
        ("ttft_ms p50 rest stream raw", True),
        ("tokens_per_second", True),
    ]
    late = Objective("ttft_ms", percentile=50, max=60, protocol="grpc")
    assert not any(verdict.kept for verdict in objectives.check(built, Objectives(Goodput(), (late,))))
    nowhere = Objective("ttft_ms", percentile=50, max=60, mode="few_shot")
    assert [verdict.kept for verdict in objectives.check(built, Objectives(Goodput(), (nowhere,)))] == [False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[objective]]\nmetric = "ttft_ms"\nmax = 1', "percentile"),
        ('[[objective]]\nmetric = "tftt_ms"\npercentile = 50\nmax = 1', "no such metric"),
        ('[[objective]]\nmetric = "failed_ratio"', "either max or min"),
        ('[[objective]]\nmetric = "failed_ratio"\nmax = 0\nmode = "raw"', "has no percentile"),
        ('[[objective]]\nmetric = "failed_ratio"\nmaximum = 0', "maximum"),
        ('[goodput]\nttft = 1\n[[objective]]\nmetric = "failed_ratio"\nmax = 0', "ttft"),
        ("[slo]", "objective"),
    ],
)
def test_a_bad_objective_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        objectives.load(str(path))


def test_comparison_finds_what_got_worse_and_only_that() -> None:
    same = comparison.compare(recorded(), recorded())
    assert len(same) == 8, "two rates and the totals' six times; rows of 10 samples are left out"
    assert not any(change.regressed for change in same)
    worse = {change.what for change in comparison.compare(recorded(), recorded(slower=1.5)) if change.regressed}
    assert worse == {"all tpot_ms p50", "all tpot_ms p95", "all e2e_ms p50", "all e2e_ms p95"}
    assert not any(change.regressed for change in comparison.compare(recorded(slower=1.5), recorded()))


def test_comparison_says_what_else_differs() -> None:
    old, new = recorded(), copy.deepcopy(recorded())
    new["machine"] = {"processor": "cpu", "cores": 8}
    new["config"] = {**new["config"], "rest": "http://127.0.0.1:2"}
    assert comparison.differences(old, new) == ["machine.cores: 2 -> 8"]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, built in (("old", recorded()), ("slow", recorded(slower=2)), ("broken", recorded(failures=2))):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(built))
    assert cli.main(["compare", str(paths["old"]), str(paths["old"])]) == 0
    assert cli.main(["compare", str(paths["old"]), str(paths["slow"])]) == 1
    assert "**worse**" in capsys.readouterr().out
    assert cli.main(["gate", str(paths["old"])]) == 0
    assert cli.main(["gate", str(paths["broken"])]) == 1
    assert "MISSED failed_ratio" in capsys.readouterr().out
    assert cli.main(["gate", str(tmp_path / "none.json")]) == 2
