"""The tiny bundles of the device side."""

from ..runtime.conftest import classifier, encoder, language_model

__all__ = ["classifier", "encoder", "language_model"]
