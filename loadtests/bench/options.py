"""What a run is asked to do, checked once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from loadtests.bench import modes
from loadtests.bench.effort import EFFORTS, Effort
from loadtests.bench.shapes import SHAPES
from loadtests.bench.system import Place
from loadtests.bench.workloads.quality import DEMO
from loadtests.bench.workloads.registry import WORKLOADS

SYSTEMS = ("ours", "transformers", "ctranslate2")  # what a run measures when nothing is asked for
KNOWN_SYSTEMS = (*SYSTEMS, "vllm")  # T5 through our plugin; in an environment that has vLLM
_PEER_SETTINGS = {
    ("transformers", "cpu"): ("float32",),
    ("transformers", "cuda"): ("bfloat16",),
    ("vllm", "cpu"): ("float32",),
    ("vllm", "cuda"): ("bfloat16",),
    ("ctranslate2", "cpu"): ("float32", "int8"),
    ("ctranslate2", "cuda"): ("bfloat16", "int8_bfloat16"),
}
Title = tuple[str, str]  # system, setting


@dataclass(frozen=True, slots=True)
class Options:
    """See `python -m loadtests bench --help`, which sets all of them."""

    shapes: tuple[str, ...]
    workloads: tuple[str, ...]
    systems: tuple[str, ...]
    settings: tuple[str, ...]  # modes of ours that are timed
    rounds: int
    threads: int
    quality_settings: tuple[str, ...] = ()  # modes of ours whose answers are compared
    effort: str = "full"
    seed: int = 0
    device: str = "cpu"
    max_running: int = 64
    encode_tokens_per_step: int = 2048
    minutes: float | None = None  # nothing new begins then
    checkpoint: Path = DEMO
    prompts: Path | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming what is wrong."""
        for what, given, known in (
            ("shape", self.shapes, SHAPES),
            ("workload", self.workloads, WORKLOADS),
            ("system", self.systems, KNOWN_SYSTEMS),
            ("mode", (*self.settings, *self.quality_settings), modes.known(self.device)),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"no {what} {name!r} on {self.device}; there are {', '.join(known)}")
        for name in ("rounds", "threads", "max_running", "encode_tokens_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes must be positive, not {self.minutes:g}")
        if "xl" in self.workloads and self.device != "cuda":
            raise ValueError("the workload xl needs --device cuda")

    def without(self, skipped: Collection[str]) -> Options:
        """The same without some modes of ours."""
        settings = tuple(name for name in self.settings if name not in skipped)
        quality = tuple(name for name in self.quality_settings if name not in skipped)
        return replace(self, settings=settings, quality_settings=quality)

    @property
    def sizes(self) -> Effort:
        return EFFORTS[self.effort]

    @property
    def ours(self) -> list[Title]:
        return [("ours", setting) for setting in self.settings] if "ours" in self.systems else []

    @property
    def titles(self) -> list[Title]:
        """Every system in every setting, ours first."""
        peers = [name for name in KNOWN_SYSTEMS if name in self.systems and name != "ours"]
        return self.ours + [(name, setting) for name in peers for setting in _PEER_SETTINGS[name, self.device]]

    def place(self, shape: str, folder: Path | None, *, max_running: int | None = None) -> Place:
        return Place(
            folder=None if folder is None else str(folder),
            shape=shape,
            seed=self.seed,
            device=self.device,
            threads=self.threads,
            max_running=self.max_running if max_running is None else max_running,
            encode_tokens_per_step=self.encode_tokens_per_step,
        )
