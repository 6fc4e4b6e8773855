"""TOML file and `key=value` overrides to a checked TrainConfig.

An unknown key is an error that names the nearest one, and all errors are reported at once, before anything is loaded.
Paths in a file are relative to that file; paths on the command line to the working directory.
"""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finetune.config import ConfigError, TrainConfig, check

_PATH_KEYS = ("init", "tokenizer", "output", "data")


def load_config(path: Path, overrides: Sequence[str] = (), **arguments: Any) -> TrainConfig:
    """Read and check a configuration.

    overrides    "key=value" texts; keys are dotted, phases are numbered: `phases.0.steps=20`, `optimizer.name=adamw`
    arguments    init, output, data, steps: the command line's own options; None = not given. `steps` makes the
                 run that long in all: phases are shortened in proportion

    Raises:
        ConfigError: with every error that was found.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError([f"{path}: no such file"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    for key in _PATH_KEYS:
        if key in raw:
            raw[key] = _beside(path, raw[key])
    errors: list[str] = []
    for override in overrides:
        _apply_override(raw, override, errors)
    for key in ("init", "output", "data"):
        if arguments.get(key) is not None:
            raw[key] = arguments[key]
    config = _build(TrainConfig, raw, "", errors)
    if config is not None:
        errors += check(config)
    if errors or config is None:
        raise ConfigError(errors)
    steps = arguments.get("steps")
    return config if steps is None else _shorten(config, steps)


def _beside(path: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_beside(path, item) for item in value]
    return str((path.parent / value).resolve()) if isinstance(value, str) else value


def _apply_override(raw: dict[str, Any], override: str, errors: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        errors.append(f"{override}: an override is key=value, such as phases.0.steps=20")
        return
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word
    node: Any = raw
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        else:
            errors.append(f"{override}: there is no {parent} to set")
            return
    if not isinstance(node, dict):
        errors.append(f"{override}: name the key inside, such as phases.0.steps=20")
        return
    node[last] = value


def _build(kind: type, raw: Any, where: str, errors: list[str]) -> Any:
    """A dataclass from a table; None after an error that leaves nothing to build."""
    if not isinstance(raw, Mapping):
        errors.append(f"{where}: must be a table of keys")
        return None
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    values: dict[str, Any] = {}
    before = len(errors)
    for key, value in raw.items():
        name = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
            errors.append(f"{name}: unknown key{hint}")
            continue
        values[key] = _value(hints[key], value, name, errors)
    for key, item in known.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            errors.append(f"{where}.{key}: missing" if where else f"{key}: missing")
    return kind(**values) if len(errors) == before else None


def _value(hint: Any, value: Any, where: str, errors: list[str]) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [item for item in get_args(hint) if item is not type(None)]
        return None if value is None else _value(inner[0], value, where, errors)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            advice = "; float16 overflows in T5's feed-forward, use bfloat16" if value == "float16" else ""
            errors.append(f"{where}: must be one of {', '.join(choices)}, not {value!r}{advice}")
        return value
    if origin is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            errors.append(f"{where}: must be a list")
            return ()
        return tuple(_value(item, entry, f"{where}.{index}", errors) for index, entry in enumerate(value))
    if is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where, errors)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        errors.append(f"{where}: must be {words[hint]}, not {value!r}")
    return value


def _shorten(config: TrainConfig, steps: int) -> TrainConfig:
    """The same run in `steps` steps: each phase keeps its share, at least one step; warm-ups shrink along.

    Two phases of 300 and 100 steps in 20 become 15 and 5.
    """
    if steps < len(config.phases):
        raise ConfigError([f"--steps {steps}: the run has {len(config.phases)} phases, each needs a step"])
    total, done, given = config.total_steps, 0, 0
    phases = []
    for index, phase in enumerate(config.phases):
        done += phase.steps
        left = len(config.phases) - index - 1
        share = max(1, min(round(steps * done / total) - given, steps - given - left))
        given += share
        warmup = min(round(phase.warmup_steps * share / phase.steps), share - 1)
        phases.append(replace(phase, steps=share, warmup_steps=warmup))
    return replace(config, phases=tuple(phases))
