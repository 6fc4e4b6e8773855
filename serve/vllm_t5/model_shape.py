"""What vLLM asks of a model's config before the model exists: the size of a head, and how long a text may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase


class T5ShapeConvertor(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """T5's heads are `d_kv` wide, which is not d_model / heads; and T5 has no longest text.

    `n_positions` (512 in most checkpoints) is advice about training, not a limit: positions enter through relative
    distances alone. Without this vLLM would refuse a larger `--max-model-len`.
    """

    def get_num_hidden_layers(self) -> int:
        """Layers with a self-attention cache: the decoder's."""
        return T5Shape.from_hf(self.hf_text_config).decoder_layers

    def get_total_num_attention_heads(self) -> int:
        return int(self.hf_text_config.num_heads)

    def get_total_num_kv_heads(self) -> int:
        return int(self.hf_text_config.num_heads)

    def get_head_size(self) -> int:
        return int(self.hf_text_config.d_kv)

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        return float("inf"), None


@dataclass(frozen=True, slots=True)
class T5Shape:
    """Dimensions of a T5, as its transformers config gives them.

    `scales_tied_head`: logits of a *tied* head are multiplied by d_model ** -0.5 (T5 1.0). Whether the head is tied is
    read off the checkpoint, because transformers 5 calls every T5 tied.
    """

    d_model: int
    d_kv: int
    d_ff: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int
    buckets: int
    max_distance: int
    epsilon: float
    activation: str
    gated: bool
    scales_tied_head: bool

    @classmethod
    def from_hf(cls, config: Any) -> T5Shape:
        """From a `T5Config` or `MT5Config` of transformers."""
        decoder_layers = config.num_decoder_layers
        return cls(
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            heads=config.num_heads,
            encoder_layers=config.num_layers,
            decoder_layers=config.num_layers if decoder_layers is None else decoder_layers,
            vocab_size=config.vocab_size,
            buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
            epsilon=config.layer_norm_epsilon,
            activation=config.dense_act_fn,
            gated=config.is_gated_act,
            scales_tied_head=getattr(config, "scale_decoder_outputs", True) is not False,
        )
