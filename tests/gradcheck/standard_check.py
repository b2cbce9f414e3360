"""One of the standard's node tests: its gradients by the compiler against differences in float64."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper

from edgepeft.errors import EdgePeftError, ExportError, UnsupportedOperatorError
from edgepeft.exporters.autodiff import differentiate
from edgepeft.exporters.graph import OPSET_IMPORTS, append
from edgepeft.exporters.passes.shapes.infer import infer_shapes
from edgepeft.exporters.sources.onnx_graph import lift_constants, standardize

from .harness import Array
from .widening import FLOATS, in_float64

#: Forms of a test.
AS_IS, AS_EXPORTED = "as it stands", "as exported"
#: What may come of it; `unproven`: nothing in float64 computes what onnxruntime does, or that does not run.
RIGHT, REFUSED, UNPROVEN = "right", "refused", "unproven"
WRONG, NOT_RUN, FALSE_SHAPE, ERROR = "wrong", "does not run", "false shape", "error"
FAULTS = (WRONG, NOT_RUN, FALSE_SHAPE, ERROR)
#: Elements of an input that are moved at most; where one evaluation takes long, so many fewer.
MOVED, ELEMENTS = 16, 200_000
STEP = 1e-5
TOLERANCES = {"float64": 1e-5, "float32": 2e-3, "float16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a test, and why."""

    outcome: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Standard:
    """A node test: its model, its inputs by name and its outputs."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, Any]
    outputs: list[Any]

    @property
    def floats(self) -> list[str]:
        """The inputs that may have a gradient."""
        kinds = {value.name: value.type.tensor_type.elem_type for value in self.model.graph.input}
        return [name for name in self.inputs if kinds[name] in FLOATS]


def check(case: Standard, form: str) -> Verdict:
    """Differentiate one test in one form and compare.

    What is no error of the project's own is told as `ERROR`.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return _Check(case, form).verdict()
        except EdgePeftError as error:
            return Verdict(REFUSED, str(error).strip().splitlines()[-1])
        except Exception as error:
            return Verdict(ERROR, f"{type(error).__name__}: {str(error)[:300]}")


