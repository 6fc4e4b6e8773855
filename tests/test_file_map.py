"""The README's map is the tree: every module and folder stands there, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("serve", "finetune", "loadtests", "protos", "docs")


def mapped() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- map: begin -->")[1].split("<!-- map: end -->")[0]
    return [line.split()[0] for line in block.splitlines() if re.match(r"^[\w.]+[/\w.]*\s{2,}\S", line)]


def present() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" and "_pb2" not in path.name
    }


def test_every_module_is_on_the_map() -> None:
    on_map = {path for path in mapped() if path.endswith(".py")}
    assert len(on_map) > 80
    assert on_map == present()


def test_everything_on_the_map_exists_once() -> None:
    paths = mapped()
    assert len(paths) == len(set(paths))
    assert [path for path in paths if not (ROOT / path).exists()] == []
