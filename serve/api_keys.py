"""API keys as both protocols check them: `Authorization: Bearer KEY`."""

from __future__ import annotations

import hmac
from collections.abc import Iterable


class ApiKeys:
    """The keys that a server accepts; never empty where it is asked."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def accept(self, authorization: bytes) -> bool:
        """Whether a header or metadata value carries a key; the scheme's case and the spaces behind it do not matter.

        >>> ApiKeys(["secret"]).accept(b"bearer   secret")
        True
        """
        scheme, _, key = authorization.strip().partition(b" ")
        # Every key is compared, so that the time taken says nothing about which one came close.
        matches = [hmac.compare_digest(key.lstrip(), valid) for valid in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
