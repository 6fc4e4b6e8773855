"""T5, T5 1.1 / Flan-T5 and mT5 on vLLM, as an out-of-tree plugin.

Installing this package is enough: vLLM finds `register` through the entry point group `vllm.general_plugins`, and
`vllm serve google/flan-t5-base` works. A plain prompt (text or token ids) goes to the encoder and the decoder begins
with the model's start token; `{"encoder_prompt": ..., "decoder_prompt": ...}` forces a decoder prefix.

Nothing of vLLM is touched for other models: `register` announces names, and the few methods that must be wrapped
(`hooks`) are wrapped when a T5 is built.
"""

from __future__ import annotations

from serve.vllm_t5.plugin import register

__all__ = ["register"]
