"""Markdown tables: what the generated parts of the pages are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_DEFAULT = re.compile(r"\s*Default: (.+?)\.$")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""
    >>> table(["field", "meaning"], [["n", "a|b"]])
    '| field | meaning |\n|---|---|\n| n | a\\|b |'
    """
    lines = [columns, *rows]
    shown = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "---|" * len(columns), *shown[1:]])


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def split_default(help: str) -> tuple[str, str]:
    """A field's meaning and its default, which the help texts say last.

    >>> split_default("Outputs to generate. Default: 1.")
    ('Outputs to generate.', '1')
    """
    found = _DEFAULT.search(help)
    return (help, "") if found is None else (help[: found.start()], found[1])
