"""`--runtime-arg key=value` for vLLM: which keys there are, and their values checked, without importing vLLM."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

Value = int | float | bool | str
_WORDS = {"true": True, "1": True, "false": False, "0": False}


def parse_runtime_args(items: Iterable[str]) -> tuple[dict[str, Value], list[str]]:
    """The arguments by name, and everything that is wrong with the others.

    >>> parse_runtime_args(["tensor_parallel_size=2", "enforce-eager=true"])
    ({'tensor_parallel_size': 2, 'enforce_eager': True}, [])
    >>> parse_runtime_args(["max_model_length=512"])[1]
    ['--runtime-arg max_model_length: no such argument; did you mean max_model_len?']
    """
    values: dict[str, Value] = {}
    problems: list[str] = []
    for item in items:
        key, equals, text = item.partition("=")
        name = key.strip().replace("-", "_")
        if not equals:
            problems.append(f"--runtime-arg {item}: must have the form key=value")
        elif name not in VLLM_ARGS:
            near = difflib.get_close_matches(name, VLLM_ARGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VLLM_ARGS)}"
            problems.append(f"--runtime-arg {name}: no such argument; {hint}")
        elif name in values:
            problems.append(f"--runtime-arg {name}: given twice")
        else:
            try:
                values[name] = VLLM_ARGS[name](text.strip())
            except ValueError as error:
                problems.append(f"--runtime-arg {name}: {error}, not {text.strip()!r}")
    return values, problems


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError("must be a whole number of at least 1")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1.0:
        raise ValueError("must be in (0, 1]")
    return number


def _flag(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError("must be true or false")
    return _WORDS[text.lower()]


def _word(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


VLLM_ARGS: dict[str, Callable[[str], Value]] = {
    "tensor_parallel_size": _count,
    "pipeline_parallel_size": _count,
    "data_parallel_size": _count,
    "distributed_executor_backend": _word,
    "quantization": _word,
    "kv_cache_dtype": _word,
    "kv_cache_memory_bytes": _count,
    "max_model_len": _count,
    "max_num_batched_tokens": _count,
    "block_size": _count,
    "gpu_memory_utilization": _share,
    "cpu_offload_gb": _count,
    "enforce_eager": _flag,
    "enable_prefix_caching": _flag,
    "attention_backend": _word,
}
