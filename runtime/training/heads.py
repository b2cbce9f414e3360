"""What follows the stages of a chain: the loss, and the cotangent of what it is given."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.manifest import VocabularyHead
from edgepeft.runtime.memory.weights import Weights
from edgepeft.runtime.session import GraphSession

Array = npt.NDArray[np.generic]

SLICE_VALUES = 2**20
"""Weights of the output layer that are decoded at a time (4 MiB of float32)."""
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
        weights: of the weight file.
        holds_logits: the logits of every slice are kept for the backward pass, not computed twice.
    """

    def __init__(
        self, head: VocabularyHead, sessions: Sessions, weights: Weights, holds_logits: bool = False
    ) -> None:
        self._head, self._sessions, self._weights = head, sessions, weights
        self._holds_logits = holds_logits

    def loss(self, hidden: ort.OrtValue, labels: Array) -> float:
        """The loss.

        Args:
            hidden: float32 `[batch, sequence, width]`.
            labels: int64 `[batch, sequence]`, not shifted.
        """
        found, _ = self._scan(hidden, labels, holds_logits=False)
        return self._loss(labels, found)[0]

    def loss_and_cotangent(self, hidden: ort.OrtValue, labels: Array) -> tuple[float, ort.OrtValue]:
        """The loss, and the cotangent of `hidden`; arguments as for `loss`."""
        found, logits = self._scan(hidden, labels, holds_logits=self._holds_logits)
        loss, share = self._loss(labels, found)
        role = self._head.backward_of_logits if self._holds_logits else self._head.backward
        graph = self._sessions.session(role)
        graph.bind({"labels": labels, "log_z": found["log_z"]})
        graph.bind_values({"share": share})
        if not self._holds_logits:
            graph.bind_values({"hidden": hidden})
        total = ort.OrtValue.ortvalue_from_numpy(np.zeros(hidden.shape(), np.float32))
        logits.reverse()
        for first, last in self._slices(hidden):
            self._bind_slice(graph, first, last)
            graph.bind_values({"cotangent": total})
            if self._holds_logits:
                graph.bind_values({"logits": logits.pop()})
            total = graph.run_for(["cotangent.out"])["cotangent.out"]
            self._weights.release()
        graph.unbind_inputs()
        return loss, total

    def _scan(
        self, hidden: ort.OrtValue, labels: Array, *, holds_logits: bool
    ) -> tuple[dict[str, Array], list[ort.OrtValue]]:
        """Each position's log-normalizer and the logit of its label, and the logits by slice if wanted."""
        batch, sequence, _ = hidden.shape()
        found: dict[str, Array] = {
            "log_z": np.full((batch, sequence, 1), _LOWEST, np.float32),
            "picked": np.zeros((batch, sequence, 1), np.float32),
        }
        logits = []
        scan = self._sessions.session(self._head.scan)
        scan.bind({"labels": labels})
        scan.bind_values({"hidden": hidden})
        for first, last in self._slices(hidden):
            self._bind_slice(scan, first, last)
            scan.bind(found)
            outputs = scan.run_for(["log_z.out", "picked.out", *(["logits"] if holds_logits else [])])
            found = {"log_z": outputs["log_z.out"].numpy(), "picked": outputs["picked.out"].numpy()}
            if holds_logits:
                logits.append(outputs["logits"])
            self._weights.release()
        scan.unbind_inputs()
        return found, logits

    def _loss(self, labels: Array, found: Mapping[str, Array]) -> tuple[float, ort.OrtValue]:
        """The loss, and each position's share of it."""
        graph = self._sessions.session(self._head.loss)
        graph.bind({"labels": labels, **found})
        outputs = graph.run_for(["loss", "share"])
        graph.unbind_inputs()
        return float(outputs["loss"].numpy()), outputs["share"]

    def _slices(self, hidden: ort.OrtValue) -> list[tuple[int, int]]:
        """First and last row of each slice."""
        step = slice_rows(hidden.shape()[-1])
        return [(first, min(first + step, self._head.rows)) for first in range(0, self._head.rows, step)]

    def _bind_slice(self, session: GraphSession, first: int, last: int) -> None:
        following = min(2 * last - first, self._head.rows)
        for name, key in self._head.weights.items():
            spec = session.inputs[name]
            session.bind({name: self._weights.rows(key, spec, first, last)})
            if last < following:
                self._weights.prefetch_rows(key, spec, last, following)
        session.bind({"first": np.array(first, np.int64)})
