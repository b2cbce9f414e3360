"""What the linears of somebody else's graph are called."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepeft.exporters.sources.naming import module_names

SCOPES = "pkg.torch.onnx.name_scopes"


@pytest.mark.parametrize(
    ("weight", "node", "metadata", "expected"),
    [
        ("bert.pooler.dense.weight", "/bert/other/Gemm", {}, "bert.pooler.dense"),
        ("model.layers.0.attn.o_proj.MatMul.weight_Q4", "", {}, "model.layers.0.attn.o_proj"),
        ("val_67", "node_MatMul_66", {SCOPES: "['', 'm', 'm.query', 'linear']"}, "m.query"),
        ("onnx::MatMul_7", "/model/layers.0/self_attn/q_proj/MatMul", {}, "model.layers.0.self_attn.q_proj"),
        ("onnx::MatMul_7_Q4", "/model/layers.0/mlp/up_proj/MatMul_Q4", {}, "model.layers.0.mlp.up_proj"),
        ("val_67_Q4", "node_MatMul_66_Q4", {}, "node_MatMul_66"),
        ("val_67", "node_MatMul_66", {SCOPES: "not a list"}, "node_MatMul_66"),
    ],
)
def test_names_of_modules(weight: str, node: str, metadata: dict[str, str], expected: str) -> None:
    value, product = one_product(weight, node)
    product.metadata_props.update(metadata)
    assert module_names([(value, [product])])[value] == expected


def test_names_that_come_out_the_same_are_the_nodes_whole_ones() -> None:
    first, second = one_product("a", "/layer/MatMul"), one_product("b", "/layer/MatMul_1")
    names = module_names([(first[0], [first[1]]), (second[0], [second[1]])])
    assert list(names.values()) == ["layer.MatMul", "layer.MatMul_1"]


def test_the_attention_block_of_genai_has_its_name_in_transformers() -> None:
    value, product = one_product("w", "/model/layers.3/attn/o_proj/MatMul_Q4")
    assert module_names([(value, [product])], genai_type="llama")[value] == "model.layers.3.self_attn.o_proj"
    assert module_names([(value, [product])], genai_type="phi3")[value] == "model.layers.3.attn.o_proj"


def one_product(weight: str, node: str) -> tuple[ir.Value, ir.Node]:
    value = ir.Value(name=weight, shape=ir.Shape([4, 4]), const_value=ir.tensor(np.zeros((4, 4), np.float32)))
    return value, ir.node("MatMul", [ir.Value(name="x"), value], name=node)
