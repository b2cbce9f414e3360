"""Losses as graphs: one file a loss, one row a task and problem type in `LOSSES`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from edgepeft.errors import ExportError

from ..graph import FLOAT, INT64, graph_input
from .causal_lm import causal_lm_loss
from .classification import classification_loss
from .contrastive import contrastive_loss
from .multi_label import multi_label_loss
from .regression import regression_loss
from .sequence_to_sequence import sequence_to_sequence_loss
from .token_classification import token_classification_loss

#: Axis of an input that is as long as the last axis of the output.
CLASSES = "classes"


@dataclass(frozen=True)
class LossInput:
    """An input of a loss that is no output of the model: `axes` are symbolic, but for `CLASSES`."""

    name: str
    axes: tuple[str, ...]
    dtype: ir.DataType = INT64


@dataclass(frozen=True)
class Loss:
    """A loss on one output of the forward graph.

    `function(graph, output, *values)` appends it and returns the float32 scalar; `values` are the graph
    inputs that `inputs` describe, in that order.
    """

    output: str
    function: Callable[..., ir.Value]
    inputs: tuple[LossInput, ...] = field(default=())

    def build(self, graph: ir.Graph, output: ir.Value) -> ir.Value:
        """Append the loss of `output` and its further inputs to `graph`; returns the scalar, named `loss`."""
        assert output.shape is not None
        values = [
            graph_input(
                graph,
                item.name,
                [output.shape[-1] if axis == CLASSES else axis for axis in item.axes],
                item.dtype,
            )
            for item in self.inputs
        ]
        scalar = self.function(graph, output, *values)
        scalar.name = "loss"
        return scalar


def _labels(*axes: str, dtype: ir.DataType = INT64) -> tuple[LossInput, ...]:
    return (LossInput("labels", axes, dtype),)


_SINGLE = Loss("logits", classification_loss, _labels("batch"))
_MULTI = Loss("logits", multi_label_loss, _labels("batch", CLASSES, dtype=FLOAT))
_REGRESSION = Loss("logits", regression_loss, _labels("batch", CLASSES, dtype=FLOAT))

#: By task and transformers' problem type, which is None for tasks that have only one.
LOSSES: dict[tuple[str, str | None], Loss] = {
    ("text-classification", "single_label_classification"): _SINGLE,
    ("text-classification", "multi_label_classification"): _MULTI,
    ("text-classification", "regression"): _REGRESSION,
    ("image-classification", "single_label_classification"): _SINGLE,
    ("image-classification", "multi_label_classification"): _MULTI,
    ("image-classification", "regression"): _REGRESSION,
    ("audio-classification", None): _SINGLE,
    ("token-classification", None): Loss("logits", token_classification_loss, _labels("batch", "sequence")),
    ("text-generation", None): Loss("logits", causal_lm_loss, _labels("batch", "sequence")),
    ("text2text-generation", None): Loss(
        "logits", sequence_to_sequence_loss, _labels("batch", "decoder_sequence")
    ),
    ("feature-extraction", None): Loss("sentence_embedding", contrastive_loss),
}


def loss_for(task: str, problem_type: str | None = None) -> Loss:
    """The row of a task.

    Raises:
        ExportError: the configuration names a problem type that the task does not have.
    """
    found = LOSSES.get((task, problem_type))
    if found is None:
        known = [str(problem) for name, problem in LOSSES if name == task]
        raise ExportError(
            f"the configuration's problem_type is {problem_type!r}, {task} knows {', '.join(known)}: correct "
            "it before exporting"
        )
    return found
