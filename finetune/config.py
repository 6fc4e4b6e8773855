"""A training run's configuration: frozen dataclasses, their defaults, and which values go together.

`finetune.config_file` reads them from TOML. Every error carries the key as it is written there (`phases.1.schedule`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run. The message lists every error, one a line."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a T5. Names are those of Hugging Face's config.json."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    d_kv: int = 64
    feed_forward_proj: Literal["gated-gelu", "relu"] = "gated-gelu"
    tie_word_embeddings: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """How a step is taken. The defaults are T5X's Adafactor, the Flan paper's optimizer.

    scale_parameter   adafactor: the learning rate is relative to each tensor's RMS
    relative_step     adafactor: the rate follows from the step number; the phases then give no rate of their own
    beta2_decay       adafactor: second-moment decay beta2 = 1 - t^-beta2_decay
    clip_rms          adafactor: an update with a larger RMS is scaled down to it
    betas, weight_decay, max_grad_norm   adamw (max_grad_norm 0: no clipping)
    """

    name: Literal["adafactor", "adamw"] = "adafactor"
    scale_parameter: bool = True
    relative_step: bool = False
    beta2_decay: float = 0.8
    clip_rms: float = 1.0
    min_factored_size: int = 128
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class LossConfig:
    """z_loss: weight of the squared log-partition (T5X 1e-4). max_bad_steps: non-finite losses in a row, then stop."""

    z_loss: float = 1e-4
    max_bad_steps: int = 3


@dataclass(frozen=True, slots=True)
class PhaseConfig:
    """A stretch of steps with one mixture, objective and schedule.

    objective            instruction: inputs -> targets. denoise: span corruption of the same texts
    schedule             constant | inverse_sqrt | linear | cosine; each rises linearly over `warmup_steps` first.
                         inverse_sqrt: learning_rate * sqrt(decay_start / step) after decay_start steps
                         linear, cosine: down to final_learning_rate at the phase's last step
    rows_per_batch       packed rows a step; micro_rows of them are in memory at once (0 = all)
    input_length, target_length   room of a row, in tokens
    reset_optimizer      begin the phase with fresh optimizer state
    """

    name: str
    steps: int
    mixture: str
    learning_rate: float | None = None
    objective: Literal["instruction", "denoise"] = "instruction"
    schedule: Literal["constant", "inverse_sqrt", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_start: int = 100
    final_learning_rate: float = 0.0
    dropout: float = 0.05
    input_length: int = 512
    target_length: int = 128
    rows_per_batch: int = 64
    micro_rows: int = 0
    noise_density: float = 0.15
    mean_span: float = 3.0
    reset_optimizer: bool = False

    @property
    def rows_at_once(self) -> int:
        return self.micro_rows if self.micro_rows > 0 else self.rows_per_batch


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run.

    model                 a shape, for random initial weights; or None: start from the folder `init`
    init                  checkpoint folder to start from (`--model`)
    tokenizer             folder of the tokenizer; not needed with `init`, which has its own
    data                  folders of training data (`--data`); none: what the repository ships
    overlong              trim (default, as T5X: cut, then EOS), drop, or no_eos (a cut target has no EOS)
    dtype                 of the products: float32, or bfloat16 with float32 weights, norms, softmax and loss
    checkpoint_steps      steps between checkpoints; 0: only by time
    checkpoint_seconds    the same by the clock; 0: only by steps. One is always written at the end
    keep_checkpoints      how many resumable checkpoints stay
    threads               torch threads; 0: torch's default
    workers               micro batches computed at the same time, each on a thread of its own. On a few CPU cores,
                          workers = cores with threads = 1 is faster than threads = cores, the more so when other
                          programs run. Needs dropout 0: threads would share one random generator
    """

    phases: tuple[PhaseConfig, ...]
    model: ModelConfig | None = None
    init: str | None = None
    tokenizer: str | None = None
    data: tuple[str, ...] = ()
    output: str = "runs/latest"
    seed: int = 0
    overlong: Literal["trim", "drop", "no_eos"] = "trim"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    threads: int = 0
    workers: int = 1
    log_steps: int = 10
    tensorboard: bool = False
    checkpoint_steps: int = 1000
    checkpoint_seconds: int = 0
    keep_checkpoints: int = 2
    description: str = ""

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


def to_dict(config: Any) -> Any:
    """A configuration as JSON-able values, for logs and flan.json."""
    if is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_dict(getattr(config, item.name)) for item in fields(config)}
    return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def check(config: TrainConfig) -> list[str]:
    """Errors of a configuration whose keys and types are right: ranges, and values that do not go together."""
    errors = []
    if (config.model is None) == (config.init is None):
        errors.append("model, init: give one of them: a [model] shape (random weights) or a folder (--model DIR)")
    if config.model is not None:
        errors += _check_model(config.model)
        if config.tokenizer is None:
            errors.append("tokenizer: missing; a run from a [model] shape needs a tokenizer folder")
    if not config.phases:
        errors.append("phases: at least one [[phases]] is needed")
    if config.optimizer.relative_step and config.optimizer.name != "adafactor":
        errors.append("optimizer.relative_step: only adafactor knows it")
    if len(config.optimizer.betas) != 2:
        errors.append("optimizer.betas: two numbers")
    errors += _check_least(
        config, "", {"log_steps": 1, "keep_checkpoints": 1, "checkpoint_steps": 0, "threads": 0, "workers": 1}
    )
    for index, phase in enumerate(config.phases):
        errors += _check_phase(phase, f"phases.{index}", config.optimizer.relative_step)
        if config.workers > 1 and phase.dropout > 0:
            errors.append(f"phases.{index}.dropout: must be 0 with workers {config.workers}; threads share a generator")
    return errors


def _check_model(model: ModelConfig) -> list[str]:
    names = ("vocab_size", "d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "d_kv")
    return _check_least(model, "model.", dict.fromkeys(names, 1))


def _check_phase(phase: PhaseConfig, where: str, relative_step: bool) -> list[str]:
    least = {"steps": 1, "input_length": 2, "target_length": 2, "rows_per_batch": 1, "micro_rows": 0}
    errors = _check_least(phase, f"{where}.", least)
    if relative_step and (phase.learning_rate is not None or phase.schedule != "constant"):
        errors.append(f"{where}.learning_rate: relative_step sets the rate itself; give no learning_rate and schedule")
    if not relative_step and (phase.learning_rate is None or phase.learning_rate <= 0):
        errors.append(f"{where}.learning_rate: must be given and above 0 (the Flan recipe: 5e-4 with adafactor)")
    if not 0 <= phase.dropout < 1:
        errors.append(f"{where}.dropout: must be in [0, 1), not {phase.dropout}")
    if phase.final_learning_rate and phase.schedule not in ("linear", "cosine"):
        errors.append(f"{where}.final_learning_rate: the schedule {phase.schedule} never reaches it")
    if phase.warmup_steps >= max(phase.steps, 1) and phase.warmup_steps > 0:
        errors.append(f"{where}.warmup_steps: {phase.warmup_steps} is not below the phase's {phase.steps} steps")
    if not 0 < phase.noise_density < 1 or phase.mean_span < 1:
        errors.append(f"{where}.noise_density, mean_span: must be in (0, 1) and at least 1")
    return errors


def _check_least(section: Any, where: str, least: Mapping[str, int]) -> list[str]:
    return [
        f"{where}{name}: must be at least {value}, not {getattr(section, name)}"
        for name, value in least.items()
        if getattr(section, name) < value
    ]
