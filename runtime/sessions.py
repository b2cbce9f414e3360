"""The open sessions of a loaded bundle, and the adapter that is bound in each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.memory.inference import STREAMED, RunPlan
from edgepeft.runtime.memory.process import read_memory, release_freed_memory
from edgepeft.runtime.registry import AdapterRegistry, AdapterSpecs, names_in, simplified, stamped
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.streamed import StreamedModel

FloatArray = npt.NDArray[np.float32]
AnySession = GraphSession | StreamedModel


@dataclass(frozen=True)
class _Open:
    """A session, the adapter that is bound in it, and what the process held before it was opened, without
    loaded adapters."""

    session: AnySession
    adapter: AdapterSpecs
    stamp: object
    rank: int
    process_bytes: int


class Sessions:
    """Opens sessions as plans ask for them.

    Args:
        bundle: the bundle.
        threads: threads of a session; 0 lets onnxruntime choose.
        one_at_a_time: close what is open before another is opened: two at once are in no plan.
    """

    def __init__(self, bundle: Bundle, threads: int, *, one_at_a_time: bool) -> None:
        self._bundle, self._threads, self._one_at_a_time = bundle, threads, one_at_a_time
        self._open: dict[str, _Open] = {}
        self.registry = AdapterRegistry(bundle)

    def activated(
        self, adapter: AdapterSpecs, choose: Callable[[int, int], RunPlan], *, check_effect: bool = True
    ) -> tuple[AnySession, RunPlan]:
        """The session of the plan that is chosen, with this adapter's inputs bound.

        Args:
            adapter: an adapter's name, a PEFT folder's path, a mixture, None, or a list with one a row.
            choose: given what the process holds without sessions, in bytes, and the adapter's rank.
            check_effect: refuse an adapter that changes nothing.

        Raises:
            AdapterError: the adapter is missing, damaged, does not fit or has no effect.
            BudgetError: what `choose` raises.
        """
        adapter = simplified(adapter)
        stamp = stamped(adapter)
        inputs: dict[str, FloatArray] | None = None
        bound = next((entry for entry in self._open.values() if entry.stamp == stamp), None)
        if bound is None:
            inputs = self.registry.inputs(adapter, check_effect=check_effect)
            slots = self._bundle.manifest.lora_slots
            rank = max((inputs[slot.scaling_input].shape[-1] for slot in slots), default=0)
        else:
            rank = bound.rank
        # An open session keeps what its largest batch needed, so a plan starts from what there was before it.
        opened = next(iter(self._open.values()), None)
        loaded_bytes = self.registry.nbytes
        if opened is None:
            process_bytes = read_memory().resident_bytes - loaded_bytes
        else:
            process_bytes = opened.process_bytes
        plan = choose(process_bytes + loaded_bytes, rank)
        entry = self._open.get(plan.role)
        if entry is not None and entry.stamp == stamp:
            return entry.session, plan
        if inputs is None:
            inputs = self.registry.inputs(adapter, check_effect=check_effect)
        if entry is None and self._one_at_a_time:
            self.close()
        session = self._session(plan.role) if entry is None else entry.session
        session.bind(inputs)
        self._open[plan.role] = _Open(session, adapter, stamp, rank, process_bytes)
        return session, plan

    def unload(self, name: str) -> None:
        """Free a loaded adapter, which no session may use any longer.

        Raises:
            AdapterError: none of that name is loaded.
        """
        self.registry.unload(name)
        for role, entry in self._open.items():
            if name in names_in(entry.adapter):
                entry.session.bind(self.registry.inputs(None))
                self._open[role] = _Open(entry.session, None, stamped(None), 0, entry.process_bytes)
        release_freed_memory()

    def close(self) -> None:
        """Free the sessions and give their memory back to the system."""
        if self._open:
            for entry in self._open.values():
                entry.session.close()
            self._open.clear()
            release_freed_memory()

    def _session(self, role: str) -> AnySession:
        if role == STREAMED:
            return StreamedModel(self._bundle, self._threads)
        return GraphSession(self._bundle, role, self._threads)
