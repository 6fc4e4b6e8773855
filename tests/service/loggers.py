"""The process's loggers, kept as they are around a test that configures them."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from serve import telemetry

CONFIGURED = ("flan", "serve", "uvicorn", "grpc", "asyncio", "opentelemetry")
_INNER = ("uvicorn.error", "uvicorn.access", "grpc._cython.cygrpc")


@contextmanager
def kept_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", *CONFIGURED, *_INNER)]
    kept = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, level, propagate in kept:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextmanager
def everything_logged(log_format: str = "json") -> Iterator[io.StringIO]:
    """What the server's own set-up writes with every level on, and beside it all that reaches the root logger."""
    stream = io.StringIO()
    with kept_loggers():
        telemetry.configure(log_format, stream, level=logging.DEBUG)
        root = logging.getLogger()
        root.handlers[:] = [logging.StreamHandler(stream)]
        root.setLevel(logging.DEBUG)
        hear_libraries()
        yield stream


def hear_libraries() -> None:
    """Every level of the libraries' loggers; again after a start, which sets uvicorn's."""
    for name in (*CONFIGURED, *_INNER):
        logging.getLogger(name).setLevel(1)
