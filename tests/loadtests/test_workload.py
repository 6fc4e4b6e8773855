"""The workload and objective files: all of them parse, and every request of theirs is one that the wire knows."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from loadtests import objectives, workload
from loadtests.rpc_client import to_request

HEADER = 'description = "d"\n'
FAMILY = '[[family]]\nname = "a"\nmode = "raw"\ninstruction = "{input}"\ncases = [["x", "y"]]\n'


@pytest.mark.parametrize(("name", "families", "cases"), [("flan", 10, 70), ("lengths", 4, 19)])
def test_shipped_workload(name: str, families: int, cases: int) -> None:
    loaded = workload.load(name)
    assert len(loaded.families) == families
    assert sum(len(family.cases) for family in loaded.families) == cases
    assert {family.mode for family in loaded.families} == set(workload.MODES)
    for case in (case for family in loaded.families for case in family.cases):
        request = to_request(case.fields)  # an unknown or ill-typed field raises
        assert request.instruction.strip()
        assert 1 <= request.max_tokens <= 512
        assert "{input}" not in request.instruction


def test_every_shipped_file_is_tested() -> None:
    assert workload.available() == ["flan", "lengths"]
    assert [path.stem for path in sorted(objectives.OBJECTIVES_DIR.glob("*.toml"))] == ["smoke"]
    assert len(objectives.load("smoke").objectives) == 6


def test_no_case_comes_twice() -> None:
    for name in workload.available():
        seen = Counter(str(case.fields) for family in workload.load(name).families for case in family.cases)
        assert [text for text, count in seen.items() if count > 1] == []


def test_one_pass_of_the_deck_has_every_family_in_every_shape() -> None:
    flan = workload.load("flan")
    cards = list(islice(flan.deck(seed=3), 2 * len(flan.families)))
    assert {(shape, case.name.split("/")[0]) for shape, case in cards} == {
        (shape, family.name) for shape in workload.SHAPES for family in flan.families
    }


def test_equal_seeds_deal_equal_requests() -> None:
    flan = workload.load("flan")
    names = [[case.name for _, case in islice(flan.deck(seed), 60)] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_repeat_makes_long_inputs(tmp_path: Path) -> None:
    text = HEADER + FAMILY.replace('"{input}"', '"Sum up."') + "repeat = [1, 3]\n"
    path = tmp_path / "own.toml"
    path.write_text(text)
    (family,) = workload.load(str(path)).families
    assert [case.fields["input"] for case in family.cases] == ["x", "x x x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "'family' is missing"),
        (FAMILY, "'description' is missing"),
        ("seed = 1\n" + HEADER + FAMILY, "unknown key 'seed'"),
        (HEADER + FAMILY.replace("raw", "chat"), "mode must be one of"),
        (HEADER + FAMILY + "wieght = 2\n", "unknown key 'wieght'"),
        (HEADER + FAMILY + FAMILY, "two families"),
        (HEADER + FAMILY.replace('["x", "y"]', '["x"]'), "pairs"),
    ],
)
def test_a_bad_workload_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        workload.load(str(path))


def test_an_unknown_workload_lists_those_that_ship() -> None:
    with pytest.raises(ValueError, match="flan, lengths"):
        workload.load("flam")
