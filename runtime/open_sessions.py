"""The open sessions of a loaded bundle, and the adapter that is bound in each."""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError
from edgepeft.techniques import lora, of_slot

from .adapters.graph_inputs import AdapterSpec, group_bytes, inputs_taken, is_decoder
from .adapters.loaded import AdapterRegistry, AdapterSpecs, names_in, simplified, stamped
from .memory.arena import renew_shared_arena
from .memory.inference import STREAMED, RunPlan
from .memory.process import read_memory, release_freed_memory
from .session import GraphSession, open_whole
from .streamed_model import StreamedModel

FloatArray = npt.NDArray[np.float32]
AnySession = GraphSession | StreamedModel


class Borrower(Protocol):
    """Something that goes on using a session between calls, and the bytes that it holds meanwhile."""

    @property
    def held_bytes(self) -> int:
        """Bytes of its own that stay between calls."""
        ...

    def close(self) -> None:
        """End, and give back."""
        ...


@dataclass(frozen=True)
class _Size:
    """An adapter's largest rank, and the bytes of its inputs beside those that loaded adapters hold: as they
    are read, and once a decoder graph has them, whose `A` factors they then share."""

    rank: int
    nbytes: int
    decoder_bytes: int


@dataclass(frozen=True)
class _Open:
    """A session, the adapter that is bound in it (as `graph_inputs` gives it and as the session's graph takes
    it), how large that is, what the process held before it was opened, without adapters, and the bytes that
    any run finds whole in its arena."""

    session: AnySession
    adapter: AdapterSpecs
    inputs: dict[str, FloatArray]
    bound: dict[str, FloatArray]
    stamp: object
    size: _Size
    process_bytes: int
    region_bytes: int


@dataclass(frozen=True)
class Borrowed:
    """A session with bindings that no other call changes, in which an adapter is bound, and the adapter's
    inputs as `graph_inputs` gives them."""

    session: AnySession
    inputs: dict[str, FloatArray]


