"""The packed rows of a phase: stream of token examples -> packer -> rows, with one state for both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.packing import PackedRow, Packer, PackingStats
from finetune.tokenization import TokenStream


class RowStream:
    """Packed rows of a phase, endless; with its state, and the mixture's manifest."""

    def __init__(self, stream: TokenStream, packer: Packer) -> None:
        self.stream, self.packer = stream, packer
        self.stats = PackingStats()

    def __iter__(self) -> Iterator[PackedRow]:
        return self

    def __next__(self) -> PackedRow:
        while True:
            row = self.packer.add(next(self.stream))
            if row is not None:
                self.stats.see_row(row, self.packer)
                return row

    def state_dict(self) -> dict[str, Any]:
        return {
            "stream": self.stream.state_dict(),
            "leftovers": self.packer.state_dict(),
            "packing": dict(self.stats.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.packer.load_state_dict(state["leftovers"])
        self.stats.counts.update(state["packing"])

    def counts(self) -> dict[str, int]:
        """What went by: examples, trimmed, dropped; rows, tokens and the room they had."""
        return dict(self.stream.counts) | dict(self.stats.counts)
