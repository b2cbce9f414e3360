"""Losses as graphs: one file a loss, one row a task and problem type in `LOSSES`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from edgepeft.errors import ExportError, UsageError

from ..graph import FLOAT, INT64, append, graph_input
from .causal_lm import causal_lm_loss
from .classification import classification_loss
from .contrastive import contrastive_loss
from .distillation import drift, labelled
from .multi_label import multi_label_loss
from .regression import regression_loss
from .sequence_to_sequence import sequence_to_sequence_loss
from .token_classification import token_classification_loss
from .triplet import triplet_loss

#: Axis of an input that is as long as the last axis of the output.
CLASSES = "classes"
#: Axes of an input that has the output's shape.
LIKE_OUTPUT = ("like the output",)


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
        present = {value.name: value for value in graph.inputs}
        values = [present.get(item.name) or self._input(graph, item, output.shape) for item in self.inputs]
        scalar = self.function(graph, output, *values)
        scalar.name = "loss"
        return scalar

    @staticmethod
    def _input(graph: ir.Graph, item: LossInput, output: ir.Shape) -> ir.Value:
        axes = list(output) if item.axes == LIKE_OUTPUT else item.axes
        return graph_input(
            graph, item.name, [output[-1] if axis == CLASSES else axis for axis in axes], item.dtype
        )


def _labels(*axes: str, dtype: ir.DataType = INT64) -> tuple[LossInput, ...]:
    return (LossInput("labels", axes, dtype),)


_SINGLE = Loss("logits", classification_loss, _labels("batch"))
_MULTI = Loss("logits", multi_label_loss, _labels("batch", CLASSES, dtype=FLOAT))
_REGRESSION = Loss("logits", regression_loss, _labels("batch", CLASSES, dtype=FLOAT))

#: By task and transformers' problem type, which is None for tasks that have only one; or by task and the name
#: of a loss that is asked for.
LOSSES: dict[tuple[str, str | None], Loss] = {
    ("text-classification", "single_label_classification"): _SINGLE,
    ("text-classification", "multi_label_classification"): _MULTI,
    ("text-classification", "regression"): _REGRESSION,
    ("image-classification", "single_label_classification"): _SINGLE,
    ("image-classification", "multi_label_classification"): _MULTI,
    ("image-classification", "regression"): _REGRESSION,
    ("audio-classification", None): _SINGLE,
    ("token-classification", None): Loss("logits", token_classification_loss, _labels("batch", "sequence")),
    ("fill-mask", None): Loss("logits", token_classification_loss, _labels("batch", "sequence")),
    ("text-generation", None): Loss("logits", causal_lm_loss, _labels("batch", "sequence")),
    ("text2text-generation", None): Loss(
        "logits", sequence_to_sequence_loss, _labels("batch", "decoder_sequence")
    ),
    ("feature-extraction", None): Loss("sentence_embedding", contrastive_loss),
    ("feature-extraction", "triplet"): Loss("sentence_embedding", triplet_loss),
}


#: Losses that have a name of their own, by name: the task they belong to.
NAMED = {"triplet": "feature-extraction"}


def loss_for(task: str, problem_type: str | None = None, name: str | None = None) -> Loss:
    """The row of a task.

    Args:
        name: of a loss other than the task's own.

    Raises:
        ExportError: the configuration names a problem type that the task does not have.
        UsageError: the task has no loss of that name.
    """
    if name is not None:
        chosen = LOSSES.get((task, name)) if name in NAMED else None
        if chosen is None:
            named = ", ".join(f"{loss} ({of})" for loss, of in NAMED.items())
            raise UsageError(f"{task} has no loss {name!r}; there are, beside each task's own: {named}")
        return chosen
    found = LOSSES.get((task, problem_type))
    if found is None:
        known = [str(problem) for name, problem in LOSSES if name == task]
        raise ExportError(
            f"the configuration's problem_type is {problem_type!r}, {task} knows {', '.join(known)}: correct "
            "it before exporting"
        )
    return found


def with_drift(loss: Loss, lead: tuple[str, ...]) -> Loss:
    """`loss` and how far the logits have drifted from the base model's, times a weight.

    Takes `base_logits`, the output without an adapter, and `drift_weight` float32 `[]`. Positions that count
    are those that are attended to, or of an encoder-decoder those that are labelled.

    Args:
        lead: the output's axes but the last.

    Raises:
        UsageError: the loss is not one of logits.
    """
    if loss.output != "logits":
        raise UsageError(f"a drift penalty compares logits, this loss is one of {loss.output}")
    base = (LossInput("base_logits", LIKE_OUTPUT, FLOAT), LossInput("drift_weight", (), FLOAT))
    mask: tuple[LossInput, ...] = ()
    if lead == ("batch", "sequence"):
        mask = (LossInput("attention_mask", lead),)

    def function(graph: ir.Graph, output: ir.Value, *values: ir.Value) -> ir.Value:
        own, (base_logits, weight, *masks) = values[: len(loss.inputs)], values[len(loss.inputs) :]
        counted = masks[0] if masks else None
        if counted is None and len(lead) > 1:
            counted = labelled(graph, own[0])
        penalty = append(graph, "Mul", [drift(graph, output, base_logits, counted), weight], shape=[])
        return append(graph, "Add", [loss.function(graph, output, *own), penalty], shape=[])

    return Loss(loss.output, function, (*loss.inputs, *base, *mask))
