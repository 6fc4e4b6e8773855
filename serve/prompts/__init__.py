"""Prompt rendering: strings only. Serving renders requests and finetuning renders training inputs through here."""

from __future__ import annotations

from collections.abc import Sequence

from serve.prompts import chat, cot, few_shot, instruction
from serve.prompts.formats import PROMPT_FORMAT_VERSION
from serve.request import Exemplar, Mode

__all__ = ["PROMPT_FORMAT_VERSION", "chat", "cot", "few_shot", "instruction", "render", "render_target"]


def render(
    mode: Mode,
    instruction_text: str,
    input: str | None = None,
    options: Sequence[str] = (),
    exemplars: Sequence[Exemplar] = (),
) -> str:
    """The prompt of a request in `mode`. In raw mode the instruction is the whole prompt, taken as it is.

    >>> render(Mode.RAW, "  two  spaces ")
    '  two  spaces '
    """
    if mode is Mode.RAW:
        return instruction_text
    if mode is Mode.INSTRUCTION:
        return instruction.render(instruction_text, input, options)
    if mode is Mode.FEW_SHOT:
        return few_shot.render(instruction_text, input, options, exemplars)
    return cot.render(instruction_text, input, options, exemplars)


def render_target(mode: Mode, output: str, rationale: str | None = None) -> str:
    """What a model trained for `mode` writes: the chain and the closing sentence in cot mode, else the output."""
    return cot.render_answer(output, rationale) if mode is Mode.COT else output.strip()
