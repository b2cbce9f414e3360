"""What follows the stages of a chain: the loss, and the cotangent of what it is given."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.manifest import VocabularyHead
from edgepeft.runtime.memory.weights import MappedWeights
from edgepeft.runtime.session import GraphSession

Array = npt.NDArray[np.generic]

SLICE_VALUES = 2**21
"""Weights of the output layer that are decoded at a time (8 MiB of float32)."""
_LOWEST = np.finfo(np.float32).min


def slice_rows(width: int) -> int:
    """Rows of an output layer of this width that are decoded at a time."""
    return max(SLICE_VALUES // width, 1)


class Sessions(Protocol):
    """Where a head finds its graphs."""

    def session(self, role: str) -> GraphSession:
        """The open session of a graph."""


class SlicedHead:
    """The output layer and the loss of a language model, a slice of the vocabulary at a time.

    Args:
        head: its wiring.
        sessions: opens its graphs.
        weights: the mapped weight file.
    """

    def __init__(self, head: VocabularyHead, sessions: Sessions, weights: MappedWeights) -> None:
        self._head, self._sessions, self._weights = head, sessions, weights

    def loss(self, hidden: ort.OrtValue, labels: Array) -> tuple[float, dict[str, Array]]:
        """The loss, and what the backward pass needs of it.

        Args:
            hidden: float32 `[batch, sequence, width]`.
            labels: int64 `[batch, sequence]`, not shifted.
        """
        batch, sequence, _ = hidden.shape()
        found: dict[str, Array] = {
            "log_z": np.full((batch, sequence, 1), _LOWEST, np.float32),
            "picked": np.zeros((batch, sequence, 1), np.float32),
        }
        scan = self._sessions.session(self._head.scan)
        scan.bind({"labels": labels})
        scan.bind_values({"hidden": hidden})
        for first, last in self._slices(scan):
            self._bind_slice(scan, first, last)
            scan.bind(found)
            outputs = scan.run_for(["log_z.out", "picked.out"])
            found = {"log_z": outputs["log_z.out"].numpy(), "picked": outputs["picked.out"].numpy()}
            self._weights.release()
        graph = self._sessions.session(self._head.loss)
        graph.bind({"labels": labels, **found})
        outputs = graph.run_for(["loss", "share"])
        return float(outputs["loss"].numpy()), {"log_z": found["log_z"], "share": outputs["share"].numpy()}

    def cotangent(self, hidden: ort.OrtValue, labels: Array, kept: Mapping[str, Array]) -> ort.OrtValue:
        """The cotangent of `hidden`; `kept` is what `loss` returned."""
        graph = self._sessions.session(self._head.backward)
        graph.bind({"labels": labels, **kept})
        graph.bind_values({"hidden": hidden})
        total = ort.OrtValue.ortvalue_from_numpy(np.zeros(hidden.shape(), np.float32))
        for first, last in self._slices(graph):
            self._bind_slice(graph, first, last)
            graph.bind_values({"cotangent": total})
            total = graph.run_for(["cotangent.out"])["cotangent.out"]
            self._weights.release()
        return total

    def _slices(self, session: GraphSession) -> list[tuple[int, int]]:
        """First and last row of each slice."""
        step = slice_rows(int(session.inputs["hidden"].shape[-1]))
        return [(first, min(first + step, self._head.rows)) for first in range(0, self._head.rows, step)]

    def _bind_slice(self, session: GraphSession, first: int, last: int) -> None:
        session.bind(
            {
                name: self._weights.rows(key, session.inputs[name], first, last)
                for name, key in self._head.weights.items()
            }
        )
        session.bind({"first": np.array(first, np.int64)})
