"""The device side: onnxruntime and numpy, nothing that imports torch or onnx."""

from edgepeft.runtime.model import Model, load

__all__ = ["Model", "load"]
