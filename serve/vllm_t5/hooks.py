"""Wrapping a method of vLLM: named as data, compared with what it was, wrapped once and only where a T5 runs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MARK = "_flan_t5_wrapped"


class VllmMovedError(RuntimeError):
    """vLLM is not what this plugin was written against."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A method of vLLM and the names of its parameters when this was written (vLLM 0.32.0)."""

    module: str
    owner: str
    method: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.owner}.{self.method}"


def wrap(hook: Hook, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(the method)` in the method's place; a second call does nothing. Class methods stay class methods.

    Raises:
        VllmMovedError: naming the method that is gone or has other parameters, and what to do.
    """
    owner = _owner(hook)
    found = inspect.getattr_static(owner, hook.method)
    if getattr(getattr(owner, hook.method), MARK, False):
        return
    function = found.__func__ if isinstance(found, classmethod) else found
    wrapped = functools.wraps(function)(make(function))
    setattr(wrapped, MARK, True)
    setattr(owner, hook.method, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)


def _owner(hook: Hook) -> Any:
    """The class of `hook`, once its method is what it was."""
    try:
        owner = getattr(importlib.import_module(hook.module), hook.owner)
        found = inspect.getattr_static(owner, hook.method)
    except (ImportError, AttributeError) as error:
        raise VllmMovedError(_advice(hook, "is gone")) from error
    function = inspect.unwrap(found.__func__ if isinstance(found, classmethod) else found)
    parameters = tuple(inspect.signature(function).parameters)
    if parameters != hook.parameters:
        raise VllmMovedError(_advice(hook, f"now takes {parameters}, not {hook.parameters}"))
    return owner


def _advice(hook: Hook, what: str) -> str:
    return (
        f"{hook} {what}. flan-serve's T5 plugin wraps it; install the vLLM that the plugin names "
        "(serve.vllm_t5.plugin.SUPPORTED_VLLM) or a newer flan-serve."
    )
