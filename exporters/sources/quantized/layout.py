"""What the layouts of quantized checkpoints have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from edgepeft.errors import ExportError

from ...quantize.table_weight import StoredWeight
from .blocks import block_size_of
from .tensors import CheckpointTensors


class Layout(ABC):
    """How the quantized modules of a checkpoint are stored.

    Args:
        tensors: of the checkpoint.
        settings: its description, `quantization_config` of config.json.

    Attributes:
        marker: the tensor that a quantized module has and no other, without the module's name.
        parts: all tensors of a quantized module that are stored in place of its weight.

    Raises:
        ExportError: the description is of a variant that is not known.
    """

    marker: str
    parts: ClassVar[frozenset[str]]

    def __init__(self, tensors: CheckpointTensors, settings: Mapping[str, Any]) -> None:
        self.tensors, self.settings = tensors, settings

    def modules(self) -> list[str]:
        """Names of the quantized modules."""
        end = f".{self.marker}"
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    def floats(self) -> list[str]:
        """Names of the tensors that belong to no quantized weight."""
        used = {f"{module}.{part}" for module in self.modules() for part in self.parts}
        return [name for name in self.tensors if name not in used]

    @abstractmethod
    def weight(self, module: str, shape: tuple[int, int]) -> StoredWeight:
        """The weight of a quantized module, whose rows are its outputs.

        Args:
            module: one of `modules()`.
            shape: of the weight, as the model has it.

        Raises:
            ExportError: tensors are missing, or are not as the description says.
        """

    def choice(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A setting that has one of the `allowed` values.

        Raises:
            ExportError: it has another.
        """
        value = self.settings.get(name, default)
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise self.unknown(f"{name} {value!r}, edgepeft reads {' and '.join(map(str, allowed))}")
        return value

    def group_size(self, module: str, columns: int) -> int:
        """Columns that share a scale, by the setting of that name, of which -1 is all of them.

        Raises:
            ExportError: it is no number of columns.
        """
        size = self.settings.get("group_size")
        if size == -1:
            return columns
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise self.unknown(f"group_size {size!r} (of {module}), expected a number of columns or -1")
        return size

    def block_size(self, module: str, groups: np.ndarray) -> int:
        """Columns of a block in the groups of a module's columns.

        Raises:
            ExportError: there are no blocks of 16 in them.
        """
        size = block_size_of(groups)
        if size is None:
            raise self.tensors.error(
                module, f"has {len(groups)} columns in groups that blocks of 16 do not divide"
            )
        return size

    def unknown(self, what: str) -> ExportError:
        """An error that says what of the description is not known."""
        return ExportError(
            f"{self.tensors.folder}: its quantization_config has {what}: export the float model that it was "
            "made of"
        )
