"""Insert IA³ slots at linear layers.

    y = l * (x Wᵀ + b)        l [1, out_features]
    y = (l * x) Wᵀ + b        l [1, in_features], of a feed-forward module

Source: arXiv 2205.05638; keys and shapes as PEFT writes them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from edgepeft.errors import ExportError
from edgepeft.slots import LINEAR, Slot
from edgepeft.techniques import ia3
from edgepeft.techniques.base import Settings

from ..graph import put_behind
from ..options import ExportOptions
from ..passes.weights.linears import Linear, select, with_bias
from ..sources.base import ModelSource
from .base import BaseGraph, GraphTechnique, activation_axes, in_columns, shares_product, slot_inputs


class Site(NamedTuple):
    """A linear module, and whether what it reads is multiplied."""

    linear: Linear
    feedforward: bool


class IA3(GraphTechnique[Site]):
    """Its sites are linear modules."""

    name, site = ia3.NAME, LINEAR

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Site]:
        """The linears of these names."""
        chosen = select(base.linears, modules)
        sites = [Site(linear, bool(modules[name][ia3.FEEDFORWARD])) for name, linear in chosen.items()]
        for linear, feedforward in sites:
            if feedforward and shares_product(linear):
                raise ExportError(
                    f"linear {linear.module} reads what others read in the same product, so IA³ cannot "
                    "multiply it there: take it out of feedforward_modules"
                )
        return sites

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """As PEFT chooses them by the model's type, or the targets; what PEFT takes for feed-forward is."""
        model_type = str(getattr(source.config, "model_type", None))
        targets = options.targets
        if targets is None:
            targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type)
        if targets is None:
            raise ExportError(
                f"{source.name}: PEFT names no modules for IA³ in a model of type {model_type!r}: say which "
                "with --targets"
            )
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, [])
        return {
            name: {ia3.FEEDFORWARD: name.endswith(tuple(feedforward))}
            for name in select(source.linear_sizes(), targets)
        }

    def insert(self, base: BaseGraph, sites: Sequence[Site]) -> list[Slot]:
        slots = []
        for linear, feedforward in sites:
            features = linear.in_features if feedforward else linear.out_features
            slot = ia3.new_slot(linear.module, features, activation_axes(linear), feedforward=feedforward)
            (vector,) = slot_inputs(base.graph, slot)
            for node, x in linear.uses:
                if feedforward:
                    put_behind(base.graph, x, "Mul", vector, only=[node])
                else:
                    output = with_bias(node)
                    put_behind(
                        base.graph,
                        output,
                        "Mul",
                        in_columns(base.graph, vector, linear.first, output, fill=1),
                    )
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = IA3()
