"""Whether an adapter belongs to a base: every tensor has its place, and it was trained on these weights."""

from collections.abc import Collection, Sequence

from .adapters import BASE_LAYER, Adapter
from .errors import AdapterError
from .slots import PREFIX, WHOLE, Slot


def fit(
    adapter: Adapter, slots: Sequence[Slot], head: Collection[str] = (), labels: Sequence[str] = ()
) -> None:
    """Check that every tensor of the adapter has its place in the base model.

    Args:
        adapter: the adapter.
        slots: of the base.
        head: keys of the base's head, where an adapter may bring more labels.
        labels: the base's own, which the adapter's begin with.

    Raises:
        AdapterError: names the first module that does not fit, and what the base has there.
    """
    places: dict[str, dict[str, Slot]] = {}
    for place in slots:
        places.setdefault(place.technique, {})[place.module] = place
    for item, module in adapter.placed:
        by_module = places.get(item.name, {})
        slot = by_module.get(module)
        if slot is None:
            known = ", ".join(list(by_module)[:3]) or "none"
            raise AdapterError(
                f"{adapter.origin}: module {module} takes no {item.title} in this bundle "
                f"({len(by_module)} modules do: {known}{', …' if len(by_module) > 3 else ''}): the adapter "
                "was made for another base, or the bundle was exported without that module as a target"
            )
        item.fit(slot, adapter)
    by_module = places.get(adapter.technique.name, {})
    if adapter.labels is not None and adapter.labels[: len(labels)] != tuple(labels):
        raise AdapterError(
            f"{adapter.origin}: knows the labels {', '.join(adapter.labels)}, this bundle {', '.join(labels)}"
            ": the adapter was made for another base"
        )
    for key in adapter.base_layer_keys:
        module = key[len(PREFIX) : key.index(BASE_LAYER)]
        slot, stored = by_module.get(module), adapter.tensors[key].shape
        if slot is None or (len(stored) == 2 and adapter.technique.weight_shape(slot) not in (None, stored)):
            raise AdapterError(
                f"{adapter.origin}: module {module} was {list(stored)} where the adapter was trained: the "
                "adapter was made for another base, or for one with its vocabulary resized"
            )
    whole = {slot.inputs[0]: slot for slot in slots if slot.technique == WHOLE}
    for key in adapter.saved_keys:
        slot, module = whole.get(key), key[len(PREFIX) :].rpartition(".")[0]
        if slot is None:
            asked = module.endswith(tuple(adapter.config.get("modules_to_save") or ()))
            raise AdapterError(
                f"{adapter.origin}: module {key[len(PREFIX) :]} is saved in the adapter, but this bundle "
                "does not let an adapter replace it: export the base together with this adapter"
                + ("" if asked else ", or save it with save_embedding_layers=False if that was not trained")
            )
        (tensor,) = slot.tensors
        shape, expected = adapter.tensors[key].shape, tensor.shape
        if adapter.labels is not None and key in head:
            expected = (len(adapter.labels), *expected[1:])
        if shape != expected:
            raise AdapterError(
                f"{adapter.origin}: module {slot.module}: {tensor.name} is {list(shape)} in the adapter, "
                f"{list(expected)} in this bundle: the adapter was made for another base or other labels"
            )


def check_base(adapter: Adapter, base: str | None) -> None:
    """Refuse an adapter that was trained on another base than this one; what records no base is taken.

    Args:
        adapter: the adapter.
        base: fingerprint of the base (`Manifest.base`); None where that is not known.

    Raises:
        AdapterError: names both.
    """
    if None not in (adapter.base, base) and adapter.base != base:
        raise AdapterError(
            f"{adapter.origin}: was trained on base {str(adapter.base)[:12]!r}, this one is "
            f"{str(base)[:12]!r}: its shape is the same, but not its weights or its configuration, so what "
            "the adapter learned does not apply: give one of this base, or --force (in Python force=True) if "
            "it is meant"
        )
