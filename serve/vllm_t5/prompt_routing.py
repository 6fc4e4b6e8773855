"""Where a prompt goes: a plain one to the encoder, and the decoder begins with the start token.

vLLM alone would give a plain prompt of an encoder-decoder model to the *decoder* and run no encoder. This is wrapped
behind vLLM's own tokenization, length check and truncation, so one place serves `LLM.generate`, the OpenAI routes,
lists of prompts and streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.vllm_t5.hooks import Hook, wrap
from serve.vllm_t5.plugin import ARCHITECTURES

PARAMETERS = ("self", "prompt", "skip_mm_cache")
RENDERED = Hook("vllm.renderers.base", "BaseRenderer", "_process_enc_dec", PARAMETERS)
RENDERED_ASYNC = Hook("vllm.renderers.base", "BaseRenderer", "_process_enc_dec_async", PARAMETERS)


def install() -> None:
    """Wrap vLLM's renderer, once a process."""
    wrap(RENDERED, _routed)
    wrap(RENDERED_ASYNC, _routed_async)


def serves_t5(model_config: Any) -> bool:
    """Whether this process's model is one of ours; other models are left alone."""
    return any(name in ARCHITECTURES for name in model_config.architectures)


def to_encoder(prompt: dict[str, Any], eos_token_id: int | None) -> dict[str, Any]:
    """The tokenized `prompt` with the encoder's ids as its text item, and an empty decoder prompt where it had none.

    A decoder prompt given as *text* loses the end-of-sequence token that tokenization put behind it; ids are ids.
    """
    encoder, decoder = prompt["encoder_prompt"], prompt["decoder_prompt"]
    if not encoder.get("multi_modal_data"):
        ids = list(encoder["prompt_token_ids"])
        rest = {key: value for key, value in encoder.items() if key in ("prompt", "cache_salt")}
        encoder = {"prompt_token_ids": ids, "multi_modal_data": {"text": [ids]}, **rest}
    if decoder is None:
        decoder = {"prompt_token_ids": []}
    elif "prompt" in decoder and decoder["prompt_token_ids"][-1:] == [eos_token_id]:
        decoder = {**decoder, "prompt_token_ids": decoder["prompt_token_ids"][:-1]}
    return {**prompt, "encoder_prompt": encoder, "decoder_prompt": decoder}


def with_true_ids(rendered: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    """The rendered input with the encoder's ids in place of the placeholders that vLLM put there."""
    encoder = prompt["encoder_prompt"]
    if encoder["prompt_token_ids"]:
        rendered["encoder_prompt"]["prompt_token_ids"] = encoder["prompt_token_ids"]
        if encoder.get("prompt"):
            rendered["encoder_prompt"]["prompt"] = encoder["prompt"]
    return rendered


def _routed(inner: Callable[..., Any]) -> Callable[..., Any]:
    def process(self: Any, prompt: dict[str, Any], *, skip_mm_cache: bool = False) -> Any:
        if not serves_t5(self.model_config):
            return inner(self, prompt, skip_mm_cache=skip_mm_cache)
        prompt = to_encoder(prompt, self.model_config.hf_config.eos_token_id)
        return with_true_ids(inner(self, prompt, skip_mm_cache=skip_mm_cache), prompt)

    return process


def _routed_async(inner: Callable[..., Any]) -> Callable[..., Any]:
    async def process(self: Any, prompt: dict[str, Any], *, skip_mm_cache: bool = False) -> Any:
        if not serves_t5(self.model_config):
            return await inner(self, prompt, skip_mm_cache=skip_mm_cache)
        prompt = to_encoder(prompt, self.model_config.hf_config.eos_token_id)
        return with_true_ids(await inner(self, prompt, skip_mm_cache=skip_mm_cache), prompt)

    return process
