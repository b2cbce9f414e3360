"""What the linears of somebody else's ONNX graph are called.

The module name is what PEFT calls the layer, so that PEFT's adapters fit: `model.layers.0.self_attn.q_proj`.
It is taken from the first of these that the file has:

1. the name of the weight, where it is a dotted path: `bert.pooler.dense.weight`,
   `model.layers.0.mlp.up_proj.MatMul.weight_Q4`;
2. the module scope that torch's exporter noted on the node (`pkg.torch.onnx.name_scopes`);
3. the path in the node's name: `/model/layers.0/self_attn/q_proj/MatMul`;
4. the name of the bias that is added to the product, where nothing else adds it:
   `bert.encoder.layer.0.output.dense.bias`;
5. the node's name: `node_linear_3`.

What the operator and the quantizer append (`/MatMul`, `.weight`, `_Q4`) is cut off and `/` becomes `.`. Files
of onnxruntime-genai call the attention block `attn` and pack its projections; for the families in
`SELF_ATTENTION` the name that transformers has, `self_attn`, is put back, and the parts of a packed
`qkv_proj` are the linears `q_proj`, `k_proj` and `v_proj`. Two weights that come out with the same name get
their nodes' whole names instead.
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

#: Model types of genai whose layers transformers calls `self_attn.{q,k,v,o}_proj`, `mlp.{gate,up,down}_proj`.
SELF_ATTENTION = frozenset(
    {"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "qwen2", "qwen3", "smollm3"}
)
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUANTIZED = re.compile(r"_(Q|DQ_Q)\d+$")
_OPERATOR = re.compile(r"[/.](MatMul|Gemm|MatMulNBits|Gather|GatherBlockQuantized)(_\w+)?$")


def module_names(
    products: Sequence[tuple[ir.Value, Sequence[ir.Node]]], *, genai_type: str | None = None
) -> dict[ir.Value, str]:
    """Names of the weights' modules.

    Args:
        products: every weight with the nodes that multiply by it or look it up.
        genai_type: `model.type` of the genai configuration, for a file of onnxruntime-genai.
    """
    biases = Counter(
        bias for _, nodes in products for bias in {_bias_name(node) for node in nodes} if bias is not None
    )
    names = {weight: _name(weight, nodes[0], biases) for weight, nodes in products}
    if genai_type in SELF_ATTENTION:
        names = {
            weight: re.sub(r"(\.layers\.\d+)\.attn\.", r"\1.self_attn.", name)
            for weight, name in names.items()
        }
    taken = Counter(names.values())
    for weight, nodes in products:
        if taken[names[weight]] > 1:
            names[weight] = _dotted(nodes[0].name or str(weight.name))
    return names


def added_bias(node: ir.Node) -> ir.Value | None:
    """The vector among the initializers that is added to a product: `Gemm`'s own, or an `Add`'s after it."""
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return bias if bias is not None and bias.const_value is not None else None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    vector = other is not None and other.const_value is not None and len(other.const_value.shape) == 1
    return other if vector else None


def _name(weight: ir.Value, node: ir.Node, biases: Counter[str]) -> str:
    own = _stem(weight.name or "")
    if "." in own and (weight.name or "") != own:
        return own
    scope = _scope(node)
    if scope:
        return scope
    name = node.name or ""
    if "/" in name:
        return _stem(_dotted(name))
    bias = _bias_name(node)
    if bias is not None and biases[bias] == 1:
        return bias
    return _stem(_dotted(name or weight.name or "linear"))


def _stem(name: str) -> str:
    """A name without what says that it is a weight, a product or quantized."""
    name = _QUANTIZED.sub("", name).removesuffix(".weight")
    return _OPERATOR.sub("", name)


def _scope(node: ir.Node) -> str | None:
    """The innermost module of torch's scopes, whose last entry is the operator."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return None
    return str(scopes[-2]) or None if isinstance(scopes, list) and len(scopes) > 1 else None


def _bias_name(node: ir.Node) -> str | None:
    bias = added_bias(node)
    name = "" if bias is None else bias.name or ""
    return name.removesuffix(".bias") if name.endswith(".bias") and "." in name else None


def _dotted(name: str) -> str:
    return re.sub(r"(::|[/:])+", ".", name).strip(".")
