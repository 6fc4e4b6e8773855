"""flan.json and README.md of a checkpoint: how it was made, in JSON and in words."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.config import TrainConfig, to_dict
from finetune.model import T5, num_parameters
from serve.prompts import PROMPT_FORMAT_VERSION

_PACKAGES = ("flan-serve", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def flan_json(
    config: TrainConfig,
    step: int,
    manifests: dict[str, list[dict[str, Any]]],
    counts: dict[str, dict[str, int]],
    totals: dict[str, Any],
) -> dict[str, Any]:
    """The recipe as it was run. `mixtures` has each phase's tasks with realised counts; `scores` is for `evaluate`."""
    return {
        "prompt_format_version": PROMPT_FORMAT_VERSION,
        "step": step,
        "total_steps": config.total_steps,
        "recipe": portable(to_dict(config)),
        "max_input_tokens": max(phase.input_length for phase in config.phases),
        "max_output_tokens": max(phase.target_length for phase in config.phases),
        "seeds": {"seed": config.seed},
        "totals": totals,
        "counts": counts,
        "mixtures": manifests,
        "packages": {"python": platform.python_version(), **_versions()},
        "scores": {},
    }


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the folders of the machine it ran on: their last parts only.

    >>> portable({"output": "/home/me/runs/a", "data": ["/data/train"], "tokenizer": None, "seed": 1})
    {'output': 'a', 'data': ['train'], 'tokenizer': None, 'seed': 1}
    """
    short = dict(recipe)
    for key in ("output", "init", "tokenizer"):
        if short.get(key) is not None:
            short[key] = Path(short[key]).name
    short["data"] = [Path(folder).name for folder in short["data"]]
    return short


def model_card(config: TrainConfig, model: T5, flan: dict[str, Any]) -> str:
    """README.md with the front matter that model hubs read."""
    shape = model.config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text2text-generation",
        "tags: [t5, flan, instruction-finetuning]",
        "---",
        "",
        "# Flan checkpoint",
        "",
        *([config.description, ""] if config.description else []),
        f"T5{'' if shape.tie_word_embeddings else ' 1.1'} with {num_parameters(model) / 1e6:.1f}M parameters: "
        f"{shape.num_layers} + {shape.num_decoder_layers} layers, d_model {shape.d_model}, d_ff {shape.d_ff}, "
        f"{shape.num_heads} heads of {shape.d_kv}, vocabulary {shape.vocab_size}. "
        f"Written after step {flan['step']:,} of {flan['total_steps']:,} by flan-finetune "
        f"(prompt format {flan['prompt_format_version']}); everything that made it is in `flan.json`.",
        "",
        "## Use",
        "",
        "`flan-serve --model FOLDER`, or `transformers.T5ForConditionalGeneration.from_pretrained(FOLDER)`.",
        "Train it in bfloat16 or float32; T5 overflows in float16.",
        "",
        "## Recipe",
        "",
        "| phase | objective | mixture | steps | learning rate | dropout | rows x (inputs + targets) |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {phase.name} | {phase.objective} | {phase.mixture} | {phase.steps:,} | "
            f"{phase.learning_rate} {phase.schedule} | {phase.dropout} | "
            f"{phase.rows_per_batch} x ({phase.input_length} + {phase.target_length}) |"
            for phase in config.phases
        ),
        "",
        f"Optimizer {config.optimizer.name}; examples packed with per-example masks; loss on every target token.",
        "",
        "## Data",
        "",
        *_data_lines(flan["mixtures"]),
    ]
    return "\n".join(lines) + "\n"


def _data_lines(mixtures: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for phase, manifest in mixtures.items():
        lines += [f"Phase {phase}:", "", "| task | licence | weight | examples seen |", "|---|---|---|---|"]
        for entry in manifest:
            weight = entry.get("weight")
            shown = f"{weight:.4f}" if isinstance(weight, float) else str(weight)
            lines.append(f"| {entry.get('task')} | {entry.get('licence')} | {shown} | {entry.get('count')} |")
        lines.append("")
    return lines


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
