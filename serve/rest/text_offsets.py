"""Where in an output's text each of its tokens begins (OpenAI's `text_offset`).

A token's own text is not always what it adds to the output: the first one loses its leading space, special tokens
add nothing, several byte tokens add one character together, a stop string is cut off. So tokens are laid along the
text that was really given out.
"""

from __future__ import annotations

from serve.output import TextLogprob

Placed = list[tuple[TextLogprob, int]]

_BYTES = "bytes:"  # how the tokenizer shows a token that is no text by itself


class TextOffsets:
    """Places tokens as the text grows. A token waits until its text is out, or one after it has been placed.

    The result does not depend on how the text was cut into pieces.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start  # what stands before the output's own text (an echoed prompt)
        self._text = ""
        self._position = 0
        self._waiting: list[TextLogprob] = []

    def push(self, tokens: tuple[TextLogprob, ...], text: str) -> Placed:
        """The tokens that can be placed now."""
        self._text += text
        self._waiting += tokens
        placed: Placed = []
        held: list[TextLogprob] = []  # those whose text was not found yet
        for token in self._waiting:
            found = self._find(token.text, sum(other.text.startswith(_BYTES) for other in held))
            if found is None:
                held.append(token)
                continue
            placed += self._at_position(held)
            held = []
            placed.append((token, self._start + found[0]))
            self._position = found[1]
        self._waiting = held
        return placed

    def flush(self) -> Placed:
        """The output has ended: the tokens left over add no text of their own."""
        placed, self._waiting = self._at_position(self._waiting), []
        return placed

    def _at_position(self, tokens: list[TextLogprob]) -> Placed:
        return [(token, self._start + self._position) for token in tokens]

    def _find(self, text: str, num_bytes_tokens: int) -> tuple[int, int] | None:
        """(begin, end) of a token's text: at the position, or just behind the characters that byte tokens made."""
        for shown in (text, text.lstrip(" ")) if self._position == 0 else (text,):
            window = self._position + num_bytes_tokens + len(shown)
            begin = self._text.find(shown, self._position, window) if shown else -1
            if begin != -1:
                return begin, begin + len(shown)
        return None
