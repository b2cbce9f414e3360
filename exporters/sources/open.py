"""Open what is to be exported, of whatever kind: after this nobody asks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .base import ModelSource
from .loading import load_source
from .onnx_file import converting, is_onnx_file, load_onnx_file


@contextmanager
def opened_source(
    model: Any, *, task: str | None, labels: Sequence[str] | None, seed: int
) -> Iterator[ModelSource]:
    """The model as a source, for as long as the block lasts.

    Args:
        model: as `edgepeft.export` takes it.
        task: see `ExportOptions`, as `labels` and `seed`.

    Raises:
        UsageError: unknown task, or labels that do not fit it.
        ExportError: it cannot be loaded; or something fails within the block that an ONNX file, which nobody
            has checked, is to blame for.
    """
    if not is_onnx_file(model):
        yield load_source(model, task=task, labels=labels, seed=seed)
        return
    with converting(Path(model)):
        yield load_onnx_file(Path(model), task=task, labels=labels)
