"""The client reference's sections: every public method of FlanClient, with its signature and its docstring."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from docs.tables.markdown import code, table
from serve.client import AsyncFlanClient, FlanClient
from serve.client.fields import GenerateFields, PromptFields

_WIDTH = 100


def methods() -> str:
    """A section for the constructor and each method."""
    names = [name for name in vars(FlanClient) if not name.startswith("_")]
    return "\n\n".join(
        [
            _section("FlanClient", FlanClient.__init__, inspect.getdoc(FlanClient)),
            *(_section(name, getattr(FlanClient, name), inspect.getdoc(getattr(FlanClient, name))) for name in names),
        ]
    )


def fields() -> str:
    """The keyword arguments of the calls, and which calls take them."""
    rows = []
    for name, kind in GenerateFields.__annotations__.items():
        calls = "`generate`, `stream`" + (", `score`" if name in PromptFields.__annotations__ else "")
        rows.append([code(name), code(str(getattr(kind, "__forward_arg__", kind)).removesuffix(" | None")), calls])
    return table(["argument", "type", "calls"], rows)


def asynchronous() -> str:
    """What AsyncFlanClient has under the same names."""
    names = [name for name in vars(AsyncFlanClient) if not name.startswith("_")]
    return ", ".join(
        code(f"await {name}()") if inspect.iscoroutinefunction(getattr(AsyncFlanClient, name)) else code(f"{name}()")
        for name in names
    )


def _section(name: str, function: Callable[..., Any], docstring: str | None) -> str:
    words = [_signature(name, function), *([] if docstring is None else [docstring.strip()])]
    return "\n".join([f"### `{name}`", "", "```text", "\n\n".join(words), "```"])


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    said = [item for item in signature.parameters.values() if item.name != "self"]
    returned = signature.return_annotation
    tail = "" if returned in ("None", inspect.Signature.empty) else f" -> {returned}"
    whole = f"{name}{signature.replace(parameters=said, return_annotation=inspect.Signature.empty)}{tail}"
    bare = whole.replace("'", "")  # annotations are strings
    return textwrap.fill(bare, _WIDTH, subsequent_indent="    ", break_long_words=False)
