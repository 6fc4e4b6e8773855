"""The order of measurements: tune and warm up everybody, then round after round, one system at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from loadtests.bench import modes, profiles, verification
from loadtests.bench.budget import Budget
from loadtests.bench.child import Child
from loadtests.bench.options import Options, Title
from loadtests.bench.system import Place
from loadtests.bench.workloads.base import Case, Row, Workload


@dataclass(slots=True)
class Findings:
    """All that a run brings. `tunings[i]` = one system's choice for one kind of case, with all it tried; `profiles[i]`
    = where our time went in one case and mode.
    """

    rows: list[Row] = field(default_factory=list)
    tunings: list[dict[str, Any]] = field(default_factory=list)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Group:
    """Workloads that run on the same weights, with the systems that take part."""

    label: str
    place: Place
    workloads: tuple[Workload, ...]
    titles: tuple[Title, ...]

    def titles_of(self, workload: Workload) -> list[Title]:
        return [title for title in self.titles if title[0] == "ours" or not workload.ours_only]


class Session:
    """One group's measurements. Only one process works at a time: the parent waits for each answer."""

    def __init__(self, group: Group, options: Options, findings: Findings, budget: Budget) -> None:
        self._group = group
        self._budget = budget
        self._options = options
        self._findings = findings
        self._children: dict[Title, Child] = {}
        self._tuned: dict[tuple[str, Title], dict[str, Any] | None] = {}
        self._bar: Any = None

    def run(self, *, verify: bool) -> None:
        with ExitStack() as stack:
            self._bar = stack.enter_context(tqdm(desc=self._group.label, unit="step", dynamic_ncols=True))
            needed = {t for w in self._group.workloads if not w.fresh for t in self._group.titles_of(w)}
            for title in self._group.titles:
                if title in needed:
                    self._show(f"loading {' '.join(title)}")
                    if (child := self._open(title, self._group.place)) is not None:
                        self._children[title] = stack.enter_context(child)
            if verify:
                self._verify()
            for workload in self._group.workloads:
                self._run_workload(workload)

    def _run_workload(self, workload: Workload) -> None:
        """All rounds of one workload; the order of systems turns by one from round to round."""
        self._budget.next_part()
        if self._budget.spent:
            self._note(f"{self._group.label}, {workload.name}: left out, for want of time")
            return
        titles = self._group.titles_of(workload)
        if not workload.fresh:
            titles = [title for title in titles if title in self._children]
        rounds = self._options.rounds if workload.max_rounds is None else min(workload.max_rounds, self._options.rounds)
        try:
            cases = workload.prepare(self._cases(workload), self._measure_ours)
        except RuntimeError as error:
            self._fail(f"{self._group.label}, {workload.name}: {error}")
            return
        if not workload.fresh:
            self._tune(workload, cases, titles)
        self._bar.total = self._bar.n + rounds * len(cases) * len(titles)
        rows: list[Row] = []
        data: list[dict[str, Any]] = []
        took = 0.0
        for number in range(rounds):
            if number > 0 and not self._budget.allows_another(took):
                self._note(f"{self._group.label}, {workload.name}: {number} of {rounds} rounds, for want of time")
                self._bar.total -= (rounds - number) * len(cases) * len(titles)
                break
            began = time.monotonic()
            turn = number % len(titles) if titles else 0
            for case in cases:
                for title in titles[turn:] + titles[:turn]:
                    self._show(f"{workload.name}, {case['name']}, {' '.join(title)}, round {number + 1} of {rounds}")
                    found = self._measure(workload, case, title, number)
                    self._bar.update()
                    if found is not None:
                        rows.append(found[0])
                        data.append(found[1])
            took = time.monotonic() - began
        workload.finish(rows, data)
        self._findings.rows += rows
        if workload.all_at_once and self._options.device == "cpu":
            self._profile(workload, cases, min(rounds, profiles.MOST_RUNS))

    def _cases(self, workload: Workload) -> list[Case]:
        return workload.cases(self._options.sizes)

    def _tune(self, workload: Workload, cases: Sequence[Case], titles: Sequence[Title]) -> None:
        for case in cases:
            for title in titles:
                place = (workload.tuning_key(case), title)
                if place in self._tuned:
                    continue
                self._show(f"tuning {place[0]}, {' '.join(title)}")
                try:
                    call = {"workload": workload.name, "case": case, "key": self._key("tune")}
                    found = self._children[title].call("tune", seconds=self._options.sizes.tuning_seconds, **call)
                except RuntimeError as error:
                    self._fail(f"{self._group.label}, {workload.name}, tuning: {error}")
                    self._tuned[place] = None
                    continue
                self._tuned[place] = found["best"]["tuning"]
                names = {"shape": self._group.label, "workload": workload.name, "case": place[0]}
                names |= {"system": title[0], "setting": title[1]}
                self._findings.tunings.append(
                    {**names, "chosen": found["best"]["text"], "tried": found["tried"], "offered": found["offered"]}
                )

    def _measure(self, workload: Workload, case: Case, title: Title, number: int) -> tuple[Row, dict[str, Any]] | None:
        """One row and its data; None if it failed, which is noted."""
        key = self._key(workload.name, case["name"], number)
        call = {"workload": workload.name, "case": case, "key": key}
        began = time.perf_counter()
        try:
            if workload.fresh:
                with Child(*title, self._group.place) as child:
                    found = child.call("measure", tuning=None, **call)
            else:
                tuning = self._tuned[workload.tuning_key(case), title]
                found = self._children[title].call("measure", tuning=tuning, **call)
        except RuntimeError as error:
            self._fail(f"{self._group.label}, {workload.name}, {case['name']}: {error}")
            return None
        row = {
            "shape": self._group.label,
            "workload": workload.name,
            "case": case["name"],
            "system": title[0],
            "setting": title[1],
            "round": number,
            "metrics": found["metrics"],
            "resident_bytes": found["resident_bytes"],
            "wall_seconds": round(time.perf_counter() - began, 3),
        }
        if published := workload.published(case):
            row["published"] = dict(published)
        return row, found["data"]

    def _profile(self, workload: Workload, cases: Sequence[Case], runs: int) -> None:
        """Where our time goes, in each mode: once more, after the rounds."""
        for case in cases:
            for title, child in self._children.items():
                if title[0] != "ours":
                    continue
                self._show(f"{workload.name}, {case['name']}, {' '.join(title)}, profile")
                names = {"shape": self._group.label, "workload": workload.name, "case": case["name"], "mode": title[1]}
                # A case's own key: prompts of another one would be in the engine's cache of prompts.
                key = self._key("profile", workload.name, case["name"])
                at_once = min(workload.at_a_time(case), self._group.place.max_running)
                try:
                    call = {"workload": workload.name, "case": case, "key": key, "runs": runs}
                    self._findings.profiles.append({**names, "at_once": at_once, **child.call("profile", **call)})
                except RuntimeError as error:
                    self._fail(f"{self._group.label}, {workload.name}, {case['name']}, profile: {error}")

    def _measure_ours(self, workload: Workload, case: Case) -> dict[str, float]:
        """The metrics of our first setting, once warm."""
        title = next((title for title in self._children if title[0] == "ours"), None)
        if title is None:
            raise RuntimeError("this workload follows our own speed, so it needs the system ours")
        self._show(f"{workload.name}, {case['name']}")
        found: dict[str, float] = {}
        for number in range(2):
            call = {"workload": workload.name, "case": case, "key": self._key("capacity", number), "tuning": None}
            found = self._children[title].call("measure", **call)["metrics"]
        return found

    def _verify(self) -> None:
        produced = {}
        for child in self._children.values():
            self._show(f"comparing results, {child.title}")
            try:
                produced[child.title] = child.call("verify", key=self._key("verify"))
            except RuntimeError as error:
                self._fail(f"{self._group.label}, comparing results: {error}")
        if not produced:
            return
        reference = next((name for name in produced if name == "transformers float32"), next(iter(produced)))
        for name, found in verification.agreement(produced, reference).items():
            record = {"shape": self._group.label, "system": name, "reference": reference, **found}
            self._findings.agreement.append(record)
            exact = name.endswith("float32") and reference.endswith("float32")
            if exact and found["equal_tokens"] < verification.WANTED:
                self._fail(f"{self._group.label}: {name} and {reference} do not run the same model")

    def _open(self, title: Title, place: Place) -> Child | None:
        try:
            return Child(*title, place)
        except RuntimeError as error:
            if title[0] == "ours" and title[1] != modes.REFERENCE:  # a mode may be refused, by a processor for example
                self._note(f"{self._group.label}: {' '.join(title)} is skipped: {error}")
            else:
                self._fail(f"{self._group.label}, loading: {error}")
            return None

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self._options.seed, self._group.label, *parts)))

    def _show(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def _note(self, text: str) -> None:
        self._findings.notes.append(text)
        self._bar.write(f"note: {text}")

    def _fail(self, text: str) -> None:
        self._findings.failures.append(text)
        self._bar.write(f"failed: {text}")


class QualitySession(Session):
    """Prompts of words, made into ids by the checkpoint's own tokenizer."""

    def __init__(
        self, group: Group, options: Options, findings: Findings, budget: Budget, ids: list[list[int]]
    ) -> None:
        super().__init__(group, options, findings, budget)
        self._ids = ids

    def _cases(self, workload: Workload) -> list[Case]:
        return [{**case, "ids": self._ids[: case["count"]]} for case in super()._cases(workload)]
