"""Reads the Whisper encoder out of a CTranslate2 model file.

CTranslate2 (OpenNMT/CTranslate2, ``model_spec.py``) stores a converted model in one file, little-endian:

    u32 version | string spec name | u32 revision | u32 number of variables
    per variable: string name | u8 rank | u32 size per dimension | u8 dtype | u32 bytes | data
    u32 number of aliases | per alias: string name | string variable it stands for

where a string is a u16 length followed by that many bytes, the last of them zero.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def read_variables(path: str | Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the stored variables whose name starts with ``prefix``, aliases included, by name."""
    with open(path, "rb") as file:
        version, spec = _unpack(file, "<I"), _string(file)
        if version != 6:
            raise ValueError(f"{path}: got CTranslate2 file version {version}, expected 6")
        if spec != "WhisperSpec":
            raise ValueError(f"{path}: got a {spec}, expected a WhisperSpec")
        _unpack(file, "<I")  # revision of the spec: nothing here depends on it
        variables = {}
        for _ in range(_unpack(file, "<I")):
            name = _string(file)
            shape = tuple(_unpack(file, "<I") for _ in range(_unpack(file, "<B")))
            code, n_bytes = _unpack(file, "<B"), _unpack(file, "<I")
            if not name.startswith(prefix):
                file.seek(n_bytes, 1)
                continue
            if code >= len(_DTYPES):
                raise ValueError(f"{path}: variable {name} has unknown dtype code {code}")
            data = file.read(n_bytes)
            if len(data) != n_bytes:
                raise ValueError(f"{path}: truncated inside variable {name}")
            variables[name] = np.frombuffer(data, _DTYPES[code]).reshape(shape)
        for _ in range(_unpack(file, "<I")):
            alias, target = _string(file), _string(file)
            if target in variables:
                variables[alias] = variables[target]
    return variables


def read_whisper_encoder(path: str | Path) -> dict[str, Tensor]:
    """Returns the float32 ``state_dict`` of the ``WhisperEncoder`` of transformers stored in a CTranslate2 file."""
    variables = read_variables(path, "encoder/")

    def weight(name: str) -> np.ndarray:
        if variables[name].dtype not in (np.float16, np.float32):
            raise ValueError(f"{path}: {name} is {variables[name].dtype}, expected float16 or float32 (not quantised)")
        return variables[name].astype(np.float32)

    state = {"embed_positions.weight": weight("encoder/position_encodings/encodings")}
    for conv in ("conv1", "conv2"):
        state[f"{conv}.weight"] = weight(f"encoder/{conv}/weight")
        state[f"{conv}.bias"] = weight(f"encoder/{conv}/bias")

    def norm(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weight(f"{theirs}/gamma"), weight(f"{theirs}/beta")

    def linear(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weight(f"{theirs}/weight"), weight(f"{theirs}/bias")

    layer = 0
    while f"encoder/layer_{layer}/ffn/layer_norm/gamma" in variables:
        theirs, ours = f"encoder/layer_{layer}", f"layers.{layer}"
        norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        # linear_0 holds the query, key and value projections on top of each other; Whisper's key has no bias.
        q, k, v = np.split(weight(f"{theirs}/self_attention/linear_0/weight"), 3)
        q_bias, _, v_bias = np.split(weight(f"{theirs}/self_attention/linear_0/bias"), 3)
        state |= {f"{ours}.self_attn.q_proj.weight": q, f"{ours}.self_attn.q_proj.bias": q_bias}
        state |= {f"{ours}.self_attn.k_proj.weight": k}
        state |= {f"{ours}.self_attn.v_proj.weight": v, f"{ours}.self_attn.v_proj.bias": v_bias}
        linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        layer += 1
    norm("encoder/layer_norm", "layer_norm")
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def _unpack(file: BinaryIO, code: str) -> int:
    data = file.read(struct.calcsize(code))
    if len(data) != struct.calcsize(code):
        raise ValueError(f"{file.name}: truncated, not a whole CTranslate2 model file")
    return struct.unpack(code, data)[0]


def _string(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<H"))[:-1].decode()
