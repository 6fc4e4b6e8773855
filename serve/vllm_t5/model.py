"""The model class that vLLM builds: both stacks, the head, and the text processor that feeds the encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config

from serve.vllm_t5 import encoder_order, weights
from serve.vllm_t5.model_shape import T5Shape
from serve.vllm_t5.processor import ENCODER_IDS, T5DummyInputs, T5ProcessingInfo, T5Processor
from serve.vllm_t5.stacks import Decoder, Encoder, hang_bias_tables

logger = init_logger("vllm.flan_t5.model")


@MULTIMODAL_REGISTRY.register_processor(T5Processor, info=T5ProcessingInfo, dummy_inputs=T5DummyInputs)
class T5ForConditionalGeneration(nn.Module, SupportsMultiModal):  # type: ignore[misc]
    """T5, T5 1.1 / Flan-T5 and mT5."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        encoder_order.install()
        config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
        if getattr(config, "model_type", None) == "umt5":
            raise ValueError("UMT5 has a bias in every layer; this plugin serves T5, T5 1.1 and mT5")
        self.config = config
        self.shape = T5Shape.from_hf(config)
        join = f"{prefix}." if prefix else ""
        self.shared = VocabParallelEmbedding(self.shape.vocab_size, self.shape.d_model)
        self.encoder = Encoder(self.shape, quantization, f"{join}encoder")
        self.decoder = Decoder(vllm_config=vllm_config, prefix=f"{join}decoder")
        self.lm_head = ParallelLMHead(
            self.shape.vocab_size, self.shape.d_model, quant_config=quantization, prefix=f"{join}lm_head"
        )
        self.logits_processor = LogitsProcessor(self.shape.vocab_size)
        self.known_tokens = known_tokens(vllm_config.model_config, self.shape.vocab_size)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Decoder ids [rows] -> [rows, d_model]; the encoder's output is never mixed into them."""
        embedded: Tensor = self.shared(input_ids)
        return embedded

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Encode the texts of all requests that are new in this step: a list of [tokens, d_model], in their order."""
        texts = kwargs[ENCODER_IDS]
        assert isinstance(texts, Tensor | list)
        ids = [text.flatten() for text in texts]  # a tensor [texts, tokens] where all are equally long
        lengths = [text.shape[0] for text in ids]
        return list(self.encoder(self.shared(torch.cat(ids)), lengths).split(lengths))

    def forward(
        self, input_ids: Tensor, positions: Tensor, encoder_outputs: list[Tensor] | None = None, **kwargs: object
    ) -> Tensor:
        """Decoder ids [rows] -> [rows, d_model]; `encoder_outputs` of the requests that are new, in row order."""
        encoded = torch.cat(encoder_outputs) if encoder_outputs else None
        hidden: Tensor = self.decoder(self.shared(input_ids), encoded)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, d_model] -> [rows, vocab_size]; rows of the vocabulary that the tokenizer does not know are -inf."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:
            logits[:, self.known_tokens :] = -torch.inf
        return logits

    def load_weights(self, weights_of_checkpoint: Iterable[tuple[str, Tensor]]) -> set[str]:
        names = {name for name, _ in self.named_parameters()}
        tied = weights.load(self, weights_of_checkpoint, gated=self.shape.gated)
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.shared)
        self.logits_processor.scale = self.shape.d_model**-0.5 if tied and self.shape.scales_tied_head else 1.0
        logger.info("T5 with %s head, %d of %d tokens known", "a tied" if tied else "its own", self.known_tokens,
                    self.shape.vocab_size)  # fmt: skip
        hang_bias_tables(self.decoder)
        return names


def known_tokens(model_config: Any, vocab_size: int) -> int:
    """Ids that the tokenizer knows (T5: 32,100 of 32,128); without a tokenizer all of them."""
    tokenizer = None if model_config.skip_tokenizer_init else cached_tokenizer_from_config(model_config)
    return vocab_size if tokenizer is None else min(vocab_size, len(tokenizer))
