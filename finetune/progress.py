"""What a run shows while it goes on: a bar, a JSON line every so often, TensorBoard if asked for."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.config import PhaseConfig, TrainConfig

if TYPE_CHECKING:
    from finetune.trainer import StepReport

LOG_FILE = "train_log.jsonl"
_SUMS = ("input_tokens", "target_tokens", "rows", "examples")


def forget_after(path: Path, step: int) -> None:
    """Drop log lines of later steps: a run that was killed logs them again after its resume."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        path.write_text("".join(kept), encoding="utf-8")


class Progress:
    """Sums reports over `log_steps` steps and writes them out. Times are this run's, resumes included."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        self.config = config
        self._started = self._saved = self._logged = time.monotonic()
        self._seconds_before = 0.0
        self._totals: dict[str, float] = dict.fromkeys(_SUMS, 0)
        self._window: list[StepReport] = []
        self._first_step = step
        self.last_loss: float | None = None
        self._bar: tqdm[Any] | None = None
        self._file: IO[str] | None = None
        self._board: Any = None

    def __enter__(self) -> Progress:
        self._bar = tqdm(
            total=self.config.total_steps, initial=self._first_step, unit="step", smoothing=0.05,
            mininterval=1.0 if sys.stderr.isatty() else 20.0,
        )  # fmt: skip
        path = Path(self.config.output) / LOG_FILE
        forget_after(path, self._first_step)
        self._file = path.open("a", encoding="utf-8")
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(Path(self.config.output) / "tensorboard"))
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self._bar, self._file, self._board):
            if sink is not None:
                sink.close()

    @property
    def seconds(self) -> float:
        """Training time so far, resumes included."""
        return self._seconds_before + time.monotonic() - self._started

    def log(self, step: int, phase: PhaseConfig, report: StepReport) -> None:
        """Count a step; every `log_steps`, and at the end, write the means of the steps since."""
        self._window.append(report)
        for name in _SUMS:
            self._totals[name] += getattr(report, name)
        if self._bar is not None:
            self._bar.update(1)
        if step % self.config.log_steps and step != self.config.total_steps:
            return
        line = self._summarise(step, phase)
        self._window = []
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._bar is not None:
            shown = {"loss": f"{line['loss']:.3f}", "lr": f"{line['learning_rate']:.1e}"}
            shown |= {"tok/s": f"{line['tokens_per_second']:.0f}", "rows/s": f"{line['rows_per_second']:.1f}"}
            self._bar.set_postfix(shown, refresh=False)
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def is_checkpoint_due(self, step: int) -> bool:
        """By steps or by the clock, as configured."""
        now = time.monotonic()
        by_steps = self.config.checkpoint_steps > 0 and step % self.config.checkpoint_steps == 0
        by_clock = self.config.checkpoint_seconds > 0 and now - self._saved >= self.config.checkpoint_seconds
        if by_steps or by_clock:
            self._saved = now
            return True
        return False

    def summary(self) -> dict[str, Any]:
        """Totals of the run for flan.json."""
        return {"seconds": round(self.seconds, 1), "last_loss": self.last_loss, **self._totals}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "totals": self._totals, "last_loss": self.last_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds_before, self._totals, self.last_loss = state["seconds"], state["totals"], state["last_loss"]

    def _summarise(self, step: int, phase: PhaseConfig) -> dict[str, Any]:
        now = time.monotonic()
        elapsed, self._logged = max(now - self._logged, 1e-9), now
        sums = {name: sum(getattr(report, name) for report in self._window) for name in _SUMS}
        weights = max(1, sums["target_tokens"])
        loss = sum(report.loss * report.target_tokens for report in self._window) / weights
        self.last_loss = loss
        return {
            "step": step,
            "phase": phase.name,
            "loss": loss,
            "z_loss": sum(report.z_loss * report.target_tokens for report in self._window) / weights,
            "learning_rate": self._window[-1].learning_rate,
            "tokens_per_second": (sums["input_tokens"] + sums["target_tokens"]) / elapsed,
            "examples_per_second": sums["examples"] / elapsed,
            "rows_per_second": sums["rows"] / elapsed,
            "seconds": round(self.seconds, 2),
            **sums,
        }
