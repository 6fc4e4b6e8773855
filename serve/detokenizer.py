"""Token ids to text, one token at a time.

A tokenizer's decoder is a chain of rules over the whole list of tokens. For the three chains that generation models
have (Metaspace: T5; byte-level BPE; sentencepiece BPE with byte fallback) each token's bytes are known by
themselves but for one space at the very start, so a table of bytes and an incremental UTF-8 decoder give the whole
text piece by piece, without looking back.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoder(Exception):
    """The tokenizer turns tokens into text in a way that this module does not know."""


class DecodeTable:
    """The bytes of every token.

    `special` are the ids that default output does not show, the unknown token among them.

    Raises:
        UnsupportedDecoder
    """

    def __init__(self, pieces: Sequence[str | None], decoder: dict[str, Any] | None, special: frozenset[int]) -> None:
        self.special = special
        self._kind = _decoder_kind(decoder)
        self._strips_first = _strips_first(decoder)
        self._pieces = pieces
        self._bytes = [self._to_bytes(token_id, piece) for token_id, piece in enumerate(pieces)]

    def bytes_of(self, token_id: int, *, opens_text: bool) -> bytes | None:
        """The token's bytes; without a word's leading space where it `opens_text`. None for an id without piece."""
        if not 0 <= token_id < len(self._bytes):
            return None
        data = self._bytes[token_id]
        if not opens_text or not self._strips_first or data is None or token_id in self.special:
            return data
        # The library's Metaspace takes every space out of the first token, its Strip takes one.
        return data.replace(b" ", b"") if self._kind == "Metaspace" else data.removeprefix(b" ")

    def token_text(self, token_id: int) -> str:
        """One token's text as logprobs show it; bytes that are no text of their own as `bytes:\\xf0\\x9f`."""
        data = self.bytes_of(token_id, opens_text=False)
        if data is None:
            return ""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _to_bytes(self, token_id: int, piece: str | None) -> bytes | None:
        if piece is None:
            return None
        if token_id in self.special:
            return piece.encode()
        if self._kind == "ByteLevel":
            try:
                return bytes(_BYTE_OF[character] for character in piece)
            except KeyError:  # an added token, written as it is
                return piece.encode()
        byte = _BYTE_PIECE.fullmatch(piece) if self._kind == "ByteFallback" else None
        return piece.replace(_SPACE, " ").encode() if byte is None else bytes([int(byte[1], 16)])


class IncrementalText:
    """The text of one sequence as its tokens arrive.

    `push` returns the text that is certain: no character that later bytes could still complete, and nothing that
    may be the beginning of a stop string. After a stop string was met (`stop_reason`), no text comes any more.
    The joined pieces, `flush` included, are the text that `Tokenizer.decode` gives, cut before the stop string.

    Args:
        stop: strings that end the text and are not part of it. The one that is complete first wins, of two complete
            at the same character the longer.
        min_tokens: a stop string that is complete within so many tokens is ordinary text.
    """

    def __init__(
        self, table: DecodeTable, *, stop: Sequence[str] = (), min_tokens: int = 0, skip_special_tokens: bool = True
    ) -> None:
        self._table = table
        self._hidden = table.special if skip_special_tokens else frozenset()
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._opens_text = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stop_reason: str | None = None

    def push(self, token_id: int) -> str:
        """Take the next token; returns the new text, often "" while something is held back."""
        self._num_tokens += 1
        if self.stop_reason is not None or token_id in self._hidden:
            return ""
        data = self._table.bytes_of(token_id, opens_text=self._opens_text)
        if data is None:
            return ""
        self._opens_text = False
        text = self._utf8.decode(data)
        if not self._stop or not text:
            return text
        return self._without_stop(text)

    def flush(self) -> str:
        """The sequence has ended: the text held back. An unfinished character at the end is dropped."""
        held, self._held = self._held, ""
        return held

    def _without_stop(self, new: str) -> str:
        buffer = self._held + new
        if self._num_tokens > self._min_tokens:
            found = self._first_stop(buffer, len(self._held))
            if found is not None:
                start, self.stop_reason = found
                self._held = ""
                return buffer[:start]
        keep = self._held_length(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def _first_stop(self, buffer: str, seen: int) -> tuple[int, str] | None:
        """Where the first stop string begins, and which; only ends beyond `seen` count (the rest was looked at)."""
        best: tuple[int, int, str] | None = None  # end, start, stop
        for stop in self._stop:
            start = buffer.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _held_length(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins some stop string without completing it."""
        longest = max(map(len, self._stop)) - 1
        for start in range(max(0, len(buffer) - longest), len(buffer)):
            tail = buffer[start:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stop):
                return len(tail)
        return 0


def _decoder_kind(decoder: dict[str, Any] | None) -> str:
    """
    Raises:
        UnsupportedDecoder
    """
    for rule in _rules(decoder):
        if rule["type"] in {"Metaspace", "ByteLevel", "ByteFallback"}:
            return str(rule["type"])
    kind = "none" if decoder is None else decoder["type"]
    raise UnsupportedDecoder(f"its decoder ({kind}) is not one of Metaspace, ByteLevel and ByteFallback")


def _strips_first(decoder: dict[str, Any] | None) -> bool:
    return any(
        (rule["type"] == "Metaspace" and rule.get("prepend_scheme", "always") != "never")
        or (rule["type"] == "Strip" and rule.get("content") == " " and rule.get("start", 0) > 0)
        for rule in _rules(decoder)
    )


def _rules(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: itself where printable, else the next free code point from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


_BYTE_OF = _byte_alphabet()
