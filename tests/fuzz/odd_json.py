"""Values, names and bodies that a client may send by mistake, or to see what happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """What stands in the body as it is: words that Python's writer would not write."""

    text: str


@dataclass(frozen=True)
class Pairs:
    """An object by its pairs: a name may stand twice."""

    items: tuple[tuple[str, Any], ...]


HUGE = Token("1" + "0" * 400)
ODD_VALUES: Sequence[Any] = (
    *(None, True, False, "", " ", "false", "0", "NaN", 0, -1, 1, 1.0, 1.5, -0.0, 2, 65, 17, 21, 2**31, 2**32, 2**53),
    *(2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, HUGE, Token("9" * 5000), 1e308, -1e308, 5e-324),
    *(Token("NaN"), Token("Infinity"), Token("-Infinity"), Token("1e999"), Token("-1e999"), Token("01"), Token("+1")),
    *(Token(".5"), Token("0x10"), Token("'x'"), Token("undefined"), Token("1_000"), Token("-"), Token("1e")),
    *("\0", "a\0b", "\ud800", "\udfff\ud800", "\ufffe", "\u2028", "\x1b[0m", "😀", "e" + "\u0301" * 50, "\ufeff"),
    *("ß" * 300, "x" * 5000, "x" * 560, "the " * 2000, Token('"\\x41"'), Token('"\\ud83d"'), Token('"\\u00"')),
    *([], {}, [[]], [None], [{}], {"": ""}, [1, "x"], {"a": None}, ["x"] * 300, [1] * 3000, {"x": [{"y": [0]}]}),
    *(Token('"open'), Token("[" * 500), Token("[" * 100 + "]" * 100), Token("[" * 60 + "]" * 60)),
    Token('{"a":' * 70 + "1" + "}" * 70),
)
ODD_NAMES = ("", "\0", "\ud800", "tempreature", "max_new_token", "__proto__", "x" * 300, "é", "N", "stream ", "\n")
ENCODINGS = ("latin-1", "utf-16", "utf-8-sig", "utf-7", "cp500")
# No object of any request.
ODD_BODIES: Sequence[bytes] = (
    *(b"", b" \r\n", b"null", b"[]", b'"x"', b"5", b"NaN", b"{", b"}", b"{}{}", b"{'a': 1}", b'{"a": 1,}', b"\xff\xfe"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[" * 5000 + b"]" * 5000, b"\x1f\x8b\x08\0\0\0\0\0\0\3", b"a=1&b=2"),
    *(b"\0" * 64, b"[" + b"[]," * 60_000 + b"1]", b'{"x":' + b"1" * 200_000 + b"}"),
    b'{"instruction": "' + b"x" * 300_000 + b'"}',
)
