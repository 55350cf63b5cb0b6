"""Reads the Whisper encoder and decoder out of a CTranslate2 model file.

CTranslate2 (OpenNMT/CTranslate2, ``model_spec.py``) stores a converted model in one file, little-endian:

    u32 version | string spec name | u32 revision | u32 number of variables
    per variable: string name | u8 rank | u32 size per dimension | u8 dtype | u32 bytes | data
    u32 number of aliases | per alias: string name | string variable it stands for

where a string is a u16 length followed by that many bytes, the last of them zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
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
    stack = _Stack(path, "encoder")
    stack.state["embed_positions.weight"] = stack.weight("position_encodings/encodings")
    for conv in ("conv1", "conv2"):
        stack.linear(conv, conv)
    for layer in stack.layers():
        stack.self_attention(layer)
        stack.feed_forward(layer)
    return stack.tensors()


def read_whisper_decoder(path: str | Path) -> dict[str, Tensor]:
    """Returns the float32 ``state_dict`` of the ``WhisperDecoder`` of transformers stored in a CTranslate2 file."""
    stack = _Stack(path, "decoder")
    stack.state["embed_tokens.weight"] = stack.weight("embeddings/weight")
    stack.state["embed_positions.weight"] = stack.weight("position_encodings/encodings")
    for layer in stack.layers():
        stack.self_attention(layer)
        stack.cross_attention(layer)
        stack.feed_forward(layer)
    return stack.tensors()


class _Stack:
    """The layers of an encoder or a decoder on their way from CTranslate2's names to those of transformers."""

    def __init__(self, path: str | Path, name: str):
        self.path, self.name = path, name
        self.variables = read_variables(path, f"{name}/")
        self.state: dict[str, np.ndarray] = {}

    def weight(self, name: str) -> np.ndarray:
        value = self.variables[f"{self.name}/{name}"]
        if value.dtype not in (np.float16, np.float32):
            raise ValueError(
                f"{self.path}: {self.name}/{name} is {value.dtype}, expected float16 or float32 (not quantised)"
            )
        return value.astype(np.float32)

    def layers(self) -> Iterator[int]:
        layer = 0
        while f"{self.name}/layer_{layer}/ffn/layer_norm/gamma" in self.variables:
            yield layer
            layer += 1

    def norm(self, theirs: str, ours: str) -> None:
        self.state[f"{ours}.weight"] = self.weight(f"{theirs}/gamma")
        self.state[f"{ours}.bias"] = self.weight(f"{theirs}/beta")

    def linear(self, theirs: str, *ours: str) -> None:
        """One of theirs, or several of ours on top of each other; Whisper's key has no bias."""
        weights = np.split(self.weight(f"{theirs}/weight"), len(ours))
        biases = np.split(self.weight(f"{theirs}/bias"), len(ours))
        for name, weight, bias in zip(ours, weights, biases, strict=True):
            self.state[f"{name}.weight"] = weight
            if not name.endswith("k_proj"):
                self.state[f"{name}.bias"] = bias

    def self_attention(self, layer: int) -> None:
        theirs, ours = f"layer_{layer}/self_attention", f"layers.{layer}.self_attn"
        self.norm(f"{theirs}/layer_norm", f"{ours}_layer_norm")
        self.linear(f"{theirs}/linear_0", f"{ours}.q_proj", f"{ours}.k_proj", f"{ours}.v_proj")
        self.linear(f"{theirs}/linear_1", f"{ours}.out_proj")

    def cross_attention(self, layer: int) -> None:
        theirs, ours = f"layer_{layer}/attention", f"layers.{layer}.encoder_attn"
        self.norm(f"{theirs}/layer_norm", f"{ours}_layer_norm")
        self.linear(f"{theirs}/linear_0", f"{ours}.q_proj")
        self.linear(f"{theirs}/linear_1", f"{ours}.k_proj", f"{ours}.v_proj")
        self.linear(f"{theirs}/linear_2", f"{ours}.out_proj")

    def feed_forward(self, layer: int) -> None:
        theirs, ours = f"layer_{layer}/ffn", f"layers.{layer}"
        self.norm(f"{theirs}/layer_norm", f"{ours}.final_layer_norm")
        self.linear(f"{theirs}/linear_0", f"{ours}.fc1")
        self.linear(f"{theirs}/linear_1", f"{ours}.fc2")

    def tensors(self) -> dict[str, Tensor]:
        self.norm("layer_norm", "layer_norm")
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in self.state.items()}


def _unpack(file: BinaryIO, code: str) -> int:
    data = file.read(struct.calcsize(code))
    if len(data) != struct.calcsize(code):
        raise ValueError(f"{file.name}: truncated, not a whole CTranslate2 model file")
    return struct.unpack(code, data)[0]


def _string(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<H"))[:-1].decode()
