"""The compiled kernels: found, loaded and called. The structs mirror types.h, field by field.

The library is made when the package is built (build.py) where there is a C compiler, and nothing needs it: without
it, or on a processor without AVX2, `level()` is NONE and torch computes everything.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from enum import IntEnum
from functools import cache

from torch import Tensor

from serve.engine.native.build import library_path

logger = logging.getLogger(__name__)


class Level(IntEnum):
    """Instruction sets that there are kernels for; int8 layers need the last."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_VNNI = 3


class Kind(IntEnum):
    """How a layer's weights are stored. Activations are float32; int16's have 14 bits, int8's 8 (fine: 15)."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT16 = 2
    INT8 = 3
    INT8_FINE = 4


ACTIVATIONS = {"relu": 0, "gelu_new": 1, "silu": 2}


class LinearTable(Structure):
    _fields_ = [
        ("kind", c_int64), ("inputs", c_int64), ("blocks", c_int64),
        ("weight", c_void_p), ("scales", c_void_p), ("offsets", c_void_p),
    ]  # fmt: skip


class LayerTable(Structure):
    _fields_ = [
        ("self_norm", c_void_p), ("cross_norm", c_void_p), ("feed_norm", c_void_p),
        ("qkv", LinearTable), ("self_out", LinearTable), ("cross_q", LinearTable), ("cross_out", LinearTable),
        ("wi", LinearTable), ("wo", LinearTable),
    ]  # fmt: skip


class EncoderLayerTable(Structure):
    _fields_ = [
        ("self_norm", c_void_p), ("feed_norm", c_void_p),
        ("qkv", LinearTable), ("self_out", LinearTable), ("wi", LinearTable), ("wo", LinearTable),
    ]  # fmt: skip


class EncoderTable(Structure):
    _fields_ = [
        ("layers", c_int64), ("decoder_layers", c_int64), ("heads", c_int64), ("d_kv", c_int64), ("d_model", c_int64),
        ("activation", c_int64), ("gated", c_int64), ("half_cache", c_int64), ("epsilon", c_double),
        ("embedding", c_void_p), ("final_norm", c_void_p), ("layer", POINTER(EncoderLayerTable)),
        ("cross", POINTER(LinearTable)),
    ]  # fmt: skip


class CachedTable(Structure):
    _fields_ = [
        ("rows", c_void_p), ("layer_step", c_int64), ("kind_step", c_int64), ("head_step", c_int64),
        ("length", c_int64),
    ]  # fmt: skip


class ModelTable(Structure):
    _fields_ = [
        ("layers", c_int64), ("heads", c_int64), ("d_kv", c_int64), ("d_model", c_int64), ("activation", c_int64),
        ("gated", c_int64), ("max_distance", c_int64), ("half_cache", c_int64), ("epsilon", c_double),
        ("embedding", c_void_p), ("bias", c_void_p), ("final_norm", c_void_p), ("layer", POINTER(LayerTable)),
    ]  # fmt: skip


class QuantizedTable(Structure):
    _fields_ = [("levels", c_void_p), ("step", c_int64), ("scales", c_void_p), ("scales_step", c_int64)]


class ScratchTable(Structure):
    _fields_ = [
        ("h", c_void_p), ("x", c_void_p), ("y", c_void_p), ("scores", c_void_p),
        ("h_step", c_int64), ("x_step", c_int64), ("y_step", c_int64), ("scores_step", c_int64),
        ("self_cost", c_int64), ("cross_cost", c_int64), ("quantized", QuantizedTable),
    ]  # fmt: skip


class HeadTable(Structure):
    _fields_ = [
        ("product", LinearTable), ("weight", c_void_p), ("lost", c_void_p), ("norms", c_void_p),
        ("half", c_int64), ("vocabulary", c_int64), ("padded", c_int64), ("most", c_int64),
    ]  # fmt: skip


class HeadScratchTable(Structure):
    _fields_ = [
        ("quantized", QuantizedTable), ("norm", c_void_p), ("loss", c_void_p), ("logits", c_void_p),
        ("reached", c_void_p), ("listed", c_void_p), ("tokens", c_void_p), ("choices", c_void_p),
    ]  # fmt: skip


class TextsTable(Structure):
    _fields_ = [
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("out", c_void_p),
        ("step", c_int64), ("heads", c_int64), ("d_kv", c_int64), ("texts", c_int64), ("longest", c_int64),
        ("cost", c_int64), ("lengths", c_void_p), ("line", c_void_p), ("room", c_void_p), ("room_step", c_int64),
    ]  # fmt: skip


JOBS = ("decoder", "encoder", "head", "single")  # as in types.h, like all these
PARTS = ("products", "attention", "rounding", "by_row", "waiting")


class ClockTable(Structure):
    _fields_ = [("job", c_int64), ("since", c_double), ("seconds", c_double * len(PARTS) * len(JOBS))]


@cache
def _library() -> ctypes.CDLL | None:
    path = library_path()
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("the native kernels cannot be loaded, torch does their work: %s", error)
        return None
    library.flan_level.restype = c_int64
    if library.flan_level() != Level.NONE:
        sizes = [c_int64, c_int64]
        library.flan_step.argtypes = [
            *sizes, POINTER(ModelTable), c_void_p, c_int64, POINTER(ScratchTable), c_void_p,
        ]  # fmt: skip
        library.flan_linear.argtypes = [
            *sizes,
            POINTER(LinearTable),
            c_void_p,
            c_int64,
            POINTER(QuantizedTable),
            c_void_p,
        ]
        library.flan_normalize.argtypes = [*sizes, c_void_p, c_void_p, c_double, c_int64, c_int64, c_void_p]
        library.flan_activate.argtypes = [*sizes, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p]
        library.flan_shortlist.argtypes = [
            *sizes, POINTER(HeadTable), c_void_p, c_int64, POINTER(HeadScratchTable), c_void_p,
        ]  # fmt: skip
        library.flan_shortlist.restype = None
        library.flan_encode.argtypes = [
            *sizes, POINTER(EncoderTable), c_void_p, POINTER(TextsTable), c_void_p, POINTER(ScratchTable), c_void_p,
        ]  # fmt: skip
        library.flan_encode.restype = None
        library.flan_attention.argtypes = [*sizes, POINTER(TextsTable)]
        library.flan_attention.restype = None
        library.flan_attention_room.argtypes, library.flan_attention_room.restype = [c_int64, c_int64], c_int64
        library.flan_profile.argtypes = [POINTER(ClockTable)]
        for function in ("flan_profile", "flan_step", "flan_linear", "flan_normalize", "flan_activate"):
            getattr(library, function).restype = None
    return library


_limit = Level.AVX512_VNNI


def level() -> Level:
    """The best kernels that are here and that this processor runs."""
    library = _library()
    return Level.NONE if library is None else min(Level(library.flan_level()), _limit)


@contextmanager
def limited(most: Level) -> Iterator[None]:
    """As if the processor had no more than that, for tests."""
    global _limit
    before, _limit = _limit, most
    try:
        yield
    finally:
        _limit = before


def loaded() -> ctypes.CDLL:
    """The library, where `level()` is not NONE."""
    library = _library()
    if library is None:
        raise RuntimeError("the native kernels have not been built")
    return library


def address(tensor: Tensor) -> int:
    """Of a contiguous CPU tensor's first element; whoever passes it on keeps the tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("the kernels read contiguous tensors in the processor's memory")
    return tensor.data_ptr()
