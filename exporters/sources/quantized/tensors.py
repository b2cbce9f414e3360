"""The tensors of a checkpoint's safetensors files, each read when it is asked for, and as it is expected."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from edgepeft.errors import ExportError

from ..model_files import read_json

INDEX = "model.safetensors.index.json"
#: What scales are stored as.
FLOATS = ("F16", "BF16", "F32")
_REMEDY = "compare the folder with where it came from, or export the float model that it was made of"


@dataclass(frozen=True)
class _Place:
    """Where a tensor is, and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class CheckpointTensors:
    """The tensors of a folder by name; only the headers of its files are read at once.

    Args:
        folder: holds `*.safetensors`, all of those that the index names where there is one.

    Attributes:
        metadata: what the files' headers note besides.

    Raises:
        ExportError: there are none, or one is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        index = read_json(str(folder), INDEX)
        named = (index or {}).get("weight_map")
        if index is not None and not (
            isinstance(named, dict) and all(isinstance(name, str) for name in named.values())
        ):
            raise self.error(INDEX, "has no weight_map")
        files = sorted({folder / name for name in named.values()} if named else self._unindexed(folder))
        if not files:
            raise self.error("*.safetensors", "are not there, and other files of weights are not read")
        for file in files:
            if file.parent != folder:
                raise self.error(INDEX, f"names {file.name!r} outside the folder")
            if not file.is_file():
                raise self.error(file.name, "is not there")
            self._note(file)

    @staticmethod
    def _unindexed(folder: Path) -> list[Path]:
        """Mistral's folders hold the same weights by other names, too."""
        file = folder / "model.safetensors"
        return [file] if file.is_file() else list(folder.glob("*.safetensors"))

    def _note(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                self.metadata |= file.metadata() or {}
                for name in list(file.keys()):
                    part = file.get_slice(name)
                    self._places[name] = _Place(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise self.error(path.name, f"cannot be read ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def dtype(self, name: str) -> str:
        """What a tensor is stored as, as safetensors writes it (`BF16`)."""
        return self._places[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
            ExportError: there is no such tensor.
        """
        if name not in self._places:
            raise self.error(name, "is not there")
        return self._places[name].shape

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored.

        Raises:
            ExportError: there is no such tensor, or it cannot be read.
        """
        self.shape(name)
        try:
            with safe_open(self._places[name].file, "pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise self.error(name, f"cannot be read ({error})") from error

    def array(self, name: str, dtypes: Sequence[str], shape: Sequence[int]) -> np.ndarray:
        """A tensor of one of `dtypes` and of `shape`, bfloat16 as float32, which numpy has not.

        Raises:
            ExportError: there is none such.
        """
        got = self.shape(name)
        if self.dtype(name) not in dtypes:
            raise self.error(name, f"is stored as {self.dtype(name)}, expected {' or '.join(dtypes)}")
        if got != tuple(shape):
            raise self.error(name, f"has the shape {list(got)}, expected {list(shape)}")
        tensor = self.read(name)
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def json_object(self, name: str) -> dict[str, object]:
        """The JSON object whose bytes a tensor holds.

        Raises:
            ExportError: it holds none.
        """
        try:
            found = json.loads(self.read(name).numpy().tobytes())
        except (ValueError, RecursionError) as error:
            raise self.error(name, f"is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise self.error(name, "is no JSON object")
        return found

    def error(self, name: str, reason: str) -> ExportError:
        """An error that says what is wrong with a tensor or file."""
        return ExportError(f"{self.folder}: {name} {reason}: {_REMEDY}")
