"""The entry point: what vLLM learns when it starts, in every one of its processes. Quick, and safe to repeat."""

from __future__ import annotations

import logging
import os

SUPPORTED_VLLM = "0.32.0"
ANY_VERSION_VARIABLE = "FLAN_VLLM_T5_ANY_VERSION"
BACKEND = "T5_RELATIVE_BIAS"
ARCHITECTURES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")
MODEL_TYPES = ("t5", "mt5")
NO_FLOAT16 = "T5's feed-forward layers overflow it. Please use bfloat16 or float32 instead."

logger = logging.getLogger("vllm.flan_t5")  # under vLLM's logger, so that its handlers print it


def register() -> None:
    """Tell vLLM about T5. Under another vLLM than SUPPORTED_VLLM: nothing but a warning that says what to do."""
    import vllm

    problem = version_problem(vllm.__version__, os.environ.get(ANY_VERSION_VARIABLE))
    if problem is not None:
        logger.warning(problem)
        return
    from vllm import ModelRegistry
    from vllm.config import model as model_config
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from serve.vllm_t5.model_shape import T5ShapeConvertor

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, "serve.vllm_t5.attention.RelativeBiasBackend")
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "serve.vllm_t5.model:T5ForConditionalGeneration")
    for model_type in MODEL_TYPES:
        MODEL_ARCH_CONFIG_CONVERTORS.setdefault(model_type, T5ShapeConvertor)
        model_config._FLOAT16_NOT_SUPPORTED_MODELS.setdefault(model_type, NO_FLOAT16)


def version_problem(installed: str, any_version: str | None = None) -> str | None:
    """Why T5 is not offered under vLLM `installed` and what to do about it; None where it is.

    A local suffix does not count: "0.32.0+cpu" is 0.32.0.
    """
    if installed.partition("+")[0] == SUPPORTED_VLLM or any_version == "1":
        return None
    return (
        f"T5 is not offered: flan-serve's plugin is written against the internals of vLLM {SUPPORTED_VLLM} and this is "
        f"{installed}. Other models are not affected. To serve T5, install vllm=={SUPPORTED_VLLM}, or a flan-serve "
        f"release that names {installed}; or set {ANY_VERSION_VARIABLE}=1 to try: every vLLM method that the plugin "
        "wraps is compared with what it was, and what moved is named."
    )
