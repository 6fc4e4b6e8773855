"""What every answer of the REST server must be, whatever was asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tests.fuzz.body_rules import Judgement, Validator, judge, strict_json
from tests.fuzz.exchange import SECONDS, Answer
from tests.fuzz.json_bodies import Json
from tests.fuzz.rest_cases import REQUEST_ID, TIMEOUT, UNLISTED, Case, request_schema

OPEN_PATHS = ("/livez", "/readyz", "/health", "/metrics")
# What counts as a request (a POST to one of these), and its label.
ROUTES = {
    "/v1/generate": "generate",
    "/v1/score": "score",
    "/v1/tokenize": "tokenize",
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/generate": "tgi",
    "/generate_stream": "tgi",
    "/": "tgi",
}
TGI_PATHS = ("/generate", "/generate_stream", "/")
NEVER_STREAM = ("/generate", "/v1/score", "/v1/tokenize")
OUTCOMES = {400: "invalid", 401: "unauthorized", 404: "invalid", 413: "invalid", 504: "deadline"}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TIMEOUT = re.compile(rb"[0-9]{1,12}")
_NO_HTTP = "this is no valid HTTP/1.1 request"


@dataclass(frozen=True)
class Seen:
    """`route`: the label under which the request is counted, None where it is not one. `outcome`: how; "served" is
    stop or length. `is_last`: a stream failed, so the server ends the connection."""

    route: str | None
    outcome: str
    is_last: bool = False


def _is_open(case: Case) -> bool:
    """Whether it needs no key: probes, scrapes, and the playground's files."""
    is_page = case.path == "/" or case.path.startswith("/static/")
    return case.path in OPEN_PATHS or (case.method in ("GET", "HEAD") and is_page)


