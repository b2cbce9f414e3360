"""Each rule against PyTorch and against central differences of the operator itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from .cases import all_cases
from .harness import Array, Case, central_differences, differentiate_case, run, subsets, torch_outputs

CASES = list(all_cases())


def assert_close(got: Array, expected: Array, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, what
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    assert np.abs(got - expected).max(initial=0) <= tolerance * scale, (
        f"{what}: got {got}, expected {expected}"
    )


def test_case_names_are_unique() -> None:
    repeated = [name for name, count in Counter(map(str, CASES)).items() if count > 1]
    assert not repeated


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_central_differences_and_torch(case: Case) -> None:
    """In float64, where the operator exists in it."""
    outputs, expected = torch_outputs(case)
    dtype = np.float64 if case.float64 else np.float32
    differentiated = differentiate_case(case, dtype, outputs, case.differentiable, static=True)
    gradients = run(differentiated.model, case, dtype)[1:]
    differences = central_differences(case, outputs)
    for i, got, from_torch, from_differences in zip(
        case.differentiable, gradients, expected, differences, strict=True
    ):
        exactness = case.tolerance64 if case.float64 else case.tolerance
        assert_close(got, from_torch, exactness, f"input {i} against PyTorch")
        step_error = 1e-6 if case.float64 else 1e-4 if case.linear else 1e-2
        assert_close(got, from_differences, step_error, f"input {i} against central differences")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_in_onnxruntime_agrees_with_torch(case: Case) -> None:
    """For every subset of wanted inputs, with static and with unknown dimensions."""
    outputs, gradients = torch_outputs(case)
    expected = dict(zip(case.differentiable, gradients, strict=True))
    for static in (True, False):
        for wanted in subsets(case.differentiable):
            differentiated = differentiate_case(case, np.float32, outputs, wanted, static=static)
            got = run(differentiated.model, case, np.float32)[1:]
            for i, gradient in zip(wanted, got, strict=True):
                assert gradient.dtype == np.float32
                assert_close(gradient, expected[i], case.tolerance, f"input {i} of {wanted}, static={static}")
            assert_lean(differentiated.backward_nodes)


def assert_lean(nodes: list[ir.Node]) -> None:
    """Nothing dead, nothing twice, every value typed."""
    keys = Counter(
        (n.domain, n.op_type, tuple(map(id, n.inputs)), tuple(sorted(str(a) for a in n.attributes.values())))
        for n in nodes
    )
    assert max(keys.values(), default=1) == 1, "a node was emitted twice"
    for node in nodes:
        assert any(output.uses() for output in node.outputs), f"{node} is dead"
        assert all(output.dtype is not None and output.shape is not None for output in node.outputs), node
