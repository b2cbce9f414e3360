"""What follows the stages of a chain: the loss, and the cotangent of what it is given."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.wiring import VocabularyHead

from ...session import GraphSession
from ...stages import Stages

Array = npt.NDArray[np.generic]

SLICE_VALUES = 2**20
"""Weights of the output layer that are decoded at a time (4 MiB of float32)."""
_LOWEST = np.finfo(np.float32).min


def slice_rows(width: int) -> int:
    """Rows of an output layer of this width that are decoded at a time."""
    return max(SLICE_VALUES // width, 1)


class SlicedHead:
    """The output layer and the loss of a language model, a slice of the vocabulary at a time.

    Args:
        head: its wiring.
        stages: opens its graphs, and has the weights.
    """

    def __init__(self, head: VocabularyHead, stages: Stages) -> None:
        self._head, self._stages = head, stages

    def loss(self, hidden: ort.OrtValue, labels: Array) -> float:
        """The loss.

        Args:
            hidden: float32 `[batch, sequence, width]`.
            labels: int64 `[batch, sequence]`, not shifted.
        """
        return self._loss(labels, self._gathered(self._head.scan, hidden, labels, {}))[0]

    def loss_and_cotangent(self, hidden: ort.OrtValue, labels: Array) -> tuple[float, ort.OrtValue]:
        """The loss, and the cotangent of `hidden`; arguments as for `loss`."""
        nothing = {name: np.zeros(hidden.shape(), np.float32) for name in ("spread", "label_rows")}
        found = self._gathered(self._head.spread, hidden, labels, nothing)
        loss, share = self._loss(labels, found)
        graph = self._stages.session(self._head.cotangent)
        graph.bind_values({"share": share, **{name: found[name] for name in nothing}})
        cotangent = graph.run_for(["cotangent"])["cotangent"]
        graph.unbind()
        return loss, cotangent

    def _gathered(
        self, role: str, hidden: ort.OrtValue, labels: Array, begin: Mapping[str, Array]
    ) -> dict[str, ort.OrtValue]:
        """Each position's log-normalizer and the logit of its label, and what `begin` begins with."""
        positions = (*hidden.shape()[:2], 1)
        graph = self._stages.session(role)
        graph.bind({"labels": labels, **begin})
        graph.bind({"log_z": np.full(positions, _LOWEST), "picked": np.zeros(positions, np.float32)})
        graph.bind_values({"hidden": hidden})
        found: dict[str, ort.OrtValue] = {}
        names = ("log_z", "picked", *begin)
        for first, last in self._slices(hidden):
            self._bind_slice(graph, first, last)
            outputs = graph.run_for([f"{name}.out" for name in names])
            found = {name: outputs[f"{name}.out"] for name in names}
            graph.bind_values(found)
            self._stages.weights.release()
        graph.unbind()
        return found

    def _loss(self, labels: Array, found: Mapping[str, ort.OrtValue]) -> tuple[float, ort.OrtValue]:
        """The loss, and each position's share of it."""
        graph = self._stages.session(self._head.loss)
        graph.bind({"labels": labels})
        graph.bind_values({name: found[name] for name in ("log_z", "picked")})
        outputs = graph.run_for(["loss", "share"])
        graph.unbind()
        return float(outputs["loss"].numpy()), outputs["share"]

    def _slices(self, hidden: ort.OrtValue) -> list[tuple[int, int]]:
        """First and last row of each slice."""
        step = slice_rows(hidden.shape()[-1])
        return [(first, min(first + step, self._head.rows)) for first in range(0, self._head.rows, step)]

    def _bind_slice(self, session: GraphSession, first: int, last: int) -> None:
        following = min(2 * last - first, self._head.rows)
        for name, key in self._head.weights.items():
            spec = session.inputs[name]
            session.bind({name: self._stages.weights.rows(key, spec, first, last)})
            if last < following:
                self._stages.weights.prefetch_rows(key, spec, last, following)
        session.bind({"first": np.array(first, np.int64)})
