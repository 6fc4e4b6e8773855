"""lm-eval as its users start it, on tasks and data written for the occasion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_lm_eval(
    work: Path,
    model: str,
    model_args: str,
    *,
    rows: list[dict[str, Any]],
    tasks: list[dict[str, Any]],
    options: tuple[str, ...] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Each task's samples in the order of the documents, as lm-eval logs them.

    Args:
        work: a folder for this run alone; it is made.
        rows: the documents, which every task reads.
        tasks: what stands in a task's YAML, but for where the documents are.

    Raises:
        AssertionError: lm-eval failed; with what it printed.
    """
    work.mkdir()
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for task in tasks:
        (work / f"{task['task']}.yaml").write_text(json.dumps(source | task), encoding="utf-8")  # JSON is YAML
    names = ",".join(task["task"] for task in tasks)
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", names, "--include_path", str(work), "--log_samples", "--output_path", str(work), *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        [samples] = work.glob(f"*/samples_{task['task']}_2*.jsonl")
        logged = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
        found[task["task"]] = sorted(logged, key=lambda row: int(row["doc_id"]))
    return found


def answers_of(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """Each task's answers: the text of a generation, or (log-likelihood, is greedy) of every choice."""
    return {name: [answer[0] for row in rows for answer in row["resps"]] for name, rows in samples.items()}
