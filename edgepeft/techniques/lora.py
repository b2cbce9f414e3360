"""LoRA: a low-rank product beside a linear module, `y += ((x A) * scaling) B`; `lora_sites` has the others.

In the graphs `A` is `[in_features, rank]`, `B` `[rank, out_features]` and the scaling `[rank]`: PEFT's
`lora_A.weight` and `lora_B.weight` transposed, and `lora_alpha / r` once for each rank. Rank 0 switches a
slot off exactly, and adapters mix exactly: their factors stand side by side along the rank, and each one's
weight goes into its scaling. In the inference graph the scaling may also be `[batch, 1, …, rank]`, with as
many axes as `x` has: a row's scaling is zero where the rank belongs to an adapter that is not its own.

Source: arXiv 2106.09685; rsLoRA's scaling: arXiv 2312.03732.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..adapter_settings import check_rank, check_share, ranks_and_alphas
from ..errors import AdapterError
from ..initialization import check_initialization
from ..slots import CONVOLUTION, EMBEDDING, EMPTY, LINEAR, LORA, PREFIX, SIZE, Slot, SlotTensor
from ..token_rows import (
    check_rows,
    check_token_indices,
    modules_with_rows,
    owns_rows,
    rows_from_file,
    rows_to_file,
)
from . import lora_sites
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference
from .lora_sites import EMBEDDING_SUFFIXES, SITE, SUFFIXES
from .lora_sites import SCALING as SCALING
from .lora_sites import A as A
from .lora_sites import B as B

_A, _B = SUFFIXES
# Options that make the layer something else than y += scaling * B(A(x)), by the value that switches them off.
_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "bias": ("none", None, "all", "lora_only"),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
_REFUSED_KEYS = {
    "lora_embedding_A": "a LoRA on an embedding",
    "lora_embedding_B": "a LoRA on an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "lora_bias",
}


def new_slot(module: str, in_features: int, out_features: int, activation_axes: int) -> Slot:
    """A slot on a linear module `[in_features] -> [out_features]`; see `Slot` for its axes."""
    key = f"{PREFIX}{module}"
    a, b, scaling = (in_features, SIZE), (SIZE, out_features), (SIZE,)
    return Slot(
        technique=LORA,
        site=LINEAR,
        module=module,
        tensors=(
            SlotTensor(A, key + _A, key + _A, a, transposed=True, trains=True, neutral=EMPTY),
            SlotTensor(B, key + _B, key + _B, b, transposed=True, trains=True, neutral=EMPTY),
            SlotTensor(
                SCALING, f"{key}.scaling", None, scaling, transposed=False, trains=False, neutral=EMPTY
            ),
        ),
        activation_axes=activation_axes,
    )


def check_options(config: Mapping[str, Any], origin: str) -> None:
    """
    Raises:
        AdapterError: the configuration asks for a layer that is something else.
    """
    for key, allowed in _REFUSED_UNLESS.items():
        value = config.get(key)
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise AdapterError(
                f"{origin}: {key}={value!r} is not supported: train the adapter without it, or merge it"
            )


def check_keys(tensors: Tensors, origin: str) -> None:
    """
    Raises:
        AdapterError: a tensor is of such a layer.
    """
    for key in tensors:
        for part, meaning in _REFUSED_KEYS.items():
            if part in key:
                raise AdapterError(f"{origin}: tensor {key} belongs to {meaning}, which is not supported")


def features(slot: Slot) -> tuple[int, int]:
    """What the slot's module reads and makes: in_features and out_features."""
    return int(slot.tensor(A).shape[0]), int(slot.tensor(B).shape[1])


