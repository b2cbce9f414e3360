"""The loss of one batch, and its gradients."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError

from .adapters.graph_inputs import to_peft_layout
from .adapters.virtual_tokens import in_front
from .inputs import batch_shape, check_batch, model_inputs, nothing_dropped
from .memory.inference import RunPlan, plan_graph
from .open_sessions import Sessions
from .session import GraphSession

FloatArray = npt.NDArray[np.float32]


def loss_and_gradients(
    bundle: Bundle,
    sessions: Sessions,
    budget_bytes: int | None,
    batch: Mapping[str, object],
    adapter: str | Path | None,
) -> tuple[float, dict[str, FloatArray]]:
    """See `edgepeft.runtime.model.Model.loss_and_gradients`."""
    if not bundle.manifest.strategies:
        raise UsageError(
            "the bundle was exported with --no-train, so it has no gradients: export it again without"
        )
    if isinstance(adapter, Mapping):
        raise UsageError("gradients are of one adapter, not of a mixture: name one")
    strategy = bundle.manifest.strategies[0]
    role = strategy.graph or "train"
    specs = model_inputs(bundle.manifest, bundle.manifest.graphs[role].inputs)
    arrays = check_batch(bundle.manifest, specs, batch)
    virtual = sessions.registry.virtual_tokens(adapter, len(next(iter(arrays.values()))))
    if virtual is not None:
        arrays = in_front(bundle.manifest, arrays, virtual)
    shape = batch_shape(specs, arrays)

    def plan(process_bytes: int, rank: int) -> RunPlan:
        return plan_graph(role, strategy.memory, budget_bytes, process_bytes, shape=shape, rank=rank)

    session, _ = sessions.activated(adapter, plan, check_effect=False)
    assert isinstance(session, GraphSession)
    session.bind({**arrays, **nothing_dropped(bundle.manifest)})
    names = {f"grad.{name}": name for name in bundle.manifest.policy.trainable}
    outputs = session.run_for(["loss", *names])
    loss = float(outputs.pop("loss").numpy())
    gradients = {names[output]: value.numpy() for output, value in outputs.items()}
    return loss, to_peft_layout(bundle, gradients)
