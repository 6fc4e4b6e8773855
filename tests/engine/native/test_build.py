"""How the kernels come to be: compiled where a compiler is, from these sources and no others, and done without else."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve.engine.native import build as installed
from serve.engine.native import library

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() != "x86_64", reason="no C compiler, or not x86-64"
)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """build.py over a copy of the sources, without what was built from them."""
    folder = tmp_path / "native"
    shutil.copytree(installed.FOLDER, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    spec = importlib.util.spec_from_file_location("copied_build", folder / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = vars(module)["_FLAGS"]
    monkeypatch.setattr(module, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in flags))  # not about speed
    return module


@needs_compiler
def test_one_library_that_says_what_the_processor_can(build: Any) -> None:
    path = build.build()
    assert path.parent == build.FOLDER
    loaded = ctypes.CDLL(str(path))
    loaded.flan_level.restype = ctypes.c_int64
    assert loaded.flan_level() == library.level()
    assert build.build() == path  # and is not compiled again
    assert list(build.FOLDER.glob("*.so")) == [path]
    assert not list(build.FOLDER.glob("tmp*"))


@needs_compiler
def test_other_sources_are_another_library(build: Any) -> None:
    """A library of old sources is never loaded, and is taken away when the new one is there."""
    old = build.build()
    with (build.FOLDER / "kernels.c").open("a") as source:
        source.write("/* changed */\n")
    assert build.library_path() != old
    assert not build.library_path().exists()
    assert build.build() == build.library_path()
    assert not old.exists()


@needs_compiler
def test_what_the_compiler_says_is_told(build: Any) -> None:
    (build.FOLDER / "kernels.c").write_text("this is no C\n")
    with pytest.raises(RuntimeError, match="this is no C"):
        build.build()
    assert not list(build.FOLDER.glob("*.so"))


def test_without_a_compiler_there_are_none(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.build() is None
    assert build.main() == 0


def test_the_installed_kernels_are_of_these_sources() -> None:
    """A checkout whose kernels were changed and not built again would quietly run through torch."""
    if shutil.which("cc") is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler, or not x86-64")
    assert installed.library_path().exists(), "run: python -m serve.engine.native.build"


def test_a_library_that_cannot_be_loaded_is_told_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "library_path", lambda: broken)
    library._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert library.level() is library.Level.NONE
        assert "cannot be loaded" in caplog.text
        with pytest.raises(RuntimeError, match="have not been built"):
            library.loaded()
    finally:
        library._library.cache_clear()
