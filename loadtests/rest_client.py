"""REST as the meters need it: text is seen when it arrives, not when a block is full."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import requests

from loadtests.meters import Final, Piece, RequestFailed


class RestClient:
    """One user's connection to `POST /v1/generate`."""

    protocol = "rest"

    def __init__(self, base_url: str, api_key: str | None = None, timeout_seconds: float = 60.0) -> None:
        self._url = base_url.rstrip("/")
        self._timeout = timeout_seconds
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between the meter and the server
        if api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def generate(self, fields: Mapping[str, Any]) -> Final:
        with self._post(fields, stream=False) as response:
            return _to_final(_checked(response))

    def stream(self, fields: Mapping[str, Any]) -> Iterator[Piece | Final]:
        with self._post(fields, stream=True) as response:
            if response.status_code != 200:
                _checked(response)
            try:
                # chunk_size=None hands each chunk on as it comes; a number would wait until so many bytes are there.
                yield from _to_events(response.iter_lines(chunk_size=None))
            except requests.RequestException as error:
                raise RequestFailed(f"broken stream: {type(error).__name__}") from error

    def model(self) -> dict[str, Any]:
        """The first entry of `GET /v1/models`."""
        try:
            response = self._session.get(f"{self._url}/v1/models", timeout=self._timeout)
        except requests.RequestException as error:
            raise RequestFailed(f"no answer: {type(error).__name__}") from error
        with response:
            model: dict[str, Any] = _checked(response)["data"][0]
            return model

    def close(self) -> None:
        self._session.close()

    def _post(self, fields: Mapping[str, Any], *, stream: bool) -> requests.Response:
        body = {**fields, "stream": True} if stream else dict(fields)
        try:
            return self._session.post(f"{self._url}/v1/generate", json=body, stream=stream, timeout=self._timeout)
        except requests.RequestException as error:
            raise RequestFailed(f"no answer: {type(error).__name__}") from error


def _checked(response: requests.Response) -> dict[str, Any]:
    if response.status_code != 200:
        try:
            kind = response.json()["error"]["type"]
        except (ValueError, KeyError, TypeError):
            kind = "no error body"
        raise RequestFailed(f"HTTP {response.status_code} {kind}")
    body: dict[str, Any] = response.json()
    return body


def _to_events(lines: Iterator[bytes]) -> Iterator[Piece | Final]:
    """The data frames. All lines are read, so that the connection can be used again; no `[DONE]` is a failure."""
    done = False
    for line in lines:
        if not line.startswith(b"data:"):
            continue  # blank separators and `: keepalive` comments
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        frame = json.loads(data)
        if "error" in frame:
            raise RequestFailed(f"error frame: {frame['error'].get('type')}")
        if "usage" in frame:
            yield _to_final(frame)
        else:
            yield Piece(frame["index"], frame["text"], frame.get("finish_reason") is not None)
    if not done:
        raise RequestFailed("the stream ended without [DONE]")


def _to_final(body: Mapping[str, Any]) -> Final:
    usage, outputs = body["usage"], body.get("outputs", [])
    answer = body.get("answer")
    if answer is None and outputs:
        answer = outputs[0].get("answer")
    return Final(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        queue_ms=body.get("timings", {}).get("queue_ms"),
        answer=answer,
        texts=tuple(output["text"] for output in outputs),
    )
