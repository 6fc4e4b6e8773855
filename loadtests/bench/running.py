"""A whole run: weights, groups of workloads, measurements, and the record of it all."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests.bench import bounds, environment, modes, peaks, profiles, prompts, ratios
from loadtests.bench.budget import Budget
from loadtests.bench.child import environment_of
from loadtests.bench.ctranslate2_system import installed
from loadtests.bench.options import Options
from loadtests.bench.rounds import Findings, Group, QualitySession, Session
from loadtests.bench.shapes import SHAPES, write_checkpoint
from loadtests.bench.workloads import quality
from loadtests.bench.workloads.base import Workload
from loadtests.bench.workloads.registry import WORKLOADS

REPORT_FORMAT = 1
CARD_SHAPE, CARD_SEQUENCES = "flan-t5-xl", 128


def run(options: Options, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measure what the options ask for; returns the record, which is JSON. `arguments` are only written down."""
    notes = []
    skipped = {
        name: problem for name in modes.known(options.device) if (problem := modes.refusal(name, options.device))
    }
    notes += [problem for name, problem in skipped.items() if name in options.settings + options.quality_settings]
    options = options.without(skipped)
    if "ctranslate2" in options.systems and not installed():
        notes.append("ctranslate2 is not installed, so it is not compared with: pip install -e '.[bench]'")
        options = replace(options, systems=tuple(name for name in options.systems if name != "ctranslate2"))
    if (load := environment.busy()) is not None:
        notes.append(load)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    began = environment.now()
    findings = Findings()
    _at_home(options, findings)
    return {
        "format": REPORT_FORMAT,
        "created": began,
        "ended": environment.now(),
        "command": environment.command(arguments),
        "rounds": options.rounds,
        "effort": options.effort,
        "seed": options.seed,
        "max_running_sequences": options.max_running,
        "encode_tokens_per_step": options.encode_tokens_per_step,
        "versions": environment.versions(),
        "processor": environment.processor(options.device, options.threads),
        "notes": notes + findings.notes,
        "failures": findings.failures,
        "agreement": findings.agreement,
        "ratios": ratios.build(findings.rows, WORKLOADS),
        **_bounds(options, findings),
        "tunings": findings.tunings,
        "rows": findings.rows,
    }


def _bounds(options: Options, findings: Findings) -> dict[str, Any]:
    """The processor's best rates, measured now, and what they allow the workloads whose requests are all known."""
    measured = dict.fromkeys((row["shape"], row["workload"]) for row in findings.rows)
    works: dict[tuple[str, str, str], bounds.Work] = {}
    for shape, workload in measured:
        if not WORKLOADS[workload].all_at_once:
            continue
        for case in WORKLOADS[workload].cases(options.sizes):
            if workload == "uniform":
                requests, at_once = [(case["prompt"], case["output"])] * case["count"], case["count"]
            else:  # those of the rounds are drawn from the same lengths
                drawn = prompts.mixed(prompts.generator(options.seed, "bound"), case["count"], 100, case["scale"])
                requests, at_once = [(len(one.ids), one.length) for one in drawn], options.max_running
            works[shape, workload, case["name"]] = bounds.Work.of(SHAPES[shape], requests, at_once)
    if options.device != "cpu" or not works:
        return {"rates": {}, "bounds": [], "profiles": []}
    rates = peaks.found(options.threads, environment_of(options.threads))
    return {
        "rates": rates,
        "bounds": bounds.build(findings.rows, works, rates),
        "profiles": profiles.build(findings.profiles, SHAPES, rates),
    }


def _at_home(options: Options, findings: Findings) -> None:
    """Every workload on the weights where it is at home, see `Workload.home`."""
    asked = [WORKLOADS[name] for name in WORKLOADS if name in options.workloads]
    homes: dict[str, tuple[Workload, ...]] = {}
    for workload in asked:
        homes[workload.home] = (*homes.get(workload.home, ()), workload)
    parts = sum(len(options.shapes) if workload.home == "shapes" else 1 for workload in asked)
    budget = Budget(None if options.minutes is None else 60 * options.minutes, parts)
    for shape in options.shapes if "shapes" in homes else ():
        with tempfile.TemporaryDirectory(prefix="flan-bench-") as folder:
            write_checkpoint(Path(folder), SHAPES[shape], options.seed)
            group = Group(shape, options.place(shape, Path(folder)), homes["shapes"], tuple(options.titles))
            Session(group, options, findings, budget).run(verify=True)
    if "checkpoint" in homes:
        _on_a_checkpoint(options, findings, budget, homes["checkpoint"])
    if "card" in homes:
        place = options.place(CARD_SHAPE, None, max_running=CARD_SEQUENCES)
        group = Group(CARD_SHAPE, place, homes["card"], tuple(options.ours))
        Session(group, options, findings, budget).run(verify=False)


def _on_a_checkpoint(options: Options, findings: Findings, budget: Budget, workloads: tuple[Workload, ...]) -> None:
    """Our settings on a trained checkpoint; the one that all are compared with takes part in any case."""
    texts = quality.texts(options.sizes.quality_prompts, options.seed, options.prompts)
    ids, size = quality.encode(options.checkpoint, texts)
    place = replace(options.place("", options.checkpoint), vocab_limit=size)
    settings = dict.fromkeys((modes.REFERENCE, *options.quality_settings))
    titles = tuple(("ours", setting) for setting in settings)
    group = Group(options.checkpoint.name, place, workloads, titles)
    QualitySession(group, options, findings, budget, ids).run(verify=False)
