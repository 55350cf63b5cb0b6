"""Argument checks shared by the ops: every message names the argument, what was got and what is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int64, torch.int32)


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Returns ``value`` if it is a tensor of that shape, dtype and device.

    ``shape`` holds an int where the size must match and a letter where any size will do: ``(4, "M")``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.is_nested:
        raise TypeError(f"{name}: got a nested tensor, expected a padded one with lengths")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {str(value.layout).removeprefix('torch.')}, expected strided")
    if shape is not None:
        got = tuple(value.shape)
        fits = len(got) == len(shape) and all(isinstance(w, str) or g == w for g, w in zip(got, shape))
        if not fits:
            want = "(" + ", ".join(str(s) for s in shape) + (",)" if len(shape) == 1 else ")")
            raise ValueError(f"{name}: got shape {got}, expected {want}")
    if dtypes is not None and value.dtype not in dtypes:
        want = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, expected {want}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}")
    return value


def readable(tensor: Tensor) -> bool:
    """Whether reading values of ``tensor`` costs nothing: a plain one on the CPU, outside of compilation."""
    if torch.compiler.is_compiling():
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def check_option(name: str, value: object, options: Sequence[object]) -> None:
    """Raises ValueError unless ``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(repr(o) for o in options)}")


def check_lengths(name: str, lengths: object, batch: int, size: int, device: torch.device, *, least: int = 1) -> Tensor:
    """Returns the lengths of a padded batch as int64 on ``device``; ``None`` means that nothing is padded.

    Values are range-checked only where reading them costs no device sync, i.e. on the CPU.
    """
    if lengths is None:
        if batch and size < least:
            raise ValueError(f"{name}: sample 0 has length {size}, expected at least {least}")
        return torch.full((batch,), size, dtype=torch.int64, device=device)
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: got {lengths!r}, expected a tensor or a list of {batch} ints") from None
    check_tensor(name, lengths, shape=(batch,), dtypes=INT_DTYPES)
    if readable(lengths):
        for b, length in enumerate(lengths.tolist()):
            if not least <= length <= size:
                raise ValueError(f"{name}: sample {b} has length {length}, expected {least} to {size}")
    return lengths.to(device=device, dtype=torch.int64).contiguous()
