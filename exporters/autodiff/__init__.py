"""Reverse-mode differentiation of ONNX graphs, by emitting ordinary ONNX nodes into the same graph."""

from .engine import differentiate

__all__ = ["differentiate"]