class Rules:
    """
    Args:
        document: what `/openapi.json` shows.
        max_body_bytes: of the server.
    """

    def __init__(self, document: Json, *, max_body_bytes: int) -> None:
        self._document = document
        self._max_body_bytes = max_body_bytes
        self._validators: dict[str, Any] = {}

    def check(self, case: Case, answer: Answer) -> Seen:
        """
        Raises:
            AssertionError: the answer is not what the contract says.
        """
        assert answer.seconds < SECONDS
        self._check_head(case, answer)
        if case.method == "HEAD":
            assert answer.body == b""
            if case.has_key or _is_open(case):
                assert answer.status == self._look_status(case)
            else:
                assert answer.status == 401
            return Seen(None, "")
        if answer.status >= 400:
            self._check_error(case, answer)
            if self._is_no_http(answer):
                assert case.method not in ("GET", "POST"), "the parser refused a good request"
                return Seen(None, "")
        if not case.has_key and not _is_open(case):
            assert answer.status == 401
            return Seen(ROUTES.get(case.path) if case.method == "POST" else None, "unauthorized")
        if case.method == "POST" and case.path in ROUTES:
            outcome = self._check_posted(case, answer)
            return Seen(ROUTES[case.path], outcome, is_last=answer.status == 200 and outcome != "served")
        assert answer.status == self._look_status(case)
        if answer.status == 200 and "get" in self._document["paths"].get(case.path, {}):
            self._check_form(answer, self._document["paths"][case.path]["get"])
        return Seen(None, "")

    def _check_head(self, case: Case, answer: Answer) -> None:
        assert answer.status != 422
        assert answer.status < 500 or answer.status == 504, answer.body[:300]
        name = answer.header(REQUEST_ID)
        assert _REQUEST_ID.fullmatch(name.encode("latin-1")), f"no valid {REQUEST_ID}"
        given = case.values_of(REQUEST_ID)
        if given and _REQUEST_ID.fullmatch(given[0]) and not self._is_no_http(answer):
            assert name.encode() == given[0]
        if answer.status == 401:
            assert answer.header("www-authenticate") == "Bearer"
        if answer.status == 405:
            assert answer.header("allow")

    def _check_error(self, case: Case, answer: Answer) -> None:
        """The error's form: TGI's on its routes, ours elsewhere."""
        assert answer.header("content-type") == "application/json"
        body = strict_json(answer.body.decode("ascii"))
        is_tgi = case.method == "POST" and case.path in TGI_PATHS and not self._is_no_http(answer)
        self._check_schema(body, {"$ref": f"#/components/schemas/{'TgiError' if is_tgi else 'Error'}"})
        error = body if is_tgi else body["error"]
        assert set(error) == ({"error", "error_type"} if is_tgi else {"message", "type", "param", "code"})
        message = error["error" if is_tgi else "message"]
        assert 0 < len(message) < 1000

    def _check_posted(self, case: Case, answer: Answer) -> str:
        """The answer to a request that may pass; its outcome."""
        if len(case.body) > self._max_body_bytes:
            assert answer.status in (400, 413)  # 400: of a header at fault
            return "invalid"
        schema = request_schema(self._document, case.path)
        assert schema is not None
        judgement = judge(case.body, schema, self._document)
        timeouts = case.values_of(TIMEOUT)
        bad_timeout = bool(timeouts) and not _TIMEOUT.fullmatch(timeouts[0])
        if bad_timeout or not judgement.fits:
            assert answer.status == 400, f"{answer.status} for what is against the schema: {answer.body[:300]!r}"
        else:
            assert answer.status in ((200, 400, 404, 504) if timeouts else (200, 400, 404)), answer.body[:300]
        if answer.status == 200:
            return self._check_served(case, answer, wants_stream=judgement.wants_stream)
        if answer.status in (400, 404):
            self._check_names_a_field(case, answer, judgement, bad_timeout=bad_timeout)
        return OUTCOMES[answer.status]

    def _check_names_a_field(self, case: Case, answer: Answer, judgement: Judgement, *, bad_timeout: bool) -> None:
        body = strict_json(answer.body.decode())
        if not judgement.is_object and not bad_timeout:
            return
        if case.path in TGI_PATHS:
            names = {TIMEOUT} if bad_timeout else judgement.names
            assert any(name and name in body["error"] for name in names), f"no field in {body}"
            return
        param = body["error"]["param"]
        if bad_timeout:
            assert param == TIMEOUT
        elif answer.status == 404:
            assert param == "model"
        elif param is None:
            assert "unknown field" in body["error"]["message"]  # one that no message can show
            assert not all(name.isprintable() for name in judgement.names)
        else:
            assert param in judgement.names or any(name.startswith(param) for name in judgement.names if len(name) > 64)

    def _check_served(self, case: Case, answer: Answer, *, wants_stream: bool) -> str:
        is_stream = case.path == "/generate_stream" or (wants_stream and case.path not in NEVER_STREAM)
        if is_stream:
            return self._check_stream(case, answer)
        self._check_form(answer, self._document["paths"][case.path]["post"])
        return "served"

    def _check_form(self, answer: Answer, operation: Json) -> None:
        """The body is what the document says of it."""
        content = operation["responses"]["200"].get("content", {"application/json": {}})
        (kind,) = (name for name in content if name != "text/event-stream")
        assert answer.header("content-type").partition(";")[0] == kind
        text = answer.body.decode()
        if kind == "application/json":
            self._check_schema(strict_json(text), content[kind].get("schema", {}))

    def _check_stream(self, case: Case, answer: Answer) -> str:
        """Data frames, and at the end [DONE] or one error; in TGI's form the whole text or one error."""
        assert answer.header("content-type") == "text/event-stream"
        assert answer.header("cache-control") == "no-cache"
        events = [event for event in answer.body.split(b"\n\n") if not event.startswith(b":")]
        assert events.pop() == b"", "the last frame is not whole"
        assert events
        assert all(event.startswith(b"data:") and b"\n" not in event for event in events)
        texts = [event.removeprefix(b"data:").strip().decode("ascii") for event in events]
        is_tgi = case.path in TGI_PATHS
        has_done = texts[-1] == "[DONE]"
        frames = [strict_json(text) for text in (texts[:-1] if has_done else texts)]
        assert all(isinstance(frame, dict) for frame in frames)
        errors = [frame for frame in frames if "error" in frame]
        if errors:
            assert not has_done
            assert errors == frames[-1:]
            code = errors[0]["error_type"] if is_tgi else errors[0]["error"]["code"]
            assert code == ("timeout" if is_tgi else "deadline"), f"a stream failed: {errors[0]}"
            assert case.values_of(TIMEOUT)
            return "deadline"
        assert has_done != is_tgi
        if is_tgi:
            for frame in frames:
                self._check_schema(frame, {"$ref": "#/components/schemas/TgiEvent"})
            assert [frame.get("generated_text") is not None for frame in frames] == [False] * (len(frames) - 1) + [True]
        return "served"

    def _look_status(self, case: Case) -> int:
        """The status of what is no request."""
        method = "GET" if case.method == "HEAD" else case.method
        is_look = case.path in UNLISTED or "get" in self._document["paths"].get(case.path, {}) or case.path == "/"
        if not is_look and case.path not in ROUTES and not case.path.startswith("/v1/models/"):
            return 404
        if method != "GET" or not is_look:
            is_unknown_model = method == "GET" and case.path.startswith("/v1/models/")
            return 404 if is_unknown_model else 405
        return 404 if case.path == "/v1/models/none" else 200

    def _check_schema(self, value: Any, schema: Json) -> None:
        key = str(schema)
        if key not in self._validators:  # made once: they are dear
            self._validators[key] = Validator({**schema, "components": self._document["components"]})
        problem = next(self._validators[key].iter_errors(value), None)
        assert problem is None, f"{problem.message} at {list(problem.absolute_path)}"

    @staticmethod
    def _is_no_http(answer: Answer) -> bool:
        return answer.status == 400 and _NO_HTTP.encode() in answer.body
