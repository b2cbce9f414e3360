"""Shapes of every value of a graph, com.microsoft's operators included, by onnxruntime's tool or onnx's."""

import contextlib
import tempfile

import onnx
import onnx_ir as ir
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from edgepeft.errors import ExportError

from ..graph import MICROSOFT

#: Initializers above this size, and vectors of floats, hold weights and are kept away from the tool.
SHAPE_BYTES = 1024


def infer_shapes(model: ir.Model) -> None:
    """Give every value of `model` the type and the (partly symbolic) shape that its inputs imply.

    Raises:
        ExportError: the graph contradicts itself.
    """
    skeleton = ir.to_proto(_without_weights(model))
    try:
        # It merges two symbols that must be equal into one. Where it gives up it leaves a file behind.
        with tempfile.TemporaryDirectory(prefix="edgepeft-shapes-") as scratch, contextlib.chdir(scratch):
            inferred = SymbolicShapeInference.infer_shapes(skeleton, auto_merge=True)
    except Exception as tool_error:  # asserts, and bare exceptions of several kinds
        # It knows com.microsoft's operators, but trips over some of the standard's younger ones.
        try:
            inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
        except Exception as error:
            raise ExportError(
                f"the shapes of the graph cannot be inferred ({tool_error!r}; {error!r}): run "
                "onnxruntime.tools.symbolic_shape_infer on the file to see where"
            ) from error
    known = {
        value.name: value
        for proto in (*inferred.graph.value_info, *inferred.graph.output)
        for value in [ir.from_proto(proto)]
    }
    for node in model.graph:
        for output in node.outputs:
            found = known.get(output.name)
            if found is not None and found.shape is not None:
                output.shape = ir.Shape(list(found.shape))
            if found is not None and found.dtype is not None:
                output.dtype = found.dtype


def _without_weights(model: ir.Model) -> ir.Model:
    skeleton = model.clone()
    graph = skeleton.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes > SHAPE_BYTES or (tensor.dtype.is_floating_point() and len(tensor.shape) > 0):
            graph.initializers.pop(name)
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            value.const_value = None
            graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):  # the tool does not know where the file is
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    for node in list(graph):
        if node.domain == MICROSOFT and node.op_type == "GatherBlockQuantized":
            _as_lookup(graph, node)
        elif node.domain == MICROSOFT and node.op_type in ("MatMulNBits", "MatMulBnb4"):
            _as_product(graph, node)
    return skeleton


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
