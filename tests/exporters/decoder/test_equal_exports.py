"""Equal exports are equal files: no graph depends on where Python's objects lie in memory."""

import onnx_ir as ir
import pytest

from edgepeft.exporters.forward import build_forward
from edgepeft.exporters.quantize.freeze import Freezer
from edgepeft.exporters.sources.loading import load_source

from .. import zoo


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_a_decoder_is_the_same_graph_each_time(family: str) -> None:
    """Gemma's was not: a node's two inputs were made flat in the order of a set."""
    source = load_source(zoo.build(family))

    def built() -> dict[str, bytes]:
        decoder = build_forward(source, Freezer(4, zoo.BLOCK_SIZE), modules=None).decoder
        assert decoder is not None
        return {
            role: ir.to_proto(model).graph.SerializeToString(deterministic=True)
            for role, model in decoder.graphs.items()
        }

    first = built()
    kept = [built() for _ in range(3)]  # each at other places than the one before
    assert all(other == first for other in kept)
