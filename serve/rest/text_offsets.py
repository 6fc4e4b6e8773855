"""Where in an output's text each of its tokens begins (OpenAI's `text_offset`).

A token's own text is not always what it adds to the output: the first one loses its leading space, special tokens
add nothing, several byte tokens add one character together, a stop string is cut off. So tokens are laid along the
text that was really given out.
"""

from __future__ import annotations

from collections import deque

from serve.output import TextLogprob

Placed = list[tuple[TextLogprob, int]]

_BYTES = "bytes:"  # how the tokenizer shows a token that is no text by itself


class TextOffsets:
    """Places tokens as the text grows; a token waits while its text may still come.

    So the result does not depend on how the text was cut into pieces.

    Args:
        start: length of what stands before the output's own text (an echoed prompt).
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._text = ""
        self._position = 0  # behind the last token whose text was found
        self._num_bytes = 0  # byte tokens since then: they make at most so many characters
        self._waiting: deque[TextLogprob] = deque()

    @property
    def position(self) -> int:
        """Where the text ends that the tokens placed so far have brought."""
        return self._start + self._position

    def push(self, tokens: tuple[TextLogprob, ...], text: str) -> Placed:
        """The tokens that can be placed now."""
        self._text += text
        self._waiting += tokens
        return self._place(is_over=False)

    def flush(self) -> Placed:
        """The output has ended: the tokens left over."""
        return self._place(is_over=True)

    def _place(self, *, is_over: bool) -> Placed:
        placed: Placed = []
        while self._waiting:
            token = self._waiting[0]
            found = self._find(token.text)
            if found is None and not is_over and self._may_come(token.text):
                break
            self._waiting.popleft()
            if found is None:  # it adds no text of its own
                placed.append((token, self._start + self._position))
                self._num_bytes += token.text.startswith(_BYTES)
            else:
                begin, self._position = found
                placed.append((token, self._start + begin))
                self._num_bytes = 0
        return placed

    def _forms(self, text: str) -> tuple[str, ...]:
        """How a token may look in the output: the first word stands there without its space."""
        return (text, text.lstrip(" ")) if self._position == 0 else (text,)

    def _find(self, text: str) -> tuple[int, int] | None:
        """(begin, end) of a token's text: at the position, or just behind the characters that byte tokens made."""
        for form in self._forms(text):
            begin = self._text.find(form, self._position, self._position + self._num_bytes + len(form)) if form else -1
            if begin != -1:
                return begin, begin + len(form)
        return None

    def _may_come(self, text: str) -> bool:
        rest = self._text[self._position : self._position + self._num_bytes + len(text)]
        for form in self._forms(text):
            if len(rest) < self._num_bytes + len(form) and (self._num_bytes > 0 or form.startswith(rest)):
                return True
        return False
