"""REST's event stream, decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator

from serve.client.wire import Json
from serve.errors import EngineFailure

_DONE = "[DONE]"


class EventDecoder:
    """Bytes to the data of server-sent events.

    Bytes are split at line feeds only: httpx's iter_lines also splits at U+2028 and U+0085, which a text may have.

        >>> decoder = EventDecoder()
        >>> decoder.feed(b'data: {"a"'), decoder.feed(b': 1}\\n\\n: keepalive\\n\\n')
        ([], ['{"a": 1}'])
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[str]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip().decode() for line in lines if line.startswith(b"data:")]


class GenerationEvents:
    """The data of `/v1/generate`'s events to the events that gRPC has: deltas and one final.

    The last frame has what the whole request has (usage, answer, votes); outputs are put together from the deltas.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, Json] = {}
        self._done = False

    def feed(self, data: str) -> Iterator[Json]:
        """The event in one frame's data, if there is one.

        Raises:
            ServeError: the frame is an error.
        """
        if data == _DONE:
            self._done = True
            return
        frame: Json = json.loads(data)
        if "error" in frame:
            raise to_frame_error(frame["error"])
        if "usage" in frame:
            yield {"final": self._final(frame)}
        else:
            self._add(frame)
            yield {"delta": frame}

    def check_ended(self) -> None:
        """Raises EngineFailure when the stream ended without saying so."""
        if not self._done:
            raise EngineFailure("the stream ended early")
