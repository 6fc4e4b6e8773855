"""REST's event stream, decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator

from serve.client.wire import Json, to_error
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
    """The data of `/v1/generate`'s frames to the events that gRPC has: deltas and one final.

    The last frame tells what concerns the whole request; its outputs are put together from the deltas (in mode cot it
    has them, but for the log-probabilities).
    """

    def __init__(self) -> None:
        self._outputs: dict[int, Json] = {}
        self._is_done = False

    def feed(self, data: str) -> Iterator[Json]:
        """The event in one frame's data, if there is one.

        Raises:
            ServeError: the frame is an error.
        """
        if data == _DONE:
            self._is_done = True
            return
        frame: Json = json.loads(data)
        if "error" in frame:
            raise to_error(frame["error"], EngineFailure)
        if "usage" in frame:
            yield {"final": frame | {"outputs": self._final_outputs(frame)}}
        else:
            self._add(frame)
            yield {"delta": frame}

    def check_ended(self) -> None:
        """
        Raises:
            EngineFailure: the stream ended without saying so.
        """
        if not self._is_done:
            raise EngineFailure("the stream ended early")

    def _add(self, frame: Json) -> None:
        output = self._outputs.setdefault(frame["index"], {"texts": [], "logprobs": []})
        output["texts"].append(frame["text"])
        output["logprobs"] += frame.get("logprobs", ())
        output |= {name: frame[name] for name in ("finish_reason", "stop_reason") if name in frame}

    def _final_outputs(self, frame: Json) -> list[Json]:
        outputs = []
        for index, output in sorted(self._outputs.items()):
            output["text"] = "".join(output.pop("texts"))
            outputs.append({"index": index, **output})
        for whole in frame.get("outputs", ()):
            outputs[whole["index"]] |= whole
        return outputs
