"""Compare a bundle with what it was made from: PyTorch, or somebody else's ONNX file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..sources.base import ModelSource
from ..sources.onnx_file import OnnxFile
from ..sources.transformers_model import Source
from ..techniques.prepare import Adapters
from .file import verify_against_file
from .pytorch import verify_against_pytorch


def verify_bundle(
    folder: Path,
    source: ModelSource,
    reference: Mapping[str, torch.Tensor],
    adapters: Adapters,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Compare the bundle in `folder` with its source.

    Args:
        reference: the values that the bundle holds of the source's weights.

    Returns:
        What was measured, for the manifest.

    Raises:
        VerificationError: an output, a loss or a gradient differs by more than the tolerance.
        AdapterError: an adapter does not change the output.
    """
    if isinstance(source, OnnxFile):
        report("verifying against the file and finite differences")
        return verify_against_file(folder, source, reference, adapters.loaded)
    assert isinstance(source, Source)
    report("verifying against PyTorch")
    return verify_against_pytorch(folder, source, reference, adapters.folders)
