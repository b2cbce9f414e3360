"""What every call of a loaded bundle stands on: its sessions, its adapters and forward passes."""

import functools
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError

from .adapters.loaded import AdapterSpecs, check_rows
from .adapters.virtual_tokens import in_front, without_front
from .inputs import axis_sizes, batch_shape, check_batch, model_inputs
from .key_value_cache import empty_cache
from .memory.inference import RunPlan, plan_forward
from .memory.room import within
from .one_call_at_a_time import one_at_a_time
from .open_sessions import Sessions
from .session import GraphSession
from .streamed_model import StreamedModel
from .tasks import Task, task_for

if TYPE_CHECKING:
    from .generation.generate import Generator

FloatArray = npt.NDArray[np.float32]


def _in_own_memory(session: GraphSession, output: str, sizes: Mapping[str, int]) -> FloatArray:
    """Run for an output that lies in no arena: there it would be in the next run's way, and keep an arena
    that is no longer used. Where its size is not known beforehand, it is copied."""
    dims = [sizes.get(dim) if isinstance(dim, str) else dim for dim in session.outputs[output].shape]
    if None in dims:
        return np.array(session.run_for([output])[output].numpy())
    dtype = np.dtype(session.outputs[output].dtype)
    array = np.empty([dim for dim in dims if dim is not None], dtype)
    session.run_into({output: array}, [])
    return array


class LoadedBundle:
    """A bundle with its sessions and adapters, called by one thread at a time; see `Model`, which adds what
    tasks make of forward passes, generation and training.

    Args:
        bundle: an opened bundle.
        memory_budget_bytes: limit on the whole process's resident memory; None for no limit.
        threads: threads of a session; 0 lets onnxruntime choose.
        int8_activations: see `edgepeft.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        memory_budget_bytes: int | None = None,
        threads: int = 0,
        *,
        int8_activations: bool = False,
    ) -> None:
        if int8_activations and (bundle.manifest.decoder is None or not bundle.manifest.decoder.int8_graph):
            raise UsageError(
                f"{bundle.path}: int8_activations is for language models with weights of 4 or 8 bits that "
                "have a decoder graph, which this bundle has not: leave it out"
            )
        self._bundle = bundle
        self._budget_bytes = memory_budget_bytes
        self._threads = threads
        self._lock = threading.RLock()
        self._task: Task = task_for(bundle)
        self._sessions = Sessions(bundle, threads, one_at_a_time=memory_budget_bytes is not None)
        self._int8_activations = int8_activations

    def _reading(self) -> AbstractContextManager[None]:
        """What comes in is inside the budget, for which sessions may be closed; see `one_at_a_time`."""
        return within(self._budget_bytes, self._sessions.make_room)

    @functools.cached_property
    def _generator(self) -> "Generator":
        # Decoders, samplers and caches: a process that trains or predicts does without them.
        from .generation.generate import Generator

        return Generator(
            self._bundle,
            self._task,
            self._sessions,
            self._lock,
            self._budget_bytes,
            int8_activations=self._int8_activations,
        )

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def predicted_peak_bytes(self) -> int | None:
        """The plan's peak for the last run; None before the first."""
        return None if self._sessions.plan is None else self._sessions.plan.peak_bytes

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the bundle's adapters and of those that were loaded."""
        own = self._bundle.adapter_names()
        return own + tuple(name for name in self._sessions.registry.names if name not in own)

    @one_at_a_time
    def load_adapter(self, name: str, path: str | Path | None = None) -> None:
        """Keep an adapter in memory, so that activating it only binds what is there.

        It takes its own bytes (float32) and no more. Adapters that are not loaded are read whenever a call
        activates them.

        Args:
            name: what calls name it by; without `path` an adapter of the bundle.
            path: a PEFT folder.

        Raises:
            AdapterError: the adapter is missing, damaged, does not fit or has no effect.
            UsageError: the name cannot be used, or is taken.
        """
        self._sessions.registry.load(name, path)

    @one_at_a_time
    def unload_adapter(self, name: str) -> None:
        """Free what `load_adapter` loaded.

        Raises:
            AdapterError: no adapter of that name is loaded.
        """
        self._sessions.unload(name)

    @one_at_a_time
    def forward(self, batch: Mapping[str, object], adapter: AdapterSpecs = None) -> dict[str, FloatArray]:
        """Run the model on a batch.

        Args:
            batch: the transformers model's keyword arguments as arrays, such as `input_ids` int64
                `[batch, sequence]`; rows of language models are padded on the right.
            adapter: an adapter's name, a PEFT folder's path, a mixture `{name: weight}`, or None for the base
                alone; or a list of these, one for each row of the batch.

        Returns:
            `logits` float32 `[batch, num_labels]` or `[batch, sequence, vocab]`, or `sentence_embedding`
            `[batch, width]`.

        Raises:
            UsageError: an input cannot be used.
            AdapterError: the adapter is missing, damaged, does not fit or has no effect.
            BudgetError: the memory budget cannot hold this batch.
        """
        specs = model_inputs(self.manifest, self.manifest.graphs["inference"].inputs)
        arrays = check_batch(self.manifest, specs, batch)
        shape = batch_shape(specs, arrays)
        check_rows(adapter, shape[0], "rows")
        virtual = self._sessions.registry.virtual_tokens(adapter, shape[0])
        if virtual is not None:
            arrays = in_front(self.manifest, arrays, virtual)
            shape = batch_shape(specs, arrays)

        def plan(process_bytes: int, rank: int) -> RunPlan:
            return plan_forward(self.manifest, self._budget_bytes, process_bytes, shape=shape, rank=rank)

        session, _ = self._sessions.activated(adapter, plan)
        output = self._task.output
        if isinstance(session, StreamedModel):
            found = session.forward(arrays)
        else:
            session.bind(arrays)
            session.bind(empty_cache(session.inputs, shape[0]))
            found = _in_own_memory(session, output, axis_sizes(specs, arrays))
            if self._budget_bytes is not None:
                session.drop_mapped_pages()  # rows of an embedding, in time all of it
        if virtual is not None:
            found = without_front(self.manifest, output, found, virtual)
        return {output: found}

    @one_at_a_time
    def close(self) -> None:
        """Free the sessions and end open streams; the next call opens sessions again."""
        self._sessions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
