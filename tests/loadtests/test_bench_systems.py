"""Every system on one tiny checkpoint: forced lengths, equal tokens, samples, scores, arrivals; the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests import __main__ as cli
from loadtests.bench import profiles, prompts
from loadtests.bench.ctranslate2_system import installed
from loadtests.bench.effort import EFFORTS
from loadtests.bench.our_system import OurSystem
from loadtests.bench.shapes import SHAPES, write_checkpoint
from loadtests.bench.system import Place, System
from loadtests.bench.worker import open_system
from loadtests.bench.workloads.registry import WORKLOADS
from serve.engine.native.library import Level, level

LENGTHS = (3, 9, 1, 6, 12)
SYSTEMS = (
    "ours",
    "transformers",
    pytest.param("ctranslate2", marks=pytest.mark.skipif(not installed(), reason="ctranslate2 is not installed")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench"), SHAPES["tiny"], 0)


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request: pytest.FixtureRequest, folder: Path) -> System:
    return open_system(request.param, "float32", Place(str(folder), "tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> System:
    return open_system("transformers", "float32", Place(str(folder), "tiny"))


def asked(system: System) -> list[prompts.Request]:
    rng = prompts.generator("asked")
    return [
        prompts.Request(prompts.prompt(rng, 4 + 3 * place, system.vocab_size), n) for place, n in enumerate(LENGTHS)
    ]


def test_lengths_are_forced_and_every_token_is_told(system: System) -> None:
    for tuning in system.candidates(len(LENGTHS)):
        system.use(tuning)
        for at_once in (0, 2):
            told = [0] * len(LENGTHS)

            def tell(place: int, told: list[int] = told) -> None:
                told[place] += 1

            made = system.generate(asked(system), at_once=at_once, on_token=tell)
            assert [len(ids) for ids in made] == told == list(LENGTHS)
    assert [len(ids) for ids in system.generate(asked(system))] == list(LENGTHS)


def test_many_requests_are_cut_into_batches_and_keep_their_order(system: System, reference: System) -> None:
    requests = prompts.mixed(prompts.generator("many"), 40, system.vocab_size, 0.05)
    expected = reference.generate(requests)
    for tuning in system.candidates(100):
        system.use(tuning)
        assert system.generate(requests) == expected
    system.use(system.candidates(1)[0])


def test_scores_are_the_same_everywhere(system: System, reference: System) -> None:
    rng = prompts.generator("scores")
    candidates = [prompts.prompt(rng, length, system.vocab_size) for length in (2, 5, 3)]
    ids = prompts.prompt(rng, 12, system.vocab_size)
    assert system.score(ids, candidates) == pytest.approx(reference.score(ids, candidates), abs=1e-3)


def test_samples_have_their_number_and_their_length(system: System) -> None:
    [request] = prompts.equal(prompts.generator("samples"), 1, 8, 5, system.vocab_size)
    made = system.sample(request, 3, seed=1)
    assert [len(ids) for ids in made] == [5] * 3
    assert len({tuple(ids) for ids in made}) > 1


def test_arrivals_are_served_after_they_are_due(system: System) -> None:
    due = [0.0, 0.0, 0.01, 0.05, 0.05]
    told = system.serve(asked(system), due)
    assert [len(times) for times in told] == list(LENGTHS)
    assert all(times == sorted(times) and times[0] >= start for times, start in zip(told, due, strict=True))


def test_samples_of_ours_cost_one_encoder_pass(folder: Path) -> None:
    own = open_system("ours", "float32", Place(str(folder), "tiny"))
    samples = WORKLOADS["samples"]
    for case in samples.cases(EFFORTS["trial"]):
        assert samples.measure(own, case, str(case["name"])).metrics["encoder_passes"] == 1.0


def test_ours_encodes_so_many_tokens_a_step(folder: Path) -> None:
    own = open_system("ours", "float32", Place(str(folder), "tiny", encode_tokens_per_step=10))
    assert isinstance(own, OurSystem)
    for request in prompts.equal(prompts.generator("key"), 4, 5, 2, own.vocab_size):
        own.submit(request)
    encoded = []
    while own.engine.has_work:
        stats = own.step().stats
        assert stats is not None
        encoded.append(stats.encode_tokens)
    assert encoded[:2] == [10, 10]
    assert sum(encoded) == 20


def test_a_long_prompt_is_read_beside_an_encode_batch(folder: Path) -> None:
    own = open_system("ours", "float32", Place(str(folder), "tiny"))
    long = WORKLOADS["long"]
    [case] = long.cases(EFFORTS["trial"])
    metrics = long.measure(own, case, "key").metrics
    assert metrics.keys() == {metric.name for metric in long.metrics}
    assert min(metrics.values()) > 0


def test_many_short_requests_leave_nothing_behind(folder: Path) -> None:
    own = open_system("ours", "float32", Place(str(folder), "tiny"))
    metrics = WORKLOADS["memory"].measure(own, {"short": 40}, "key").metrics
    assert metrics.keys() == {"resident", "resident_at_mark", "resident_ratio"}


def test_a_profile_is_of_one_run_and_its_parts_are_all_of_it(folder: Path) -> None:
    own, uniform = open_system("ours", "float32", Place(str(folder), "tiny")), WORKLOADS["uniform"]
    [_, case] = uniform.cases(EFFORTS["trial"])
    found = profiles.take(uniform, own, case, "key", 3)
    assert found["requests"] == [(case["prompt"], case["output"])] * case["count"] * case["repeats"]
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    if level() is not Level.NONE:
        assert found["parts"]["decoder products"] > 0
    [record] = profiles.build(
        [{"shape": "tiny", "workload": "uniform", "case": "", "mode": "float32", "at_once": case["count"], **found}],
        SHAPES,
        {"float32": 1000.0, "memory": 200.0},
    )
    assert 0 < sum(record["least"].values()) < record["seconds"]


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench.json"
    names = ["--effort", "trial", "--threads", "1", "--modes", "float32", "--systems", "ours,transformers"]
    assert cli.main(["bench", *names, "--workloads", "uniform,memory", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["failures"] == []
    assert [one["equal_tokens"] for one in record["agreement"]] == [1.0]
    assert {one["peer"] for one in record["ratios"]} == {"transformers float32"}
    assert {row["workload"] for row in record["rows"]} == {"uniform", "memory"}
    assert [one["mode"] for one in record["profiles"]] == ["float32", "float32"]
    assert record["versions"]["torch"] is not None
    assert "**" in capsys.readouterr().out
