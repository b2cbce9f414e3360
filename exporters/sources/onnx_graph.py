"""Read an ONNX file that somebody else wrote, and bring it to the form that the passes expect."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from onnxscript import version_converter

from edgepeft.errors import ExportError

from ..graph import IR_VERSION, OPSET_IMPORTS
from ..passes.shapes.infer import infer_shapes
from ..passes.weights.widen_floats import drop_idle_casts, widen_floats

#: The oldest opset that onnxscript's converter starts from; onnx's own goes up to it.
_OLDEST = 18
_NOT_YET_STANDARD = ("LayerNormalization", "SimplifiedLayerNormalization")
_ASIDE = "edgepeft.aside"


def read_graph(path: Path) -> ir.Model:
    """The model in `path`, its weights mapped from the file and from external data in the same folder.

    Raises:
        ExportError: the file is no ONNX model, or its external data is missing, cut off or elsewhere.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise several kinds, some of them bare
        raise ExportError(f"{path}: cannot be read as an ONNX model: {error}") from error
    for tensor in _external_tensors(model):
        _check_external(path, tensor)
    return model


def standardize(model: ir.Model, path: Path) -> tuple[ir.Model, bool]:
    """Bring a model to the opset of a bundle, without functions, with its constants as initializers and with
    the shapes of all values, in float32.

    Returns:
        The model, and whether it computed in 16 bits.

    Raises:
        ExportError: the model cannot be converted, or its shapes cannot be inferred.
    """
    with _quiet():
        InlinePass()(model)
        model = _at_opset(model, path)
    lift_constants(model)
    widened = widen_floats(model)
    infer_shapes(model)
    if widened:
        drop_idle_casts(model.graph)
    return model, widened


def lift_constants(model: ir.Model) -> None:
    """Make the constants of a model initializers, of different names, and leave out what nothing uses."""
    with _quiet():
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        RemoveInitializersFromInputsPass()(model)
        IdentityEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        NameFixPass()(model)
        TopologicalSortPass()(model)  # onnxruntime's converter to float16 appends its casts


def _at_opset(model: ir.Model, path: Path) -> ir.Model:
    target, opset = OPSET_IMPORTS[""], model.graph.opset_imports.get("", 0)
    if opset > target:
        raise ExportError(
            f"{path}: uses opset {opset}, bundles use {target}: write the file with opset {target} or older"
        )
    try:
        if opset < _OLDEST:
            model = _at_oldest(model)
            ir.external_data.set_base_dir(model.graph, path.parent)
        if opset < target:
            version_converter.convert_version(model, target)
    except Exception as error:  # the converters raise bare exceptions
        raise _unconverted(path, opset, str(error)) from error
    if model.graph.opset_imports.get("") != target:
        raise _unconverted(path, opset, f"the converter stopped at {model.graph.opset_imports.get('')}")
    for node in model.graph:
        node.version = None
    model.ir_version = IR_VERSION
    return model


def _at_oldest(model: ir.Model) -> ir.Model:
    """Convert to `_OLDEST` with onnx's own converter, which goes by the standard.

    onnxruntime has normalizations in the standard's domain before the standard has them, and its optimizer
    writes them at any opset; the converter passes over them in another domain.
    """
    graph = model.graph
    aside = [node for node in graph if not node.domain and node.op_type in _NOT_YET_STANDARD]
    for node in aside:
        node.domain = _ASIDE
    graph.opset_imports[_ASIDE] = 1
    converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), _OLDEST))
    for node in converted.graph:
        if node.domain == _ASIDE:
            node.domain = ""
    del converted.graph.opset_imports[_ASIDE]
    return converted


def _unconverted(path: Path, opset: int, reason: str) -> ExportError:
    target = OPSET_IMPORTS[""]
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return ExportError(
        f"{path}: cannot be converted from opset {opset} to {target} ({first}): export the model with opset "
        f"{_OLDEST} or newer"
    )


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    tensors = [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    for graph in model.graphs():
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    tensors.append(attribute.as_tensor())
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    location = PurePosixPath(str(tensor.location))
    folder = path.parent.resolve()
    data = (folder / location).resolve()
    if location.is_absolute() or ".." in location.parts or not data.is_relative_to(folder):
        raise ExportError(
            f"{path}: the data of {tensor.name!r} is in {str(location)!r}, outside the file's folder: put it "
            "beside the file"
        )
    if not data.is_file():
        raise ExportError(f"{path}: the data of {tensor.name!r} should be in {data.name!r}, which is missing")
    offset, length = tensor.offset or 0, tensor.length
    end_bytes = offset + tensor.nbytes
    if offset < 0 or end_bytes > data.stat().st_size or (length is not None and length != tensor.nbytes):
        raise ExportError(
            f"{path}: the data of {tensor.name!r} ends at byte {end_bytes:,} of {data.name!r}, which has "
            f"{data.stat().st_size:,} B: copy the file again"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converters' deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
