"""The standard's own node tests, differentiated: `python -m tests.gradcheck.standard [PATTERN]...`.

Every node test of onnx with a floating-point tensor among its inputs and its outputs is read as the exporter
reads a file that somebody else wrote (its opset, its constants, its shapes), a loss and the gradient of every
such input are appended, and onnxruntime runs the whole in the test's own precision. The gradients are
compared with differences of the test's model as it stands, in float64. Each test is run in two forms: as it
stands, and with symbolic axes and its other inputs as constants, as exporters write them.

Exits with 1 where a gradient is wrong, a joint graph does not run, a value has another shape than is
declared, or anything ends in an error that is not the project's own.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from .standard_check import AS_EXPORTED, AS_IS, FAULTS, Standard, Verdict, check
from .widening import FLOATS

#: What came of the last run of all, for the table of operators.
COUNTS = Path(__file__).with_name("standard_counts.json")


@functools.cache
def standard_tests() -> dict[str, Standard]:
    """The float node tests, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float_tests(load_model_tests(kind="node"))


def float_tests(loaded: Iterable[TestCase]) -> dict[str, Standard]:
    """Those of some node tests that have a floating-point tensor among their inputs and their outputs."""
    found = {}
    for test in loaded:
        names = [value.name for value in test.model.graph.input]
        inputs, outputs = ([_array(value) for value in values] for values in test.data_sets[0])
        case = Standard(test.name, test.model, dict(zip(names, inputs, strict=False)), outputs)
        kinds = {value.type.tensor_type.elem_type for value in test.model.graph.output}
        if case.floats and kinds & FLOATS:
            found[test.name] = case
    return found


def _array(value: Any) -> Any:
    """A tensor as numpy; a sequence as it is."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def results(patterns: Sequence[str]) -> Iterator[tuple[str, str, Verdict]]:
    """Name, form and verdict of the tests whose names match one of `patterns`, or of all."""
    for name, case in standard_tests().items():
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            for form in (AS_IS, AS_EXPORTED):
                yield name, form, check(case, form)


def main() -> int:
    """Run, tell every fault and the counts, which are kept for the table of operators after a run of all."""
    logging.getLogger("onnxruntime.tools.symbolic_shape_infer").setLevel(logging.ERROR)
    counts: dict[str, Counter[str]] = {AS_IS: Counter(), AS_EXPORTED: Counter()}
    for name, form, verdict in results(sys.argv[1:]):
        counts[form][verdict.outcome] += 1
        if verdict.outcome in FAULTS or len(sys.argv) > 1:
            print(f"{verdict.outcome:12} {name}, {form}: {verdict.reason}", flush=True)
    for form, outcomes in counts.items():
        print(f"{form}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items()))}")
    if len(sys.argv) == 1:
        tables = {form: dict(sorted(outcomes.items())) for form, outcomes in counts.items()}
        COUNTS.write_text(json.dumps({"onnx": onnx.__version__, **tables}, indent=1) + "\n", encoding="utf-8")
    return int(any(outcomes[fault] for outcomes in counts.values() for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