class _Check:
    """One test in one form, its model as the exporter reads it."""

    def __init__(self, case: Standard, form: str) -> None:
        self._case, self._form = case, form
        rng = np.random.default_rng(7)
        self._weights = [
            rng.uniform(0.5, 1.5, np.shape(y)) * rng.choice([-1, 1], np.shape(y)) * np.isfinite(y)
            if isinstance(y, np.ndarray) and y.dtype.name in TOLERANCES
            else None
            for y in case.outputs
        ]

        floats = [case.inputs[name] for name in case.floats]
        floats += [y for y, weights in zip(case.outputs, self._weights, strict=True) if weights is not None]
        self._tolerance = max(TOLERANCES[array.dtype.name] for array in floats)
        self._model = self._read()

    def verdict(self) -> Verdict:
        case = self._case
        refusals = []
        wanted, silent = [], []
        for name in case.floats:
            try:
                self._differentiated([name])
            except UnsupportedOperatorError as error:
                refusals.append(str(error).splitlines()[1].strip())
            except ExportError as error:
                if "does not influence" not in str(error):
                    raise
                silent.append(name)
            else:
                wanted.append(name)
        if not wanted and not silent:
            return Verdict(REFUSED, refusals[0])
        try:
            if not self._agrees(_run(case.model, case.inputs)):
                return Verdict(UNPROVEN, "onnxruntime computes something else than the standard")
        except Exception as error:
            return Verdict(UNPROVEN, f"onnxruntime does not run it: {' '.join(str(error).split())[:200]}")
        gradients: dict[str, Array] = {}
        model = self._model
        if wanted:
            model = self._differentiated(wanted)
            try:
                value, *found = _run(model, case.inputs)
            except Exception as error:
                return Verdict(NOT_RUN, " ".join(str(error).split())[:300])
            gradients = dict(zip(wanted, found, strict=True))
            if fault := self._other_loss(float(value)):
                return Verdict(WRONG, fault)
        if fault := self._false_shape(model):
            return Verdict(FALSE_SHAPE, fault)
        loss = self._loss()
        if loss is None:
            return Verdict(UNPROVEN, "nothing computes it in float64")
        for name in (*wanted, *silent):
            if fault := self._difference(loss, name, gradients.get(name)):
                return Verdict(WRONG, f"{name}: {fault}")
        if not wanted:
            return Verdict(RIGHT, "no gradient")
        return Verdict(RIGHT, f"refused for others: {refusals[0]}" if refusals else "")

    def _read(self) -> ir.Model:
        """The test's model as the exporter reads it."""
        case, proto = self._case, onnx.ModelProto()
        proto.CopyFrom(case.model)
        _older(proto)
        if self._form == AS_EXPORTED:
            _as_exported(proto, case)
        model = ir.from_proto(proto)
        if model.graph.opset_imports.get("", 0) > OPSET_IMPORTS[""]:  # a file may not have it
            lift_constants(model)
            infer_shapes(model)
            return model
        return standardize(model, Path(f"{case.name}.onnx"))[0]

    def _differentiated(self, wanted: Sequence[str]) -> ir.Model:
        """The model with a loss and gradients as its outputs."""
        model = self._model.clone()
        graph = model.graph
        terms = []
        for value, weights in zip(list(graph.outputs), self._weights, strict=True):
            if weights is None:
                continue
            assert value.dtype is not None
            tensor = ir.tensor(weights.astype(value.dtype.numpy()), name=f"loss.{value.name}")
            weight = ir.Value(
                name=tensor.name,
                shape=ir.Shape(weights.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            graph.register_initializer(weight)
            scaled = append(graph, "Mul", [value, weight], shape=value.shape, dtype=value.dtype)
            total = append(graph, "ReduceSum", [scaled], {"keepdims": 0}, shape=[], dtype=value.dtype)
            if value.dtype != ir.DataType.DOUBLE:
                total = append(
                    graph, "Cast", [total], {"to": ir.DataType.DOUBLE}, shape=[], dtype=ir.DataType.DOUBLE
                )
            terms.append(total)
        loss = terms[0]
        for term in terms[1:]:
            loss = append(graph, "Add", [loss, term], shape=[], dtype=ir.DataType.DOUBLE)
        inputs = {value.name: value for value in graph.inputs}
        cotangents = differentiate(graph, loss, [inputs[name] for name in wanted])
        graph.outputs[:] = [loss]
        for name in wanted:
            gradient = cotangents[inputs[name]]
            output = append(graph, "Identity", [gradient], shape=gradient.shape, dtype=gradient.dtype)
            output.name = f"gradient of {name}"
            graph.outputs.append(output)
        return model

    def _agrees(self, outputs: Sequence[Any]) -> bool:
        """Whether these are the outputs that the standard's are, as far as they are floats."""
        for got, expected in zip(outputs, self._case.outputs, strict=True):
            if isinstance(expected, np.ndarray) and expected.dtype.name in TOLERANCES:
                if got.shape != expected.shape:
                    return False
                scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
                loose = 1e-2 if expected.dtype == np.float16 else 1e-3
                if not np.allclose(got, expected, rtol=0, atol=loose * scale, equal_nan=True):
                    return False
        return True

    def _other_loss(self, value: float) -> str | None:
        """How the loss of the joint graph differs from that of the test's own outputs."""
        terms = [
            np.where(weights == 0, 0, y.astype(np.float64)) * weights
            for y, weights in zip(self._case.outputs, self._weights, strict=True)
            if weights is not None
        ]
        expected = float(sum(term.sum() for term in terms))
        scale = max(1.0, float(sum(np.abs(term).sum() for term in terms)))
        if not np.isfinite(value) and any(
            (weights == 0).any() for weights in self._weights if weights is not None
        ):
            return None  # an output that is infinite is, times 0, no number
        return (
            None
            if abs(value - expected) <= self._tolerance * scale
            else f"its loss is {value:.6g}, expected {expected:.6g}"
        )

    def _false_shape(self, model: ir.Model) -> str | None:
        """A value whose declared shape is not the one that it has."""
        graph = model.graph
        declared = {
            output.name or "": output.shape
            for node in graph
            for output in node.outputs
            if output.shape is not None and output.name and isinstance(output.type, ir.TensorType)
        }
        proto = ir.to_proto(model)
        del proto.graph.output[:]
        for name in declared:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
        for value in proto.graph.value_info:
            value.type.tensor_type.ClearField("shape")
        try:
            arrays = _run(proto, self._case.inputs)
        except Exception:  # it ran with its own outputs
            return None
        for (name, shape), array in zip(declared.items(), arrays, strict=True):
            sizes = list(np.shape(array))
            if len(sizes) != len(shape) or any(
                isinstance(dim, int) and dim != size for dim, size in zip(shape, sizes, strict=True)
            ):
                return f"{name}: declared {shape}, is {sizes}"
        return None

    def _loss(self) -> Callable[[dict[str, Any]], float] | None:
        """The loss in float64, or None where nothing computes what the test expects."""
        evaluate = in_float64(self._case.model)

        def loss(inputs: dict[str, Any]) -> float:
            outputs = evaluate(inputs)
            total = 0.0
            for y, weights in zip(outputs, self._weights, strict=True):
                if weights is not None:
                    # Where the shape depends on the values (Range), it may be another there.
                    same = y.shape == weights.shape
                    total += float((np.where(weights == 0, 0, y) * weights).sum()) if same else np.nan
            return total

        try:
            outputs = evaluate(self._case.inputs)
        except Exception:
            return None
        return loss if self._agrees(outputs) else None

    def _difference(
        self, loss: Callable[[dict[str, Any]], float], name: str, gradient: Array | None
    ) -> str | None:
        """Where a gradient, zero where None, is another than the differences say; None where nowhere.

        At a kink any value between the slopes of both sides will do, at a jump any number.
        """
        base = self._case.inputs[name]
        got = np.zeros(base.shape) if gradient is None else np.asarray(gradient, np.float64)
        if got.shape != base.shape:
            return f"has shape {list(got.shape)}, expected {list(base.shape)}"
        start = base.astype(np.float64)
        places = list(np.ndindex(base.shape))
        most = max(2, min(MOVED, ELEMENTS // max(base.size, 1)))
        if len(places) > most:
            drawn = np.random.default_rng(3).choice(len(places), most, replace=False)
            places = [places[i] for i in drawn]

        def slopes(place: tuple[int, ...], step: float) -> tuple[float, float]:
            values = []
            for move in (-step, 0.0, step):
                moved = start.copy()
                moved[place] += move
                values.append(loss({**self._case.inputs, name: moved}))
            return (values[1] - values[0]) / step, (values[2] - values[1]) / step

        found = {place: slopes(place, STEP * max(1.0, abs(start[place]))) for place in places}
        scale = max([1e-2, *(abs(sum(pair)) / 2 for pair in found.values() if np.isfinite(pair).all())])
        tolerance = self._tolerance * scale
        for place, (left, right) in found.items():
            if not np.isfinite(start[place]) or not np.isfinite([left, right]).all():
                continue
            low, high = min(left, right) - tolerance, max(left, right) + tolerance
            if low <= got[place] <= high:
                continue
            fine = slopes(place, STEP / 10 * max(1.0, abs(start[place])))
            if abs(sum(fine) - left - right) > tolerance and np.isfinite(got[place]):
                continue
            return f"is {got[place]:.6g} at {list(place)}, the differences say {left:.6g} and {right:.6g}"
        return None


def _as_exported(proto: onnx.ModelProto, case: Standard) -> None:
    """Symbolic axes, and inputs of other types as constants."""
    proto.ir_version = max(proto.ir_version, 8)  # before 4 a constant had to be an input as well
    for value in list(proto.graph.input):
        array = case.inputs.get(value.name)
        if value.name in case.floats:
            _name_axes(value)
        elif isinstance(array, np.ndarray) and array.dtype.kind in "iub":
            proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
            proto.graph.input.remove(value)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")


def _name_axes(value: onnx.ValueInfoProto) -> None:
    """Symbolic axes; those of one size have one name."""
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_value > 1:
            dim.dim_param = f"axis_{dim.dim_value}"


def _older(proto: onnx.ModelProto) -> None:
    """Give a model of a later opset than a bundle's that one, where it is valid there too: many operators
    have had only types added since."""
    target = OPSET_IMPORTS[""]
    for entry in proto.opset_import:
        if not entry.domain and entry.version > target:
            later, entry.version = entry.version, target
            try:
                onnx.checker.check_model(proto, full_check=True)
            except Exception:
                entry.version = later


def _run(model: ir.Model | onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, disabled_optimizers=["ConstantFolding"]
    )
    names = {item.name for item in session.get_inputs()}
    given = {name: value for name, value in feeds.items() if name in names}
    for item in session.get_inputs():
        if item.type == "tensor(float)":  # a file that computes in 16 bits is read as one of 32
            given[item.name] = np.asarray(given[item.name], np.float32)
    return list(session.run(None, given))