class Lora(PeftTechnique):
    """See the module."""

    name, title, peft_type = LORA, "LoRA", "LORA"
    inert = "every lora_B is zero"
    suffixes: ClassVar[tuple[str, ...]] = (_A, _B)
    parts: ClassVar = {"lora_B": (B,)}
    by_row: ClassVar[Sequence[str]] = (SCALING,)
    bias_of_targets = "lora_only"
    zero_at_first: ClassVar[tuple[str, ...]] = (_B, EMBEDDING_SUFFIXES[0])
    """How keys of what is zero in a fresh adapter end: B, on an embedding A."""

    def from_file(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
        return rows_from_file(config, tensors, origin)

    def to_file(self, tensors: Tensors) -> dict[str, FloatArray]:
        return rows_to_file(tensors, of_lora=True)

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return not (config.get("use_dora") or config.get("lora_bias"))

    @property
    def _elsewhere(self) -> tuple[str, ...]:
        """Suffixes on embeddings, where those that build upon this one are not."""
        return EMBEDDING_SUFFIXES if self.name == LORA else ()

    def owns(self, key: str) -> bool:
        return key.endswith((*self.suffixes, *self._elsewhere)) or owns_rows(key)

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        ends = (self.suffixes[0], *self._elsewhere[:1])
        return tuple(key[len(PREFIX) : -len(end)] for key in tensors for end in ends if key.endswith(end))

    def settings(self, adapter: Held, module: str) -> Settings:
        site = lora_sites.site_of(adapter.tensors, module)
        return {} if site == LINEAR else {SITE: site}

    def problem(self, slot: Slot) -> str | None:
        if slot.site in (EMBEDDING, CONVOLUTION) and self.name == LORA:
            return lora_sites.problem(slot)
        by_name = {tensor.name: tensor.shape for tensor in slot.tensors}
        sizes = (*by_name.get(A, ())[:1], *by_name.get(B, ())[1:2])
        whole = [size for size in sizes if isinstance(size, int)]
        if len(whole) == 2 and min(whole) < 1:
            return f"is {whole[0]} -> {whole[1]}"
        if len(whole) != 2:
            return f"has tensors of shapes {[list(shape) for shape in by_name.values()]}, which are no LoRA's"
        return difference(slot, new_slot(slot.module, whole[0], whole[1], slot.activation_axes))

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        found = super().values(slot, adapter)
        rank = self.rank(adapter.tensors, slot.module)
        if not found or rank == 0:
            return {}
        return found | {slot.input(SCALING): np.full(rank, adapter.scaling(slot.module), np.float32)}

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: A uniform as `kaiming_uniform_(a=sqrt(5))` draws it, B zero."""
        del read_weight
        if slot.site != LINEAR:
            return lora_sites.fresh(slot, size, rng)
        in_features, out_features = features(slot)
        bound = 1 / math.sqrt(in_features)
        a = rng.uniform(-bound, bound, (size, in_features)).astype(np.float32)
        return {slot.input(A): a, slot.input(B): np.zeros((out_features, size), np.float32)}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With alpha = 2 r."""
        del slots
        return {
            "init_lora_weights": True,
            "lora_alpha": 2 * size,
            "lora_dropout": 0.0,
            "r": size,
            "use_dora": False,
            "use_rslora": False,
        }

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        """With patterns for what differs from the largest rank and the first alpha."""
        ranks, alphas = dict[str, int](), dict[str, float]()
        for slot, tensors in values:
            scaling = tensors[slot.input(SCALING)]
            if not (scaling == scaling[0]).all():
                raise AdapterError(
                    f"{origin}: module {slot.module}: its scaling differs along the rank, so it is a "
                    "mixture, which PEFT's format cannot hold: add its adapters one by one"
                )
            ranks[slot.module] = scaling.size
            alphas[slot.module] = alpha_of(float(scaling[0]), scaling.size)
        rank, alpha = max(ranks.values(), default=1), next(iter(alphas.values()), 1.0)
        return self.fresh_config(rank, ()) | {
            "lora_alpha": alpha,
            "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
            "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        }

    def stirred(self, tensors: Tensors, rng: np.random.Generator, scale: float) -> dict[str, FloatArray]:
        """What is zero in a fresh one."""
        return {
            key: (scale * rng.standard_normal(value.shape)).astype(np.float32)
            if key.endswith(self.zero_at_first)
            else value
            for key, value in tensors.items()
        }

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not weighted:
            return self.neutral(slot, read_weight)
        scalings = [_times(values[slot.input(SCALING)], weight) for values, weight in weighted]
        return _side_by_side(slot, [values for values, _ in weighted]) | {
            slot.input(SCALING): _joined(scalings, 0)
        }

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not adapters:
            return self.neutral(slot, read_weight)
        if not slot.activation_axes:
            raise AdapterError(
                f"module {slot.module}: its activations mix the rows of a batch, so rows cannot have "
                "adapters of their own: run them one adapter at a time"
            )
        scalings = [
            weights[:, index, None] * values[slot.input(SCALING)] for index, values in enumerate(adapters)
        ]
        # Behind the batch: a convolution's channels, or else the last axis.
        between = () if slot.site == CONVOLUTION else (1,) * (slot.activation_axes - 2)
        scaling = _joined(scalings, 1).reshape(len(weights), *between, -1)
        return _side_by_side(slot, adapters) | {slot.input(SCALING): scaling}

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        check_options(config, origin)
        check_initialization(config, origin)
        check_token_indices(config, origin)
        check_share(config, "lora_dropout", origin)
        check_rank(config, "lora_alpha", origin)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        check_rows(config, tensors, origin)
        check_keys({key: value for key, value in tensors.items() if not self.owns(key)}, origin)
        for key, tensor in tensors.items():
            on_embedding = key.endswith(EMBEDDING_SUFFIXES)
            if not self.owns(key) or owns_rows(key):
                continue
            first, second = EMBEDDING_SUFFIXES if on_embedding else SUFFIXES
            stem, mine = key[: -len(first)], key[-len(first) :]
            other = tensors.get(stem + (second if mine == first else first))
            module = stem[len(PREFIX) :]
            if other is None:
                raise AdapterError(
                    f"{origin}: module {module} has {_short(mine)} but no "
                    f"{_short(second if mine == first else first)}"
                )
            site = lora_sites.site_of(tensors, module)
            if site != LINEAR and self.name == LORA:
                if mine == first:
                    lora_sites.check_pair(module, tensor, other, site, origin)
                continue
            if tensor.ndim != 2 or other.ndim != 2:
                raise AdapterError(
                    f"{origin}: tensor {key} has {tensor.ndim} axes, edgepeft runs LoRA on linear modules (2 "
                    "axes)"
                )
            if mine == _A and tensor.shape[0] != other.shape[1]:
                raise AdapterError(
                    f"{origin}: module {module}: lora_A has rank {tensor.shape[0]}, lora_B rank "
                    f"{other.shape[1]}"
                )
        return self._scalings(config, tensors, origin)

    def rank(self, tensors: Tensors, module: str) -> int:
        found = (tensors.get(f"{PREFIX}{module}{end}") for end in (self.suffixes[0], *self._elsewhere[:1]))
        return next((int(tensor.shape[0]) for tensor in found if tensor is not None), 0)

    def weight_shape(self, slot: Slot) -> tuple[int, ...] | None:
        if slot.site == CONVOLUTION:
            return None
        return features(slot) if slot.site == EMBEDDING else features(slot)[::-1]

    def fit(self, slot: Slot, adapter: Held) -> None:
        if slot.site != LINEAR or lora_sites.site_of(adapter.tensors, slot.module) != LINEAR:
            lora_sites.fit(slot, adapter)
            return
        a, b = (adapter.tensors[slot.input(name)] for name in (A, B))
        if (a.shape[1], b.shape[0]) != features(slot):
            in_features, out_features = features(slot)
            raise AdapterError(
                f"{adapter.origin}: module {slot.module} is {a.shape[1]} -> {b.shape[0]} features in the "
                f"adapter, {in_features} -> {out_features} in this bundle: the adapter was made for another "
                "base"
            )

    def has_effect(self, adapter: Held) -> bool:
        """A product that is not all zeros, and whose scaling is not zero; or rows of the embedding."""
        if modules_with_rows(adapter.tensors):
            return True
        for module in self.modules(adapter.tensors):
            on_embedding = lora_sites.site_of(adapter.tensors, module) == EMBEDDING
            keys = (f"{PREFIX}{module}{end}" for end in (EMBEDDING_SUFFIXES if on_embedding else SUFFIXES))
            if adapter.scaling(module) != 0.0 and all(adapter.tensors[key].any() for key in keys):
                return True
        return False

    def _scalings(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        """`lora_alpha / r`, or `/ sqrt(r)` with rsLoRA, after `rank_pattern` and `alpha_pattern`."""
        given = ranks_and_alphas(config, "lora_alpha", self.modules(tensors), origin)
        found = {}
        for module, (rank, alpha) in given.items():
            rows = self.rank(tensors, module)
            if rank != rows:
                raise AdapterError(
                    f"{origin}: module {module}: adapter_config.json gives rank {rank}, its lora_A has "
                    f"{rows} rows"
                )
            found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return found


TECHNIQUE = Lora()


def _short(suffix: str) -> str:
    return suffix.removeprefix(".").removesuffix(".weight")


def _side_by_side(slot: Slot, adapters: Sequence[Tensors]) -> dict[str, FloatArray]:
    """What adapters store of a slot, along the rank; arrays of a single one are its own."""
    return {
        tensor.input: _joined([item[tensor.input] for item in adapters], tensor.shape.index(SIZE))
        for tensor in slot.tensors
        if tensor.key is not None and SIZE in tensor.shape
    }


def _joined(parts: Sequence[FloatArray], axis: int) -> FloatArray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def _times(scaling: FloatArray, weight: float) -> FloatArray:
    return scaling if weight == 1 else scaling * np.float32(weight)


def alpha_of(scaling: float, divisor: float) -> float:
    """PEFT's `lora_alpha` that gives this float32 scaling, divided so; a round number where one does."""
    exact = scaling * divisor
    rounded = round(exact, 4)
    return rounded if np.float32(rounded / divisor) == np.float32(scaling) else exact
