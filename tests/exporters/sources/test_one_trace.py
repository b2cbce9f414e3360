"""One trace gives a decoder's graph to generate with and its graph to train."""

import gc
from typing import Any

import onnx_ir as ir
import pytest
import torch

from edgepeft.exporters.sources import transformers_model
from edgepeft.exporters.sources.base import Traced
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.quick_trace import quick_trace
from edgepeft.exporters.sources.transformers_model import Source

from .. import models


def test_a_decoder_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph to train is a copy without the cache, for any length and with no input or size of a past."""
    trace, traced = transformers_model.trace, 0

    def counted(source: Source, **options: Any) -> Traced:
        nonlocal traced
        traced += 1
        return trace(source, **options)

    monkeypatch.setattr(transformers_model, "trace", counted)
    source = load_source(models.llama(tied=True))
    for _ in range(2):
        generating, training = (source.trace(training=each).model.graph for each in (False, True))
        assert len(generating.outputs) == 5
        assert any((value.name or "").startswith("past_key_values.") for value in generating.inputs)
        assert len(training.outputs) == 1
        axes = {
            str(dim)
            for value in (*training.inputs, *(output for node in training for output in node.outputs))
            for dim in value.shape or ()
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None
        }
        assert axes == {"batch", "sequence"}
    assert traced == 1


def test_settings_are_as_they_were_after_a_trace() -> None:
    """Also where it fails."""

    def fail() -> None:
        with quick_trace():
            assert settings() != before
            raise KeyError

    def settings() -> tuple[object, ...]:
        return gc.get_threshold(), getattr(torch.fx.config, "do_not_emit_stack_traces", None)

    before = settings()
    with pytest.raises(KeyError):
        fail()
    assert settings() == before
