"""Shapes of every value of a graph, com.microsoft's operators included, by onnxruntime's own tool."""

import onnx_ir as ir
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from edgepeft.errors import ExportError

from ..graph import MICROSOFT

#: Initializers above this size, and vectors of floats, hold weights and are kept away from the tool.
SHAPE_BYTES = 1024


def infer_shapes(model: ir.Model) -> None:
    """Give every value of `model` the type and the (partly symbolic) shape that its inputs imply.

    Raises:
        ExportError: the graph contradicts itself, or the tool does not know an operator's shapes.
    """
    skeleton = _without_weights(model)
    try:
        # It merges two symbols that must be equal into one.
        inferred = SymbolicShapeInference.infer_shapes(ir.to_proto(skeleton), auto_merge=True)
    except Exception as error:  # asserts, and bare exceptions of several kinds
        raise ExportError(
            f"the shapes of the graph cannot be inferred ({type(error).__name__}: {error}): run "
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
        # The tool does not unpack the codes of a table; float rows have the shape that it ends up with.
        if node.op_type == "GatherBlockQuantized" and node.domain == MICROSOFT:
            _as_lookup(graph, node)
    return skeleton


def _as_lookup(graph: ir.Graph, node: ir.Node) -> None:
    scales, indices = node.inputs[2], node.inputs[1]
    assert scales is not None
    assert scales.shape is not None
    rows, blocks = scales.shape[0], scales.shape[-1]
    width = int(blocks) * node.attributes.get_int("block_size", 128)  # type: ignore[arg-type]
    table = ir.Value(name=f"{node.name}.rows", shape=ir.Shape([rows, width]), type=scales.type)
    graph.inputs.append(table)
    lookup = ir.node("Gather", [table, indices], {"axis": 0}, outputs=[ir.Value(name="")])
    output = node.outputs[0]
    name, output.name = output.name, None
    lookup.outputs[0].name = name
    output.replace_all_uses_with(lookup.outputs[0])
    graph.insert_before(node, lookup)
    graph.remove(node, safe=True)
