"""Training: resume is the same run bit for bit, accumulation changes nothing, signals leave a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import trainer
from finetune.checkpoints import load_tensors, read_json
from finetune.config import PhaseConfig, TrainConfig
from finetune.example import TextExample
from finetune.loss import LossError, LossGuard
from finetune.packing import PackedRow
from tests.finetune.tiny import EXAMPLES, SHAPE, WordStream, make_model, train_config, word_source


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = load_tensors(one), load_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert losses(one) == losses(other)
    assert read_json(one / "flan.json")["mixtures"] == read_json(other / "flan.json")["mixtures"]


class StopAfter:
    """A source that asks the process to end while its n-th example is drawn: in the middle of a step."""

    def __init__(self, num_draws: int) -> None:
        self.left = num_draws

    def __call__(self, mixture: str, data: tuple[str, ...], seed: int) -> WordStream:
        stop = self

        class Stream(WordStream):
            def __next__(self) -> TextExample:
                stop.left -= 1
                if stop.left == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().__next__()

        return Stream(mixture, seed)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer.train(train_config(tmp_path_factory.mktemp("straight") / "run"), source=word_source)


@pytest.mark.parametrize("num_draws", [1, 25, 40, 60, 70])
def test_resume_is_the_same_run(num_draws: int, straight: Path, tmp_path: Path) -> None:
    """Stopped in phase 1, at its end, or in phase 2; with dropout, denoising, and rows half packed."""
    config = train_config(tmp_path / "run")
    trainer.train(config, source=StopAfter(num_draws))
    stopped_at = read_json(tmp_path / "run" / "flan.json")["step"]
    assert 0 < stopped_at < 10
    trainer.train(config, resume=True, source=word_source)
    assert_same_run(straight, tmp_path / "run")


def test_resume_at_the_phase_boundary(straight: Path, tmp_path: Path) -> None:
    """A run of the first phase only, gone on with as the whole."""
    config = train_config(tmp_path / "run")
    trainer.train(replace(config, phases=config.phases[:1]), source=word_source)
    trainer.train(config, resume=True, source=word_source)
    assert_same_run(straight, tmp_path / "run")


def test_a_finished_run_resumed_does_nothing(straight: Path) -> None:
    before = (straight / "model.safetensors").read_bytes()
    trainer.train(train_config(straight), resume=True, source=word_source)
    assert (straight / "model.safetensors").read_bytes() == before


def test_the_log_has_what_was_done(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["phase"] for line in lines] == ["denoise"] * 4 + ["instructions"] * 6
    assert [line["learning_rate"] for line in lines[:6]] == pytest.approx([0.01] * 4 + [0.005, 0.01])
    assert all(line["rows"] == 4 and line["target_tokens"] > 0 for line in lines)


def test_flan_json_tells_the_recipe(straight: Path) -> None:
    flan = read_json(straight / "flan.json")
    assert (flan["step"], flan["total_steps"], flan["prompt_format_version"]) == (10, 10, 1)
    assert flan["recipe"]["phases"][1]["schedule"] == "linear"
    assert (flan["max_input_tokens"], flan["max_output_tokens"]) == (24, 12)
    drawn = flan["mixtures"]["instructions"][0]["count"]
    assert drawn >= flan["counts"]["instructions"]["examples"] > 0
    assert flan["counts"]["denoise"]["rows"] == 16
    assert flan["packages"]["torch"] == torch.__version__.split("+")[0] or flan["packages"]["torch"]


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 8])
def test_accumulation_changes_nothing(micro_rows: int, tmp_path: Path) -> None:
    """8 rows of very different lengths as 1 x 8, 2 x 4, 3 + 3 + 2 and 8 x 1."""
    rows = [PackedRow(EXAMPLES[index % 3 : index % 3 + 1 + index % 2]) for index in range(8)]
    expected, gradients = accumulate(rows, 8)
    loss, found = accumulate(rows, micro_rows)
    assert loss == pytest.approx(expected, abs=1e-5)
    for one, other in zip(gradients, found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def accumulate(rows: list[PackedRow], micro_rows: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step of these rows."""
    phase = PhaseConfig(
        "p", 1, "m", 1.0, dropout=0.0, input_length=20, target_length=14, rows_per_batch=8, micro_rows=micro_rows
    )
    model = make_model(SHAPE)
    kept: list[torch.Tensor] = []

    class Keep:
        def step(self, rate: float) -> None:
            kept.extend(parameter.grad for parameter in model.parameters() if parameter.grad is not None)

        def zero_grad(self) -> None:
            pass

    config = TrainConfig(phases=(phase,))
    run: Any = trainer.Run(config, model, Keep(), None, Path(), None, torch.device("cpu"), map)  # type: ignore[arg-type]
    report = trainer.train_step(run, phase, 0, iter(rows), LossGuard(1))  # type: ignore[arg-type]
    return report.loss, kept


