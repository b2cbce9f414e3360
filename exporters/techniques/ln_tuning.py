"""Layer-norm tuning: weights and biases of normalizations stay inputs of the graphs.

Source: arXiv 2312.11420; keys as PEFT writes them.
"""

from collections.abc import Mapping, Sequence

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING

from edgepeft.errors import ExportError
from edgepeft.slots import PARAMETER, Slot
from edgepeft.techniques import ln_tuning
from edgepeft.techniques.base import Settings

from ..options import ExportOptions
from ..sources.base import ModelSource
from .base import BaseGraph, GraphTechnique


class LnTuning(GraphTechnique[str]):
    """Its sites are names of modules."""

    name, site = ln_tuning.NAME, PARAMETER

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """Those that the targets name, or PEFT for the model's type."""
        targets = options.targets
        if targets is None:
            model_type = str(getattr(source.config, "model_type", None))
            targets = TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING.get(model_type)
        names, found = source.parameter_names(), dict[str, Settings]()
        for target in targets or ():
            for module in source.module_names():
                if (module == target or module.endswith(f".{target}")) and f"{module}.weight" in names:
                    found[module] = {}
        if not found:
            named = (
                f"has no normalization {', '.join(targets)}" if targets else "is of no type that PEFT knows"
            )
            raise ExportError(
                f"{source.name} {named}: say with --targets which of its normalizations to train"
            )
        return found

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[str]:
        """The modules whose weight is a vector that the graph reads.

        Raises:
            ExportError: a module's is not.
        """
        for module in modules:
            weight = base.weights.get(f"{module}.weight")
            if weight is None or weight.shape is None or len(weight.shape) != 1 or not weight.uses():
                raise ExportError(
                    f"module {module} has no weight that is a vector, so it is no normalization to be tuned"
                )
        return list(modules)

    def insert(self, base: BaseGraph, sites: Sequence[str]) -> list[Slot]:
        slots = []
        for module in sites:
            found = {}
            for parameter in ln_tuning.PARAMETERS:
                name = f"{module}.{parameter}"
                value = base.weights.get(name)
                if value is not None and value.uses() and value.shape is not None:
                    found[parameter] = tuple(map(int, value.shape.numpy())), name
                    del base.weights[name]
            slot = ln_tuning.new_slot(module, found)
            for tensor in slot.tensors:
                value = next(item for item in base.graph.inputs if item.name == tensor.default)
                value.name = tensor.input
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = LnTuning()
