"""The command line: what each command does, exit codes, and errors that say what to change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.__main__ import COMMANDS, FAILED, OK, USAGE, build_parser, main

CONFIGS = Path(__file__).parents[2] / "finetune" / "configs"
TINY = (
    "model.d_model=8", "model.d_ff=8", "model.num_layers=1", "model.num_decoder_layers=1",
    "phases.0.rows_per_batch=2", "phases.1.rows_per_batch=2", "log_steps=1",
)  # fmt: skip


def run(tmp_path: Path, *arguments: str) -> int:
    return main(["train", str(CONFIGS / "smoke.toml"), "--output", str(tmp_path / "run"), *TINY, *arguments])


def test_train_resume_and_export_on_shipped_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--steps", "3") == OK
    assert capsys.readouterr().out == f"checkpoint {tmp_path / 'run'}\n"
    assert run(tmp_path, "--steps", "4") == FAILED
    assert "--resume" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "4", "--resume") == OK
    flan = json.loads((tmp_path / "run" / "flan.json").read_text())
    assert (flan["step"], flan["recipe"]["log_steps"]) == (4, 1)
    assert sum(entry["count"] for entry in flan["mixtures"]["instructions"]) > 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == OK
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == FAILED


def test_configuration_errors_are_listed_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "sed=1", "dtype=float16") == USAGE
    lines = capsys.readouterr().err.splitlines()
    assert "error: sed: unknown key; did you mean seed?" in lines
    assert any(line.startswith("error: dtype: must be one of") for line in lines)
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_anywhere_but_nothing_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "x.toml", "seed=1", "--outptu", "y"])
    assert caught.value.code == USAGE
    assert "unknown arguments: --outptu y" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "a", "b", "seed=1"])


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.toml"]) == USAGE
    assert capsys.readouterr().err == "error: nowhere.toml: no such file\n"


def test_inspect_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "smoke", "--num-examples", "2"]) == OK
    assert "▁" in capsys.readouterr().out  # the tokens of the demo tokenizer


def test_a_tokenizer_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mixture", "smoke", "--pieces", "400", "--num-examples", "300"]
    assert main(["tokenizer", str(tmp_path), *arguments]) == OK
    assert capsys.readouterr().out == f"tokenizer {tmp_path}: 500 ids\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == OK
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
