"""The device side: onnxruntime and numpy, nothing that imports torch or onnx."""

from .model import Model, load

__all__ = ["Model", "load"]
