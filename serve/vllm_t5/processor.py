"""Text as a 'modality': how vLLM's encoder-decoder machinery gets the prompt to the encoder.

vLLM runs an encoder only for items of a modality, at most one a request. Here the item is the prompt's token ids; the
placeholder that stands for it in the encoder prompt is as long as the ids are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    PromptReplacement,
)

from serve.vllm_t5 import openai_answers, prompt_routing, request_outputs

MODALITY = "text"
ENCODER_IDS = "encoder_ids"  # the model's keyword argument
PLACEHOLDER = 0


class TextItems(ModalityDataItems):  # type: ignore[misc]
    """Prompts as tensors of token ids, handed to the model as they are."""

    def get_count(self) -> int:
        return len(self.data)

    def get(self, index: int) -> Tensor:
        item: Tensor = self.data[index]
        return item

    def get_processor_data(self) -> Mapping[str, object]:
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        return {ENCODER_IDS: list(self.data)}


class TextParser(MultiModalDataParser):  # type: ignore[misc]
    """Accepts a text, a list of token ids, or a list with one of these."""

    def __init__(self, tokenize: Callable[[str], list[int]], vocab_size: int) -> None:
        super().__init__()
        self._tokenize = tokenize
        self._vocab_size = vocab_size

    def _get_subparsers(self) -> Mapping[str, Callable[[Any], TextItems]]:
        return {MODALITY: self.parse}

    def parse(self, data: object) -> TextItems:
        """One prompt, or a list with one.

        Raises:
            VLLMValidationError: another type, no tokens, or an id that the model has no row for.
        """
        is_ids = isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], int)
        single = isinstance(data, str | Tensor) or is_ids
        items = data if isinstance(data, list) and not single else [data]
        return TextItems([self._ids(item) for item in items], MODALITY)

    def _ids(self, item: object) -> Tensor:
        if isinstance(item, str):
            item = self._tokenize(item)
        if isinstance(item, Tensor):
            item = item.flatten().tolist()
        if not isinstance(item, list) or not all(type(number) is int for number in item):
            raise VLLMValidationError("the encoder's text must be a string or a list of token ids", parameter="prompt")
        if not item:
            raise VLLMValidationError("the prompt has no tokens", parameter="prompt")
        if min(item) < 0 or max(item) >= self._vocab_size:
            raise VLLMValidationError(f"token ids must be 0...{self._vocab_size - 1}", parameter="prompt")
        return torch.tensor(item)


class T5ProcessingInfo(BaseProcessingInfo):  # type: ignore[misc]
    """One text a request, as long as the model length allows. Its making wraps what serves prompts and answers."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        prompt_routing.install()
        request_outputs.install()
        openai_answers.install()

    def get_data_parser(self) -> TextParser:
        return TextParser(lambda text: list(self.get_tokenizer().encode(text)), self.ctx.model_config.get_vocab_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {MODALITY: 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {MODALITY: self.ctx.model_config.max_model_len}

    @property
    def skip_prompt_length_check(self) -> bool:
        """The renderer has checked the prompt; vLLM's second check asks for room for output behind the *encoder*."""
        return True


class T5DummyInputs(BaseDummyInputsBuilder):  # type: ignore[misc]
    """The longest input there can be, for the run that measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, object]:
        return {MODALITY: [[PLACEHOLDER] * seq_len for _ in range(mm_counts.get(MODALITY, 0))]}


class T5Processor(EncDecMultiModalProcessor):  # type: ignore[misc]
    """Makes vLLM's encoder input out of the ids, and leaves the decoder prompt alone."""

    requires_tokenizer = False

    def create_encoder_prompt(self, prompt: list[int], mm_items: Any) -> list[int]:
        return [PLACEHOLDER]

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {ENCODER_IDS: MultiModalFieldConfig.batched(MODALITY)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        texts = mm_items[MODALITY]
        return [
            PromptReplacement(
                modality=MODALITY,
                target=[PLACEHOLDER],
                replacement=lambda index: [PLACEHOLDER] * len(texts.get(index)),
            )
        ]
