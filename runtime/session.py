"""onnxruntime sessions over a bundle's graphs: one place for their options, bindings and errors."""

import copy
import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from edgepeft.bundle.manifest import TensorSpec
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.sizes_on_disk import PACKED
from edgepeft.errors import BundleError, EdgePeftError

from .memory.arena import register_shared_arena
from .memory.huge_pages import gather_into_huge_pages
from .memory.mapped_pages import drop_mapped_pages

Array = npt.NDArray[np.generic]

ORT_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(ort_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    MemoryError,
)
"""What onnxruntime raises: its exceptions have no common base of their own."""

# Merging equal nodes would keep what a training graph means to compute twice; folding would expand int4 and
# float16 weights to float32, but for graphs that say there is something else to fold. The exporter has done
# what is to be done of both otherwise.
MERGING, FOLDING = "CommonSubexpressionElimination", "ConstantFolding"


def _options(threads: int, shared_arena: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A memory pattern asks for a whole run's tensors at once, for every shape anew: on MiniLM (16 rows of 48
    # tokens) a training process peaks at 431 MiB with it and at 272 with the arena alone, where its tensors
    # need 256. Without the arena, the gaps on malloc's heap make that 320.
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    if shared_arena:
        register_shared_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Each session's threads would spin while the next one computes: on 2 cores a step of SmolLM2-135M's
        # shape at 128 tokens takes twice as long with that. Within a run they should: 5 to 8 % of a step.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class GraphSession:
    """One graph of a bundle, ready to run.

    Inputs stay bound until they are bound again, so an adapter's hundreds of tensors are handed over once.
    Arrays are not copied: the session reads and writes the memory of the arrays it is given, and keeps them
    alive.

    Args:
        bundle: the opened bundle.
        role: the graph's key in the manifest, such as `inference`.
        threads: threads of this session; 0 lets onnxruntime choose.
        shared_arena: take memory from the arena that all such sessions of the process share.
        profile: where to write a profile, which `end_profile` ends; none where empty.
        exact_products: never round activations; None: where the session shares the arena, or trains.

    Raises:
        BundleError: onnxruntime refuses the graph, or its inputs and outputs are not the manifest's.
    """

    def __init__(
        self,
        bundle: Bundle,
        role: str,
        threads: int = 0,
        *,
        shared_arena: bool = False,
        profile: str = "",
        exact_products: bool | None = None,
    ) -> None:
        self.role = role
        self._weights_file = bundle.path.absolute() / bundle.manifest.weights_file
        self._where = f"{bundle.path}: graph {role!r}"
        data = bundle.graph_bytes(role)
        spec = bundle.manifest.graphs[role]
        self.inputs: dict[str, TensorSpec] = {item.name: item for item in spec.inputs}
        self.outputs: dict[str, TensorSpec] = {item.name: item for item in spec.outputs}
        options = _options(threads, shared_arena)
        options.enable_profiling = bool(profile)
        options.profile_file_prefix = profile
        if exact_products is None:
            exact_products = shared_arena or any(item.graph == role for item in bundle.manifest.strategies)
        if exact_products:
            # onnxruntime fuses DequantizeLinear and MatMul and then rounds the activations to int8 (level 4):
            # the loss would be a staircase, and not the function whose gradient the graph computes.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.path.absolute())
        )
        disabled = [MERGING] if spec.folds else [MERGING, FOLDING]
        try:
            session = ort.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except ORT_ERRORS as error:
            raise BundleError(
                f"{self._where}: onnxruntime {ort.__version__} refuses it: {one_line(error)}"
            ) from error
        for kind, declared, found in (
            ("inputs", self.inputs, {item.name for item in session.get_inputs()}),
            ("outputs", self.outputs, {item.name for item in session.get_outputs()}),
        ):
            if declared.keys() != found:
                differing = sorted(declared.keys() ^ found)[0]
                raise BundleError(
                    f"{self._where}: its {kind} are not the manifest's, {differing!r} is in one only"
                )
        self._session = session
        self._process = os.getpid()
        _open.add(self)
        self._binding = session.io_binding()
        # What is bound by its address, for as long as it is bound: a binding of onnxruntime that is cleared
        # still refers to every array that `bind_cpu_input` gave it.
        self._inputs_kept: dict[str, Array] = {}
        self._outputs_kept: dict[str, Array] = {}

    def with_own_bindings(self) -> Self:
        """The same session, with inputs and outputs that are bound apart from this one's."""
        other = copy.copy(self)
        other._binding = self._session.io_binding()
        other._inputs_kept, other._outputs_kept = {}, {}
        return other

    def bind(self, values: Mapping[str, Array]) -> None:
        """Use these arrays as inputs from now on; their memory is read at every run.

        Raises:
            EdgePeftError: a dtype or a number of axes is not the graph's.
        """
        with self._translated():
            for name, value in values.items():
                if not value.flags.c_contiguous:
                    raise EdgePeftError(f"{self._where}: input {name!r} is not contiguous")
                kind: Any = value.dtype
                shape = value.shape
                if (spec := self.inputs.get(name)) is not None and spec.dtype in PACKED:
                    kind, shape = PACKED[spec.dtype], tuple(int(dim) for dim in spec.shape)
                self._binding.bind_input(name, "cpu", 0, kind, shape, value.ctypes.data)
                self._inputs_kept[name] = value

    def bind_values(self, values: Mapping[str, ort.OrtValue]) -> None:
        """Use another run's outputs as inputs, without a copy."""
        with self._translated():
            for name, value in values.items():
                self._binding.bind_ortvalue_input(name, value)
                self._inputs_kept.pop(name, None)

    def unbind(self) -> None:
        """Let go of every input and output."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._inputs_kept.clear()
        self._outputs_kept.clear()

    def bind_outputs(self, values: Mapping[str, Array]) -> None:
        """Have these outputs written straight into arrays of the right dtype and shape from now on."""
        with self._translated():
            for name, value in values.items():
                if not (value.flags.c_contiguous and value.flags.writeable):
                    raise EdgePeftError(f"{self._where}: output {name!r} is not a writable contiguous array")
                self._binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
                self._outputs_kept[name] = value

    def run(self) -> None:
        """Run with everything bound; results are in the arrays given to `bind_outputs`."""
        self._check_process()
        try:  # a context manager costs more, and a token calls this once
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise self._translation(error) from error

    def run_for(self, names: Sequence[str]) -> dict[str, ort.OrtValue]:
        """Run and return these outputs, whose shapes need not be known beforehand."""
        with self._translated():
            # Bound outputs keep the last run's buffers, and its shapes.
            self._binding.clear_binding_outputs()
            for name in names:
                self._binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(self._binding)
            values = dict(zip(names, self._binding.get_outputs(), strict=True))
            self._binding.clear_binding_outputs()
            return values

    def run_into(self, arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, ort.OrtValue]:
        """Run with some outputs written straight into arrays and others returned."""
        with self._translated():
            self._binding.clear_binding_outputs()
            self.bind_outputs(arrays)
            for name in names:
                self._binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(self._binding)
            values = dict(zip([*arrays, *names], self._binding.get_outputs(), strict=True))
            self._binding.clear_binding_outputs()
            self._outputs_kept.clear()
            return {name: values[name] for name in names}

    def drop_mapped_pages(self) -> None:
        """Let go of pages of the weight file that were read: looked up rows of an embedding, in time all of
        them. What is read again comes from the system's cache."""
        drop_mapped_pages(self._weights_file.resolve())

    def end_profile(self) -> Path:
        """The file of the profile so far."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session's memory; it cannot run afterwards."""
        self._inputs_kept.clear()
        self._outputs_kept.clear()
        del self._binding
        del self._session

    def _check_process(self) -> None:
        """Refuse to wait for threads that a fork has not copied, which is for ever.

        Raises:
            EdgePeftError: this process is a copy of the one that opened the session.
        """
        if os.getpid() != self._process:
            raise EdgePeftError(
                f"{self._where}: this process was forked after the model was loaded, and onnxruntime's "
                "threads are not in it: load the model in every process after the fork, or use "
                "multiprocessing's 'spawn'"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        self._check_process()
        try:
            yield
        except ORT_ERRORS as error:
            raise self._translation(error) from error

    def _translation(self, error: Exception) -> EdgePeftError:
        text = one_line(error)
        if isinstance(error, MemoryError) or "allocate" in text or "bad_alloc" in text:
            return EdgePeftError(
                f"{self._where}: the device has no memory left for it ({text}): use smaller batches or "
                "sequences"
            )
        return EdgePeftError(f"{self._where}: failed: {text}")


_open: weakref.WeakSet[GraphSession] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """In a process that was forked: closing a session would wait for its threads, which are not there."""
    for session in list(_open):
        if hasattr(session, "_session"):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)


def open_whole(bundle: Bundle, role: str, threads: int = 0, *, shared_arena: bool = False) -> GraphSession:
    """A session for inference that stays open: its packed weights in huge pages where the system has any, and
    without the pages of the file that they were packed from.

    Raises:
        BundleError: see `GraphSession`.
    """
    trains = any(item.graph == role for item in bundle.manifest.strategies)
    session = GraphSession(bundle, role, threads, shared_arena=shared_arena, exact_products=trains)
    session.drop_mapped_pages()
    gather_into_huge_pages()
    return session


def one_line(error: BaseException) -> str:
    """An error's text for a message, cut short."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."
