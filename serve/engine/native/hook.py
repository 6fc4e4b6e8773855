"""hatchling's build hook: a package that is built or installed from source gets the kernels where there is a compiler.

pyproject.toml names this file. It is loaded by path in an environment that has hatchling and nothing else.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg,misc,unused-ignore]
    """Compiles the kernels, and tells the wheel that it is for one kind of machine then."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel (or the editable one) is put together."""
        try:
            path = _build_module().build()
        except RuntimeError as error:  # nobody should be without the package for a compiler's sake
            self.app.display_warning(f"built without kernels: {error}")
            return
        if path is None:
            self.app.display_warning("built without kernels: no C compiler, or not Linux on x86-64")
            return
        build_data["artifacts"].append(f"serve/engine/native/{path.name}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _build_module() -> Any:
    """build.py by its path: the package itself is not importable here."""
    spec = importlib.util.spec_from_file_location("flan_native_build", Path(__file__).with_name("build.py"))
    if spec is None or spec.loader is None:
        raise RuntimeError("build.py is missing beside the hook")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
