"""What a technique says of its slots, also where it defines nothing of its own."""

import numpy as np
import pytest

from edgepeft.adapters import Adapter
from edgepeft.errors import AdapterError
from edgepeft.slots import EMPTY, LINEAR, ONES, PREFIX, ZEROS, Slot, SlotTensor
from edgepeft.techniques import MODULES, lora, of_slot, technique, whole
from edgepeft.techniques.base import FloatArray, Held, PeftTechnique, Technique


class Scales(Technique):
    """As IA³ has them: a factor for each output, 1 where no adapter is."""

    name, title = "scales", "a scale"

    def problem(self, slot: Slot) -> str | None:
        raise NotImplementedError

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        raise NotImplementedError


SLOT = Slot("scales", LINEAR, "up", (SlotTensor("f", "f", "f", (1, 3), True, True, ONES),))
ONE, OTHER = ({"f": np.full((1, 3), value, np.float32)} for value in (2, 3))


def no_weight(name: str) -> FloatArray:
    raise AssertionError(name)


def test_what_defines_no_mixture_takes_one_adapter() -> None:
    scales = Scales()
    np.testing.assert_array_equal(scales.mixed(SLOT, [], no_weight)["f"], np.ones((1, 3)))
    assert scales.mixed(SLOT, [(ONE, 1.0)], no_weight)["f"] is ONE["f"]
    for weighted in ([(ONE, 0.5)], [(ONE, 1.0), (OTHER, 1.0)]):
        with pytest.raises(AdapterError, match="module up: a scale of several adapters, or with a weight"):
            scales.mixed(SLOT, weighted, no_weight)


def test_what_cannot_tell_rows_apart_takes_equal_ones() -> None:
    scales = Scales()
    same = scales.rows(SLOT, [ONE], np.ones((2, 1), np.float32), no_weight)
    assert same["f"] is ONE["f"]
    with pytest.raises(AdapterError, match="module up is filled once for all rows"):
        scales.rows(SLOT, [ONE], np.array([[1], [0]], np.float32), no_weight)
    with pytest.raises(AdapterError, match="run the adapters that differ there one at a time"):
        scales.rows(SLOT, [ONE, OTHER], np.eye(2, dtype=np.float32), no_weight)


def test_sizes_and_neutral_values() -> None:
    """Of the axis that is free, of words and of the base's own tensors."""
    slot = lora.new_slot("up", 4, 3, 2)
    neutral = of_slot(slot).neutral(slot, no_weight)
    assert [neutral[name].shape for name in slot.inputs] == [(4, 0), (0, 3), (0,)]
    assert all(tensor.neutral == EMPTY and tensor.default is None for tensor in slot.tensors)
    assert of_slot(slot).size(slot, neutral) == 0
    head = whole.new_slot("head", "bias", (3,), "head.bias")
    assert of_slot(head).neutral(head, lambda name: np.full(3, len(name), np.float32)) == {
        f"{PREFIX}head.bias": pytest.approx(np.full(3, 9))
    }
    assert of_slot(head).size(head, {}) == 0
    zeros = Slot("scales", LINEAR, "up", (SlotTensor("f", "f", None, (2,), False, False, ZEROS),))
    np.testing.assert_array_equal(Scales().neutral(zeros, no_weight)["f"], np.zeros(2))


def test_what_is_written_is_what_the_adapter_had() -> None:
    """In PEFT's layout, without what follows from the configuration; a part of the values will do."""
    a, b = np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((3, 2), np.float32)
    slot = lora.new_slot("up", 4, 3, 2)
    tensors = dict(zip(slot.inputs, (a, b), strict=False))
    adapter = Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 3}, tensors)
    values = of_slot(slot).values(slot, adapter)
    np.testing.assert_array_equal(values.pop(slot.input(lora.SCALING)), [1.5, 1.5])
    assert [values[name].shape for name in slot.inputs[:2]] == [(4, 2), (2, 3)]
    written = of_slot(slot).write(slot, values)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[key], tensors[key]) for key in tensors)
    assert of_slot(slot).write(slot, {slot.input(lora.B): values[slot.input(lora.B)]}).keys() == {
        slot.input(lora.B)
    }
    assert of_slot(slot).values(lora.new_slot("down", 4, 3, 2), adapter) == {}


def test_every_module_of_the_package_is_a_technique() -> None:
    assert {"lora", "whole"} <= MODULES.keys()
    for name in MODULES:
        found = technique(name)
        assert found.name == name
        if isinstance(found, PeftTechnique):
            # Named like PEFT's type, or chosen by its configuration where several have that type.
            assert found.peft_type == name.upper() or not found.is_of({"peft_type": found.peft_type})
