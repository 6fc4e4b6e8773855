"""Configuration: every shipped file is read, every mistake named with its key, all at once."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from finetune.config import ConfigError, TrainConfig, to_dict
from finetune.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "finetune" / "configs"
MINIMAL = """
init = "model"
[[phases]]
name = "only"
mixture = "smoke"
steps = 10
learning_rate = 5e-4
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str, **arguments: Any) -> TrainConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_config(path, overrides, **arguments)


def errors(tmp_path: Path, text: str = MINIMAL, *overrides: str, **arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides, **arguments)
    return list(caught.value.errors)


def test_every_shipped_config_is_read() -> None:
    paths = sorted(CONFIGS.glob("*.toml"))
    assert [path.stem for path in paths] == ["demo", "flan_t5_base", "flan_t5_small", "smoke"]
    for path in paths:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# python -m finetune train finetune/configs/" + path.name), path
        config = load_config(path, init="model" if path.stem.startswith("flan_t5") else None)
        assert config.total_steps > 0
        for phase in config.phases:
            assert phase.mixture in {"demo", "demo_focus", "smoke", "flan2022"}
        assert config.tokenizer is None or (Path(config.tokenizer) / "tokenizer.json").is_file()


@pytest.mark.parametrize(("size", "steps"), [("small", 98_000), ("base", 84_000)])
def test_the_flan_recipe_is_the_papers(size: str, steps: int) -> None:
    config = load_config(CONFIGS / f"flan_t5_{size}.toml", init="model")
    phase = config.phases[0]
    assert (phase.steps, phase.rows_per_batch, phase.learning_rate, phase.dropout) == (steps, 64, 5e-4, 0.05)
    assert (phase.schedule, phase.warmup_steps, phase.input_length, phase.target_length) == ("constant", 0, 2048, 512)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.scale_parameter, optimizer.relative_step) == ("adafactor", True, False)
    assert (optimizer.clip_rms, optimizer.beta2_decay, optimizer.min_factored_size) == (1.0, 0.8, 128)


def test_defaults_overrides_and_arguments(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL, "phases.0.steps=20", "optimizer.name=adamw", "seed=3", "dtype=bfloat16", output="x"
    )
    assert (config.phases[0].steps, config.optimizer.name, config.seed, config.dtype) == (20, "adamw", 3, "bfloat16")
    assert (config.output, config.overlong, config.loss.z_loss) == ("x", "trim", 1e-4)
    with pytest.raises(FrozenInstanceError):
        config.seed = 4  # type: ignore[misc]


def test_paths_are_beside_the_file(tmp_path: Path) -> None:
    assert load(tmp_path).init == str(tmp_path / "model")
    assert load(tmp_path, 'data = ["../d"]\n' + MINIMAL).data == (str(tmp_path.parent / "d"),)
    assert load(tmp_path, MINIMAL, data=["d"]).data == ("d",)


def test_unknown_keys_name_the_nearest_and_all_errors_come_at_once(tmp_path: Path) -> None:
    text = MINIMAL + 'learning_rat = 1\ndropout = 1.5\n[optimizer]\nname = "adafactr"\nfoo = 1\n'
    found = errors(tmp_path, text, "sed=3")
    assert "phases.0.learning_rat: unknown key; did you mean learning_rate?" in found
    assert "sed: unknown key; did you mean seed?" in found
    assert "optimizer.name: must be one of adafactor, adamw, not 'adafactr'" in found
    assert any(line.startswith("optimizer.foo: unknown key; known keys: name, ") for line in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype=float16", "dtype: must be one of float32, bfloat16, not 'float16'; float16 overflows"),
        ("optimizer.relative_step=true", "phases.0.learning_rate: relative_step sets the rate itself"),
        ("phases.0.learning_rate=0", "phases.0.learning_rate: must be given and above 0"),
        ("phases.0.dropout=1", "phases.0.dropout: must be in [0, 1), not 1.0"),
        ("phases.0.final_learning_rate=1e-5", "the schedule constant never reaches it"),
        ("phases.0.warmup_steps=10", "phases.0.warmup_steps: 10 is not below the phase's 10 steps"),
        ("phases.0.input_length=1", "phases.0.input_length: must be at least 2, not 1"),
        ("phases.0.noise_density=0.0", "phases.0.noise_density"),
        ("workers=2", "phases.0.dropout: must be 0 with workers 2"),
        ("keep_checkpoints=0", "keep_checkpoints: must be at least 1, not 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas: two numbers"),
        ("seed=true", "seed: must be a whole number, not True"),
        ("phases.0.steps=1.5", "phases.0.steps: must be a whole number, not 1.5"),
        ("phases.0.name=7", "phases.0.name: must be a text, not 7"),
        ("phases=[]", "phases: at least one [[phases]] is needed"),
        ("phases.9.steps=1", "phases.9.steps=1: there is no 9 to set"),
        ("model=3", "model: must be a table of keys"),
        ("seed", "seed: an override is key=value"),
    ],
)
def test_what_cannot_be_run_is_refused(change: str, message: str, tmp_path: Path) -> None:
    assert any(message in line for line in errors(tmp_path, MINIMAL, change))


def test_a_shape_or_a_folder_never_both_or_neither(tmp_path: Path) -> None:
    shape = "[model]\nvocab_size = 96\nd_model = 8\nd_ff = 8\nnum_layers = 1\nnum_decoder_layers = 1\nnum_heads = 0\n"
    assert any("give one of them" in line for line in errors(tmp_path, MINIMAL + shape))
    without = MINIMAL.replace('init = "model"\n', "")
    assert any("give one of them" in line for line in errors(tmp_path, without))
    found = errors(tmp_path, without + shape)
    assert "model.num_heads: must be at least 1, not 0" in found
    assert any(line.startswith("tokenizer: missing") for line in found)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    assert errors(tmp_path, "phases = [")[0].startswith(str(tmp_path / "run.toml"))
    assert "phases: missing" in errors(tmp_path, 'init = "x"')


def test_steps_shortens_every_phase_in_proportion(tmp_path: Path) -> None:
    second = '[[phases]]\nname = "b"\nmixture = "smoke"\nsteps = 30\nlearning_rate = 1e-3\nwarmup_steps = 10\n'
    config = load(tmp_path, MINIMAL + second, steps=8)
    assert [phase.steps for phase in config.phases] == [2, 6]
    assert config.phases[1].warmup_steps == 2
    assert [phase.steps for phase in load(tmp_path, MINIMAL + second, steps=2).phases] == [1, 1]
    assert "each needs a step" in errors(tmp_path, MINIMAL + second, steps=1)[0]


def test_a_configuration_is_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(to_dict(load(tmp_path))))["phases"][0]["mixture"] == "smoke"
