"""The base model's own logits, which a drift penalty compares with."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle

from ...adapters.graph_inputs import graph_inputs
from ...inputs import BASE_LOGITS, DRIFT_WEIGHT
from ...key_value_cache import empty_cache
from ...session import GraphSession

Array = npt.NDArray[np.generic]


class Drift:
    """Adds what a drift penalty needs to batches: runs the inference graph without an adapter.

    Args:
        bundle: exported with a drift penalty.
        weight: of the penalty.
        threads: threads of the session.
    """

    def __init__(self, bundle: Bundle, weight: float, threads: int = 0) -> None:
        self._weight = np.array(weight, np.float32)
        self._session = GraphSession(bundle, "inference", threads)
        self._session.bind(graph_inputs(bundle, []))

    def added_to(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The batch with `base_logits` and `drift_weight`."""
        session = self._session
        session.bind({name: value for name, value in batch.items() if name in session.inputs})
        session.bind(empty_cache(session.inputs, len(next(iter(batch.values())))))
        logits = session.run_for(["logits"])["logits"].numpy()
        return {**batch, BASE_LOGITS: logits, DRIFT_WEIGHT: self._weight}

    def close(self) -> None:
        """Free the session."""
        self._session.close()
