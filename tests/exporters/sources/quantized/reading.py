"""One module's tensors, read by a layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgepeft.exporters.quantize.table_weight import StoredWeight
from edgepeft.exporters.sources.quantized.checkpoint import quantized_layout

from . import writers

ROWS, COLUMNS = 24, 128


def read(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    shape: tuple[int, int] = (ROWS, COLUMNS),
) -> StoredWeight:
    """The weight of a module `part`, written to a folder and read by the layout that `settings` ask for."""
    config = {"quantization_config": dict(settings)}
    stored = {f"part.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    writers.write(folder, stored, config)
    layout = quantized_layout(folder, config)
    assert layout is not None
    assert layout.modules() == ["part"]
    return layout.weight("part", shape)
