"""Values by patterns of module names: PEFT's, and none that takes longer than a moment."""

import time

import pytest
from peft.utils.other import get_pattern_key

from edgepeft.adapters import Adapter
from edgepeft.errors import AdapterError
from edgepeft.patterns import ModulePatterns

from ..runtime import tiny

PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in PROJECTIONS]

USUAL = [
    "q_proj",
    "model.layers.1.self_attn.q_proj",
    "layers.1.*",
    r".*\.(q|v)_proj",
    r"^model\.layers\.\d+\.self_attn\.(q|k)_proj",
    r"layers\.(?:[0-9]|1[01])\..*proj",
    r".*layers\..*\.self_attn\..*_proj",
    r"layers\.\d{1,2}\.mlp\.(up|down)_proj",
    r"(?!.*mlp).*_proj",
    "nothing",
    "(self_attn|mlp)?.q_proj",
]


def test_the_value_is_the_one_that_peft_finds() -> None:
    """Of the first key that matches, whatever their order."""
    for keys in (USUAL, USUAL[::-1], *([key] for key in USUAL)):
        patterns = ModulePatterns({key: key for key in keys})
        patterns.check_cost(MODULES)
        for module in MODULES:
            assert patterns.value(module, module) == get_pattern_key(keys, module)


COSTLY = [
    "(a+)+b",
    "(a*)*b",
    "(a|a)*b",
    "(?:a|ab)*c",
    "(a|b|ab)*c",
    "a?" * 28 + "a" * 28,
    "(a|aa|b)" * 24 + "c",
    "(.*)" * 6 + "x",
    ".*?" * 6 + "x",
    "(?=(a+)+b)",
    "(?:(?:a{0,30}){0,30}){0,30}b",
    "((a?){30}){30}c",
    r"(a*)(?(1)a*|b*)*c",
]


@pytest.mark.parametrize("key", COSTLY)
def test_a_pattern_that_could_take_hours_is_refused_at_once(key: str) -> None:
    """In an adapter whose module has a name made for it; the folder and the key are named."""
    made = tiny.adapter()
    names = {tiny.A: tiny.A.replace("dense", "a" * 60), tiny.B: tiny.B.replace("dense", "a" * 60)}
    tensors = {names.get(name, name): value for name, value in made.tensors.items()}
    for pattern in ("rank_pattern", "alpha_pattern"):
        began_s = time.perf_counter()
        with pytest.raises(AdapterError, match=rf"here: adapter_config\.json: {pattern} key .* too costly"):
            Adapter({**made.config, pattern: {key: 2}}, tensors, "here")
        assert time.perf_counter() - began_s < 1


@pytest.mark.parametrize("key", ["(", "a{99999999999999999}", "(?i)q_proj", "(" * 5000, "a" * 10_000, "*"])
def test_what_is_no_pattern_is_refused(key: str) -> None:
    """By its name, shortened where it is long."""
    with pytest.raises(ValueError, match=r"^key '.{1,100}' (is no regular expression|has .* characters)"):
        ModulePatterns({key: 1})


def test_many_patterns_are_matched_in_a_moment() -> None:
    """More than Python keeps compiled, one for each module of a large model."""
    modules = [f"model.layers.{layer}.{name}" for layer in range(250) for name in PROJECTIONS]
    began_s = time.perf_counter()
    patterns = ModulePatterns({module: index for index, module in enumerate(modules)})
    patterns.check_cost(modules[:300])
    assert [patterns.value(module, None) for module in modules[:300]] == list(range(300))
    assert time.perf_counter() - began_s < 5


def test_a_name_that_is_too_long_to_be_matched() -> None:
    """Names come from the same stranger."""
    with pytest.raises(ValueError, match="a module's name of 5,000 characters"):
        ModulePatterns({"a": 1}).check_cost(["a" * 5000])
