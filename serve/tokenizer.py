"""Text to token ids and back. User text is only ever text: a literal `</s>` or `<extra_id_0>` in it is no control.

`Tokenizer` is read-only after loading, so any number of threads may share it (nothing here sets truncation or
padding, which the library keeps on the shared object).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from serve.chat_template import ChatTemplate
from serve.detokenizer import DecodeTable, IncrementalText
from serve.errors import CheckpointError, InvalidRequest
from serve.request import ChatMessage

__all__ = ["IncrementalText", "Tokenizer", "check_text"]

_DEFAULT_EOS = "</s>"


def check_text(field: str, text: str) -> None:
    """
    Raises:
        InvalidRequest: `text` holds NUL or a lone surrogate, which is no Unicode text.
    """
    if "\x00" in text:
        raise InvalidRequest(f"{field} must not contain the NUL character", field=field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} has a lone surrogate at character {error.start}; send well-formed Unicode", field=field
        ) from None


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        spec: the content of tokenizer.json.
        eos: text of the end-of-sequence token.
        chat_template: the checkpoint's own form of a chat, if it has one.

    `size` counts the ids that the tokenizer has (the model may have more rows). `eos_id` and `unknown_id` are None
    where there is none. `table` has every token's bytes.

    Raises:
        UnsupportedDecoder
    """

    def __init__(self, spec: str, eos: str | None = _DEFAULT_EOS, chat_template: ChatTemplate | None = None) -> None:
        content: dict[str, Any] = json.loads(spec)
        whole = tokenizers.Tokenizer.from_str(spec)
        vocabulary: dict[str, int] = whole.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        self.eos_id = None if eos is None else vocabulary.get(eos)
        self.unknown_id = _unknown_id(content["model"], vocabulary)
        special = {entry["id"] for entry in content.get("added_tokens", ()) if entry["special"]}
        hidden = special | ({self.unknown_id} if self.unknown_id is not None else set())
        pieces = [whole.id_to_token(token_id) for token_id in range(self.size)]
        self.table = DecodeTable(pieces, content.get("decoder"), frozenset(hidden))
        self._encoder = _text_only(content, hidden)
        self._prefix, self._suffix = _template_ids(whole)
        self.chat_template = chat_template
        self._with_control = None if chat_template is None else whole
        self._special_texts = frozenset(str(pieces[token_id]) for token_id in special)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder: tokenizer.json, else spiece.model through transformers.

        Raises:
            CheckpointError: no tokenizer there, or one that cannot be read.
        """
        path = Path(folder)
        if (path / "tokenizer.json").is_file():
            spec = (path / "tokenizer.json").read_text(encoding="utf-8")
        elif (path / "spiece.model").is_file():
            spec = _convert_sentencepiece(path)
        else:
            raise CheckpointError(f"{path}: neither tokenizer.json nor spiece.model is there")
        try:
            return cls(spec, _eos_text(path), ChatTemplate.load(path))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise CheckpointError(f"{path / 'tokenizer.json'}: cannot be read: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`; with special tokens as the tokenizer's own template adds them (T5: one EOS at the end).

        Through `encode_batch`, because `encode` holds the interpreter's lock: seconds for a text of some MB.
        Texts of that size belong in a worker thread all the same.
        """
        [encoding] = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return (*self._prefix, *ids, *self._suffix) if add_special_tokens else tuple(ids)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[str, tuple[int, ...]]:
        """A chat in the checkpoint's own form, and its ids; special tokens of the template count, a message's do not.

        Raises:
            InvalidRequest: the template refuses the messages.
        """
        assert self.chat_template is not None
        assert self._with_control is not None
        segments = self.chat_template.segments(messages, self._special_texts)
        ids: list[int] = []
        for segment in segments:
            tokenizer = self._with_control if segment.has_control else self._encoder
            [encoding] = tokenizer.encode_batch_fast([segment.text], add_special_tokens=False)
            ids += encoding.ids
        return "".join(segment.text for segment in segments), tuple(ids)

    def count_unknown(self, token_ids: Sequence[int]) -> int:
        """How many of the ids stand for text that the vocabulary lacks."""
        return 0 if self.unknown_id is None else token_ids.count(self.unknown_id)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids: exactly what `IncrementalText` gives piece by piece."""
        text = IncrementalText(self.table, skip_special_tokens=skip_special_tokens)
        return "".join([*(text.push(token_id) for token_id in token_ids), text.flush()])

    def token_text(self, token_id: int) -> str:
        """One token's text as logprobs show it: leading space kept, special tokens by name, bytes that are no
        text of their own as `bytes:\\xf0\\x9f`."""
        return self.table.token_text(token_id)


def _unknown_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    unknown = model.get("unk_token")  # BPE, WordPiece, WordLevel
    return None if unknown is None else vocabulary.get(unknown)


def _text_only(content: dict[str, Any], special: set[int]) -> tokenizers.Tokenizer:
    """A tokenizer that never makes a special token out of text.

    A Unigram vocabulary holds its special tokens as pieces, so the library finds `</s>` in a text even when told
    not to look for special tokens (sentencepiece itself does not: they are control symbols there). Their pieces are
    renamed here to something that no accepted text holds: NUL is refused.
    """
    content = dict(content)
    model = dict(content["model"])
    if model.get("type") == "Unigram" or "unk_id" in model:
        pieces = list(model["vocab"])
        for token_id in special:
            if token_id < len(pieces):
                pieces[token_id] = [f"\x00{token_id}", pieces[token_id][1]]
        model["vocab"] = pieces
        content["model"] = model
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] not in special]
        content["post_processor"] = None  # names the tokens that were renamed
    encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _template_ids(whole: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer's template puts before and after a text (T5: nothing and EOS; Llama: BOS and nothing)."""
    whole.no_truncation()
    whole.no_padding()
    for probe in ("a", "0", "."):
        bare = whole.encode(probe, add_special_tokens=False).ids
        full = whole.encode(probe, add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _eos_text(folder: Path) -> str | None:
    """The EOS token's text as the folder's files name it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json_of(folder / name).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return _DEFAULT_EOS


def _convert_sentencepiece(folder: Path) -> str:
    """tokenizer.json of a folder that has only spiece.model.

    transformers sees that file alone: beside a tokenizer_config.json it wants the sentencepiece package.
    """
    from transformers import T5Tokenizer

    config = _json_of(folder / "tokenizer_config.json")
    try:
        with tempfile.TemporaryDirectory() as alone:
            shutil.copy(folder / "spiece.model", alone)
            converted = T5Tokenizer.from_pretrained(alone, extra_ids=config.get("extra_ids", 100))
        spec: str = converted.backend_tokenizer.to_str()
    except Exception as error:
        raise CheckpointError(f"{folder / 'spiece.model'}: cannot be converted: {error}") from error
    return spec


def _json_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
