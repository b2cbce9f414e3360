"""OFT: blocks of the sizes that PEFT chooses, and what is refused, by its name."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule

import edgepeft
from edgepeft.adapters import PREFIX, Adapter, load_adapter, save_adapter
from edgepeft.errors import AdapterError, ExportError
from edgepeft.exporters.graph import new_model, tidy
from edgepeft.exporters.passes.weights.linears import Linear
from edgepeft.exporters.techniques import graph_technique
from edgepeft.exporters.techniques.base import BaseGraph, slot_inputs
from edgepeft.techniques import oft

from .. import models
from . import parity

CONFIG = {"peft_type": "OFT", "oft_block_size": 4, "r": 0}
KEY = f"{PREFIX}up.oft_R.weight"


def test_blocks_are_of_pefts_sizes() -> None:
    layer = object.__new__(OFTLayer)
    for features in range(1, 90):
        for asked in range(1, 100):
            expected = layer.adjust_oft_parameters(features, asked) if features % asked else asked
            assert oft.block_size(features, 0, asked) == expected
            assert oft.block_size(features, asked, 0) == features // expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"coft": True}, "coft=True projects the parameters in every forward pass"),
        ({"use_cayley_neumann": False}, "use_cayley_neumann=False solves a linear system"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"block_share": 1}, "block_share is 1, expected true or false"),
        ({"r": 2}, "r is 2 and oft_block_size 4, expected one of them to be 0"),
        ({"oft_block_size": 0}, "r is 0 and oft_block_size 0"),
        ({"oft_block_size": -1}, "oft_block_size is -1, expected a whole number"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms is 1, with which nothing is rotated"),
        ({"num_cayley_neumann_terms": "5"}, "num_cayley_neumann_terms is '5', expected a whole number"),
    ],
)
def test_a_configuration_is_refused_by_its_field(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=f"here: .*{message}"):
        Adapter(CONFIG | setting, {}, "here")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{PREFIX}embed.oft_embedding_R.weight", "belongs to an OFT on an embedding"),
        (f"{PREFIX}up.oft_r", "belongs to an OFT of a PEFT before 0.16"),
    ],
)
def test_a_tensor_is_refused_by_its_key(key: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter(CONFIG, {key: np.ones((2, 6), np.float32)})
    with pytest.raises(AdapterError, match="has 1 axes, expected 2"):
        Adapter(CONFIG, {KEY: np.ones(6, np.float32)})


def test_another_series_or_other_blocks_do_not_fit(tmp_path: Path) -> None:
    parity.write("oft", "bert", 32, tmp_path)
    adapter = load_adapter(tmp_path / "a")
    settings = {"num_cayley_neumann_terms": 6}, {"block_share": True}
    with edgepeft.load(tmp_path / "b") as device:
        for setting in settings:
            (name,) = setting
            other = tmp_path / name
            save_adapter(Adapter(adapter.config | setting, adapter.tensors), other)
            with pytest.raises(AdapterError, match=f"{name} is .* in the adapter, .* in this bundle"):
                device.forward(parity.batch("bert").arrays, adapter=other)


def test_what_shares_a_product_or_has_blocks_of_one_is_refused(tmp_path: Path) -> None:
    x, y = (ir.Value(name=name, shape=ir.Shape(["batch", "sequence", 96])) for name in "xy")
    product = ir.node("MatMul", [x, x], outputs=[y])
    linear = Linear("q_proj", (product,), 96, 32)
    base = BaseGraph(ir.Graph([x], [y], nodes=[product]), {}, {}, {"q_proj": linear})
    with pytest.raises(ExportError, match="linear q_proj reads what others read in the same product, so OFT"):
        graph_technique("oft").sites(base, {"q_proj": {}})
    with pytest.raises(ExportError, match="reads 64 features in blocks of one"):
        edgepeft.export(
            models.bert_classifier(), tmp_path / "b", method="oft", rank=64, targets=["key"], quick=True
        )


@pytest.mark.parametrize("terms", range(2, 9))
def test_every_number_of_terms_is_pefts(terms: int) -> None:
    """The slot's own operators, in onnxruntime, beside PEFT's series."""
    blocks, size, lead = 3, 4, ["batch", 2]
    settings = {"in_features": blocks * size, "r": blocks, "oft_block_size": 0, "block_share": False}
    slot = oft.new_slot("up", settings | {"num_cayley_neumann_terms": terms}, 3)
    x = ir.Value(name="x", shape=ir.Shape([*lead, blocks * size]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="g")
    inputs = {oft.ROTATION: slot_inputs(graph, slot)[0]}
    technique: Any = graph_technique("oft")
    delta = technique.delta(graph, slot, inputs, x)
    delta.name = "delta"
    graph.outputs.append(delta)
    model = new_model(graph)
    tidy(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((blocks, size * (size - 1) // 2), np.float32)
    given = rng.standard_normal((5, 2, blocks * size), np.float32)
    (got,) = session.run(None, {"x": given, slot.input(oft.ROTATION): weight})

    module = OFTRotationModule(
        *(blocks, weight.shape[1], size, blocks * size), num_cayley_neumann_terms=terms
    )
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        expected = module(torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(given + got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
