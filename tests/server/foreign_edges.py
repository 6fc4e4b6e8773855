"""The same faces over OpenAI's and Text Generation Inference's schemas, for what those can say: prompts as they are."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from tests.server.protocol_edges import Answer, Json, Refused, broken_off, by_text, events_of, post, refused

_OPENAI_FIELDS = frozenset(
    {
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "n", "stop"),
        *("logprobs", "ignore_eos", "skip_special_tokens", "logit_bias", "mode", "instruction", "model", "debug"),
    }
)
_TGI_NAMES = {
    "max_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
    "repetition_penalty": "repetition_penalty", "seed": "seed", "stop": "stop", "logprobs": "top_n_tokens",
}  # fmt: skip
_TGI_KINDS: dict[str, str] = {
    "validation": "invalid",
    "timeout": "deadline",
    "overloaded": "queue_full",
    "generation": "engine_failure",
}
_TGI_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}


class Completions:
    """POST /v1/completions."""

    path: ClassVar[str] = "/v1/completions"
    prompt_name: ClassVar[str] = "prompt"

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def can_say(self, body: Json) -> bool:
        return body.get("mode") == "raw" and set(body) <= _OPENAI_FIELDS

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        response = post(self.http, self.path, self.to_body(body), timeout_ms)
        if response.status_code != 200:
            return self.refused(response)
        whole = response.json()
        return self.answer(whole, [self.output(choice) for choice in whole["choices"]])

    def to_body(self, body: Json) -> Json:
        said = {name: value for name, value in body.items() if name not in ("mode", "instruction")}
        if "instruction" in body:
            said |= self.prompt(body["instruction"])
        # Where the request is silent the defaults differ: OpenAI's are 1.
        return {"temperature": 0, **self.logprobs(said)}

    def prompt(self, text: Any) -> Json:
        return {"prompt": text}

    def logprobs(self, said: Json) -> Json:
        return said

    def refused(self, response: httpx.Response) -> Refused:
        error = refused(response)
        name = "instruction" if error.field == self.prompt_name else error.field
        return Refused(error.kind, name, error.message)

    def answer(self, whole: Json, outputs: list[Json]) -> Answer:
        said: Json = {name: whole[name] for name in ("model", "prompt") if name in whole}
        return Answer(outputs, whole["usage"], said)

    def output(self, choice: Json) -> Json:
        shown = {name: choice[name] for name in ("index", "finish_reason", "stop_reason")}
        return {**shown, "text": self.text(choice), **self.columns([choice["logprobs"]])}

    def text(self, choice: Json) -> str:
        text: str = choice["text"]
        return text

    def columns(self, parts: list[Json | None]) -> Json:
        """The log-probabilities of a choice, or of the chunks of one."""
        found = [part for part in parts if part is not None]
        return {
            "token_texts": [text for part in found for text in part["tokens"]],
            "logprobs": [logprob for part in found for logprob in part["token_logprobs"]],
            "tops": [top for part in found for top in part["top_logprobs"]],
        }


class CompletionsStream(Completions):
    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        said = {**self.to_body(body), "stream": True, "stream_options": {"include_usage": True}}
        response = post(self.http, self.path, said, timeout_ms)
        if response.status_code != 200:
            return self.refused(response)
        frames = events_of(response.text)
        broken = broken_off(frames)
        if broken is not None:
            return broken
        *chunks, last, _ = frames
        assert last["choices"] == []
        choices: dict[int, list[Json]] = {}
        for chunk in chunks:
            assert chunk["usage"] is None
            for choice in chunk["choices"]:
                choices.setdefault(choice["index"], []).append(choice)
        return self.answer(last, [self.joined(choices[index]) for index in sorted(choices)])

    def joined(self, pieces: list[Json]) -> Json:
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        shown = {name: pieces[-1][name] for name in ("index", "finish_reason", "stop_reason")}
        text = "".join(map(self.text, pieces))
        return {**shown, "text": text, **self.columns([piece["logprobs"] for piece in pieces])}


class Chat(Completions):
    """POST /v1/chat/completions: one user turn is the prompt itself."""

    path, prompt_name = "/v1/chat/completions", "messages"

    def prompt(self, text: Any) -> Json:
        return {"messages": [{"role": "user", "content": text}]}

    def logprobs(self, said: Json) -> Json:
        asked = dict(said)
        return asked if "logprobs" not in said else {**asked, "logprobs": True, "top_logprobs": said["logprobs"]}

    def refused(self, response: httpx.Response) -> Refused:
        error = super().refused(response)
        return Refused(error.kind, "logprobs" if error.field == "top_logprobs" else error.field, error.message)

    def text(self, choice: Json) -> str:
        text: str = (choice["message"] if "message" in choice else choice["delta"])["content"]
        return text

    def columns(self, parts: list[Json | None]) -> Json:
        tokens = [token for part in parts if part is not None for token in part["content"]]
        return {
            "token_texts": [token["token"] for token in tokens],
            "logprobs": [token["logprob"] for token in tokens],
            "tops": [by_text(token["token"], token["logprob"], token["top_logprobs"], "token") for token in tokens],
        }


class ChatStream(Chat, CompletionsStream):
    pass


class Tgi:
    """POST /generate."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def can_say(self, body: Json) -> bool:
        if body.get("mode") != "raw" or not set(body) <= {*_TGI_NAMES, "mode", "instruction"}:
            return False
        samples = 0 < body.get("top_p", 1.0) < 1.0 or body.get("top_k", 0) > 0  # there these two mean sampling
        return not (samples and body.get("temperature", 0) == 0)

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        response = post(self.http, "/generate", self.to_body(body), timeout_ms)
        if response.status_code != 200:
            return self.refused(response.json())
        whole = response.json()
        details = whole["details"]
        output = {"text": whole["generated_text"], **self.reason(details)}
        output |= self.columns(details["tokens"], details.get("top_tokens"))
        prompt_tokens = int(response.headers["x-prompt-tokens"])
        return self.answer(output, prompt_tokens, details["generated_tokens"])

    def to_body(self, body: Json) -> Json:
        parameters = {_TGI_NAMES[name]: value for name, value in body.items() if name in _TGI_NAMES}
        temperature = parameters.get("temperature", 0)
        if temperature == 0:
            parameters.pop("temperature", None)
        parameters |= {"details": True, "do_sample": temperature != 0}
        prompt = {"inputs": body["instruction"]} if "instruction" in body else {}
        return {**prompt, "parameters": parameters}

    def refused(self, error: Json) -> Refused:
        """The field is the message's first word."""
        assert set(error) == {"error", "error_type"}
        word = error["error"].removeprefix("parameters: ").partition(" ")[0].partition("[")[0].rstrip(":")
        names = {theirs: ours for ours, theirs in _TGI_NAMES.items()} | {"inputs": "instruction"}
        kind = _TGI_KINDS.get(error["error_type"], str(error["error_type"]))
        return Refused(kind, names.get(word) if kind == "invalid" else None, error["error"])

    def reason(self, details: Json) -> Json:
        reason = details["finish_reason"]
        return {"finish_reason": _TGI_REASONS[reason], "is_stopped": reason == "stop_sequence"}

    def columns(self, tokens: list[Json], tops: list[list[Json]] | None) -> Json:
        return {
            "token_ids": [token["id"] for token in tokens],
            "logprobs": [token["logprob"] for token in tokens],
            "top_ids": [[top["id"] for top in row] for row in tops or [[] for _ in tokens]],
        }

    def answer(self, output: Json, prompt_tokens: int, completion_tokens: int) -> Answer:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        return Answer([output], usage)


class TgiStream(Tgi):
    """POST /generate_stream."""

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        response = post(self.http, "/generate_stream", self.to_body(body), timeout_ms)
        if response.status_code != 200:
            return self.refused(response.json())
        events = events_of(response.text)
        if "error" in events[-1]:
            return self.refused(events[-1])
        last, tokens = events[-1], [event["token"] for event in events]
        # The end token's text is empty, and a stop string's is not returned: so the pieces are the text.
        assert "".join(token["text"] for token in tokens) == last["generated_text"]
        assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
        tops = [event["top_tokens"] for event in events] if "top_tokens" in last else None
        output = {"text": last["generated_text"], **self.reason(last["details"]), **self.columns(tokens, tops)}
        return self.answer(output, last["details"]["input_length"], last["details"]["generated_tokens"])
