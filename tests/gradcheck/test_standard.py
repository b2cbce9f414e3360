"""A sample of the standard's node tests; `python -m tests.gradcheck.standard` runs all."""

from __future__ import annotations

import functools
import importlib
import json
import warnings

import onnx_ir as ir
import pytest
from onnx.backend.test.case import node
from onnx.backend.test.case.test_case import TestCase

from edgepeft.exporters.autodiff.context import RuleContext
from edgepeft.exporters.autodiff.registry import RULES, Registration, Rule, RuleResult
from edgepeft.exporters.passes.shapes import infer as shapes

from .standard import COUNTS, float_tests
from .standard_check import AS_EXPORTED, AS_IS, FALSE_SHAPE, FAULTS, NOT_RUN, RIGHT, WRONG, Standard, check

#: Modules of onnx, by the operators that they test: of each the first tests are taken, so many.
SAMPLE = {
    "rmsnormalization": 8,
    "layernormalization": 4,
    "lpnormalization": 2,
    "reducemean": 4,
    "reduce_log_sum": 8,
    "matmul": 2,
    "gather": 2,
    "softmax": 2,
    "gelu": 2,
    "castlike": 2,
    "rotaryembedding": 2,
    "tanh": 1,
}


@functools.cache
def sample(module: str) -> dict[str, Standard]:
    """The float tests of one module of onnx, which makes them where it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = len(node._NodeTestCases)
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
        made: list[TestCase] = node._NodeTestCases[before:]
    tests = float_tests(made)
    return dict(list(tests.items())[: SAMPLE[module]])


@pytest.mark.parametrize("form", [AS_IS, AS_EXPORTED])
@pytest.mark.parametrize("module", SAMPLE)
def test_no_fault(module: str, form: str) -> None:
    verdicts = {name: check(case, form) for name, case in sample(module).items()}
    assert verdicts
    faults = {name: verdict for name, verdict in verdicts.items() if verdict.outcome in FAULTS}
    assert not faults
    assert any(verdict.outcome == RIGHT for verdict in verdicts.values()), verdicts


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without 1 − y² the gradient of Tanh is its cotangent."""

    def wrong(c: RuleContext) -> RuleResult:
        return [c.cotangent]

    rule = Rule(wrong, None, broadcasts=False, refuses=None)
    monkeypatch.setitem(RULES._registrations, ("", "Tanh"), [Registration("", "Tanh", 1, 13, rule)])
    verdict = check(next(iter(sample("tanh").values())), AS_IS)
    assert verdict.outcome == WRONG, verdict


def test_a_false_shape_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes._Found, "shape", lambda *_: ir.Shape([7]))
    verdict = check(next(iter(sample("tanh").values())), AS_IS)
    assert verdict.outcome in (FALSE_SHAPE, NOT_RUN), verdict


def test_the_last_run_of_all_had_no_fault() -> None:
    """What the table of operators tells is what `python -m tests.gradcheck.standard` counted."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    for form in (AS_IS, AS_EXPORTED):
        assert counts[form][RIGHT] > 700
        assert not set(FAULTS) & set(counts[form])
