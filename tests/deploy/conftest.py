"""Building an image takes minutes: those tests run when asked for, by `make image-test` (`pytest -m container`)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "container" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="builds and runs an image: make image-test")
    for item in items:
        if item.get_closest_marker("container") is not None:
            item.add_marker(skip)
