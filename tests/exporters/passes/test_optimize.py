"""Which rules are tried where changes nothing of what they do."""

from collections.abc import Callable
from contextlib import nullcontext

import onnx_ir as ir
import pytest
import transformers

from edgepeft.exporters.passes import optimize
from edgepeft.exporters.sources.loading import load_source

from .. import models


@pytest.mark.parametrize(
    "build", [models.bert_classifier, lambda: models.llama(tied=True)], ids=["bert", "llama"]
)
def test_a_graph_is_the_one_of_rules_that_are_tried_everywhere(
    build: Callable[[], transformers.PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = load_source(build()).trace(training=False)
    quick, whole = traced.copy().model, traced.copy().model
    optimize.optimize_forward(quick)
    monkeypatch.setattr(optimize, "_tried_where_they_may_match", nullcontext)
    optimize.optimize_forward(whole)
    assert {"SimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization"} & {
        node.op_type for node in quick.graph
    }, "nothing was fused, so nothing was compared"
    quick_bytes, whole_bytes = (
        ir.to_proto(model).SerializeToString(deterministic=True) for model in (quick, whole)
    )
    assert quick_bytes == whole_bytes
