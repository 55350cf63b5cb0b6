"""Modules around the ops of this package."""

from lyra_ops.nn.multi_lora import MultiLoraLinear

__all__ = ["MultiLoraLinear"]
