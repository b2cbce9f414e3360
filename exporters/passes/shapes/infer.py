"""Shapes of every value of a graph, com.microsoft's operators included, and what runs say of them.

onnx's inference goes by the standard, but knows none of com.microsoft's operators, nor that the `-1` of a
`Reshape` is the length. onnxruntime's tool computes with symbols and knows both, but declares sizes that no
run has, fixed ones among them. What the two say is taken where two runs at different sizes agree with it. A
graph that does not run without its weights gets onnx's shapes, and the tool's where onnx has none.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from edgepeft.errors import ExportError
from edgepeft.files import temporary_folder

from ...graph import MICROSOFT
from ..drop_cache import is_cache

#: Initializers above this size, and vectors of floats, hold weights and are kept away from the tools.
SHAPE_BYTES = 1024
#: Batch, tokens and cached tokens of the two runs; any other axis has a size of its own from the last on.
_RUNS = ((2, 3, 5, 6), (3, 7, 4, 9))
_TOKENS = ("input_ids", "token_type_ids", "position_ids")

Dims = list[int | str | None]


def infer_shapes(model: ir.Model) -> None:
    """Give every value of `model` the type and the (partly symbolic) shape that its inputs imply.

    Raises:
        ExportError: the graph contradicts itself.
    """
    bare = _without_weights(model)
    skeleton = bare.clone()
    _stand_in(skeleton.graph)
    proto = ir.to_proto(skeleton)
    by_onnx, error = _told(lambda: onnx.shape_inference.infer_shapes(proto, data_prop=True))
    by_tool, tool_error = _told(lambda: _by_tool(proto))
    if error is not None and tool_error is not None:
        raise ExportError(
            f"the shapes of the graph cannot be inferred ({tool_error!r}; {error!r}): run "
            "onnxruntime.tools.symbolic_shape_infer on the file to see where"
        ) from error
    found = _Found(bare)
    for node in model.graph:
        for output in node.outputs:
            told = [known[output.name] for known in (by_onnx, by_tool) if output.name in known]
            claims = [dims for value in told if (dims := _dims(value)) is not None]
            output.shape = found.shape(output.name, claims)
            dtype = next((value.dtype for value in told if value.dtype is not None), None)
            if dtype is not None:
                output.dtype = dtype


def _told(infer: Callable[[], onnx.ModelProto]) -> tuple[dict[str | None, ir.Value], Exception | None]:
    """What a tool says of values, by name."""
    try:
        graph = infer().graph
    except Exception as error:  # asserts, and bare exceptions of several kinds
        return {}, error
    values = [ir.from_proto(proto) for proto in (*graph.value_info, *graph.output)]
    return {value.name: value for value in values}, None


def _by_tool(proto: onnx.ModelProto) -> onnx.ModelProto:
    # It merges two symbols that must be equal into one. Where it gives up it leaves a file behind, and it
    # prints what it cannot decide.
    with (
        temporary_folder() as scratch,
        contextlib.chdir(scratch),
        contextlib.redirect_stdout(None),
    ):
        inferred: onnx.ModelProto = SymbolicShapeInference.infer_shapes(proto, auto_merge=True)
    return inferred


def _dims(value: ir.Value) -> Dims | None:
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


class _Found:
    """Shapes that were told, checked against those of runs.

    Args:
        bare: the graph, its weights inputs.
    """

    def __init__(self, bare: ir.Model) -> None:
        runs = [_run(bare, *sizes) for sizes in _RUNS]
        self._runs = [run for run in runs if run is not None] if None not in runs else []
        #: By symbol, its size in each run; a symbol of no input is what it is where it is met first.
        self._symbols: dict[str, tuple[int, ...]] = {}
        for value in bare.graph.inputs if self._runs else ():
            for dim, *sizes in zip(_dims(value) or (), *(run[value.name] for run in self._runs), strict=True):
                if isinstance(dim, str):
                    self._symbols.setdefault(dim, tuple(sizes))
        self._of_inputs = set(self._symbols)

    def shape(self, name: str | None, told: Sequence[Dims]) -> ir.Shape | None:
        """Of what is told of a value what holds in the runs, or what is told first where there are none."""
        if not self._runs:
            return ir.Shape(told[0]) if told else None
        sizes = [run.get(name) for run in self._runs]
        told = [claim for claim in told if all(run is not None and len(run) == len(claim) for run in sizes)]
        if not told:  # a rank may come from the runs' own data
            return None
        dims: Dims = []
        for axis, in_runs in enumerate(zip(*(run for run in sizes if run is not None), strict=True)):
            claims = [claim[axis] for claim in told]
            dims.append(
                next((dim for dim in sorted(claims, key=self._rank) if self._holds(dim, in_runs)), None)
            )
        return ir.Shape(dims)

    def _rank(self, dim: int | str | None) -> int:
        """Numbers first, then sizes of inputs."""
        return 0 if isinstance(dim, int) else 1 if dim in self._of_inputs else 2

    def _holds(self, dim: int | str | None, in_runs: tuple[int, ...]) -> bool:
        if isinstance(dim, str):
            return self._symbols.setdefault(dim, in_runs) == in_runs
        return dim is not None and set(in_runs) == {dim}


def _run(
    bare: ir.Model, batch: int, tokens: int, cached: int, other: int
) -> dict[str | None, tuple[int, ...]] | None:
    """The sizes of all values, inputs among them, in a run at such sizes; None where it does not run."""
    has_cache = any(is_cache(value) for value in bare.graph.inputs)
    meant: dict[str | None, tuple[int | None, ...]] = dict.fromkeys(_TOKENS, (batch, tokens))
    meant["attention_mask"] = batch, tokens + cached * has_cache
    named: dict[str, int] = {}
    feeds: dict[str, np.ndarray] = {}
    for value in bare.graph.inputs:
        known = (batch, None, cached, None) if is_cache(value) else meant.get(value.name, ())
        shape = []
        for dim, size in itertools.zip_longest(_dims(value) or (), known):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            other += size is None
            shape.append(named.setdefault(dim or f"unnamed {len(named)}", other if size is None else size))
        assert value.dtype is not None
        fill = np.ones if value.name == "attention_mask" else np.zeros  # weights are never touched
        feeds[value.name or ""] = fill(shape, value.dtype.numpy())
    whole = bare.clone()
    for node in whole.graph:
        for output in node.outputs:
            output.shape = None
    names = [output.name for node in whole.graph for output in node.outputs if output.name]
    proto = ir.to_proto(whole)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        arrays = session.run(names, feeds)
    except Exception:  # of several kinds: whether it runs is what is asked
        return None
    found = dict(zip(names, arrays, strict=True)) | feeds
    return {name: array.shape for name, array in found.items() if isinstance(array, np.ndarray)}


def _without_weights(model: ir.Model) -> ir.Model:
    """A copy of `model` with its weights as inputs."""
    bare = model.clone()
    graph = bare.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        is_large = tensor.nbytes > SHAPE_BYTES or (tensor.dtype.is_floating_point() and len(tensor.shape) > 0)
        if is_large and tensor.dtype.numpy().isbuiltin == 1:  # others numpy cannot feed
            graph.initializers.pop(name)
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            value.const_value = None
            graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):  # the tool does not know where the file is
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    return bare


def _stand_in(graph: ir.Graph) -> None:
    """Put float operators in the place of quantized ones, which neither tool knows."""
    for node in list(graph):
        if node.domain == MICROSOFT and node.op_type == "GatherBlockQuantized":
            _as_lookup(graph, node)
        elif node.domain == MICROSOFT and node.op_type in ("MatMulNBits", "MatMulBnb4"):
            _as_product(graph, node)


def _as_lookup(graph: ir.Graph, node: ir.Node) -> None:
    """Float rows have the shape that quantized ones end up with."""
    scales, indices = node.inputs[2], node.inputs[1]
    assert scales is not None
    assert scales.shape is not None
    rows, blocks = scales.shape[0], scales.shape[-1]
    width = int(blocks) * node.attributes.get_int("block_size", 128)  # type: ignore[arg-type]
    table = ir.Value(name=f"{node.name}.rows", shape=ir.Shape([rows, width]), type=scales.type)
    graph.inputs.append(table)
    _replace(graph, node, ir.node("Gather", [table, indices], {"axis": 0}))


def _as_product(graph: ir.Graph, node: ir.Node) -> None:
    """A float weight gives the shape that a quantized one gives."""
    scales = node.inputs[2]
    assert scales is not None
    sizes = [node.attributes["K"].as_int(), node.attributes["N"].as_int()]
    weight = ir.Value(name=f"{node.name}.weight", shape=ir.Shape(sizes), type=scales.type)
    graph.inputs.append(weight)
    _replace(graph, node, ir.node("MatMul", [node.inputs[0], weight]))


def _replace(graph: ir.Graph, node: ir.Node, stand_in: ir.Node) -> None:
    old, new = node.outputs[0], stand_in.outputs[0]
    name, old.name = old.name, None
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.insert_before(node, stand_in)
    graph.remove(node, safe=True)
