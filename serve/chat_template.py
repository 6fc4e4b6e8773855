"""A checkpoint's own chat template (decoder-only models have one; T5 has none and gets the Flan rendering).

The template's special tokens are control, the same words inside a message are text. So a message's literal special
tokens are rendered as markers, and who tokenizes the prompt learns which stretches are which (`Segment`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import CheckpointError, InvalidRequest
from serve.request import ChatMessage

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered chat. `has_control`: special tokens in it are control (else they are a user's text)."""

    text: str
    has_control: bool


class ChatTemplate:
    """A Jinja template as transformers understands it, run in its sandbox.

    Args:
        source: the template.
        variables: what it may name beside `messages`: bos_token, eos_token, …
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._source = source
        self._variables = dict(variables)
        self._render = _load_renderer()

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint folder, or None.

        Raises:
            CheckpointError: it is not one that can be used.
        """
        path = folder / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        source = config.get("chat_template")
        if isinstance(source, list):  # several with names
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if source is None:
            return None
        variables = {name: _text(config[name]) for name in _SPECIAL_NAMES if config.get(name) is not None}
        template = cls(source, variables)
        try:
            template.segments([ChatMessage("user", "Hello")], ())
        except InvalidRequest as error:
            raise CheckpointError(f"{folder}: its chat template cannot be used: {error.message}") from error
        return template

    def segments(self, messages: Sequence[ChatMessage], special: Collection[str]) -> list[Segment]:
        """The rendered chat, the assistant's turn left open.

        Args:
            special: texts that are control when the template writes them.

        Raises:
            InvalidRequest: the template refuses these messages (e.g. it takes no system message).
        """
        literals: list[str] = []
        nonce = secrets.token_hex(4)

        def mark(found: re.Match[str]) -> str:
            literals.append(found[0])
            return f"\ue000{nonce}{len(literals) - 1}\ue001"

        names = re.compile("|".join(re.escape(name) for name in sorted(special, key=len, reverse=True)))
        marked = [
            {"role": message.role, "content": names.sub(mark, message.content) if special else message.content}
            for message in messages
        ]
        parts = re.split(f"\ue000{nonce}(\\d+)\ue001", self._rendered(marked))
        return [
            Segment(part, True) if place % 2 == 0 else Segment(literals[int(part)], False)
            for place, part in enumerate(parts)
            if part
        ]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            [text], _ = self._render(
                conversations=[messages],
                chat_template=self._source,
                add_generation_prompt=True,
                **self._variables,
            )
        except Exception as error:  # a template's errors are of many kinds, its own `raise_exception` among them
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        rendered: str = text
        return rendered


def _load_renderer() -> Callable[..., Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    renderer: Callable[..., Any] = render_jinja_template
    return renderer


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