class Sessions:
    """Opens sessions as plans ask for them.

    Args:
        bundle: the bundle.
        threads: threads of a session; 0 lets onnxruntime choose.
        one_at_a_time: there is a budget. Close what is open before another is opened: two at once are in no
            plan. And have runs of mixed shapes take what the largest does.

    Attributes:
        plan: the last one that was chosen.
    """

    def __init__(self, bundle: Bundle, threads: int, *, one_at_a_time: bool) -> None:
        self._bundle, self._threads, self._one_at_a_time = bundle, threads, one_at_a_time
        self._open: dict[str, _Open] = {}
        self.registry = AdapterRegistry(bundle)
        self.plan: RunPlan | None = None
        self._borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()

    def activated(
        self,
        adapter: AdapterSpecs,
        choose: Callable[[int, int], RunPlan],
        *,
        check_effect: bool = True,
        beside: Sequence[dict[str, FloatArray]] = (),
    ) -> tuple[AnySession, RunPlan]:
        """The session of the plan that is chosen, with this adapter's inputs bound.

        Args:
            adapter: an adapter's name, a PEFT folder's path, a mixture, None, or a list with one a row.
            choose: given what the process holds without sessions, in bytes, and the adapter's rank.
            check_effect: refuse an adapter that changes nothing.
            beside: inputs of other adapters that the same call binds, for the plan.

        Raises:
            AdapterError: the adapter is missing, damaged, does not fit or has no effect.
            BudgetError: what `choose` raises.
        """
        adapter = simplified(adapter)
        stamp = stamped(adapter)
        bound = next((entry for entry in self._open.values() if entry.stamp == stamp), None)
        inputs: dict[str, FloatArray] | None = None
        if bound is None:
            inputs = self.registry.inputs(adapter, check_effect=check_effect)
            size = self._size(inputs)
        else:
            size = bound.size
        sizes = [size, *map(self._size, beside)]
        rank = max(item.rank for item in sizes)
        read_bytes = sum(item.nbytes for item in sizes)
        # An open session keeps what its largest batch needed, so a plan starts from what there was before it.
        opened = next(iter(self._open.values()), None)
        loaded_bytes = self.registry.nbytes
        if opened is None:
            process_bytes = read_memory().resident_bytes - loaded_bytes - read_bytes
        else:
            process_bytes = opened.process_bytes
        held_bytes = process_bytes + loaded_bytes + sum(item.held_bytes for item in self._borrowers)
        plan = choose(held_bytes + read_bytes, rank)
        if is_decoder(self._bundle.manifest, plan.role):
            plan = choose(held_bytes + sum(item.decoder_bytes for item in sizes), rank)
        plan = self._in_open_twin(plan)
        self.plan = plan
        entry = self._open.get(plan.role)
        region_bytes = 0 if entry is None else entry.region_bytes
        wanted_bytes = plan.session_bytes + plan.activation_bytes if plan.is_whole else 0
        if self._one_at_a_time and wanted_bytes > region_bytes and not self._borrowers:
            region_bytes = max(wanted_bytes, 2 * region_bytes)
            self.close()
            entry = None
        if entry is not None and entry.stamp == stamp:
            return entry.session, plan
        if inputs is None:  # another graph took them, perhaps as parts of larger ones
            inputs = self.registry.inputs(adapter, check_effect=check_effect)
            entry = self._open.get(plan.role)  # reading may have needed its room
        if entry is None and self._one_at_a_time:
            self.check_unused("this call needs the memory in another way")
            self.close()
        self._close_plain_twin(plan.role)
        session = self._session(plan.role, region_bytes) if entry is None else entry.session
        taken = inputs_taken(self._bundle.manifest, plan.role, inputs)
        session.bind(taken)
        self._open[plan.role] = _Open(
            session, adapter, inputs, taken, stamp, size, process_bytes, region_bytes
        )
        return session, plan

    def borrowed(
        self, adapters: Sequence[AdapterSpec], choose: Callable[[int, int], RunPlan]
    ) -> tuple[list[Borrowed], RunPlan]:
        """As `activated`, for each of some adapters: one session, with bindings of its own for each.

        Raises:
            AdapterError, BudgetError: see `activated`.
        """
        first, *others = adapters
        beside = [self.registry.inputs(adapter) for adapter in others]
        session, plan = self.activated(first, choose, beside=beside)
        entry = self._open[plan.role]
        taken = [entry.bound, *(inputs_taken(self._bundle.manifest, plan.role, inputs) for inputs in beside)]
        found = []
        for inputs, bound in zip([entry.inputs, *beside], taken, strict=True):
            own = session.with_own_bindings()
            own.bind(bound)
            found.append(Borrowed(own, inputs))
        return found, plan

    def lend(self, borrower: Borrower) -> None:
        """Keep the sessions open for a borrower, and count what it holds, until it gives back or is gone."""
        self._borrowers.add(borrower)

    def give_back(self, borrower: Borrower) -> None:
        """The borrower uses no session any more."""
        self._borrowers.discard(borrower)

    def check_unused(self, why: str) -> None:
        """Refuse to close sessions that something goes on using.

        Raises:
            UsageError: a stream is open.
        """
        if self._borrowers:
            raise UsageError(
                f"a stream of this model is open and {why}: read it to its end or close it first"
            )

    def unload(self, name: str) -> None:
        """Free a loaded adapter, which no session may use any longer; a stream that uses it keeps it.

        Raises:
            AdapterError: none of that name is loaded.
        """
        self.registry.unload(name)
        for role, entry in self._open.items():
            if name in names_in(entry.adapter):
                inputs = self.registry.inputs(None)
                taken = inputs_taken(self._bundle.manifest, role, inputs)
                entry.session.bind(taken)
                self._open[role] = dataclasses.replace(
                    entry,
                    adapter=None,
                    inputs=inputs,
                    bound=taken,
                    stamp=stamped(None),
                    size=self._size(inputs),
                )
        release_freed_memory()

    def make_room(self) -> None:
        """Free the sessions, which the next call opens again, unless something goes on using them."""
        if self._borrowers:
            return
        streamed = STREAMED in self._open
        self.close()
        if streamed:
            renew_shared_arena()
            release_freed_memory()

    def close(self) -> None:
        """Free the sessions, end what borrows them, and give their memory back to the system."""
        for borrower in list(self._borrowers):
            borrower.close()
        if self._open:
            for entry in self._open.values():
                entry.session.close()
            self._open.clear()
            release_freed_memory()

    def _size(self, inputs: dict[str, FloatArray]) -> _Size:
        manifest = self._bundle.manifest
        rank = max((of_slot(slot).size(slot, inputs) for slot in manifest.slots), default=0)
        own = {name: array for name, array in inputs.items() if not self.registry.holds(array)}
        nbytes = sum(array.nbytes for array in own.values())
        if manifest.decoder is None:
            return _Size(rank, nbytes, nbytes)
        factors = [slot.input(lora.A) for slot in manifest.packed_slots]
        shared_bytes = sum(own[name].nbytes for name in factors if name in own)
        return _Size(rank, nbytes, nbytes - shared_bytes + group_bytes(manifest, inputs))

    def _in_open_twin(self, plan: RunPlan) -> RunPlan:
        """The plan with the decoder's graph for adapters where that is open and the plain one is asked
        for: without an adapter it computes the same, and nothing has to be opened."""
        decoder = self._bundle.manifest.decoder
        twin = None if decoder is None else decoder.adapted_twin(plan.role)
        return plan if twin is None or twin not in self._open else dataclasses.replace(plan, role=twin)

    def _close_plain_twin(self, role: str) -> None:
        """Free the plain graph where the one for adapters takes its place, if no stream runs on it."""
        decoder = self._bundle.manifest.decoder
        twin = None if decoder is None else decoder.plain_twin(role)
        if twin is not None and twin in self._open and not self._borrowers:
            self._open.pop(twin).session.close()
            release_freed_memory()

    def _session(self, role: str, region_bytes: int) -> AnySession:
        if region_bytes:
            renew_shared_arena(region_bytes)
        if role == STREAMED:
            return StreamedModel(self._bundle, self._threads)
        return open_whole(self._bundle, role, self._threads, shared_arena=region_bytes > 0)
