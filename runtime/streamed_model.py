"""The inference graph as a chain of stages that run one at a time, their weights mapped from the bundle.

What a budget must hold is one stage's activations and decoded weights, and the key/value cache; neither the
model's weights nor those of the output layer, nor its logits of more than the rows wanted, are ever whole in
memory.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.wiring import StreamedInference
from edgepeft.errors import BundleError

from .key_value_cache import KeyValueCache, cache_specs
from .memory.weights import MappedWeights
from .stages import Stages

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]

# Weights of the output layer that are decoded at a time (2 MiB of float32). The arena has no region for more
# than a stage's largest weight: on SmolLM2-135M's shape 2**21 raise the peak by 10 MiB, and save 4 % a token.
_SLICE_VALUES = 2**19


class StreamedModel:
    """A bundle's streamed inference, ready to run once an adapter's inputs are bound.

    Args:
        bundle: the bundle.
        threads: threads of a session; 0 lets onnxruntime choose.
        streamed: the stages to run; the bundle's own where None.
        profile: how the files of the sessions' profiles begin; none where empty.

    Raises:
        BundleError: the bundle has no streamed inference.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 0,
        *,
        streamed: StreamedInference | None = None,
        profile: str = "",
    ) -> None:
        streamed = streamed or bundle.manifest.streamed_inference
        if streamed is None:
            raise BundleError(f"{bundle.path}: has no streamed inference: export it again")
        self._bundle, self._streamed = bundle, streamed
        self._stages = Stages(bundle, MappedWeights(bundle), threads, profile)
        self._adapter: dict[str, Array] = {}
        cached = [index for index, stage in enumerate(streamed.stages) if stage.cache]
        self._last_cached = max(cached, default=-1)

    def with_own_bindings(self) -> Self:
        """The same stages and sessions, with adapter inputs that are bound apart from this one's."""
        other = copy.copy(self)
        other._adapter = {}
        return other

    def bind(self, inputs: Mapping[str, Array]) -> None:
        """Use these adapter inputs from now on; all of them have to be bound before the first run."""
        self._adapter |= inputs

    def new_cache(self, rows: int, tokens: int) -> KeyValueCache | None:
        """An empty cache of this size; None for a model without one."""
        if not cache_specs(self._bundle.manifest):
            return None
        return KeyValueCache(self._bundle.manifest, self._streamed, rows, tokens)

    def forward(self, batch: Mapping[str, Array]) -> FloatArray:
        """The inference graph's first output for a batch, whole."""
        hidden = self._hidden(batch, None)
        if self._streamed.output_layer is None:
            return np.array(hidden.numpy())  # not in the arena, where it would be in the next run's way
        return self._logits(hidden)

    def read(self, batch: Mapping[str, Array], cache: KeyValueCache) -> None:
        """Add what the model makes of some tokens to the cache, and nothing else.

        Args:
            batch: the model's inputs; its mask covers what the cache holds too.
            cache: of this model, with room for the tokens.
        """
        self._hidden(batch, cache, only_cache=True)

    def next_logits(self, batch: Mapping[str, Array], cache: KeyValueCache | None) -> FloatArray:
        """The logits behind the last of some tokens, float32 `[batch, vocabulary]`; see `read`."""
        hidden = self._hidden(batch, cache)
        last = np.ascontiguousarray(hidden.numpy()[:, -1:])
        if self._streamed.output_layer is None:
            return last[:, 0]
        return self._logits(ort.OrtValue.ortvalue_from_numpy(last))[:, 0]

    def end_profiles(self) -> dict[str, Path]:
        """The profile of every graph that ran, by role."""
        return self._stages.end_profiles()

    def close(self) -> None:
        """Free the sessions."""
        self._stages.close()

    def _hidden(
        self, batch: Mapping[str, Array], cache: KeyValueCache | None, *, only_cache: bool = False
    ) -> ort.OrtValue:
        """What the last stage makes; with `only_cache`, the last one that has a part of the cache."""
        first = next(iter(batch.values()))
        past = self._no_past(len(first)) if cache is None else cache.past()
        context = self._stages.context(
            self._streamed.context, self._streamed.context_weights, {**batch, **past}
        )
        hidden: ort.OrtValue | None = None
        for index, stage in enumerate(self._streamed.stages):
            if only_cache and index > self._last_cached:
                break
            entering = {} if hidden is None else {"hidden": hidden}
            session = self._stages.bound(stage.forward, stage, self._adapter, context, entering)
            into: dict[str, Array] = {}
            if cache is not None and stage.cache:
                names = {output: name.removeprefix("present.") for output, name in stage.cache.items()}
                room = cache.room(names.values(), first.shape[1])
                into = {output: room[name] for output, name in names.items()}
            hidden = session.run_into(into, ["hidden.out"])["hidden.out"]
            if cache is not None and stage.cache:
                cache.keep()
            self._stages.done(session)
        if cache is not None:
            cache.length += first.shape[1]
        assert hidden is not None  # there is at least one stage
        return hidden

    def _logits(self, hidden: ort.OrtValue) -> FloatArray:
        """The output layer, some rows of it at a time, float32 `[batch, sequence, vocabulary]`."""
        layer = self._streamed.output_layer
        assert layer is not None
        session = self._stages.session(layer.graph)
        session.bind_values({"hidden": hidden})
        *lead, width = hidden.shape()
        logits = np.empty([*lead, layer.rows], np.float32)
        step = output_rows(width)
        for first in range(0, layer.rows, step):
            last = min(first + step, layer.rows)
            session.bind(
                {
                    name: self._stages.weights.rows(key, session.inputs[name], first, last)
                    for name, key in layer.weights.items()
                }
            )
            logits[..., first:last] = session.run_for(["logits"])["logits"].numpy()
            self._stages.weights.release()
        session.unbind()
        return logits

    def _no_past(self, rows: int) -> dict[str, Array]:
        cache = self.new_cache(rows, 0)
        return {} if cache is None else cache.past()


def output_rows(width: int) -> int:
    """Rows of an output layer of this width that are decoded at a time."""
    return max(_SLICE_VALUES // width, 1)
