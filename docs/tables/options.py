"""The configuration reference's table: every option of `flan-serve`, from the settings themselves."""

from __future__ import annotations

import json
from dataclasses import Field, fields
from typing import Any

from docs.tables.markdown import code, table
from serve.config import Settings, env_name, option_name


def options() -> str:
    rows = []
    for spec in fields(Settings):
        name = option_name(spec)
        flag = f"--{name} / --no-{name}" if isinstance(spec.default, bool) else f"--{name}"
        rows.append(
            [code(flag), code(env_name(spec)), code(name), _default(spec), _values(spec), spec.metadata["help"]]
        )
    return table(["flag", "environment variable", "TOML key", "default", "values", "meaning"], rows)


def _default(spec: Field[Any]) -> str:
    """As TOML has it."""
    return "" if spec.default in (None, ()) else code(json.dumps(spec.default))


def _values(spec: Field[Any]) -> str:
    metadata, default = spec.metadata, spec.default
    if metadata.get("choices"):
        return ", ".join(code(choice) for choice in metadata["choices"])
    if isinstance(default, bool):
        return "`true`, `false`"
    if isinstance(default, tuple):
        return "list of strings"
    if not isinstance(default, int | float):
        return (
            "an existing file" if metadata.get("file") else "an existing folder" if metadata.get("folder") else "text"
        )
    kind = "whole number" if isinstance(default, int) else "number"
    low, high = metadata.get("low"), metadata.get("high")
    return f"{kind} ≥ {low}" if high is None else f"{kind} {low}…{high}"
