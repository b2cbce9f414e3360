"""The benchmark on exported bundles of the tasks that the tiny bundles do not have."""

from collections.abc import Callable

import pytest

from edgepeft.runtime.bench.run import BenchOptions, bench

from ...exporters.conftest import Exported, exported, shared

__all__ = ["exported", "shared"]  # the fixtures
pytestmark = pytest.mark.slow
CLASSIFIES = ["load", "predict", "train", "swap"]
GENERATES = ["load", "prefill", "decode", "train", "swap"]


@pytest.mark.parametrize(
    ("name", "seq_len", "phases"),
    [
        ("bert-tokens", 8, CLASSIFIES),
        ("bert-regression", 8, CLASSIFIES),
        ("bert-encoder", 8, CLASSIFIES),
        ("vit", None, CLASSIFIES),
        ("vit-multi-label", None, CLASSIFIES),
        ("wav2vec2", 400, CLASSIFIES),
        ("t5", 8, GENERATES),
        ("llama-tied", 8, GENERATES),
    ],
)
def test_every_task_has_its_phases(
    exported: Callable[[str, int], Exported], name: str, seq_len: int | None, phases: list[str]
) -> None:
    """All of them run, with the update that training is a part of."""
    sizes = BenchOptions(seq_len=seq_len, batch_size=2, steps=1, max_new_tokens=3)
    report = bench(exported(name, 4).folder, sizes, None, print)
    assert [(phase.name, phase.status) for phase in report.phases] == [(one, "ran") for one in phases]
