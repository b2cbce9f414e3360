"""What a manifest must say of the decoder graph before it is opened."""

from ..errors import BundleError
from ..techniques import is_in_decoder
from ..techniques.lora import features
from .manifest import Manifest
from .wiring import SEQLENS, TOTAL, DecoderGraph

_INPUTS = {"input_ids", SEQLENS, TOTAL}


def check_decoder(manifest: Manifest, decoder: DecoderGraph) -> None:
    """Check that the graphs exist, take what a decoder is given, and that every group fits its slots.

    Raises:
        BundleError: names the graph or group, and what is wrong with it.
    """
    others = {name for slot in manifest.slots if is_in_decoder(slot) for name in slot.inputs}
    slots = {slot.module: slot for slot in manifest.packed_slots}
    cache = {
        spec.name: spec
        for spec in manifest.graphs["inference"].inputs
        if spec.name.startswith("past_key_values.")
    }
    lora: set[str] = set()
    for index, group in enumerate(decoder.groups):
        where = f"decoder, group {index}"
        lora |= {group.a_input, group.b_input}
        _require(len(group.slots) >= 1, f"{where} has no slot")
        for placed in group.slots:
            slot = slots.get(placed.module)
            _require(slot is not None, f"{where}: {placed.module!r} is no slot")
            assert slot is not None
            in_features, out_features = features(slot)
            _require(
                in_features == group.in_features
                and placed.first >= 0
                and placed.first + out_features <= group.out_features,
                f"{where} is {group.in_features} -> {group.out_features}, its slot {placed.module!r} "
                f"{in_features} -> {out_features} from column {placed.first} on",
            )
    int8 = decoder.int8_graph, decoder.int8_plain_graph, decoder.int8_memory
    _require(
        None not in int8 or not any(int8), "decoder: of 8-bit activations, a graph or its memory is missing"
    )
    takes_lora = [
        (role, takes) for pair in decoder.pairs for role, takes in zip(pair, (True, False), strict=True)
    ]
    for role, takes in takes_lora:
        if role is None:
            continue
        expected = _INPUTS | cache.keys() | others | (lora if takes else set())
        graph = manifest.graphs.get(role)
        _require(graph is not None, f"decoder: there is no graph {role!r}")
        assert graph is not None
        differing = sorted({spec.name for spec in graph.inputs} ^ expected)
        _require(
            not differing, f"decoder: the graph {role!r} and its wiring differ in the input {differing[:1]}"
        )
        for spec in graph.inputs:
            if spec.name in cache:
                sizes, wanted = spec.shape, cache[spec.name].shape
                _require(
                    len(sizes) == 4 and (sizes[1], sizes[3]) == (wanted[1], wanted[3]),
                    f"decoder: {spec.name!r} is {list(sizes)}, the inference graph's {list(wanted)}",
                )
        outputs = {spec.name for spec in graph.outputs}
        presents = {name.replace("past_key_values.", "present.") for name in cache}
        differing = sorted(outputs ^ {"logits", *presents})
        _require(not differing, f"decoder: the graph {role!r} has not the outputs expected: {differing[:1]}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)
