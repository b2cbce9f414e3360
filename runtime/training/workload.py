"""The sizes of an update that its plan depends on."""

from edgepeft.adapters import Adapter
from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES

from ..memory.plan import Workload
from .options import TrainingOptions


def workload(
    adapter: Adapter, names: list[str], rows: int, seq_len: int, options: TrainingOptions
) -> Workload:
    """The sizes that training `names` of an adapter on batches of `rows` x `seq_len` tokens depends on."""
    return Workload(
        rows=rows,
        seq_len=seq_len,
        rank=max((adapter.rank(module) for module in adapter.modules), default=0),
        adapter_values=adapter.parameters,
        trained_values=sum(adapter.tensors[name].size for name in names),
        gradient_bytes=4 if options.accumulation_steps == 1 else 8,
        moment_bytes=OPTIMIZER_STATES[options.optimizer_state].bytes_per_value,
        updates_in_backward=options.updates_in_backward,
    )
