"""The three shapes of a training example, from row to model.

Row           fields of one line of a source, as a dict with `input`, `output`, and perhaps `options`, `rationale`
TextExample   rendered through serve.prompts: two strings
TokenExample  tokenized: two id lists, each ending in EOS
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextExample:
    """A rendered training instance. `template_type` is zs_opt, zs_noopt, fs_opt, fs_noopt, cot, fs_cot or denoise."""

    inputs: str
    targets: str
    task: str
    template_type: str


@dataclass(frozen=True, slots=True)
class TokenExample:
    """Token ids of one instance; both lists end in EOS. `trimmed` says that the target was over-long and was cut."""

    encoder_input_tokens: tuple[int, ...]
    decoder_target_tokens: tuple[int, ...]
    task: str
    trimmed: bool = False
