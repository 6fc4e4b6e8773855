"""Servers to be asked odd things: real processes over tiny checkpoints, everything about their answers kept short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx

from tests.fuzz.json_bodies import EXEMPLAR_SET
from tests.fuzz.rest_cases import KEY
from tests.server.process import ServerProcess

MAX_BODY_MIB = 0.125
MAX_BODY_BYTES = int(MAX_BODY_MIB * 2**20)
# How many requests all runs together send; without it each sends a few.
TOTAL_REQUESTS = "FLAN_FUZZ_REQUESTS"
_FILLING_PROMPTS = 256  # of 440 tokens; half of them take the 64 MiB


def num_requests(usual: int, share: float) -> int:
    """How many requests a run sends.

    Args:
        usual: where nobody says.
        share: of the total that the environment says.
    """
    total = os.environ.get(TOTAL_REQUESTS)
    return usual if total is None else int(int(total) * share)


def fill_caches(server: ServerProcess) -> None:
    """Ask for more long prompts, each another, than the server's budget for prompts that may come again holds: what
    they take is meant, and would look like a leak."""
    with httpx.Client(base_url=server.rest_url, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        for number in range(_FILLING_PROMPTS):
            body = {"mode": "raw", "instruction": f"{number:04} " + "x " * 220, "max_tokens": 1}
            assert client.post("/v1/generate", json=body).status_code == 200


def serving(folder: Path, exemplars: Path) -> ServerProcess:
    """A server over a checkpoint.

    Args:
        exemplars: an empty folder, for its sets.
    """
    lines = [json.dumps({"input": f"{n} and two", "output": str(n + 2), "rationale": "so"}) for n in range(5)]
    (exemplars / f"{EXEMPLAR_SET}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ServerProcess(
        *("--model", str(folder), "--api-key", KEY, "--max-body-mib", str(MAX_BODY_MIB), "--exemplars", str(exemplars)),
        *("--max-input-tokens", "600", "--max-output-tokens", "8", "--default-max-tokens", "8"),
        start_seconds=180,
    )
