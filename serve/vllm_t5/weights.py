"""Hugging Face's tensor names of a T5 -> the parameters of serve.vllm_t5.model, strictly: all there, none left over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EMBEDDING = "shared.weight"
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
# In the first checkpoints of the hub, and never read: T5 has no bias in cross-attention.
IGNORED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(\w+)(?:\.(\w+))?\.weight")
_SELF = {"q": ("qkv", "q"), "k": ("qkv", "k"), "v": ("qkv", "v"), "o": ("o", None)}
_CROSS: dict[str, tuple[str, str | int | None]] = {"q": ("q", None), "k": ("kv", 0), "v": ("kv", 1), "o": ("o", None)}
_FEED_FORWARD: dict[str, tuple[str, int | None]] = {
    "wi": ("wi", None),
    "wi_0": ("wi", 0),
    "wi_1": ("wi", 1),
    "wo": ("wo", None),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's name, and which part of it a tensor fills (None: all)."""

    parameter: str
    part: str | int | None = None


def place_of(name: str) -> Place | None:
    """Where checkpoint tensor `name` goes; None if a T5 has no such tensor.

    >>> place_of("decoder.block.3.layer.1.EncDecAttention.v.weight")
    Place(parameter='decoder.layers.3.cross_attention.kv.weight', part=1)
    """
    if name in (EMBEDDING, *EMBEDDING_ALIASES):
        return Place(EMBEDDING)
    if name == HEAD:
        return Place(HEAD)
    if name in ("encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"):
        return Place(f"{name.partition('.')[0]}.norm.weight")
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    stack, block, sublayer, module, matrix = match.groups()
    room = _room(stack, int(sublayer))
    if room is None:
        return None
    parts: dict[str, dict[str, tuple[str, str | int | None]]] = {
        "SelfAttention": dict(_SELF),
        "EncDecAttention": _CROSS,
        "DenseReluDense": dict(_FEED_FORWARD),
    }
    prefix = f"{stack}.layers.{block}.{room}"
    if module == "layer_norm" and matrix is None:
        return Place(f"{prefix}.norm.weight")
    if module == "SelfAttention" and matrix == "relative_attention_bias":
        return Place(f"{stack}.relative_bias.weight") if block == "0" else None
    expected = {"attention": "SelfAttention", "cross_attention": "EncDecAttention", "feed_forward": "DenseReluDense"}
    if module != expected[room] or matrix not in parts[module]:
        return None
    parameter, part = parts[module][matrix]
    return Place(f"{prefix}.{parameter}.weight", part)


def _room(stack: str, sublayer: int) -> str | None:
    rooms = ("attention", "feed_forward") if stack == "encoder" else ("attention", "cross_attention", "feed_forward")
    return rooms[sublayer] if sublayer < len(rooms) else None


def load(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, gated: bool) -> bool:
    """Fill the parameters of `model`; True if the checkpoint's head is its embedding.

    The checkpoint decides: no `lm_head.weight`, or one that equals the embedding, is a tied head. `gated`: a
    feed-forward layer has two inner matrices.

    Raises:
        ValueError: naming tensors that are missing or that no T5 has.
    """
    parameters = dict(model.named_parameters())
    parts: dict[str, set[str | int | None]] = {}
    unknown: list[str] = []
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name == IGNORED:
            continue
        place = place_of(name)
        if place is None or place.parameter not in parameters:
            unknown.append(name)
            continue
        if place.parameter in (EMBEDDING, HEAD):
            kept[place.parameter] = tensor
        parameter = parameters[place.parameter]
        part = () if place.part is None else (place.part,)
        getattr(parameter, "weight_loader", _copy)(parameter, tensor, *part)
        parts.setdefault(place.parameter, set()).add(place.part)
    missing = [name for name in parameters if name != HEAD and not _filled(name, parts.get(name, set()), gated)]
    if unknown or missing:
        raise ValueError(f"not a T5 checkpoint that fits its config: missing {missing or 'nothing'}, unknown {unknown}")
    return HEAD not in kept or torch.equal(kept[HEAD], kept[EMBEDDING])


def _filled(name: str, parts: set[str | int | None], gated: bool) -> bool:
    """Whether all parts of a parameter came."""
    if name.endswith(".qkv.weight"):
        return parts == {"q", "k", "v"}
    if name.endswith(".kv.weight"):
        return parts == {0, 1}
    if name.endswith(".wi.weight") and gated:
        return parts == {0, 1}
    return bool(parts)


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} where {list(parameter.shape)} belongs")
    parameter.data.copy_(tensor)