def test_workers_change_nothing(tmp_path: Path) -> None:
    base = train_config(tmp_path / "one")
    phases = tuple(replace(phase, dropout=0.0, micro_rows=2) for phase in base.phases)
    one = trainer.train(replace(base, phases=phases), source=word_source)
    two = trainer.train(replace(base, phases=phases, workers=2, output=str(tmp_path / "two")), source=word_source)
    assert_same_run(one, two)


def test_a_killed_run_resumes_from_its_checkpoint_and_logs_each_step_once(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainer.train_step, []

    def dies(*arguments: Any) -> trainer.StepReport:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt  # as abrupt as it gets in a test: steps 6 and 7 are logged, not saved
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(train_config(tmp_path / "run"), source=word_source)
    monkeypatch.undo()
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7]
    trainer.train(train_config(tmp_path / "run"), resume=True, source=word_source)
    assert_same_run(straight, tmp_path / "run")
    assert len((tmp_path / "run" / "train_log.jsonl").read_text().splitlines()) == 10


def test_resume_without_a_checkpoint_starts_at_the_beginning(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(train_config(tmp_path / "run"), resume=True, source=word_source)
    assert "has no finished checkpoint yet: starting at step 0" in capsys.readouterr().err
    assert_same_run(straight, tmp_path / "run")


def test_weights_are_not_saved_while_the_loss_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 5, where a checkpoint is due, has no finite loss; step 10 has."""
    real = trainer._save
    saved: list[int] = []

    def save(run: trainer.Run, *rest: Any) -> None:
        saved.append(run.step)
        real(run, *rest)

    monkeypatch.setattr(trainer, "_save", save)
    calls: list[int] = []
    step = trainer.micro_step

    def breaks(*arguments: Any) -> trainer.MicroStep:
        calls.append(1)
        parts = step(*arguments)
        return replace(parts, total=float("inf")) if len(calls) == 9 else parts  # 4 steps of 2 come first

    monkeypatch.setattr(trainer, "micro_step", breaks)
    trainer.train(train_config(tmp_path / "run"), source=word_source)
    assert saved == [10]


def test_a_run_is_not_begun_over_another(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        trainer.train(train_config(straight), source=word_source)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="did not write"):
        trainer.train(train_config(other), source=word_source)


def test_resume_with_another_seed_is_refused(straight: Path) -> None:
    with pytest.raises(ValueError, match="seed is 5, the checkpoint was made with 0"):
        trainer.train(train_config(straight, seed=5), resume=True, source=word_source)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainer.micro_step, []

    def breaks(run: Any, batch: Any, num_targets: int) -> trainer.MicroStep:
        calls.append(1)
        parts = real(run, batch, num_targets)
        return replace(parts, total=float("nan")) if len(calls) > 11 else parts

    monkeypatch.setattr(trainer, "micro_step", breaks)
    with pytest.raises(LossError, match="nan 3 times in a row"):
        trainer.train(train_config(tmp_path / "run"), source=word_source)
    assert read_json(tmp_path / "run" / "flan.json")["step"] == 5
    assert all(bool(tensor.isfinite().all()) for tensor in load_tensors(tmp_path / "run").values())


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    small = replace(train_config(tmp_path).model, vocab_size=512)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="the tokenizer has 8100 ids, the model only 512 rows"):
        trainer.train(train_config(tmp_path / "run", model=small), source=word_source)


def test_it_learns(tmp_path: Path) -> None:
    base = train_config(tmp_path / "run")
    phase = replace(base.phases[1], steps=60, learning_rate=0.05, schedule="constant", dropout=0.0)
    folder = trainer.train(replace(base, phases=(phase,), log_steps=10, checkpoint_steps=0), source=word_source)
    found = losses(folder)
    assert found[60] < 0.6 * found[10]
