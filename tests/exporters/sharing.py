"""What the processes of a test run share: each trace, file and bundle is made by the first that asks for it.

Tracing takes most of an export of a tiny model, and measuring memory most of the rest.
"""

import fcntl
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch.onnx._internal._lazy_import import onnxscript_apis

from edgepeft.bundle.manifest import Manifest
from edgepeft.exporters import pipeline
from edgepeft.exporters.calibration import rounding
from edgepeft.exporters.measure import bundle as memory
from edgepeft.exporters.sources import tracing, transformers_model
from edgepeft.exporters.sources.base import Traced
from edgepeft.exporters.sources.transformers_model import Source
from edgepeft.runtime.records import Record

Make = Callable[[Path], object]
#: Settings that a trace does not depend on: where a model comes from, how its weights were drawn, what its
#: outputs are called.
_NOT_TRACED = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"),
    *("initializer_range", "initializer_factor", "init_std"),
    *("id2label", "label2id", "problem_type"),
}


class Shared:
    """Folders and files below `root`, which all processes of a run see."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str, make: Make) -> Path:
        """The file or folder `name`: `make` writes it to the path that it is given, once a run."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_name(f"{path.stem}.partial{path.suffix}")
                make(partial)
                partial.rename(path)
        return path


@contextmanager
def traces_shared(shared: Shared) -> Iterator[None]:
    """Let exports of equal models take one trace, bound to the weights of each."""
    trace = transformers_model.trace

    def trace_once(source: Source, *, with_past: bool = False) -> Traced:
        fresh: list[Traced] = []

        def make(path: Path) -> None:
            traced = trace(source, with_past=with_past)
            fresh.append(traced.copy())
            path.write_bytes(ir.to_proto(traced.model).SerializeToString())

        path = shared(f"traces/{_fingerprint(source, with_past)}.onnx", make)
        if fresh:
            return fresh[0]
        model = ir.load(path)
        return Traced(model, _weights(model.graph, source.model))

    # What torch can translate is the same each time, and it reads the source of 500 functions to list it.
    listed = functools.cache(onnxscript_apis.get_torchlib_ops)
    with (
        patch.object(transformers_model, "trace", trace_once),
        patch.object(onnxscript_apis, "get_torchlib_ops", listed),
    ):
        yield


def _weights(graph: ir.Graph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters that are inputs of a trace, laid out as the trace has them."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    turned = tracing.conv1d_weights(module)
    return {
        name: parameters[name].detach().T.contiguous() if name in turned else parameters[name].detach()
        for name in (str(value.name) for value in graph.inputs)
        if name in parameters
    }


def _fingerprint(source: Source, with_past: bool) -> str:
    """Of all that a trace depends on: modules, configuration, and every tensor but the weights' values."""
    model = source.model
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_TRACED}
    told = [
        f"{type(model)}",
        str(model),
        json.dumps(config, sort_keys=True, default=str),
        source.task,
        str(with_past),
    ]
    told += [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.named_parameters()]
    digest = hashlib.sha256("\n".join(told).encode())
    for name, value in model.named_buffers():
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


@contextmanager
def unmeasured() -> Iterator[None]:
    """Leave the memory formulas of what is exported empty."""

    def without(manifest: Manifest, folder: Path, length_unit: int) -> Manifest:
        del folder, length_unit
        return manifest

    with patch.object(pipeline, "with_memory", without):
        yield


@contextmanager
def uncalibrated() -> Iterator[None]:
    """Round language models to the nearest, as `quick` does, unless there are records: what they would write
    themselves takes longer than the rest of an export of a tiny model."""

    def with_records(source: Source, records: Sequence[Record], options: object, bits: int) -> bool:
        del source, options, bits
        return bool(records)

    with patch.object(pipeline, "is_calibrated", with_records):
        yield


@contextmanager
def calibrated() -> Iterator[None]:
    """Let what is exported be calibrated as it is by default."""
    with patch.object(pipeline, "is_calibrated", rounding.is_calibrated):
        yield


@contextmanager
def measured() -> Iterator[None]:
    """Measure the memory formulas of what is exported, where the others are left empty."""
    with patch.object(pipeline, "with_memory", memory.with_memory):
        yield
