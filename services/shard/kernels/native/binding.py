"""The functions and structures of the compiled library, as ctypes sees them: `source/model.h`, field by field.

Knows signatures; nothing of models.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_void_p
from pathlib import Path


class Linear(Structure):
    """A packed matrix."""

    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("column_sums", c_void_p),
        ("bias", c_void_p),
        ("inner", c_int32),
        ("panel_count", c_int32),
    )


class Layer(Structure):
    """One layer; pointers are null where the architecture has no such thing."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("feed_forward_norm", c_void_p),
        ("post_feed_forward_norm", c_void_p),
        ("query_key_value", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("rotation", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int32),
        ("unused", c_int32),
    )


class Model(Structure):
    """A packed model."""

    _fields_ = (
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(Layer)),
        ("head", Linear),
        ("weight_kind", c_int32),
        ("embedding_kind", c_int32),
        ("layer_count", c_int32),
        ("vocabulary", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_size", c_int32),
        ("page", c_int32),
        ("activation", c_int32),
        ("epsilon", c_float),
        ("attention_scale", c_float),
        ("attention_softcap", c_float),
        ("logit_softcap", c_float),
        ("embedding_scale", c_float),
    )


class Step(Structure):
    """The chunks of a step, of four int32 each, and where its results go."""

    _fields_ = (
        ("chunks", c_void_p),
        ("token_ids", c_void_p),
        ("tables", c_void_p),
        ("wants_logits", c_char_p),
        ("logits", c_void_p),
        ("best", c_void_p),
        ("finite", c_void_p),
        ("chunk_count", c_int32),
        ("unused", c_int32),
    )


class Library:
    """A compiled library. A call lets other Python threads run.

    Attributes:
        name: of the file: the instruction set, and a hash of what it was made from.
    """

    def __init__(self, path: Path) -> None:
        """Loads it.

        Raises:
            OSError: it cannot be loaded.
            RuntimeError: the system does not let this process use the instruction set.
        """
        library = ctypes.CDLL(str(path))
        self.name = path.stem
        self.prepare = library.fermata_prepare
        self.prepare.restype = c_int32
        self.pack = library.fermata_pack
        self.pack.argtypes = [c_int32, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p]
        self.create = library.fermata_create
        self.create.argtypes, self.create.restype = [POINTER(Model), c_int32], c_void_p
        self.forward = library.fermata_forward
        self.forward.restype = c_int32
        self.forward.argtypes = [c_void_p, POINTER(Step)]
        self.destroy = library.fermata_destroy
        self.destroy.argtypes = [c_void_p]
        if not self.prepare():
            raise RuntimeError(f"the system refuses the instruction set of {path.name}")
