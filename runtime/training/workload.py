"""The sizes of an update that its plan depends on."""

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES
from edgepeft.errors import UsageError
from edgepeft.virtual_tokens import count_virtual

from ..memory.plan import Workload
from .options import TrainingOptions
from .techniques import steps_that_train


def own_tokens(manifest: Manifest, adapter: Adapter, options: TrainingOptions) -> int:
    """Tokens that a text is cut to, so that it fits the model behind the adapter's virtual ones.

    Raises:
        UsageError: there is no room for any.
    """
    virtual = count_virtual(adapter)
    room = manifest.model.max_length - virtual
    if virtual and room < 1:
        raise UsageError(
            f"the adapter has {virtual} virtual tokens, the model takes at most {manifest.model.max_length}: "
            "train one with fewer"
        )
    return min(options.tokens(manifest), room) if virtual else options.tokens(manifest)


def workload(
    adapter: Adapter, names: list[str], rows: int, seq_len: int, options: TrainingOptions
) -> Workload:
    """The sizes that training `names` of an adapter on batches of `rows` x `seq_len` tokens depends on, its
    virtual tokens in front."""
    of_technique = steps_that_train(adapter, names)
    return Workload(
        rows=rows,
        seq_len=seq_len + count_virtual(adapter),
        rank=max((own.rank(adapter.tensors, module) for own, module in adapter.placed), default=0),
        adapter_values=adapter.parameters,
        trained_values=sum(adapter.tensors[name].size for name in names),
        gradient_bytes=4 if options.accumulation_steps == 1 else 8,
        moment_bytes=OPTIMIZER_STATES[options.optimizer_state].bytes_per_value
        + 4 * len(of_technique.averages),
        updates_in_backward=options.updates_in_backward,
        needs_gradients=of_technique.needs_gradients,
    )
